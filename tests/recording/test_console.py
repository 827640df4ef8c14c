"""What a person sees: figures, the report, prompts, suggestions."""

import json
import shutil
import subprocess

import pytest

from srnn.__main__ import main
from srnn.config.sweeps import Sweep, expand
from srnn.datasets import Adding, Text
from srnn.datasets.text import Texts
from srnn.recording.console import _prompt, figure, print_report, print_way_back, print_ways_on
from srnn.run_folder import RunFolder
from srnn.vocabulary import Characters, Words
from tests.conftest import SMALL

NAME = """it's $HOME (a) `b` "c" [d] = 1"""  # of a folder: whatever a shell would look at
LONG = "donaudampfschiffahrtsgesellschaft"
LINE = """it's "$HOME" `x` \\ --y !"""


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (2.5289, "2.529"),
        (0.0023456, "0.002346"),
        (0.0023411, "0.002341"),
        (12.5, "12.50"),
        (123.45, "123.5"),
        (98765.4, "98,765"),
        (0.0, "0"),
        (-0.5, "-0.5000"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
    ],
)
def test_figures_have_four_digits_that_count(value, shown):
    assert figure(value) == shown


def test_a_network_has_one_time_in_a_report(text_run, capsys):
    """Those behind a choice are measured apart, some on another day: they would contradict it."""
    report = json.loads((text_run / "report.json").read_text())
    choice = {"layer": "whole network", "use": "1 stream, 1 step", "winner": "cpu", "left_out": {}, "what": ""}
    report["latency"] |= {"step": {"dense": 4e-4, "sparse": 1e-4}}
    report["latency"]["choices"] = [choice | {"seconds": {"torch": 0.987654, "cpu": 0.123456}}]
    print_report(report)
    shown = capsys.readouterr().out
    assert "400 us, 100 us (4.00x)" in shown
    assert "whole network" in shown
    assert not any(time in shown.replace(",", "") for time in ("987654", "123456"))


def test_a_report_says_what_dense_is(text_run, capsys):
    report = json.loads((text_run / "report.json").read_text())
    print_report(report)
    shown = " ".join(capsys.readouterr().out.split())
    assert "dense by the fastest of torch, oneDNN and onnxruntime `srnn bench RUN` shows each of them" in shown
    for missing in (["torch", "oneDNN"], None):  # onnxruntime is not there; a report of an older version
        report["latency"]["dense_runtimes"] = missing
        if missing is None:
            del report["latency"]["dense_runtimes"]
        print_report(report)
        shown = " ".join(capsys.readouterr().out.split())
        assert "dense by the faster of torch and oneDNN `srnn bench RUN` compares with onnxruntime too" in shown


