"""Which calls are recorded and replayed; on a GPU, that replays are the calls. On a CPU a recording is a stand-in."""

import gc
import pickle
import threading

import pytest
import torch

from srnn.kernels import replay
from srnn.kernels.contract import Layer, equal_lengths
from srnn.kernels.replay import MOST_MEMORY, MOST_SHAPES, RESTING, Recordings, ReplayedLayer, nothing_recorded
from tests.kernels.triton_cases import layer, on_gpu


class Counted(Layer):
    """Counts its calls."""

    def __init__(self):
        self.calls = 0

    def run(self, x_NI, batch_sizes, state):
        self.calls += 1
        return 2 * x_NI, state


class StandIn(replay._Recording):
    """Computes what a replay of ``Counted`` would."""

    def replay(self, given, stream):
        for own, part in zip(self.inputs, given, strict=True):
            own.copy_(part)
        return [2 * given[0], *(part.clone() for part in given[1:])]


class Stream:
    waited = 0

    def wait_event(self, event):
        self.waited += 1

    def record(self, stream):
        pass


@pytest.fixture
def streams(monkeypatch):
    """Recordings that need no GPU; the list holds the streams, of which the first is the current one."""
    there = [Stream(), Stream()]

    def record(inner, x_NI, batch_sizes, state, pool):
        inner.run(x_NI, batch_sizes, state)
        graph = type("Graph", (), {"pool": lambda self: "pool"})()
        return StandIn(graph, [x_NI.clone(), *(part.clone() for part in state)], [])

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: there[0])
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    return there


def call(ready, steps, streams=1):
    x = torch.randn(steps * streams, 3)
    y, end = ready.run(x, equal_lengths(steps, streams), (torch.ones(streams, 4),))
    assert y.equal(2 * x)
    assert end[0].equal(torch.ones(streams, 4))


def test_the_second_call_of_a_shape_is_recorded(streams):
    inner = Counted()
    ready = ReplayedLayer(inner, 100, Recordings())
    call(ready, 5)
    call(ready, 6)
    assert not ready.recorded
    call(ready, 5)
    assert len(ready.recorded) == 1
    before = inner.calls
    for _ in range(3):
        call(ready, 5)
    assert inner.calls == before


@pytest.mark.parametrize("why", ["lengths", "empty", "capture", "autocast", "compiled"])
def test_what_runs_as_it_is(streams, why, monkeypatch):
    inner = Counted()
    ready = ReplayedLayer(inner, 100, Recordings())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capture")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: why == "autocast")
    sizes = {"lengths": torch.tensor([2, 1]), "empty": equal_lengths(2, 0)}.get(why, equal_lengths(2, 2))
    x, state = torch.randn(int(sizes.sum()), 3), (torch.ones(int(sizes[0]), 4),)
    for _ in range(4):
        if why == "compiled":
            with nothing_recorded():
                ready.run(x, sizes, state)
        else:
            ready.run(x, sizes, state)
    assert inner.calls == 4
    assert not ready.recorded


def test_recordings_are_few_and_those_that_rest_make_room(streams):
    ready = ReplayedLayer(Counted(), 100, Recordings())
    for steps in range(1, MOST_SHAPES + 3):
        call(ready, steps)
        call(ready, steps)
    assert {key[0] for key in ready.recorded} == set(range(1, MOST_SHAPES + 1))
    for _ in range(RESTING):
        call(ready, 2)
    call(ready, MOST_SHAPES + 1)
    kept = {key[0] for key in ready.recorded}
    assert len(kept) == MOST_SHAPES
    assert {2, MOST_SHAPES + 1} <= kept
    assert 1 not in kept, "the one that rested longest goes"


