"""Calls that take too much memory to be recorded run as several of fewer steps. On a CPU a recording is a stand-in."""

import pytest
import torch
from torch import nn

from srnn.inference.sparsify import sparsify
from srnn.kernels import replay
from srnn.kernels.calls_in_parts import LEAST_STEPS, Parts, Steps
from srnn.kernels.contract import Layer, equal_lengths
from srnn.kernels.reference import run_layer
from srnn.kernels.replay import MOST_MEMORY, MOST_OF_A_PART, MOST_SHAPES, Recordable, Replays, nothing_recorded
from srnn.kernels.replayed import ReplayedLayer, ReplayedRecurrence
from tests.kernels.common import prune
from tests.kernels.triton_cases import layer, on_gpu, state_of

FITTING = 80  # steps that take as much memory as a part may
STREAMS = 3
PART = 64


class Plain(Layer):
    """The reference; it keeps the number of steps of each call."""

    def __init__(self, weights):
        self.weights, self.steps = weights, []

    def run(self, x_NI, batch_sizes, state):
        self.steps.append(len(batch_sizes))
        return run_layer(self.weights, x_NI, batch_sizes, state)


class StandIn(replay._Recording):
    """Makes the call again."""

    run = None

    def replay(self, given, raw, into=None):
        outputs = self.run(given)
        if into is not None and into.stride() == outputs[0].stride():
            into.copy_(outputs[0])
            return [into, *outputs[1:]]
        return outputs


class Nothing:
    """In place of streams, events and graphs."""

    def pool(self):
        return None

    def record(self, stream):
        pass


@pytest.fixture
def recorded(monkeypatch):
    """The numbers of rows of what was recorded, which takes no GPU."""
    rows = []

    def record(run, given, pool, stream):
        rows.append(given[0].shape[0])
        one = StandIn([replay._Graph(Nothing(), None)], run(given))
        one.run = run
        return one

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Nothing())
    monkeypatch.setattr(replay, "raw_stream", lambda device: -1)
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Nothing())
    return rows


def compare(ready, weights, x_NI, given, steps):
    """A call with these inputs, whose rows are either x or its product, beside the reference."""
    state = state_of(weights, STREAMS, torch.Generator().manual_seed(steps))
    wanted = run_layer(weights, x_NI, equal_lengths(steps, STREAMS), state)
    before = [part.clone() for part in state]
    got = ready(given, equal_lengths(steps, STREAMS), state)
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b)
    for part, same in zip(state, before, strict=True):
        assert part.equal(same)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_large_call_of_a_layer_is_replayed_in_parts(recorded, cell):
    """From its second time on. All but the last part have one length, and the state goes from each to the next."""
    weights = layer(cell, 5, 7)
    inner = Plain(weights)
    ready = ReplayedLayer(inner, (weights,), torch.float32)
    ready.row_bytes = MOST_OF_A_PART // (FITTING * STREAMS)
    for steps in (133, 256, 133, 133, 256, 133):
        x_NI = torch.randn(steps * STREAMS, 5)
        compare(ready.run, weights, x_NI, x_NI, steps)
    assert recorded == [PART * STREAMS, 5 * STREAMS]
    assert inner.steps[:5] == [133, 256, PART, PART, PART], "the second part is recorded, which runs it, then replayed"
    assert set(inner.steps[5:]) == {PART, 5}


def test_a_large_call_of_a_recurrence_is_replayed_in_parts(recorded):
    """Its inputs may be columns of something larger."""
    weights, seen = layer("gru", 5, 7), []

    def inner(u_NG, batch_sizes, state):
        seen.append(len(batch_sizes))
        return run_layer(weights, u_NG, batch_sizes, state)  # inputs stand for their product here

    ready = ReplayedRecurrence(inner, weights, torch.float32, lambda: None)
    ready.row_bytes = MOST_OF_A_PART // (FITTING * STREAMS)
    for _ in range(4):
        x_NI = torch.randn(9, 130 * STREAMS)[2:7].T
        compare(ready, weights, x_NI, x_NI, 130)
    assert recorded == [PART * STREAMS, 2 * STREAMS]
    assert set(seen[1:]) == {PART, 2}


