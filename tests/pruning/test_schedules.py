import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srnn.errors import UserError
from srnn.pruning.schedules import GradualSchedule, RunLength, expected_sparsity, resolve_gradual

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


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"start": 900}, ["start_itr=900", "ramp_itr=500", "out of order"]),
        ({"end": 0.1}, ["end_itr=200", "out of order"]),
        ({"end": 3000}, ["end_itr=3000", "after the run", "max_epochs"]),
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
