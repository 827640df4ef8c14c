import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner
from srnn.pruning.forecast import expected_n_of_m, expected_sparsity
from srnn.pruning.schedules import (
    CosineSchedule,
    CubicSchedule,
    GradualSchedule,
    RunLength,
    iteration,
    resolve_cosine,
    resolve_cubic,
    resolve_gradual,
)

RUN = RunLength(total_steps=2000, steps_per_epoch=100)


def test_table_1_heuristics():
    schedule = resolve_gradual("auto", "auto", "auto", "auto", 1.5, RUN)
    assert (schedule.start_itr, schedule.ramp_itr, schedule.end_itr) == (100, 500, 1000)
    assert schedule.freq == 18  # 1/50 of end - start
    long = resolve_gradual("auto", "auto", "auto", "auto", 1.5, RunLength(200_000, 10_000))
    assert long.freq == 100


def test_equation_1():
    schedule = GradualSchedule(start_itr=100, ramp_itr=500, end_itr=1000, freq=10)
    assert schedule.theta(0.3) == pytest.approx(2 * 0.3 * 10 / (2 * 400 + 3 * 500))


@given(
    start=st.integers(0, 1000),
    first=st.integers(50, 1000),
    second=st.integers(50, 1000),
    q=st.floats(1e-3, 10),
)
def test_the_threshold_ends_at_q_and_rises(start, first, second, q):
    schedule = GradualSchedule(start, start + first, start + first + second, 1)
    values = [schedule.epsilon(itr, q) for itr in range(start + 1, schedule.end_itr)]
    assert values == sorted(values)
    # phi = 1.5 theta: eps(end_itr) = q, up to the +1 of both pieces.
    plus_ones = 2.5 * schedule.theta(q)
    assert schedule.epsilon(schedule.end_itr, q) == pytest.approx(q + plus_ones)


def test_phi_twice_theta_overshoots_as_derived():
    schedule = GradualSchedule(1000, 5000, 10_000, 100, phi_ratio=2)
    assert schedule.epsilon(10_000, 1.0) == pytest.approx(1.22, abs=0.005)


@given(start=st.integers(0, 300), length=st.integers(1, 300), freq=st.integers(1, 100))
def test_updates_are_the_steps_algorithm_1_names(start, length, freq):
    schedule = GradualSchedule(start, start, start + length, freq)
    named = [itr for itr in range(0, start + length + 10) if start < itr < start + length and itr % freq == 0]
    assert list(schedule.updates) == named
    assert [itr for itr in range(0, start + length + 10) if schedule.is_update(itr)] == named


def test_expected_sparsity():
    assert expected_sparsity(0.0, 0.9) == 0
    assert expected_sparsity(1.0, 0.9) == pytest.approx(0.9)
    assert expected_sparsity(0.5, 0.9) == pytest.approx(math.erf(0.5 * 1.6448536 / math.sqrt(2)))


@pytest.mark.parametrize("score", ["max", "mean", "energy"])
def test_expected_sparsity_of_blocks(score):
    weights = torch.randn(40_000, 16).abs()
    of = {"max": weights.amax(1), "mean": weights.mean(1), "energy": weights.square().mean(1).sqrt()}[score]
    q = float(of.quantile(0.9))
    for share in (0.6, 0.8, 0.9, 1.0):
        seen = float((of < share * q).float().mean())
        assert expected_sparsity(share, 0.9, 16, score) == pytest.approx(seen, abs=0.03)


@pytest.mark.parametrize(("keep", "of"), [(2, 4), (1, 4), (4, 8)])
def test_expected_sparsity_of_n_of_m(keep, of):
    runs = torch.randn(40_000, of).abs().sort(dim=1).values
    may_go = runs[:, : of - keep]
    for count, q in ((None, runs.quantile(1 - keep / of)), (len(runs), may_go.max())):
        for share in (0.0, 0.3, 0.6, 1.0):
            seen = float((may_go < share * float(q)).sum()) / runs.numel()
            assert expected_n_of_m(share, keep, of, count) == pytest.approx(seen, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"start": 900},
            ["start_itr=900, ", "ramp_itr=auto (step 500)", "out of order", "; give ramp_itr and end_itr"],
        ),
        ({"end": 0.1}, ["end_itr=0.1 (step 200)", "out of order"]),
        (
            {"start": "6 epochs", "ramp": "6 epochs", "end": "3 epochs"},
            [
                "pruning.start_itr='6 epochs' (step 600), pruning.ramp_itr='6 epochs' (step 600), "
                "pruning.end_itr='3 epochs' (step 300) are out of order in a run of 2000 steps (20 epochs)",
                "start_itr < end_itr",
            ],
        ),
        ({"end": "30 epochs"}, ["end_itr='30 epochs' (step 3000) is after the end of a run of 2000 steps (20 epochs)"]),
        ({"end": 3000}, ["end_itr=3000", "after the end of a run of 2000 steps", "max_epochs"]),
        ({"start": 1.5}, ["pruning.start_itr=1.5", "between 0.0 and 1.0"]),
        ({"start": -1}, ["pruning.start_itr=-1"]),
        ({"freq": 19}, ["pruning.freq=19", "at most 18"]),
        ({"start": 10, "ramp": 11, "end": 11}, ["no step for an update"]),
        ({"run": RunLength(400, 100)}, ["5 epochs", "this run has 4", "fractions"]),
    ],
)
def test_refusals_say_what_and_what_to_do(settings, words):
    arguments = {
        "start": "auto",
        "ramp": "auto",
        "end": "auto",
        "freq": "auto",
        "phi_ratio": 1.5,
        "run": RUN,
    } | settings
    with pytest.raises(UserError) as error:
        resolve_gradual(**arguments)
    for word in words:
        assert word in str(error.value)