def test_what_runs_from_its_last_step_to_the_first_is_not_cut(recorded):
    weights = layer("gru", 5, 7, reverse=True)
    inner = Plain(weights)
    for ready in (
        ReplayedLayer(inner, (weights,), torch.float32),
        ReplayedLayer(inner, (layer("gru", 5, 7), weights), torch.float32),
        ReplayedRecurrence(inner.run, weights, torch.float32, lambda: None),
    ):
        ready.row_bytes = MOST_OF_A_PART // (FITTING * STREAMS)
        for _ in range(3):
            x_NI = torch.randn(256 * STREAMS, 5)
            compare(ready.run if isinstance(ready, Layer) else ready, weights, x_NI, x_NI, 256)
    assert inner.steps == [256] * 9
    assert not recorded


def test_parts_fit_and_are_as_long_as_may_be():
    """And of calls of the same streams all are of one length, so that few are recorded."""
    generator = torch.Generator().manual_seed(0)
    cut = 0
    for _ in range(300):
        of_a_step = int(torch.randint(1, MOST_OF_A_PART // 32, (1,), generator=generator))
        sizes = set()
        for steps in (100, 1000, 10_000):
            x = torch.empty(2, 3 * steps, device="meta")
            parts = Parts.of(x, Steps(1, 3), steps * of_a_step, MOST_OF_A_PART)
            if parts is None:
                assert steps * of_a_step < 2 * MOST_OF_A_PART or of_a_step * LEAST_STEPS > MOST_OF_A_PART
                continue
            cut += 1
            part = parts.size // 3
            sizes.add(part)
            assert part >= LEAST_STEPS
            assert part & (part - 1) == 0
            assert part * of_a_step <= MOST_OF_A_PART < 2 * part * of_a_step
            assert parts.dim == 1
        assert len(sizes) <= 1
    assert cut > 50
    assert Parts.of(torch.empty(0, 2), Steps(0, 1), 0, MOST_OF_A_PART) is None


def called(replays, steps, memory, seen):
    """A running sum over the steps of [B, T], with the sum so far as state; ``memory`` is of a step."""

    def run(given):
        x, before = given
        seen.append(x.shape[1])
        y = x.T.contiguous().cumsum(0) + before  # laid out by steps, as the modules' outputs are
        return [y.T, y[-1].clone()]

    x, before = torch.randint(9, (2, steps)).double(), torch.randint(9, (2,)).double()
    done = replays("sum", [x, before], run, lambda x: Recordable(x.shape[1] * memory, (), Steps(1, 1)))
    if done is None:
        done = run([x, before])
    y, after = done
    assert y.equal(x.cumsum(1) + before[:, None])
    assert after.equal(y[:, -1])
    assert y.stride() == (1, 2)


def test_outputs_that_are_laid_out_by_steps_are_written_where_they_stay(recorded):
    replays, seen = Replays(), []
    for _ in range(4):
        called(replays, 200, MOST_OF_A_PART // FITTING, seen)
    assert recorded == [2, 2], "streams"
    assert seen[:4] == [200, PART, PART, PART]


def test_a_call_is_cut_too_where_others_have_taken_what_it_needs(recorded):
    for taken, parts in ((0, [200]), (MOST_MEMORY // 8, [128, 72])):
        replays, seen = Replays(), []
        replays.recorded["sum", ((1, 1), 0, 0)] = StandIn([replay._Graph(Nothing(), None)], [torch.empty(taken).byte()])
        for _ in range(6):
            called(replays, 200, MOST_MEMORY * 19 // 20 // 200, seen)
        assert sorted({*seen} - {200} or {200}, reverse=True) == parts
        assert seen.count(200) == (1 if taken else len(seen))


def test_a_call_is_not_cut_where_its_parts_would_not_be_recorded(recorded):
    replays, seen = Replays(), []
    for index in range(MOST_SHAPES):
        replays.recorded["other", ((index, 1), 0, 0)] = StandIn([replay._Graph(Nothing(), None)], [torch.empty(1)])
    for _ in range(4):
        called(replays, 200, MOST_OF_A_PART // FITTING, seen)
    assert seen == [200] * 4
    replays.recorded["sum", ((2, PART), 0, 0)] = replays.recorded.popitem()[1]
    called(replays, 200, MOST_OF_A_PART // FITTING, seen)
    assert seen[4:] == [PART, PART, PART, 8]


def test_a_part_does_not_write_to_what_was_made_for_a_later_call():
    """The graph that was told of the next outputs may be told of a part's in between."""
    written = []

    class Copies:
        def __init__(self):
            self.writes_to = [0]

        def read_from(self, given):
            pass

        def write_to(self, outputs):
            self.writes_to = [part.data_ptr() for part in outputs]

    def graph(copies):
        return type("Graph", (), {"replay": lambda self: written.append(copies.writes_to)})()

    copies = [Copies() for _ in range(replay.GRAPHS)]
    one = replay._Recording([replay._Graph(graph(each), each) for each in copies], [torch.empty(3)])
    kept = []
    for index in range(30):
        into = torch.empty(3) if index % 5 else None
        (outputs,) = one.replay([], 0, into)
        assert (outputs is into) == bool(index % 5)
        assert written[-1] == [outputs.data_ptr()]
        kept.append(outputs)
    (outputs,) = one.replay([], 0, torch.empty(6)[::2])
    assert outputs.is_contiguous(), "of another layout"


# From here on with a GPU.


def of_a_part(monkeypatch, memory):
    """Recordings may take so many bytes, and a part three quarters of it."""
    monkeypatch.setattr(replay, "MOST_MEMORY", memory)
    monkeypatch.setattr(replay, "MOST_OF_A_PART", memory * 3 // 4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [False, True])
def test_large_calls_of_a_module_are_those_without_replays(cell, batch_first, monkeypatch):
    """Few shapes are recorded, whatever a call's length; outputs of earlier calls stay as they were."""
    network = sparsify(prune(cell(64, 64, 2, batch_first=batch_first), 0.1, 16).cuda(), "16x1", "fp16", "triton")
    of_a_part(monkeypatch, 2_000_000)
    kept = []
    for index, steps in enumerate((200, 150, 200, 150, 200, 260, 150, 260, 200)):
        x = torch.randn(*((16, steps) if batch_first else (steps, 16)), 64, device="cuda", dtype=torch.float16)
        with torch.inference_mode(index % 4 > 0):
            with nothing_recorded():
                truth, end = network(x)
            y, after = network(x)
        kept.append((y, truth))
        for part, true in zip(*[[state] if cell is nn.GRU else state for state in (after, end)], strict=True):
            torch.testing.assert_close(part, true, atol=2e-3, rtol=0)
    for y, truth in kept:
        torch.testing.assert_close(y, truth, atol=2e-3, rtol=0)
    shapes = {key[1][0][int(batch_first)] for key in network._ready["replays"].recorded}
    assert shapes <= {64, 8, 22, 4}, "64 steps, and what is left of 200, 150 and 260"
    assert 64 in shapes


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cell", "height"), [("gru", 16), ("lstm", 16), ("gru", 1)])
def test_large_calls_of_a_layer_are_those_without_replays(cell, height, monkeypatch):
    from srnn.kernels.triton.backend import Triton

    weights = layer(cell, 64, 256, height, density=0.1, values="fp16")
    ready = Triton().layer(weights, torch.device("cuda"), torch.float16)
    of_a_part(monkeypatch, 110 * STREAMS * ready.row_bytes)
    kept = []
    for steps in (200, 150, 200, 150, 200, 150, 200):
        x = torch.randn(steps * STREAMS, 64, device="cuda", dtype=torch.float16)
        state = tuple(part.cuda().half() for part in state_of(weights, STREAMS, torch.Generator().manual_seed(steps)))
        wanted = ready.inner.run(x, equal_lengths(steps, STREAMS), state)
        kept.append((ready.run(x, equal_lengths(steps, STREAMS), state), wanted))
    for got, wanted in kept:
        for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    assert {key[1][0][0] for key in ready.replays.recorded} == {64 * STREAMS, 8 * STREAMS, 22 * STREAMS}
