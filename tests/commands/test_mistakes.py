"""A user's mistake gets one sentence and exit code 2, and no traceback."""

import errno
import os
import re
import signal
import sys
import time
from dataclasses import replace

import pytest
import torch

from srnn.__main__ import main
from srnn.config.composing import presets
from srnn.config.settings import GROUPS, SECTIONS, options_of
from srnn.errors import UserError
from srnn.inference.packed_file import write
from srnn.inference.packing import pack
from srnn.registry import register
from srnn.vocabulary import Vocabulary
from tests.conftest import SMALL

QUIET = ["tracking.mode=disabled", *SMALL]


def mistake(capsys, *arguments):
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("srnn: ")
    assert "Traceback" not in error
    assert len(error.strip().splitlines()) == 1
    return error


@pytest.fixture
def run_folder(tmp_path):
    """A folder as a run leaves it, of an untrained model."""
    config = {"name": "gru", "hidden_size": 8, "embedding_size": 4, "num_layers": 1, "dropout": 0.0}
    vocabulary = Vocabulary.build("characters", "\nabcdef(): x")
    supplied = {"vocabulary_size": len(vocabulary)}
    model = register.build("model", config, **supplied)
    with torch.no_grad():
        model.rnn.weight_hh_l0 *= torch.rand_like(model.rnn.weight_hh_l0) < 0.1
    about = {"dataset": register.get("dataset", "python_source").defaults()}
    write(
        tmp_path / "model.safetensors",
        replace(pack(model, config, supplied, "fp16"), vocabulary=vocabulary, about=about),
    )
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["pruning.sparcity=0.8"], ["pruning.sparcity", "'sparsity'"]),
        (["model.hidden_size=wide"], ["model.hidden_size='wide'", "int"]),
        (["pruning=gradul"], ["gradul", "'gradual'"]),
        (["pruning.sparsity=1"], ["pruning.sparsity=1", "below 1"]),
        (["trian"], ["trian", "'train'"]),
        (["dataset=text", "dataset.path=''"], ["dataset.path is empty"]),
        (["dataset=text", "dataset.path=/no/such/file"], ["/no/such/file", "no such file"]),
        (
            ["pruning.start_itr=0.6", "pruning.end_itr=0.5"],
            ["start_itr=0.6 (step 24)", "end_itr=0.5 (step 20)", "out of order"],
        ),
        (["trainer.max_epochs=4"], ["5 epochs", "has 4", "fractions"]),
        (["pruning.freq=99"], ["pruning.freq=99", "is more than the 12 steps between start_itr and end_itr"]),
        (["pruning.q=/no/dense.ckpt"], ["/no/dense.ckpt", "no such checkpoint"]),
        (["pruning.q=1e6"], ["threshold reaches", "q=1e+06", "every weight"]),
        (["model.hidden_size=1000000"], ["does not fit into memory", "model.hidden_size"]),
        (["model.num_layers=100000"], ["model.num_layers=100000 must be from 1 to 1,000"]),
        pytest.param(
            ["trainer.accelerator=gpu"],
            ["trainer.accelerator=gpu", "gpu backend"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        (["tracking.mode=online"], ["tracking.mode=online", "WANDB_API_KEY", "offline"]),
    ],
)
def test_training(capsys, tmp_path, arguments, words, monkeypatch):
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    tracking = [] if "tracking.mode=online" in arguments else QUIET
    # What comes last wins, so the mistakes go last; but a command comes first.
    given = arguments if arguments == ["trian"] else [*tracking, f"hydra.run.dir={tmp_path}/some/run", *arguments]
    error = mistake(capsys, *given)
    for word in words:
        assert word in error
    # A threshold too high is found in the middle of the training.
    assert bool(list(tmp_path.iterdir())) == (arguments == ["pruning.q=1e6"]), "what was refused left something behind"


LATE = ["pruning.freq=99", *QUIET]  # found when the data have been read


def test_a_refused_run_leaves_folders_of_others_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    mistake(capsys, *LATE, "hydra.run.dir=there")
    mistake(capsys, *LATE, "hydra.run.dir=there/new/run")
    assert {path.name for path in (tmp_path / "there").iterdir()} == {"config.yaml", "environment.json"}
    mistake(capsys, *LATE)
    assert not (tmp_path / "outputs").exists()


def test_a_refused_run_that_wrote_more_stays(capsys, tmp_path, monkeypatch):
    def refuse(_, folder):
        (folder.path / "notes").write_text("mine")
        raise UserError("refused")

    monkeypatch.setattr("srnn.training.run.rehearse", refuse)
    assert "refused" in mistake(capsys, *QUIET, f"hydra.run.dir={tmp_path}/run")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.yaml", "environment.json", "notes"}


