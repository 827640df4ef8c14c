"""The recurrence on a GPU against torch's own operations; on a CPU in Triton's interpreter, see ``tests/kernels``."""

import functools

import pytest
import torch

from srnn.cells import GATES
from srnn.models import recurring, recurring_gpu
from srnn.models.recurring import recur
from tests.kernels.common import relative_error
from tests.kernels.triton_cases import DEVICE, INTERPRETED, here, on_gpu


@pytest.fixture(autouse=True)
def fused(monkeypatch):
    """In the interpreter, too."""
    if INTERPRETED:
        monkeypatch.setattr(recurring, "runs_on_gpu", lambda *given: True)


def case(cell, steps, *rows, hidden, dtype=torch.float64, device="cpu"):
    """Products, recurrent matrices and states of so many directions and streams."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape, scale=1.0):
        made = torch.randn(*shape, dtype=torch.float64, generator=generator) * scale
        return made.to(device, dtype).requires_grad_()

    gates = GATES[cell]
    w = random(*rows[:-1], gates * hidden, hidden, scale=hidden**-0.5)
    states = tuple(random(*rows, hidden) for _ in range(1 + (cell == "lstm")))
    return random(steps, *rows, gates * hidden), w, *states


def results(run, given):
    """Outputs, states and gradients of all that is given, each output with another weight."""
    u, w, *state = given
    y, after = run(u, w, tuple(state))
    weights = torch.linspace(-1, 2, y.numel(), dtype=torch.float64, device=y.device).view_as(y)
    loss = (y * weights).sum() + sum((k + 2) * part.square().sum() for k, part in enumerate(after))
    return [part.detach() for part in (y, *after, *torch.autograd.grad(loss, given))]


def plain(cell):
    """``recur`` in torch's own operations."""

    def run(u, w, state):
        outputs = []
        for one in u:
            state = recurring.cell_step(cell, one, state[0] @ w.mT, state)
            outputs.append(state[0])
        return torch.stack(outputs), state

    return run


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize("rows", [(3,), (2, 1)])
def test_outputs_and_gradients_are_torch_s(cell, rows):
    given = case(cell, 4, *rows, hidden=101, device=DEVICE)
    for got, wanted in zip(results(lambda *g: recur(*g, cell), given), results(plain(cell), given), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)
    single = [part.detach().float().requires_grad_() for part in given]
    for got, wanted in zip(results(lambda *g: recur(*g, cell), single), results(plain(cell), given), strict=True):
        assert relative_error(got, wanted) < 1e-5


class Called:
    """Stands for a graph: calls what would have been recorded."""

    def __init__(self, run, stream, pool):
        self.replay, self.pool = run, lambda: None


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["clipped_relu", "gru", "lstm"])
@pytest.mark.parametrize("low", [False, True])
def test_pieces_are_put_together(cell, low, monkeypatch):
    """Without graphs: what each piece is given, and what is taken from it."""
    known = {}

    def run(given, backward):
        key = given.cell
        if key not in known:
            u = torch.full(
                (recurring_gpu.PIECE_STEPS, *given.u.shape[1:]), torch.nan, dtype=given.u.dtype, device=DEVICE
            )
            arrays = recurring_gpu._Arrays.empty(cell, torch.empty_like(given.w), u, backward=True)
            known[key] = recurring_gpu._Graphs(arrays, None)
        recurring_gpu._in_pieces(given, backward, known[key])

    given = case(cell, 8, 2, 1, hidden=5, dtype=torch.float32, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
        wanted = results(lambda *g: recur(*g, cell), given)
        monkeypatch.setattr(recurring_gpu, "PIECE_STEPS", 3)
        monkeypatch.setattr(recurring_gpu, "_recorded", Called)
        monkeypatch.setattr(recurring_gpu, "_run", run)
        for _ in range(2):
            for got, truth in zip(results(lambda *g: recur(*g, cell), given), wanted, strict=True):
                torch.testing.assert_close(got, truth)
        with torch.no_grad():  # in the memory of the same graphs
            y, after = recur(given[0], given[1], given[2:], cell)
        for got, truth in zip((y, *after), wanted, strict=False):
            torch.testing.assert_close(got, truth)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize("low", [False, True])
def test_what_only_a_backward_pass_wants_is_not_kept(cell, low, monkeypatch):
    made, run = [], recurring_gpu._run

    def noted(given, backward):
        made.append(given)
        run(given, backward)

    monkeypatch.setattr(recurring_gpu, "_run", noted)
    u, w, *state = case(cell, 7, 2, 3, hidden=5, dtype=torch.float32, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=low):
        y, after = recur(u, w, tuple(state), cell)
        with torch.inference_mode():
            quiet = recur(u, w, tuple(state), cell)
        frozen = recur(*(part.detach() for part in (u, w)), tuple(part.detach() for part in state), cell)
    for got in (quiet, frozen):
        assert torch.equal(got[0], y)
        assert all(torch.equal(a, b) for a, b in zip(got[1], after, strict=True))
        assert not got[0].requires_grad
    apart = {part.data_ptr() for part in (made[0].h, made[0].c, made[0].low, made[0].gates)}
    assert len(apart) == 1 + (cell == "lstm") + low + (cell in ("gru", "lstm"))
    for one in made[1:]:
        assert one.gates is one.h
        assert all(part is one.h or len(part) == 1 for part in (one.c, one.low))


def without_graphs(run, stream, pool):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")


@pytest.mark.gpu
@here
def test_without_graphs_it_is_launched_step_by_step(monkeypatch):
    """With one warning, whatever number of graphs could not be recorded."""
    given = case("lstm", 8, 2, 1, hidden=5, dtype=torch.float32, device=DEVICE)
    wanted = results(lambda *g: recur(*g, "lstm"), given)
    u = torch.empty(3, 2, 1, 20, device=DEVICE)
    arrays = recurring_gpu._Arrays.empty("lstm", torch.empty(2, 20, 5, device=DEVICE), u, backward=True)
    graphs = recurring_gpu._Graphs(arrays, None)
    monkeypatch.setattr(recurring_gpu, "PIECE_STEPS", 3)
    monkeypatch.setattr(recurring_gpu, "_recorded", without_graphs)
    monkeypatch.setattr(recurring_gpu, "_run", functools.partial(recurring_gpu._in_pieces, graphs=graphs))
    recurring_gpu._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="launched step by step.*: CUDA error: operation not.*capturing$") as told:
        several = [results(lambda *g: recur(*g, "lstm"), given) for _ in range(2)]
    assert len(told) == 1
    for got, truth in zip(several[0] + several[1], wanted * 2, strict=True):
        torch.testing.assert_close(got, truth)
    assert len(graphs.ready) == 4  # both ways, of two lengths


