"""Anything may be typed: a command line is run, or refused in one sentence that names what was wrong with it."""

import os
import re
import shutil

import pytest

from srnn.config.command_line import check_command_line
from srnn.config.composing import compose_settings
from srnn.config.settings import GROUPS, SECTIONS, options_of
from srnn.errors import UserError
from srnn.registry import KINDS, register
from tests.conftest import QUIET
from tests.fuzz.choices import SMALLEST, choices
from tests.fuzz.common import Answers, generators

VALUES = [
    "", "0", "1", "-1", "3", "0.5", "-0.0", "1e400", "1e-400", "9" * 400, "9" * 5000, "nan", "inf", "-inf", "null",
    "true", "false", "yes", "0x10", "1_000", "[]", "{}", "[1,2]", "[a,[b]]", "{a:1}", "{a:{b:1}}", "{1:2,a:3}",
    "[null]", "1,2", "a,b", "range(1,4)", "interval(0,1)", "choice(a,b)", "sort(3,2)", "glob(*)", "int(1.5)",
    "str([])", "extend_list(1)", "float(x)", "json_str({})", "${seed}", "${nothing}", "${oc.env:HOME}",
    "${oc.env:NOT_THERE}", "${now:%Y}", "${slug:a b}", "${hydra:job.name}", "${", "$x", "${tracking.name}", "???",
    "a b", " a ", "a\tb", "a\nb", "'", '"', "'a", '"a', "'a'", "a'b", "a=b", "=", "==", "a:b", "a@b", "@", "~", "+",
    "\\", "\\'", "%s", "{0}", "*", "**", "a/b", "../..", "/", "~nobody_here/x", "-m", "--help", "#", "&a", "*a", "|",
    "!!python/object:os.system", "é", "日本", "\u202e", "\ufeff", "\udcff", "😀", "\x07", "\x1b[31m", "x" * 3000,
    "element", "16x1", "2:4", "0x0", "-1x1", "auto", "cpu", "gru", "cubic", "text", "1 epochs", "3 epochs", "-1 epochs",
]  # fmt: skip
OTHER_KEYS = [
    "", " ", "x", "é", "model.", ".model", "model..x", "model.x.y", "model.hidden_size.x", "model[0]", "model/x",
    "model@x", "model@model.x", "@", "hydra", "hydra.run.dir", "hydra.run", "hydra.sweep.dir", "hydra.sweep",
    "hydra.job.name", "hydra.job", "hydra.mode", "hydra.sweeper", "hydra.sweeper.params", "hydra.sweeper.rows",
    "hydra/launcher", "hydra/sweeper", "hydra/nothing", "hydra.searchpath", "hydra.verbose", "hydra.x", "resume",
    "experiment", "defaults", "_target_", "name", "model.name", "model._target_", "pruning.q.recurrent",
    "pruning.scope",
    "pruning.scope.*", "tracking.tags.0", "srnn", "packed", "x" * 300, "model\n", "-", "--cfg", "model.hidden size",
]  # fmt: skip


def keys():
    known = [*GROUPS, "seed", "init_from", "init_partly"]
    for section, make in SECTIONS.items():
        known += [f"{section}.{name}" for name in options_of(make)]
    for kind in KINDS:
        for name in register.names(kind):
            known += [f"{kind}.{option}" for option in register.get(kind, name).options]
    return sorted(set(known))


def arguments(rng, known):
    """One to four words, most of them overrides."""
    words = []
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        draw = rng.random()
        key = rng.choice(known if rng.random() < 0.7 else OTHER_KEYS)
        value = rng.choice(VALUES)
        if draw < 0.7:
            words.append(f"{rng.choice(['', '', '', '', '+', '++', '~'])}{key}={value}")
        elif draw < 0.8:
            words.append(f"~{key}")
        elif draw < 0.85:
            words.append(f"{rng.choice(GROUPS)}={rng.choice(['gru', 'lstm', 'none', 'cubic', 'text', 'cpu', 'sgd'])}")
        elif draw < 0.9:
            words.append(
                rng.choice(["-m", "--multirun", "--cfg", "--cfg=job", "--config-dir", "-x", "--", "-c", "job"])
            )
        elif draw < 0.95:
            words.append(f"{key}{rng.choice(['', '=', ':', ' = '])}{value}"[: rng.choice([1, 5, 50, 5000])])
        else:
            words.append("".join(chr(rng.choice([rng.randrange(1, 128), rng.randrange(1, 0xD800)])) for _ in range(9)))
    return words


