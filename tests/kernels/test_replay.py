"""Which calls are recorded and replayed; on a GPU, that replays are the calls. On a CPU a recording is a stand-in."""

import gc
import threading
from types import SimpleNamespace

import pytest
import torch

from srnn.kernels import replay
from srnn.kernels.contract import Layer, equal_lengths
from srnn.kernels.graph_copies import GraphRefusedError
from srnn.kernels.replay import MOST_MEMORY, MOST_SHAPES, RESTING, nothing_recorded
from srnn.kernels.replayed import ReplayedLayer, ReplayedRecurrence
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

    def replay(self, given, raw):
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

    def record(run, given, pool, stream, parts):
        graph = type("Graph", (), {"pool": lambda self: "pool"})()
        return StandIn([replay._Graph(graph, None)], run([part.clone() for part in given]))

    monkeypatch.setattr(replay, "record", record)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: there[0])
    monkeypatch.setattr(replay, "raw_stream", lambda device: id(there[0]))
    monkeypatch.setattr(torch.cuda, "Event", Stream)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    return there


def replayed(inner, row_bytes=100, check=None):
    ready = ReplayedLayer(inner, (layer("gru", 3, 4),), torch.float32, check)
    ready.row_bytes = row_bytes
    return ready


def call(ready, steps, streams=1):
    x = torch.randn(steps * streams, 3)
    y, end = ready.run(x, equal_lengths(steps, streams), (torch.ones(streams, 4),))
    assert y.equal(2 * x)
    assert end[0].equal(torch.ones(streams, 4))


def test_the_second_call_of_a_shape_is_recorded(streams):
    inner = Counted()
    ready = replayed(inner)
    call(ready, 5)
    call(ready, 6)
    assert not ready.replays.recorded
    call(ready, 5)
    assert len(ready.replays.recorded) == 1
    before = inner.calls
    for _ in range(3):
        call(ready, 5)
    assert inner.calls == before


@pytest.mark.parametrize("why", ["lengths", "empty", "capture", "autocast", "compiled"])
def test_what_runs_as_it_is(streams, why, monkeypatch):
    inner = Counted()
    ready = replayed(inner)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capture")
    monkeypatch.setattr(torch._C, "_is_any_autocast_enabled", lambda: why == "autocast")
    sizes = {"lengths": torch.tensor([2, 1]), "empty": equal_lengths(2, 0)}.get(why, equal_lengths(2, 2))
    x, state = torch.randn(int(sizes.sum()), 3), (torch.ones(int(sizes[0]), 4),)
    for _ in range(4):
        if why == "compiled":
            with nothing_recorded():
                ready.run(x, sizes, state)
        else:
            ready.run(x, sizes, state)
    assert inner.calls == 4
    assert not ready.replays.recorded


def test_recordings_are_few_and_those_that_rest_make_room(streams):
    ready = replayed(Counted())
    for steps in range(1, MOST_SHAPES + 3):
        call(ready, steps)
        call(ready, steps)
    assert {key[1][0][0] for key in ready.replays.recorded} == set(range(1, MOST_SHAPES + 1))
    for _ in range(RESTING):
        call(ready, 2)
    call(ready, MOST_SHAPES + 1)
    kept = {key[1][0][0] for key in ready.replays.recorded}
    assert len(kept) == MOST_SHAPES
    assert {2, MOST_SHAPES + 1} <= kept
    assert 1 not in kept, "the one that rested longest goes"