@pytest.mark.parametrize(
    ("content", "word"), [(b"", "empty"), (b"\xff\0\xfe", "UTF-8"), (b"a\0b", "binary"), (b"tiny", "too few")]
)
def test_texts(capsys, tmp_path, content, word):
    (tmp_path / "text").write_bytes(content)
    where = [f"dataset.path={tmp_path}/text", f"hydra.run.dir={tmp_path}/run"]
    assert word in mistake(capsys, "dataset=text", *QUIET, *where)


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    folder = f"{tmp_path}/file/run"
    for option, flags in (("hydra.run.dir", []), ("hydra.sweep.dir", ["-m"])):
        error = mistake(capsys, *flags, *QUIET, f"{option}={folder}")
        assert f"{option}={folder}: this folder cannot be written: Not a directory; set {option} to another." in error


@pytest.mark.parametrize("made_by", ["hydra", "srnn"])
def test_a_folder_that_cannot_be_written(capsys, tmp_path, monkeypatch, made_by):
    def fail(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    if made_by == "hydra":
        monkeypatch.setattr("hydra.core.utils.Path.mkdir", fail)
    else:
        monkeypatch.setattr("srnn.training.run.write_atomically", fail)
    error = mistake(capsys, *QUIET, f"hydra.run.dir={tmp_path}/run")
    assert f"hydra.run.dir={tmp_path}/run: this folder cannot be written: Permission denied; set" in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["evaluate", "generate"])
class TestRunFolders:
    def test_not_one(self, capsys, tmp_path, command):
        assert "no such folder" in mistake(capsys, command, f"run={tmp_path}/absent")
        assert "no finished run" in mistake(capsys, command, "--run", tmp_path)
        assert f"`srnn {command} outputs/RUN`" in mistake(capsys, command)

    def test_stopped(self, capsys, tmp_path, command):
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "config.yaml").touch()
        assert f"`srnn resume {tmp_path}` goes on with it" in mistake(capsys, command, tmp_path)

    def test_truncated(self, capsys, run_folder, command):
        file = run_folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-7])
        assert "damaged" in mistake(capsys, command, f"run={run_folder}")

    def test_bit_flipped(self, capsys, run_folder, command):
        file = run_folder / "model.safetensors"
        data = bytearray(file.read_bytes())
        data[-40] ^= 4
        file.write_bytes(data)
        error = mistake(capsys, command, f"run={run_folder}")
        assert "damaged" in error
        assert "checksum" in error


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--length", "-1"], "--length=-1"),
        (["--temperature", "nan"], "--temperature=nan"),
        (["--top-k", "0"], "--top-k=0"),
        (["--prompt", ""], "--prompt is empty"),
        (["--length", "many"], "--length"),
        (["--colour", "red"], "--colour"),
        (["--seed", str(2**70)], "--seed"),
    ],
)
def test_generate_options(capsys, run_folder, arguments, word):
    assert word in mistake(capsys, "generate", "--run", run_folder, *arguments)


def test_generate_takes_text_literally_and_repeats_with_a_seed(capsys, run_folder):
    prompts = ["def f(x):", "a=b,c", "--run", "-x", "run=abc", "${x}"]
    for prompt in prompts:
        texts = []
        for _ in range(2):
            assert main(["generate", f"run={run_folder}", "--prompt", prompt, "--length", "20", "--seed", "3"]) == 0
            told = capsys.readouterr()
            texts.append(told.out)
        unknown = [repr(c) for c in dict.fromkeys(prompt) if c not in "\nabcdef(): x"]
        words = f"--prompt: {', '.join(unknown)}: not among the characters this network knows; read as unknown.\n"
        assert told.err == (f"srnn: {words}" if unknown else "")
        known = "".join(c if c in "\nabcdef(): x" else "�" for c in prompt)
        assert texts[0] == texts[1]
        assert texts[0].startswith(known)
        assert len(texts[0]) == len(prompt) + 21


