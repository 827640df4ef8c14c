"""Calls that take too much memory to be recorded as a whole: as parts of fewer steps, in one graph."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from srnn.inference.sparsify import sparsify
from srnn.kernels import replay
from srnn.kernels.calls_in_parts import LEAST_STEPS, MOST_PARTS, Parts, Steps
from srnn.kernels.choosing import length_class
from srnn.kernels.contract import Layer, equal_lengths
from srnn.kernels.reference import run_layer
from srnn.kernels.replay import MOST_MEMORY, MOST_SHAPES, RESTING, Recordable, Replays, nothing_recorded
from srnn.kernels.replayed import ReplayedLayer, ReplayedRecurrence
from tests.kernels.common import prune
from tests.kernels.triton_cases import layer, on_gpu, state_of

STREAMS = 3


class Plain(Layer):
    """The reference; it keeps the number of steps of each call."""

    def __init__(self, weights):
        self.weights, self.steps = weights, []

    def run(self, x_NI, batch_sizes, state):
        self.steps.append(len(batch_sizes))
        return run_layer(self.weights, x_NI, batch_sizes, state)


class Nothing:
    """In place of graphs, streams and events."""

    def __init__(self, *_, **options):
        pass

    def pool(self):
        return None

    def instantiate(self):
        pass

    def record(self, stream):
        pass


class Copies:
    """What a graph was told of its copies."""

    def __init__(self, graph, into, out, device):
        self.into, self.out, self.writes_to = into, out, []


@pytest.fixture
def captured(monkeypatch):
    """A capture runs the call once; the list has the copies of each graph."""
    made = []

    def copies(*about):
        made.append(Copies(*about))
        return made[-1]

    for name, stand_in in {"Graph": Nothing, "recorded": lambda *_: nullcontext(), "GraphCopies": copies}.items():
        monkeypatch.setattr(replay, name, stand_in)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Nothing())
    monkeypatch.setattr(replay, "raw_stream", lambda device: -1)
    monkeypatch.setattr(torch.cuda, "Event", Nothing)
    monkeypatch.setattr(torch.cuda, "Stream", Nothing)
    return made


def is_of(address, size, tensor):
    return tensor.data_ptr() <= address and address + size <= tensor.data_ptr() + tensor.nbytes


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_graph_of_parts_is_the_call(captured, batch_first):
    """All parts in turn, the state from each to the next; each is copied in and out as a piece of memory."""
    weights, steps, dim = layer("lstm", 5, 7), 133, int(batch_first)
    x = torch.randn(steps, STREAMS, 5)
    state = list(state_of(weights, STREAMS, torch.Generator().manual_seed(1)))
    seen = []

    def run(given):
        x, *state = given
        seen.append(x.shape[dim])
        rows = x.movedim(dim, 0).reshape(-1, 5)
        y, end = run_layer(weights, rows, equal_lengths(x.shape[dim], STREAMS), tuple(state))
        return [y.view(-1, STREAMS, 7).movedim(0, dim), *end]

    parts = Parts(dim, 64, 0)
    given = [parts.laid_out(x.movedim(0, dim)), *state]
    taken = [torch.full_like(part, torch.nan) for part in run(given)]
    wanted = run(given)
    seen.clear()
    replay._captured(run, given, taken, None, None, parts)
    assert seen == [64, 64, 5]
    for got, true in zip(taken, wanted, strict=True):
        torch.testing.assert_close(got, true)
    (copies,) = captured
    whole = [given[0]] * 3 + state
    assert [size for _, _, size in copies.into] == [4 * n for n in (64 * 15, 64 * 15, 5 * 15, 21, 21)]
    assert all(is_of(source, size, of) for (source, _, size), of in zip(copies.into, whole, strict=True))
    assert [size for _, _, size in copies.out] == [4 * n for n in (64 * 21, 64 * 21, 5 * 21, 21, 21)]
    whole = [taken[0]] * 3 + taken[1:]
    assert all(is_of(to, size, of) for (_, to, size), of in zip(copies.out, whole, strict=True))
    assert [source for source, _, _ in copies.into[:3]] == [part.data_ptr() for part in parts.cut(given[0])]
    assert [to for _, to, _ in copies.out[:3]] == [part.data_ptr() for part in parts.cut(taken[0])]
    for of in (given[0], taken[0]):
        assert parts.addresses(of) == [part.data_ptr() for part in parts.cut(of)]


def test_outputs_of_which_parts_are_no_pieces_of_memory_are_not_recorded(captured):
    parts = Parts(1, 64, 0)
    with pytest.raises(RuntimeError, match="pieces of memory"):
        replay.record(lambda given: [given[0].contiguous()], [torch.randn(3, 100, 2)], None, None, parts)


def test_parts_fit_and_are_few():
    generator = torch.Generator().manual_seed(0)
    cut = 0
    for _ in range(4000):
        of_a_step = int(torch.randint(1, MOST_MEMORY // 32, (1,), generator=generator))
        most = int(torch.randint(1, MOST_MEMORY, (1,), generator=generator))
        steps = int(torch.randint(0, 1000, (1,), generator=generator))
        parts = Parts.of(torch.empty(2, 3 * steps, device="meta"), Steps(1, 3), steps * of_a_step, most)
        fitting = most // of_a_step
        least = -(-steps // max(1, fitting))
        if parts is None:
            of_equal_parts = steps - (least - 1) * -(-steps // max(1, least))  # steps of the last
            assert steps <= fitting or least > MOST_PARTS or of_equal_parts < LEAST_STEPS
            continue
        cut += 1
        part = parts.size // 3
        count = -(-steps // part)
        assert LEAST_STEPS <= part <= fitting
        assert part * of_a_step == parts.memory <= most
        assert count == least <= MOST_PARTS, "one fewer would not fit"
        last = steps - (count - 1) * part
        assert last >= LEAST_STEPS
        assert length_class(last) == length_class(part) == length_class(steps), "another kernel may run short calls"
    assert cut > 200


def test_a_call_is_laid_out_as_its_parts_are_copied():
    for dim, x in ((0, torch.randn(100, 3, 5)), (1, torch.randn(3, 100, 5)), (1, torch.randn(5, 100, 3).mT)):
        for given in (x, x[..., 1:], x.flip(dim)):
            made = Parts(dim, 64, 0).laid_out(given)
            assert made.equal(given)
            assert all(part.movedim(dim, 0).is_contiguous() for part in made.split(64, dim))


def recorded_parts(ready, weights, steps, calls=2):
    x_NI, state = torch.randn(steps * STREAMS, 5), state_of(weights, STREAMS, torch.Generator().manual_seed(steps))
    for _ in range(calls):
        try:
            ready(x_NI, equal_lengths(steps, STREAMS), state)
        except AttributeError:  # stand-ins are not replayed
            break


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_which_layers_are_cut(captured, cell):
    """Not those that run from the last step to the first; of each two parts, beside what others take."""
    weights, back = layer(cell, 5, 7), layer(cell, 5, 7, reverse=True)
    for directions, wanted in (((weights,), [112, 98]), ((back,), []), ((weights, back), [])):
        inner = Plain(directions[0])
        ready = ReplayedLayer(inner, directions, torch.float32)
        ready.row_bytes = MOST_MEMORY // (200 * STREAMS)
        recorded_parts(ready.run, weights, 210)
        made = [one.parts for one in ready.replays.recorded.values()]
        assert [parts.size for parts in made] == ([112 * STREAMS] if wanted else [])
        captured_steps = inner.steps[2:] if wanted else []
        assert captured_steps == wanted * (1 + replay.GRAPHS), "once as they are, for kernels to be compiled"
    recurrence = ReplayedRecurrence(Plain(weights).run, weights, torch.float32, lambda: None)
    recurrence.row_bytes = ready.row_bytes
    recorded_parts(recurrence, weights, 210)
    assert [one.parts.size for one in recurrence.replays.recorded.values()] == [112 * STREAMS]
    assert not ReplayedRecurrence(Plain(back).run, back, torch.float32, lambda: None).may_be_cut


def test_a_call_is_cut_where_others_have_taken_what_it_needs(captured):
    about = Recordable(MOST_MEMORY * 9 // 10, (), Steps(0, 1))
    x, replays = torch.empty(200, 1), Replays()
    assert replays._parts_of(x, about) is None
    replays.recorded["other"] = replay._Recording([], [torch.empty(MOST_MEMORY // 4, dtype=torch.uint8, device="meta")])
    assert replays._parts_of(x, about) == Parts(0, 112, about.memory * 112 // 200)
    assert replays._parts_of(x, Recordable(about.memory)) is None
    replays.recorded["large"] = replay._Recording([], [x], Parts(0, 100, about.memory))
    assert replays._taken(0) == MOST_MEMORY // 4, "no outputs are made in advance of what is cut"


@pytest.mark.parametrize("rested", [0, RESTING + 1])
def test_what_rested_makes_room_before_a_call_is_cut(captured, rested):
    weights = layer("gru", 5, 7)
    ready = ReplayedLayer(Plain(weights), (weights,), torch.float32)
    ready.row_bytes = MOST_MEMORY // (210 * STREAMS)
    other = replay._Recording([replay._Graph(Nothing(), None)], [torch.empty(MOST_MEMORY // 4, dtype=torch.uint8)])
    ready.replays.recorded["other"], ready.replays._calls = other, rested
    recorded_parts(ready.run, weights, 200)
    made = [one.parts for key, one in ready.replays.recorded.items() if key != "other"]
    assert made == ([None] if rested else [Parts(0, 112 * STREAMS, 112 * STREAMS * ready.row_bytes)])


def test_a_call_in_parts_is_a_shape_like_others(captured):
    """It is not recorded where there are as many as are kept already."""
    weights = layer("gru", 5, 7)
    ready = ReplayedLayer(Plain(weights), (weights,), torch.float32)
    ready.row_bytes = MOST_MEMORY // (150 * STREAMS)
    for name in range(MOST_SHAPES):
        ready.replays.recorded[name] = replay._Recording([replay._Graph(Nothing(), None)], [])
    recorded_parts(ready.run, weights, 200)
    assert set(ready.replays.recorded) == set(range(MOST_SHAPES))


def test_outputs_of_a_call_in_parts_are_made_when_it_comes():
    """And the graph is told where the parts of them are."""
    told = []

    class Graph:
        def replay(self):
            pass

    class Told:
        writes_to = ()

        def read_from(self, given):
            told.append(given)

        def write_to(self, outputs):
            self.writes_to = outputs

    graphs = [replay._Graph(Graph(), Told()) for _ in range(replay.GRAPHS)]
    one = replay._Recording(graphs, [torch.empty(100, 2), torch.empty(3)], Parts(0, 64, 0))
    x, state = torch.randn(100, 4), torch.randn(5)
    for _ in range(5):
        y, end = one.replay([x, state], 0)
        assert one.next is None
        assert one.graphs[-1].copies.writes_to == [y.data_ptr(), y[64:].data_ptr(), end.data_ptr()]
        assert told[-1] == [x.data_ptr(), x[64:].data_ptr(), state.data_ptr()]


# From here on with a GPU.


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [False, True])
def test_large_calls_of_a_module_are_those_without_replays(cell, batch_first, monkeypatch):
    """Outputs of earlier calls stay as they were, in and out of inference mode, with and without a state."""
    network = sparsify(prune(cell(64, 64, 2, batch_first=batch_first), 0.1, 16).cuda(), "16x1", "fp16", "triton")
    monkeypatch.setattr(replay, "MOST_MEMORY", 2_000_000)
    kept, hx = [], None
    for index, steps in enumerate((200, 150, 200, 150, 200, 260, 150, 260, 200, 260)):
        x = torch.randn(*((16, steps) if batch_first else (steps, 16)), 64, device="cuda", dtype=torch.float16)
        with torch.inference_mode(index % 4 > 0):
            with nothing_recorded():
                truth, end = network._plain(x, hx)
            y, after = network(x, hx)
        kept.append((y, truth))
        for part, true in zip(*[[state] if cell is nn.GRU else state for state in (after, end)], strict=True):
            torch.testing.assert_close(part, true, atol=2e-3, rtol=0)
        hx = None if index % 2 else torch.utils._pytree.tree_map(torch.clone, after)
    for y, truth in kept:
        torch.testing.assert_close(y, truth, atol=2e-3, rtol=0)
    cut = [one.parts.size for one in network._ready["replays"].recorded.values() if one.parts is not None]
    assert len(cut) >= 3
    assert all(size >= LEAST_STEPS for size in cut)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cell", "height"), [("gru", 16), ("lstm", 16), ("gru", 1)])
def test_large_calls_of_a_layer_are_those_without_replays(cell, height, monkeypatch):
    from srnn.kernels.triton.backend import Triton

    weights = layer(cell, 64, 256, height, density=0.1, values="fp16")
    ready = Triton().layer(weights, torch.device("cuda"), torch.float16)
    monkeypatch.setattr(replay, "MOST_MEMORY", 110 * STREAMS * ready.row_bytes)
    kept = []
    for steps in (200, 150, 200, 150, 200, 150, 200):
        x = torch.randn(steps * STREAMS, 64, device="cuda", dtype=torch.float16)
        state = tuple(part.cuda().half() for part in state_of(weights, STREAMS, torch.Generator().manual_seed(steps)))
        wanted = ready.inner.run(x, equal_lengths(steps, STREAMS), state)
        kept.append((ready.run(x, equal_lengths(steps, STREAMS), state), wanted))
    for got, wanted in kept:
        for a, b in zip((got[0], *got[1]), (wanted[0], *wanted[1]), strict=True):
            torch.testing.assert_close(a, b, atol=2e-3, rtol=0)
    assert sorted(one.parts.size for one in ready.replays.recorded.values()) == [80 * STREAMS, 100 * STREAMS]


@pytest.mark.gpu
@on_gpu
def test_a_recording_in_parts_takes_the_memory_of_one():
    from srnn.kernels.triton.backend import Triton

    ready = Triton().layer(
        layer("gru", 1024, 1024, 32, density=0.1, values="fp16"), torch.device("cuda"), torch.float16
    )
    steps, streams = 512, 64  # 499 MB as a whole
    x = torch.randn(steps * streams, 1024, device="cuda", dtype=torch.float16)
    state = (torch.zeros(streams, 1024, device="cuda", dtype=torch.float16),)
    with torch.inference_mode():
        for _ in range(3):
            ready.run(x, equal_lengths(steps, streams), state)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved()
        ready.replays.recorded.clear()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    assert 100e6 < before - torch.cuda.memory_reserved() < MOST_MEMORY