def test_what_never_fits_makes_nothing_go(streams):
    ready = replayed(Counted(), MOST_MEMORY // 10)
    for steps in (4, 4, *[5] * (RESTING + 2), 11, 11, 11):
        call(ready, steps)
    assert {key[1][0][0] for key in ready.replays.recorded} == {4, 5}


def test_recordings_take_a_bounded_memory(streams):
    """They share what they use while they run, because no two of them do at once, and have the next outputs each."""
    ready = replayed(Counted(), MOST_MEMORY // 10)
    for steps in (11, 6, 5, 9):
        call(ready, steps)
        call(ready, steps)
    assert {key[1][0][0] for key in ready.replays.recorded} == {9, 6, 5}
    for part, why in ((4, "outputs take 0.75, and this one 0.4"), (16, "outputs take 0.19, and the largest 0.84")):
        for one in ready.replays.recorded.values():
            one.like = [torch.empty(MOST_MEMORY // part, dtype=torch.uint8)]
        call(ready, 4)
        call(ready, 4)
        assert len(ready.replays.recorded) == 3, why
    for one in ready.replays.recorded.values():
        one.like = [torch.empty(MOST_MEMORY // 32, dtype=torch.uint8)]
    call(ready, 4)
    assert len(ready.replays.recorded) == 4, "0.09 and 0.87"


def test_a_call_whose_outputs_find_no_room_runs_as_it_is(streams, monkeypatch):
    """How large they are is known once it is recorded; it is recorded no second time."""
    ready = replayed(Counted(), MOST_MEMORY // 10)
    call(ready, 9)
    call(ready, 9)
    tries, plain = [], replay.record

    def record(*given):
        one = plain(*given)
        tries.append(one)
        one.like = [torch.empty(MOST_MEMORY // 8, dtype=torch.uint8)]
        return one

    monkeypatch.setattr(replay, "record", record)
    for _ in range(4):
        call(ready, 5)
    assert len(tries) == 1
    assert {key[1][0][0] for key in ready.replays.recorded} == {9}


@pytest.mark.parametrize(
    ("cell", "inputs", "hidden", "both", "rows", "megabytes"),
    [
        ("gru", 1024, 1024, False, 64 * 256, 208),
        ("gru", 2560, 2560, False, 64 * 128, 258),
        ("lstm", 1500, 1500, False, 64 * 128, 178),
        ("tanh", 1024, 1024, False, 64 * 256, 141),
        ("gru", 2048, 512, False, 64 * 256, 191),
        ("lstm", 2048, 512, False, 32 * 256, 107),
        ("gru", 1024, 1024, True, 64 * 128, 210),
    ],
)
def test_the_memory_of_a_recording_is_about_what_was_measured(cell, inputs, hidden, both, rows, megabytes):
    """On an H200, of blocks in fp16, without what the outputs are copied to."""
    directions = tuple(layer(cell, inputs, hidden, 32, density=0.02) for _ in range(1 + both))
    ready = ReplayedLayer(Counted(), directions, torch.float16)
    measured = 1e6 * megabytes + 2 * rows * len(directions) * hidden
    assert 0.95 * measured <= ready.recordable(rows, 64).memory <= 1.15 * measured


def test_what_cuda_refuses_runs_as_it_is_from_then_on(streams, monkeypatch):
    """Inputs in memory of another kind than the first ones."""

    def refuses(self, given, raw):
        raise GraphRefusedError("of another kind")

    inner = Counted()
    ready = replayed(inner)
    for _ in range(3):
        call(ready, 5)
    before = inner.calls
    monkeypatch.setattr(StandIn, "replay", refuses)
    for _ in range(3):
        call(ready, 5)
    assert inner.calls == before + 3
    assert not ready.replays.recorded


class Copies:
    """Where a graph's outputs go."""

    def __init__(self, error=None):
        self.error, self.taken, self.writes_to = error, [], [0]

    def read_from(self, addresses):
        pass

    def write_to(self, addresses):
        if self.taken and self.error is not None:
            raise self.error
        self.taken.append(addresses)
        self.writes_to = addresses


def one_recording(*copies):
    """Of graphs that do nothing."""
    nothing = type("Graph", (), {"replay": lambda self: None})()
    return replay._Recording([replay._Graph(nothing, each) for each in copies], [torch.empty(3)])


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("none left"), GraphRefusedError("of another kind")])
def test_a_call_gives_its_outputs_though_the_next_has_no_memory(error):
    copies = Copies(error)
    one = one_recording(copies)
    (outputs,) = one.replay([], 0)
    assert [outputs.data_ptr()] == copies.taken[0]
    with pytest.raises(type(error)):
        one.replay([], 0)


def test_nothing_is_kept_of_memory_that_belongs_to_a_graph_of_others():
    one = one_recording(Copies())
    with nothing_recorded():
        one.replay([], 0)
    assert one.next is None
    one.replay([], 0)
    assert one.next is not None


def test_outputs_are_made_for_the_stream_and_the_mode_of_the_call():
    """A tensor of inference mode cannot be written to outside of it, and memory goes back to the stream it is of."""
    one = one_recording(Copies())
    for made, mode in enumerate([True, False, False, True]):
        with torch.inference_mode(mode):
            (outputs,) = one.replay([], 0)
        assert outputs.is_inference() is mode, made
    for stream in (0, 1):
        kept, _, _ = one.next
        with torch.inference_mode():
            (outputs,) = one.replay([], stream)
        assert (outputs is kept[0]) is (stream == 0)


def test_the_outputs_of_a_loop_take_turns_and_each_place_has_a_graph_of_its_own(monkeypatch):
    """Telling a graph of another place takes longer than launching it."""
    out_of_turn = [1, 0, 0, 2, 1, 2]
    places, order = [torch.empty(3) for _ in range(4)], [*[0, 1, 2] * 4, *out_of_turn, *[0, 1, 2], *[3, 1, 2, 3]]
    made = iter([*order, 0])
    monkeypatch.setattr(torch, "empty_like", lambda part: places[next(made)])
    there, written = [Copies() for _ in range(3)], []
    one = one_recording(*there)
    for each in one.graphs:
        each.graph = SimpleNamespace(replay=lambda each=each: written.extend(each.copies.writes_to))
    for place in order:
        (outputs,) = one.replay([], 0)
        assert outputs is places[place]
    addresses = [place.data_ptr() for place in places]
    assert written == [addresses[place] for place in order]
    told = [[addresses.index(address) for (address,) in each.taken] for each in there]
    assert told == [[0, 3], [1, 0], [2]], "0 again is made ready for a call that does not come"


def test_many_shapes_are_not_all_remembered(streams):
    ready = replayed(Counted())
    for steps in range(1, 500):
        call(ready, steps)
    assert len(ready.replays._once) <= 64


def test_what_cannot_be_recorded_runs_as_it_is(streams, monkeypatch):
    def fails(*_):
        raise torch.OutOfMemoryError("no memory")

    inner = Counted()
    ready = replayed(inner)
    monkeypatch.setattr(replay, "record", fails)
    for _ in range(5):
        call(ready, 5)
    assert inner.calls == 5


def test_another_stream_waits_for_the_last_replay(streams):
    ready = replayed(Counted())
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

    ready = replayed(Counted(), check=check)
    for _ in range(3):
        call(ready, 5)
    failed.append("gave up")
    with pytest.raises(RuntimeError, match="gave up"):
        call(ready, 5)
    call(ready, 5)


def test_a_recurrence_is_replayed_too(streams):
    """Its inputs may be columns of something larger; and what failed before is told of."""
    calls, failed = [], []

    def inner(u_NG, batch_sizes, state):
        calls.append(len(u_NG))
        return 2 * u_NG, state

    def check():
        if failed:
            raise RuntimeError(failed.pop())

    ready = ReplayedRecurrence(inner, layer("gru", 3, 4), torch.float32, check)
    for index in range(6):
        u_NG, state = torch.randn(12, 10).T, (torch.randn(2, 4),)
        y, end = ready(u_NG, equal_lengths(5, 2), state)
        assert y.equal(2 * u_NG)
        assert end[0].equal(state[0])
        if index == 1:
            recorded = len(calls)
    assert len(calls) == recorded
    failed.append("gave up")
    with pytest.raises(RuntimeError, match="gave up"):
        ready(u_NG, equal_lengths(5, 2), state)
    ready(u_NG[:3], torch.tensor([2, 1]), state)
    assert calls[-1] == 3


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
    assert len(ready.replays.recorded) == 1
    for a, b in zip(got, wanted, strict=True):
        same(a, b)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 1), (16, 16)])
def test_replays_of_a_recurrence_are_the_calls(height, streams):
    """As networks with norms between their halves run it, piece by piece."""
    ready = on_a_gpu(height=height).inner.recurrence
    weights = ready.weights
    wrapped = ReplayedRecurrence(ready, weights, torch.float16, ready.check)
    u = torch.randn(streams * 60, 3 * 256, device="cuda", dtype=torch.float16)
    state = (torch.zeros(streams, 256, device="cuda", dtype=torch.float16),)
    whole, end = ready(u, equal_lengths(60, streams), state)
    pieces = []
    for piece in u.split(10 * streams):
        y, state = wrapped(piece, equal_lengths(10, streams), state)
        pieces.append(y)
    assert len(wrapped.replays.recorded) == 1
    same((torch.cat(pieces), state), (whole, end))


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
    assert [len(ready.replays.recorded) for ready in several] == [3, 3]


@pytest.mark.gpu
@on_gpu
def test_memory_does_not_grow_and_comes_back():
    torch._C._cuda_clearCublasWorkspaces()  # 32 MB that any product takes for good
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
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= before + (4 << 20)