def test_a_kernel_that_cannot_run_is_refused_before_training(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("srnn.kernels.Auto.supports", lambda *_: "it needs a GPU")
    error = mistake(capsys, *QUIET, f"hydra.run.dir={tmp_path}/run")
    assert "kernel=auto cannot run on the cpu: it needs a GPU" in error
    assert not (tmp_path / "run/metrics.csv").exists()


def test_a_working_folder_that_was_removed(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tmp_path.rmdir()
    assert main(["list"]) == 2
    assert "the working folder cannot be used: No such file" in capsys.readouterr().err


def test_errors_of_the_system_name_the_file_and_no_number(capsys, monkeypatch):
    error = OSError(errno.EFBIG, "File too large", "a.bin", None, None)
    monkeypatch.setattr("srnn.commands.list.main", lambda _: (_ for _ in ()).throw(error))
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "srnn: a.bin: File too large.\n"


def test_an_interrupt_while_an_object_is_taken_down_is_not_lost(capsys, monkeypatch, ctrl_c):
    class Slow:
        def __del__(self):
            raise KeyboardInterrupt

    def runs(_):
        Slow()
        time.sleep(20)

    monkeypatch.setattr("srnn.commands.list.main", runs)
    before, began = sys.unraisablehook, time.monotonic()
    assert main(["list"]) == 130
    assert time.monotonic() - began < 15
    assert sys.unraisablehook is before
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert capsys.readouterr().err == "srnn: interrupted; what was written so far is whole.\n"


def test_a_preset_that_is_no_yaml(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "conf_folders", list(register.conf_folders))
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment/mine.yaml").write_text("a: [")
    assert main(["experiment=mine", "--config-dir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("srnn: a config file is no YAML: while parsing")
    assert "mine.yaml" in error


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setenv("SRNN_DEBUG", "1")
    with pytest.raises(UserError):
        main(["pruning=gradul"])


def test_list_shows_every_component(capsys):
    assert main(["list", "all"]) == 0
    shown = capsys.readouterr().out
    for name in (
        "gru",
        "python_source",
        "brackets",
        "gradual",
        "dense",
        "adam",
        "must be given",
        "plug-in brackets.py",
    ):
        assert name in shown
    assert "[recurrent, linear, embedding]" in shown
    for group in GROUPS:
        for name in presets(group):
            assert f"│ {name} " in shown


@pytest.mark.parametrize("group", GROUPS)
def test_list_of_a_group_is_its_menu(capsys, group):
    assert main(["list", group]) == 0
    shown = capsys.readouterr().out
    for name in presets(group):
        assert f"\n  {name} " in shown
    assert f"srnn list {group}=NAME: its options and what they mean" in shown
    assert " = " not in shown, "an option"
    assert not any(f"\n{other}= " in f"\n{shown}" for other in GROUPS if other != group)


def test_list_shows_the_files_of_a_plugin(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(register, "conf_folders", [tmp_path])
    for file, text in (("dataset/short", "name: adding\nsteps: 7\n"), ("experiment/default", "# Mine.\nseed: 3\n")):
        (tmp_path / file).parent.mkdir()
        (tmp_path / f"{file}.yaml").write_text(text)
    for name, words in (("dataset=short", ["steps = 7"]), ("experiment=default", ["seed = 3", "Mine."])):
        assert main(["list", name.partition("=")[0]]) == 0
        assert f"\n  {name.partition('=')[2]} " in capsys.readouterr().out
        assert main(["list", name]) == 0
        shown = capsys.readouterr().out
        for word in words:
            assert word in shown


def test_list_says_what_options_mean_that_a_preset_of_a_group_sets(capsys):
    assert main(["list", "trainer=fast"]) == 0
    assert "stop after so many passes" in capsys.readouterr().out


def test_list_alone_is_a_menu(capsys):
    assert main(["list"]) == 0
    shown = capsys.readouterr().out
    for group in GROUPS:
        for name in presets(group):
            assert f"\n  {name} " in shown
    assert re.search(r"model=NAME +gru is the default", shown)
    assert "long short-term memory" in shown
    assert "hidden_size" not in shown
    assert "srnn list GROUP=NAME" in shown


def test_list_says_which_pruning(capsys):
    assert main(["list", "pruning"]) == 0
    advice = capsys.readouterr().out.partition("Which one?")[2]
    assert "for speed:          pruning=cubic pruning.structure=16x1" in advice
    assert all(len(line) <= 80 for line in advice.splitlines())


@pytest.mark.parametrize("word", ["lstm", "model=lstm"])
def test_list_tells_what_the_options_of_a_name_mean(capsys, word):
    assert main(["list", word]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "hidden_size = 256" in shown
    assert "units of a recurrent layer" in shown
    assert "gradual" not in shown


def test_list_names_what_is_near(capsys):
    assert main(["list", "pruning=gradul"]) == 2
    assert "gradual" in capsys.readouterr().err
    assert main(["list", "gradul"]) == 2
    assert "list: gradul: no group or name. Did you mean" in capsys.readouterr().err


def test_list_shows_the_options_of_no_component(capsys):
    assert main(["list", "all"]) == 0
    shown = capsys.readouterr().out
    for section in SECTIONS.values():
        for name in options_of(section):
            assert f" {name} = " in shown
    for words in ("seed = 0 (int from 0 to 4,294,967,295)", "init_from = null", "resume=FOLDER"):
        assert words in shown
    assert "On the CPU, also where there is a" in shown
    assert "model.hidden_size = 200" in shown, "what a preset sets"
    assert "optimizer=sgd" in shown
    assert main(["list", "others"]) == 0
    assert "gradual" not in capsys.readouterr().out
    assert main(["list", "distill"]) == 0
    shown = capsys.readouterr().out
    assert "temperature = 2.0" in shown
    assert "init_from" not in shown


def test_help(capsys):
    assert main(["--help"]) == 0
    assert "generate outputs/RUN" in capsys.readouterr().out


def test_a_second_run_in_a_process_is_refused_before_it_disturbs_the_first(capsys, monkeypatch):
    """Hydra's config is one for all threads."""
    inside = []
    monkeypatch.setattr("srnn.commands.train.check_command_line", lambda _: inside.append(main(["seed=1"])) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["seed=0"])
    assert inside == [2]
    assert "another run goes on in this process" in capsys.readouterr().err
    monkeypatch.undo()
    assert "pruning=no" in mistake(capsys, "pruning=no"), "and then the next is heard"
