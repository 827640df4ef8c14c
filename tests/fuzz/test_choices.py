"""A run of any valid choices trains, prunes, packs and is read back; or is refused before its first step."""

import json
import math
import shutil

import pytest

from srnn.run_folder import RunFolder
from tests.fuzz.choices import SMALLEST, choices
from tests.fuzz.common import Answers, generators

# What only the training itself can find out.
DURING = ("the training has diverged",)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 60)
    return path


# Small matrices may keep nothing, or not a fraction of it, and are told so.
@pytest.mark.filterwarnings("ignore:pruning (ended|left no weight)")
def test_runs_of_valid_choices(tmp_path, text, monkeypatch, capsys):
    monkeypatch.setattr("srnn.training.run.plot_run", lambda *_: [])
    answers, why = Answers(seconds=60.0, kilobytes=1_000_000), []
    for rng in generators("choices", 4):
        words = choices(rng)
        run = RunFolder(tmp_path / "run")
        made = [*SMALLEST, f"dataset.path={text}", *words, f"hydra.run.dir={run}"]
        code, said = answers.to(capsys, made, words)
        if code == 2:
            assert not run.metrics.exists() or any(said_then in said.err for said_then in DURING), (words, said.err)
            why.append(said.err.strip().splitlines()[-1])
        else:
            check(run, words)
            others = [["generate", "--run", run, "--length", "4"],
                      ["export", f"run={run}", "--output", run.path / "e.safetensors"],
                      ["compare", run, "--mode", "disabled", "--output", tmp_path / "out"]]  # fmt: skip
            for command in (["evaluate", f"run={run}"], rng.choice(others)):
                code, said = answers.to(capsys, command, (words, command))
                assert code == 0, (words, command, said.err)
        assert not [path for path in tmp_path.rglob(".*") if path.is_file()], words
        shutil.rmtree(run.path, ignore_errors=True)
    print(answers, *why, sep="\n")


def check(run, words):
    """The report's numbers are numbers, and every layer has the zeros that were asked for."""
    report = json.loads(run.report.read_text())
    assert math.isfinite(report["scores"]["test_packed"]["loss"]), words
    reached, wanted = report["sparsity"]["reached"], report["sparsity"]["wanted"]
    assert wanted is None or reached > wanted - 0.05, (words, report["sparsity"])
    assert report["size"]["nonzeros"] <= report["size"]["parameters"], words
