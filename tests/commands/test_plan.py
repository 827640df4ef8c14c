"""``srnn plan``: the forecast of a config, without training."""

import json

import pytest
from torch import nn

from srnn.__main__ import main
from srnn.config.command_line import check_command_line
from srnn.config.composing import compose_settings
from srnn.meta_device import memory_here
from srnn.pruning import Pruner
from srnn.recording.console import print_plan, shown_updates
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


@pytest.mark.parametrize(
    ("preset", "told"),
    [
        (
            ["experiment=pareto"],
            "a sweep of 12 jobs, and here one of them, gru_gradual_hidden_size-256_sparsity-0.9_s0.",
        ),
        (["experiment=paper_table"], "a sweep of 12 jobs, and here one of them, gru_gradual_hidden_size-256_s0."),
        (["experiment=paper_table", "model.num_layers=2"], "a sweep of 12 jobs, and here one of them"),
        (["experiment=pareto", "pruning=cubic", "model.hidden_size=24"], "a sweep of 3 jobs, and here one of them"),
        (
            ["hydra.mode=MULTIRUN", "hydra.sweeper.params={seed: '1,2'}"],
            "a sweep of 2 jobs, and here the config that they vary",
        ),
        (["hydra.mode=MULTIRUN"], "a sweep of 1 job, and here one of them"),
        (["seed=1"], None),
    ],
)
def test_one_config_of_a_sweep_is_told_to_be_one(preset, told, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "trainer=fast", *preset]) == 0
    shown = capsys.readouterr().out
    assert f"Note: this is {told}" in shown if told else "Note" not in shown
    check_command_line([*preset, "--cfg", "job"])
    assert capsys.readouterr().err.startswith(f"srnn: this is {told}" if told else "")


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


@pytest.mark.parametrize("large", ["model.num_layers=50", "model.hidden_size=4000"])
def test_a_network_larger_than_memory_is_refused_before_it_is_made(tmp_path, monkeypatch, capsys, large):
    """The system would give the memory, and kill the process where it is written to."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srnn.meta_device.os.sysconf", lambda name: 1 << 10)  # pages, and bytes of one
    monkeypatch.setattr("torch.nn.RNNBase.reset_parameters", lambda layer: pytest.fail("it was made"))
    assert main(["plan", *SMALL, "model.hidden_size=64", large]) == 2
    assert "model=gru does not fit into memory, 0 GB here: lower model.hidden_size" in capsys.readouterr().err


def test_a_container_has_the_memory_that_it_is_given(tmp_path, monkeypatch):
    limits = tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes"
    monkeypatch.setattr("srnn.meta_device.CONTAINER_LIMITS", limits)
    there = memory_here()
    assert there > 1 << 28
    for text, memory in (("max\n", there), ("4096000\n", 4_096_000), (f"{1 << 63}\n", there)):
        limits[0].write_text(text)
        assert memory_here() == memory
    limits[1].write_text("1000\n")
    assert memory_here() == 1000


def test_the_work_grows_with_the_layers_and_not_with_their_square(capsys):
    class Counted(list):
        seen = 0

        def __iter__(self):
            Counted.seen += len(self)
            return super().__iter__()

    pruner = Pruner(nn.GRU(4, 4, num_layers=100), "gradual", 1000, sparsity=0.9)
    for group in pruner.groups:
        group.parts = Counted(group.parts)
    print_plan(pruner)
    assert "weight_hh_l99" in capsys.readouterr().out
    assert Counted.seen < 10 * len(pruner.parts)