def test_words_of_a_command_line(tmp_path, capsys):
    known, answers = keys(), Answers(seconds=5.0)  # a sweep of many jobs is composed job by job
    for rng in generators("command line", 40):
        # Most are a run's own choices, some with one odd word beside them: what is only odd is refused at once.
        words = [*SMALLEST, f"dataset.path={tmp_path}/text.txt", *choices(rng)] if (own := rng.random() < 0.7) else []
        if not own or rng.random() < 0.3:
            words += arguments(rng, known)
        check = check_command_line if rng.random() < 0.6 else compose_settings
        with answers.measured(words):
            try:
                check(words)
                answers.counts["taken"] += 1
            except UserError as error:
                answers.refused(error, words)
            except SystemExit:
                assert any(word in ("--help", "-h") for word in words), words
    capsys.readouterr()
    print(answers)


COMMANDS = ["evaluate", "generate", "export", "compare", "rerun", "bench", "plan", "list", "doctor", "resume"]


@pytest.mark.parametrize("command", ["evaluate", "generate", "export", "compare", "rerun", "plan", "list"])
def test_words_of_other_commands(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    answers, flags = (
        Answers(seconds=5.0),
        ["--run", "--output", "--kernel", "--length", "--metric", "--values", "--plot"],
    )
    for rng in generators(command, 12):
        words = [rng.choice(flags) if rng.random() < 0.3 else rng.choice(VALUES) for _ in range(rng.randint(0, 3))]
        words = [
            f"{rng.choice(['run', 'values', 'seed', 'x'])}={word}" if rng.random() < 0.3 else word for word in words
        ]
        if command == "plan":
            words = ["--plot", f"{tmp_path}/plan.png", *words]
        if not any("help" in word for word in words):
            answers.to(capsys, [command, *words], [command, *words])
    print(answers)


def names(rng):
    """Names that a folder may have."""
    odd = "aä日😀 \t'\"`$&;|<>()[]{}*?!#%=+,.:@~^\\-_\n\r\x07\x1b\udcff\u202e\ufeff"
    name = "".join(rng.choice(odd) for _ in range(rng.choice([1, 2, 5, 20])))
    name = rng.choice([name, f"-{name}", f"~{name}", f"{name}.", f".{name}", f"a::{name}", f"file:{name}", f"{name}=1"])
    name = rng.choice([name, name, name, (name * 255).encode("utf-8", "surrogateescape")[:255].decode(errors="ignore")])
    return "x" if name.replace("/", "") in ("", ".", "..") else name


def test_names_of_folders(tmp_path, text_run, monkeypatch, capsys):
    """Every command takes a run from a folder of any name, absolute and relative."""
    monkeypatch.chdir(tmp_path)
    answers = Answers(seconds=20.0, kilobytes=1_000_000)
    for rng in generators("names", 4):
        name = names(rng)
        folder = tmp_path / name
        shutil.copytree(text_run, folder)
        given = rng.choice([folder, f"./{name}"])
        for words in (["evaluate", f"run={given}", "kernel=dense"], ["generate", "--run", given, "kernel=dense"],
                      ["export", f"run={given}", "values=bf16"], ["compare", given, "--mode", "disabled"],
                      ["plan", *QUIET, f"init_from='{quoted(given)}'", "--plot", f"{folder}/plan.png"]):  # fmt: skip
            code, said = answers.to(capsys, words, words)
            assert code == 0, (words, said.err)
        code, said = answers.to(capsys, [f"resume={given}"], name)
        assert code == 2
        assert "this run is finished" in said.err
        shutil.rmtree(folder)
    print(answers)


def quoted(path):
    """As Hydra's grammar takes it between single quotes: backslashes count only before a quote, the closing one too."""
    return re.sub(r"(\\*)('|\Z)", lambda m: 2 * m[1] + ("\\'" if m[2] else ""), str(path))


@pytest.mark.slow
def test_runs_in_folders_of_any_name(tmp_path, monkeypatch, capsys):
    """A run trains in a folder of any name, and is resumed from it; or its name is refused before anything is made."""
    monkeypatch.chdir(tmp_path)
    answers = Answers(seconds=60.0, kilobytes=1_000_000)
    for rng in generators("runs", 4):
        name = names(rng)
        code, said = answers.to(capsys, [*QUIET, f"hydra.run.dir='{quoted(tmp_path / name)}'"], name)
        if code == 0:
            assert (tmp_path / name / "checkpoints/best.ckpt").is_file(), name
            os.remove(tmp_path / name / "report.json")
            code, said = answers.to(capsys, [f"resume={tmp_path / name}"], name)
            assert code == 0, (name, said.err)
            shutil.rmtree(tmp_path / name)
        assert not list(tmp_path.iterdir()), (name, said.err)
    print(answers)