@pytest.mark.gpu
@on_gpu
def test_a_recording_that_fails_leaves_the_stream(monkeypatch):
    """What a graph may not hold ends the recording; the stream, and what comes after it, are as they were."""
    before = torch.cuda.current_stream()
    recurring_gpu._warn_once.cache_clear()
    with pytest.warns(UserWarning, match="launched step by step"):
        made = recurring_gpu._recorded_or_launched(torch.cuda.synchronize, torch.cuda.Stream(), None)
    assert isinstance(made, recurring_gpu._Launched)
    assert torch.cuda.current_stream() == before
    made.replay()
    given = case("gru", 3, 2, hidden=16, dtype=torch.float32, device=DEVICE)
    for got, truth in zip(results(lambda *g: recur(*g, "gru"), given), results(plain("gru"), given), strict=True):
        assert relative_error(got, truth) < 1e-4


@pytest.mark.gpu
@here
def test_products_under_autocast_and_of_some_gradients():
    """Products are rounded as torch's are; states stay fp32. Who has no use for a gradient gets none."""
    given = case("gru", 3, 2, hidden=20, dtype=torch.float32, device=DEVICE)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, wanted = results(lambda *g: recur(*g, "gru"), given), results(plain("gru"), given)
    assert got[0].dtype == torch.float32
    for mine, theirs in zip(got, wanted, strict=True):
        assert mine.dtype == theirs.dtype
        assert relative_error(mine, theirs) < 1e-2
    u, w, h = (part.detach() for part in given)
    y, _ = recur(u, w.requires_grad_(), (h,), "gru")
    y.sum().backward()
    assert w.grad is not None
    with torch.inference_mode():
        assert torch.equal(recur(u, w, (h,), "gru")[0], y)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", list(GATES))
def test_all_in_16_bits(cell):
    """A network in bfloat16: what a step computes between its products is in float32."""
    given = [part.detach().bfloat16().requires_grad_() for part in case(cell, 3, 2, hidden=20, device=DEVICE)]
    truth = [part.detach().double().requires_grad_() for part in given]
    got, torch_s = results(lambda *g: recur(*g, cell), given), results(plain(cell), given)
    for mine, theirs, wanted in zip(got, torch_s, results(plain(cell), truth), strict=True):
        assert mine.dtype == torch.bfloat16
        times = 5 if INTERPRETED else 1.5  # the interpreter cuts off where a GPU rounds
        assert relative_error(mine, wanted) < times * relative_error(theirs, wanted) + 1e-3


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cell", "rows"), [("clipped_relu", (2, 5)), ("gru", (5,)), ("lstm", (2, 3))])
def test_pieces_of_a_sequence(cell, rows):
    """Of all lengths around that of a piece, in turn; and the memory of graphs does not grow with them."""
    for steps in (1, 31, 32, 33, 100, 33, 64):
        given = [part.detach().float().requires_grad_() for part in case(cell, steps, *rows, hidden=48, device=DEVICE)]
        truth = [part.detach().double().requires_grad_() for part in given]
        for got, wanted in zip(results(lambda *g: recur(*g, cell), given), results(plain(cell), truth), strict=True):
            assert relative_error(got, wanted) < 1e-4, steps
    for batch in range(1, 8):
        u, w, *state = case(cell, 5, *rows[:-1], batch, hidden=48, device=DEVICE)
        recur(u, w, tuple(state), cell)
    assert len(recurring_gpu._known) <= recurring_gpu.MOST_SIZES


@pytest.mark.gpu
@on_gpu
def test_two_streams_and_a_graph_of_others():
    torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)  # of recording on a stream of its own
    given = case("gru", 40, 4, hidden=64, dtype=torch.float32, device=DEVICE)
    wanted = results(lambda *g: recur(*g, "gru"), given)
    queues = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    several = []
    for _ in range(5):
        for queue in queues:
            with torch.cuda.stream(queue):
                several.append(results(lambda *g: recur(*g, "gru"), given))
    torch.cuda.synchronize()
    for got in several:
        for mine, theirs in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, theirs)

    class Layer(torch.nn.Module):
        def forward(self, u, w, h):
            return recur(u, w, (h,), "gru")[0]

    graphed = torch.cuda.make_graphed_callables(Layer(), tuple(p.detach().requires_grad_() for p in given))
    y = graphed(*given)
    torch.testing.assert_close(y, wanted[0])
    for got, truth in zip(torch.autograd.grad(y.sum(), given), torch.autograd.grad(
        recur(given[0], given[1], (given[2],), "gru")[0].sum(), given), strict=True):  # fmt: skip
        torch.testing.assert_close(got, truth)
