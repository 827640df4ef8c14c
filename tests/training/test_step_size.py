"""The step size: its schedules, in terms of the run and of pruning."""

import csv
import math

import pytest
import torch

from srnn.__main__ import main
from srnn.config.composing import compose_settings
from srnn.config.settings import Settings
from srnn.errors import UserError
from srnn.pruning.methods import Gradual, NoPruning
from srnn.pruning.schedules import RunLength
from srnn.registry import register
from srnn.training.moments import Moments
from srnn.training.preparing import prepare
from srnn.training.step_size import attach
from tests.conftest import QUIET
from tests.training.test_resume import RUN, check_same_run, interrupt_after

MOMENTS = Moments(RunLength(100, 10), pruning_start=10, pruning_end=50)


def rates(name, steps=100, losses=None, **options):
    """The step size of every step of a run, of an optimiser whose own is 2."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = register.build("schedule", {"name": name, **options}, moments=MOMENTS, batches=10)
    schedulers = attach(schedule, optimizer)[1]
    found = []
    for itr in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for each in schedulers:
            if (itr + 1) % each.get("frequency", 1) == 0:
                each["scheduler"].step(*([losses[itr // 10]] if "monitor" in each else []))
    return found


def test_a_constant_step_size_leaves_the_optimizer_alone():
    assert register.build("schedule", {"name": "constant"}, moments=MOMENTS) is None
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    assert attach(None, optimizer) is optimizer
    assert rates("constant", warmup=3, steps=6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine():
    for itr, rate in enumerate(rates("cosine")):
        assert rate == pytest.approx(1 + math.cos(math.pi * itr / 100))
    rewound = rates("cosine", floor=0.1, decay_from="pruning_start", restart_at="pruning_end")
    assert rewound[:11] == [2.0] * 11
    assert rewound[30] == pytest.approx(2 * (0.1 + 0.9 * 0.5)), "half of the way from start to end"
    assert rewound[49] == pytest.approx(0.2, abs=0.01)
    assert rewound[50] == 2.0, "high again when pruning ends"
    assert rewound[75] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert rewound[99] == pytest.approx(0.2, abs=0.01)


def test_step():
    falling = rates("step", decay=0.5, decay_from="2 epochs", restart_at=0.5, warmup=1)
    assert falling[0] == 1.0
    assert falling[10:70:10] == [2.0, 2.0, 1.0, 0.5, 2.0, 1.0]
    assert falling[39] == falling[30] == 1.0
    assert rates("step", decay=0.5, every=7)[13:15] == [1.0, 0.5]


def test_plateau_looks_at_losses_once_pruning_has_ended():
    losses = [5.0, 6.0, 7.0, 8.0, 9.0, 8.0, 8.0, 7.0, 9.0, 9.0]
    found = rates("plateau", losses=losses)
    assert found[:70:10] == [2.0] * 7, "losses that rise while weights go do not count"
    assert found[70:100:10] == [1.0, 1.0, 0.5]
    found = rates("plateau", losses=[5.0] * 10, decay_from=0, restart_at="pruning_end", patience=1, warmup=3)
    assert found[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert found[20:100:10] == pytest.approx([2.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 0.5])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"decay_from": "pruning_ends"}, "schedule.decay_from='pruning_ends' must be a step, a fraction"),
        ({"decay_from": "11 epochs"}, "is after the end of a run of 100 steps"),
        ({"decay_from": 1.0}, "is no step before the end of a run of 100 steps"),
        ({"restart_at": 0}, "must be after schedule.decay_from=0"),
        ({"decay_from": 0.6, "restart_at": "pruning_end"}, r"restart_at='pruning_end' \(step 50\) must be after"),
        ({"warmup": -1}, "schedule.warmup=-1 must be a step from 0 on"),
        ({"every": 0}, "schedule.every=0 must be at least one step"),
        ({"decay": 1.5}, "schedule.decay=1.5 must be above 0 and below 1"),
    ],
)
def test_mistakes(options, words):
    with pytest.raises(UserError, match=words):
        rates("step", **options)


def test_moments_are_those_of_the_method():
    method, run = Gradual(start_itr=0.2, ramp_itr=0.3, end_itr=0.7), RunLength(1000, 100)
    with pytest.raises(AttributeError):
        Moments.of(method, run)
    method.prepare(run, [], None)
    assert Moments.of(method, run) == Moments(run, 200, 700)
    dense = NoPruning()
    dense.prepare(run, [], None)
    assert Moments.of(dense, run) == Moments(run, 100, 500)


def test_a_run_tells_its_schedule_when_pruning_ends():
    settings = compose_settings([*QUIET, "schedule=cosine", "schedule.decay_from=pruning_end", "pruning.end_itr=0.6"])
    module = prepare(settings).objective
    optimizer = torch.optim.SGD(module.model.parameters(), lr=1.0)
    (scheduler,) = module.schedule(optimizer)[1]
    factor = scheduler["scheduler"].lr_lambdas[0]
    assert [factor(itr) for itr in (0, 24)] == [1.0, 1.0]  # of 40 steps
    assert factor(32) == pytest.approx(0.5)


def test_two_schedules_are_refused(tmp_path, capsys):
    run = [*QUIET, "schedule=cosine", "optimizer.lr_decay=0.5", f"hydra.run.dir={tmp_path}/run"]
    assert main(run) == 2
    assert "leave schedule=constant" in capsys.readouterr().err
    assert not (tmp_path / "run/metrics.csv").exists(), "before anything else is done"


def test_a_config_of_before_means_a_constant_step_size():
    config = compose_settings(QUIET).as_dict()
    del config["schedule"]
    assert Settings.check(config).schedule == {"name": "constant", "warmup": 0}


@pytest.mark.parametrize("schedule", ["cosine", "plateau"])
def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, schedule):
    chosen = [*RUN, f"schedule={schedule}", "schedule.warmup=7", "schedule.restart_at=0.8"]
    chosen += ["optimizer=sgd", "trainer.accumulate_grad_batches=2"] if schedule == "cosine" else []
    assert main([*chosen, f"hydra.run.dir={tmp_path}/one"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5, 32 if schedule == "plateau" else 16)  # in the middle, and at the end of a pass
        assert main([*chosen, f"hydra.run.dir={tmp_path}/two"]) == 130
        assert main([f"resume={tmp_path}/two"]) == 130
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")
    rows = list(csv.DictReader((tmp_path / "one/metrics.csv").read_text().splitlines()))
    sizes = [float(row["step_size"]) for row in rows if row.get("step_size")]
    assert max(sizes) > 2 * min(sizes)
