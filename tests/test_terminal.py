"""What is printed: as it is, whatever the output can show, and whoever reads it."""

import os
import subprocess
import sys
import warnings

import torch

import srnn
from srnn import terminal
from srnn.terminal import console, logged, screen, warnings_in_words

SAY = "from srnn.terminal import *; show_what_can_be_shown(); {}"


def say(code, **environment):
    words = [sys.executable, "-c", SAY.format(code)]
    return subprocess.run(words, capture_output=True, env=os.environ | environment, check=False)


def test_brackets_are_no_markup():
    with console.capture() as capture:
        console.print("Everything is in runs [old]/a, not [/b] :smile:", soft_wrap=True)
    assert capture.get() == "Everything is in runs [old]/a, not [/b] :smile:\n"


def test_what_a_job_of_a_sweep_prints_is_in_its_log(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    assert (screen().console, screen().title) == (console, "")
    with logged(log, "job", bar=True), warnings_in_words():
        warnings.showwarning("Few weights.", UserWarning, terminal.__file__, 1)
        console.print("inside", style="bold")
        screen().console.print(f"{screen().title}step 1")
        assert not screen().bar, "there is no terminal"
    console.print("after")
    assert log.read_text() == "before\nsrnn: Few weights.\ninside\n"
    assert capsys.readouterr() == ("job: step 1\nafter\n", "job: srnn: Few weights.\n")
    assert screen().console is console


def test_warnings_are_sentences_and_name_the_callers_line():
    with warnings_in_words():
        assert warnings.formatwarning("Few weights.", UserWarning, terminal.__file__, 1) == "srnn: Few weights.\n"
        assert "elsewhere.py:1: UserWarning" in warnings.formatwarning("Few.", UserWarning, "elsewhere.py", 1)
    assert "terminal.py:1: UserWarning" in warnings.formatwarning("Few.", UserWarning, terminal.__file__, 1)
    pruner = srnn.Pruner(torch.nn.Linear(4, 4), "hard", 9, sparsity=0.5, prune_itr=8)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        pruner.finalize()
    assert [(warning.filename, "were asked for" in str(warning.message)) for warning in told] == [(__file__, True)]


def test_what_the_output_cannot_show_is_escaped():
    for encoding, shown in (("ascii", b"\\u03b1\\xe9"), ("cp1252", b"\\u03b1\xe9"), ("utf-8", "αé".encode())):
        done = say("print('αé')", PYTHONIOENCODING=encoding)
        assert (done.returncode, done.stdout) == (0, shown + b"\n")


def test_a_reader_that_goes_away_ends_nothing():
    code = "[console.print('x' * 1000) for _ in range(500)]; print('still here', file=sys.stderr)"
    process = subprocess.Popen(
        [sys.executable, "-c", SAY.format(code)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with process:
        process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0
    assert said.count("the output was closed") == 1
    assert said.endswith("still here\n")


def test_an_output_that_takes_nothing_ends_nothing():
    """A log on a full disk; a terminal whose line was lost says much the same."""
    code = "[console.print('x') for _ in range(3)]; print('still here', file=sys.stderr)"
    words = [sys.executable, "-c", SAY.format(code)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(words, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (0, "still here")
    assert done.stderr.count("the output was closed") == 1


def test_a_process_without_output(tmp_path):
    """Its first file must not get the number that everything is printed to."""
    code = f"open_closed_streams(); file = open('{tmp_path}/mine', 'w'); console.print('lost'); os.write(1, b'lost')"
    command = f'exec "{sys.executable}" -c "{SAY.format(code)}" <&- >&-'
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr, (tmp_path / "mine").read_text()) == (0, "", "")