def test_layers_of_a_network_share_the_memory(streams):
    recordings = Recordings()
    first, second = (ReplayedLayer(Counted(), MOST_MEMORY // 10, recordings) for _ in range(2))
    for ready, steps in ((first, 6), (second, 6), (second, 2), (first, 11)):
        call(ready, steps)
        call(ready, steps)
    assert [len(ready.recorded) for ready in (first, second)] == [1, 1]
    assert {key[0] for key in second.recorded} == {2}
    del first, ready
    call(second, 6)
    assert len(second.recorded) == 2, "a layer that is gone takes nothing"
    assert not pickle.loads(pickle.dumps(recordings)).alive


def test_many_shapes_are_not_all_remembered(streams):
    ready = ReplayedLayer(Counted(), 100, Recordings())
    for steps in range(1, 500):
        call(ready, steps)
    assert len(ready._once) <= 64


def test_what_cannot_be_recorded_runs_as_it_is(streams, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    inner = Counted()
    ready = ReplayedLayer(inner, 100, Recordings())
    monkeypatch.setattr(replay, "record", fails)
    for _ in range(5):
        call(ready, 5)
    assert inner.calls == 5


def test_another_stream_waits_for_the_last_replay(streams):
    ready = ReplayedLayer(Counted(), 100, Recordings())
    for _ in range(3):
        call(ready, 5)
    assert not streams[0].waited
    streams.reverse()
    call(ready, 5)
    assert streams[0].waited == 1


def test_a_failure_is_told_of_before_a_replay(streams):
    failed = []

    def check():
        if failed:
            raise RuntimeError(failed.pop())

    ready = ReplayedLayer(Counted(), 100, Recordings(), check)
    for _ in range(3):
        call(ready, 5)
    failed.append("gave up")
    with pytest.raises(RuntimeError, match="gave up"):
        call(ready, 5)
    call(ready, 5)


# From here on with a GPU.


def on_a_gpu(cell="gru", hidden=256, height=1, seed=0):
    from srnn.kernels.triton.backend import Triton

    weights = layer(cell, 64, hidden, height, density=0.1, values="fp16", seed=seed)
    return Triton().layer(weights, torch.device("cuda"), torch.float16)


def inputs(steps, streams, hidden=256, parts=1):
    x = torch.randn(steps * streams, 64, device="cuda", dtype=torch.float16)
    states = (torch.randn(streams, hidden, device="cuda", dtype=torch.float16) * 0.5 for _ in range(parts))
    return x, equal_lengths(steps, streams), tuple(states)


def same(got, wanted):
    for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cell", "height", "streams"), [("gru", 1, 1), ("lstm", 16, 1), ("gru", 16, 16)])
def test_replays_are_the_calls(cell, height, streams):
    """In and out of inference mode; and what earlier calls gave stays as it was."""
    ready = on_a_gpu(cell, height=height)
    given = [inputs(40, streams, parts=1 + (cell == "lstm")) for _ in range(6)]
    wanted = [ready.inner.run(*one) for one in given]
    got = []
    for index, one in enumerate(given):
        with torch.inference_mode(index % 2 == 1):
            got.append(ready.run(*one))
    assert len(ready.recorded) == 1
    for a, b in zip(got, wanted, strict=True):
        same(a, b)


@pytest.mark.gpu
@on_gpu
def test_a_kernel_that_gave_up_is_told_of_at_the_next_replay(capfd):
    one = inputs(20, 1)
    with torch.inference_mode():  # which the flag must not belong to
        ready = on_a_gpu()
        wanted = ready.run(*one)
        for _ in range(2):
            ready.run(*one)
    ready.inner.recurrence.failed.fill_(1)
    with pytest.raises(RuntimeError, match="gave up waiting"):
        ready.run(*one)
    same(ready.run(*one), wanted)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ready.run(*one)
    graph.replay()
    ready.inner.recurrence.failed.fill_(1)
    graph.replay()
    torch.cuda.synchronize()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        ready.run(*one)
    ready.inner.recurrence.failed.fill_(1)
    del ready
    gc.collect()
    assert "gave up waiting" in capfd.readouterr().err, "nobody called it again"


@pytest.mark.gpu
@on_gpu
def test_threads_streams_and_two_layers():
    several = [on_a_gpu(seed=0), on_a_gpu(seed=1, height=16)]
    given = [inputs(30, streams) for streams in (1, 2, 5)]
    wanted = [[ready.inner.run(*one) for one in given] for ready in several]
    torch.cuda.synchronize()
    wrong = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                which, what = (int(torch.randint(n, (1,), generator=generator)) for n in (2, 3))
                got = several[which].run(*given[what])
                torch.cuda.current_stream().synchronize()
                try:
                    same(got, wanted[which][what])
                except AssertionError as error:
                    wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert [len(ready.recorded) for ready in several] == [3, 3]


@pytest.mark.gpu
@on_gpu
def test_memory_does_not_grow_and_comes_back():
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    ready = on_a_gpu(hidden=1024)
    generator = torch.Generator().manual_seed(0)
    given = {steps: inputs(steps, 1, 1024) for steps in range(1, 65)}
    taken = []
    for _ in range(3):
        for _ in range(1000):
            ready.run(*given[int(torch.randint(1, 65, (1,), generator=generator))])
        torch.cuda.synchronize()
        taken.append(torch.cuda.memory_reserved() - before)
    assert max(taken) < 320 << 20
    assert taken[-1] <= taken[0] + (8 << 20)
    del ready, given
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (4 << 20)


@pytest.mark.gpu
@on_gpu
def test_changed_weights_and_a_compiled_network(tmp_path, monkeypatch):
    from torch import nn

    from srnn.inference.sparsify import sparsify
    from tests.kernels.common import prune

    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    first, second = (sparsify(prune(nn.GRU(40, 160), 0.1).cuda(), kernel="triton") for _ in range(2))
    x = torch.randn(12, 1, 40, device="cuda")
    wanted = [network(x)[0] for network in (first, second)]
    for _ in range(3):
        first(x)
    second.load_state_dict(first.state_dict())
    for _ in range(4):
        torch.testing.assert_close(second(x)[0], wanted[0])
    assert not wanted[0].equal(wanted[1])
    again = sparsify(prune(nn.GRU(40, 160), 0.1).cuda(), kernel="triton")
    compiled = torch.compile(again, mode="reduce-overhead")
    truth = again(x)[0].clone()
    for _ in range(5):
        with torch.inference_mode():
            torch.testing.assert_close(compiled(x)[0].clone(), truth)