def text_of(folder, text, level="characters"):
    (folder / "text.txt").write_text(text * max(1, 20_000 // len(text)))
    data = Text(str(folder / "text.txt"), level, batch_size=4, sequence_length=80)
    data.setup()
    return data


@pytest.mark.parametrize(
    ("text", "level", "prompt"),
    [
        ("Καλημέρα κόσμε, it's a fine day\n", "characters", "Καλημέρα κόσμε, it's"),
        ("ACGTACGTACGTACGTACGTACGTACGTACGT", "characters", "ACGTACGTACGTACGTACGT"),
        ("short\n", "bytes", "short"),
        ("extraordinarily long words here\n", "words", "extraordinarily long"),
        ("a" + "\n" * 40_000, "characters", ""),
    ],
)
def test_a_prompt_is_whole_words_of_the_data(tmp_path, text, level, prompt):
    data = text_of(tmp_path, text, level)
    assert _prompt(data, data.vocabulary) == prompt


@pytest.mark.parametrize(
    ("text", "tokens", "prompt"),
    [
        # Other words of the validation text are unknown.
        ("we know it is so\n", Words(["is", "it", "know", "so", "\n"]), "know it is so"),
        ("all of these are known words\n", Words(["all", "are", "known", "of", "these", "\n"]), "all of these are"),
        ("to donaudampfschiffahrtsgesellschaft\n", Words(["donaudampfschiffahrtsgesellschaft"]), LONG),
        ("nothing\n", Words(["else"]), ""),
        ("so na\u00efve we are\n", Characters("aenorsvw \n"), "we are"),
        ("今天是晴朗的一天\n", Characters("今天是的一\n"), "今天是"),
    ],
)
def test_a_prompt_holds_nothing_unknown(tmp_path, text, tokens, prompt):
    data = text_of(tmp_path, text, tokens.level)
    data = Text(data.path, tokens.level, batch_size=4, sequence_length=80)
    data.setup(vocabulary=tokens)
    assert _prompt(data, tokens) == prompt
    assert not tokens.unknown(prompt)


@pytest.mark.parametrize("level", ["characters", "bytes"])
def test_a_prompt_begins_with_no_part_of_a_word(tmp_path, level):
    """Where a text is split by characters, its validation part may begin within one."""

    class Cut(Text):
        def texts(self):
            return Texts(*["vergn\u00fcgliche Stunden im Park "[6:] * 200] * 3)

    data = Cut(str(tmp_path), level, batch_size=4, sequence_length=64)
    data.setup()
    assert _prompt(data, data.vocabulary) == "Stunden im Park"


def through_a_shell(line):
    """The words that a shell makes of a command: the command is a function that prints them."""
    say = "() { printf '%s\\0' \"$@\"; }"
    script = f"srnn{say}\nwandb{say}\n{line.partition(': ')[2]}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split("\0")[:-1]


def test_there_is_no_prompt_where_there_are_no_words(tmp_path, capsys):
    print_ways_on(RunFolder(tmp_path), text_of(tmp_path, "a" + "\n" * 40_000))
    assert f"Try it: srnn generate {tmp_path}\n" in capsys.readouterr().out


def suggestions(capsys):
    return [line for line in capsys.readouterr().out.splitlines() if ": srnn " in line or ": wandb " in line]


def test_every_suggestion_is_a_command_for_a_shell(tmp_path, text_run, sweep, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/nowhere")
    run = tmp_path / NAME
    shutil.copytree(text_run, run)
    tracked = run / "wandb/offline-run-1-x"
    tracked.mkdir(parents=True)
    (tracked / "run-x.wandb").write_text("")
    print_ways_on(RunFolder(run), text_of(tmp_path, f"{LINE}\n"))
    generate, sync = map(through_a_shell, suggestions(capsys))
    assert generate == ["generate", str(run), "--prompt", LINE[:21].rpartition(" ")[0]]
    assert main(generate) == 0
    assert capsys.readouterr().out.startswith("it's")
    assert sync == ["sync", str(tracked)]

    data = Adding()
    print_ways_on(RunFolder(run), data)
    evaluate, _ = map(through_a_shell, suggestions(capsys))
    assert evaluate == ["evaluate", str(run)]
    assert main([*evaluate, "kernel=dense"]) == 0
    capsys.readouterr()

    print_way_back(RunFolder(run))
    (resume,) = map(through_a_shell, suggestions(capsys))
    assert resume == ["resume", str(run)]
    assert main(resume) == 2
    assert "this run is finished" in capsys.readouterr().err

    many = tmp_path / f"sweep {NAME}"
    shutil.copytree(sweep, many)
    Sweep(many, expand([*SMALL, "kernel=dense", "pruning=none", "seed=0"])).summarize(ran=[])
    compare, upload = map(through_a_shell, suggestions(capsys))
    assert compare == ["compare", str(many)]
    assert main([*compare, f"output={tmp_path}/compared", "mode=disabled"]) == 0
    assert upload == ["sync", *sorted(map(str, many.glob("*/wandb/offline-run-*")))]
    assert len(upload) == 7