def test_short_runs_take_fractions():
    schedule = resolve_gradual(0.1, 0.25, 0.5, "auto", 1.5, RunLength(200, 100))
    assert (schedule.start_itr, schedule.ramp_itr, schedule.end_itr, schedule.freq) == (20, 50, 100, 1)


@given(
    start=st.integers(0, 300),
    freq=st.integers(1, 40),
    updates=st.integers(1, 60),
    initial=st.floats(0, 0.5),
    final=st.floats(0.5, 0.99),
)
def test_the_cubic_schedule_is_zhu_and_guptas_at_all_steps(start, freq, updates, initial, final):
    schedule = CubicSchedule(start, start + updates * freq, freq, initial)
    assert list(schedule.updates) == [start + k * freq for k in range(updates + 1)]
    values = [schedule.sparsity(itr, final) for itr in schedule.updates]
    assert values == [
        pytest.approx(final + (initial - final) * (1 - k * freq / (updates * freq)) ** 3) for k in range(updates + 1)
    ]
    assert values[0] == pytest.approx(initial)
    assert values[-1] == final
    assert values == sorted(values)


@given(end=st.integers(2, 3000), freq=st.integers(1, 100), alpha=st.floats(0.01, 0.99))
def test_the_cosine_schedule_is_rigls_at_all_steps(end, freq, alpha):
    schedule = CosineSchedule(end, freq, alpha)
    assert list(schedule.updates) == [itr for itr in range(1, end) if itr % freq == 0]
    for itr in range(0, end, 7):
        assert schedule.drop(itr) == pytest.approx(alpha / 2 * (1 + math.cos(math.pi * itr / end)))
    assert schedule.drop(0) == pytest.approx(alpha)
    assert schedule.drop(end) == pytest.approx(0)


def test_cubic_and_cosine_heuristics():
    cubic = resolve_cubic("auto", "auto", "auto", 0.0, RUN)
    assert (cubic.start_itr, cubic.end_itr, cubic.freq) == (100, 1000, 18)
    # The last update is a whole number of freq after the first.
    assert resolve_cubic(10, 1000, 19, 0.0, RUN).end_itr == 998
    cosine = resolve_cosine("auto", "auto", 0.3, RUN)
    assert (cosine.end_itr, cosine.freq) == (1500, 30)


@pytest.mark.parametrize(
    ("when", "itr"),
    [
        (800, 800),
        (0.25, 500),
        ("auto", 77),
        ("3 epochs", 300),
        ("1 epoch", 100),
        ("2.5epochs", 250),
        (0, 0),
        (1.0, 2000),
    ],
)
def test_steps_fractions_and_epochs(when, itr):
    assert iteration("pruning.start_itr", when, 77, RUN) == itr


@pytest.mark.parametrize("when", ["3", "epochs", "-1 epochs", "a while", "3 steps"])
def test_other_words_are_refused(when):
    with pytest.raises(UserError, match=rf"pruning\.end_itr='{when}' must be a whole number .* '3 epochs', or auto"):
        iteration("pruning.end_itr", when, 0, RUN)


def test_a_run_of_unknown_epochs_counts_as_the_papers_20():
    schedule = resolve_gradual("auto", "auto", "auto", "auto", 1.5, RunLength(1000))
    assert (schedule.start_itr, schedule.ramp_itr, schedule.end_itr) == (50, 250, 500)
    with pytest.raises(UserError, match="at least 1"):
        RunLength(0)


@pytest.mark.parametrize(
    ("resolve", "words"),
    [
        (
            lambda: resolve_cubic(0.5, 0.2, "auto", 0.0, RUN),
            r"start_itr=0\.5 \(step 1000\), .*end_itr=0\.2 \(step 400\) .* start_itr < end_itr",
        ),
        (lambda: resolve_cubic(0, 3000, "auto", 0.0, RUN), "end_itr=3000 is after the end of a run of 2000"),
        (lambda: resolve_cubic(0, 1000, 1000, 0.0, RUN), "freq=1000 is more than the 999 steps between"),
        (lambda: resolve_gradual(0, 500, 1000, 40, 1.5, RUN), "freq=40 is too coarse.*at most 20"),
        (lambda: resolve_cosine(1, "auto", 0.3, RUN), "end_itr=1 leaves no step"),
    ],
)
def test_cubic_and_cosine_refusals(resolve, words):
    with pytest.raises(UserError, match=words):
        resolve()


def test_pruning_in_a_few_rounds():
    cubic = resolve_cubic(100, 1100, 100, 0.0, RUN)
    assert list(cubic.updates) == list(range(100, 1101, 100)), "ten rounds after the first"
    assert cubic.sparsity(1100, 0.9) == 0.9
    assert list(resolve_cubic(100, 1100, 1000, 0.5, RUN).updates) == [100, 1100]
    assert list(resolve_cosine(1000, 200, 0.3, RUN).updates) == [200, 400, 600, 800]
    assert resolve_gradual(0, 500, 1000, 20, 1.5, RUN).freq == 20
    pruner = Pruner(nn.Linear(10, 10), "cubic", 200, sparsity=0.9, start_itr=1, end_itr=0.8, freq=30)
    assert sum(pruner.step() for _ in range(200)) == 6
    assert pruner.reached()
