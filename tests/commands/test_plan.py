"""``srnn plan``: the forecast of a config, without training."""

import json

import pytest

from srnn.__main__ import main
from srnn.config.composing import compose_settings
from srnn.recording.console import shown_updates
from srnn.training.preparing import prepare
from tests.conftest import SMALL


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], ["rnn.weight_hh_l0", "90.0 %", "threshold / q", "40 steps, 5 epochs", "q is estimated"]),
        (["pruning.q=0.2"], ["q is fixed", "threshold"]),
        (["pruning=cubic", "pruning.start_itr=1 epoch", "pruning.structure=8x1"], ["8x1", "13 updates"]),
        ([r"pruning.scope={*.weight_hh_l0\[z\]:{sparsity:0.95}}"], ["rnn.weight_hh_l0[z]", "95.0 %"]),
        (["pruning=rigl"], ["rnn.weight_hh_l0", "updates"]),
        (["pruning=none"], ["Nothing is pruned"]),
    ],
    ids=lambda value: "-".join(value)[:20] if value else "default",
)
def test_prints_and_plots(tmp_path, monkeypatch, capsys, overrides, words):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *SMALL, *overrides]) == 0
    shown = capsys.readouterr().out
    for word in words:
        assert word in shown
    if "pruning=none" not in overrides:
        assert (tmp_path / "outputs/plan.png").read_bytes().startswith(b"\x89PNG")
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["plan.png"], "no run was started"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("plots=x.png", "plots: unknown option of the config. Did you mean 'plot'? Allowed: model, dataset, "),
        ("resume=outputs/RUN", "srnn, experiment, plot, hydra."),
        ("outputs/RUN", "plan: outputs/RUN: it takes what a run does, GROUP=NAME and GROUP.OPTION=VALUE"),
        ("seed=0,1", "plan: seed=0,1: it plans one run: give one value"),
        ("pruning.sparsity=choice(0.8,0.9)", "it plans one run"),
    ],
)
def test_what_it_does_not_take_is_answered_by_what_it_takes(given, message, capsys):
    assert main(["plan", given]) == 2
    assert message in capsys.readouterr().err


def test_the_forecast_is_what_a_run_does(tmp_path):
    chosen = [*SMALL, "pruning=cubic", "tracking.mode=disabled", "kernel=dense"]
    pruner = prepare(compose_settings(chosen)).pruner()
    assert main([*chosen, f"hydra.run.dir={tmp_path}/run"]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["steps"] == pruner.run.total_steps
    sizes = {group.name: group.size for group in pruner.groups}
    for validation in report["validations"]:
        expected = sum(pruner.method.expected(validation["step"], group) * sizes[group.name] for group in pruner.groups)
        assert validation["sparsity"] == pytest.approx(expected / sum(sizes.values()), abs=0.001)


def test_mistakes(tmp_path, capsys):
    for arguments, words in (
        (["pruning=cubik"], "'cubic'"),
        (["pruning=none,cubic"], "it plans one run"),
        (["-m", "seed=0,1"], "-m"),
        (["--plot", "plan.pdf"], "must be a file named *.png"),
        ([*SMALL, "--plot", "/dev/null/plan.png"], "--plot=/dev/null: this folder cannot be written"),
        ([*SMALL, "pruning.scope={rnn:{sparsity:0.5}}"], "matches no weight"),
        ([*SMALL, "pruning.start_itr=a while"], "'3 epochs'"),
    ):
        assert main(["plan", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_long_schedules_are_shown_in_a_few_rows():
    assert shown_updates([3]) == [3]
    rows = shown_updates(range(10, 1000, 10))
    assert (len(rows), rows[0], rows[-1]) == (7, 10, 990)
