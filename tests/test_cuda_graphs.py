"""What may happen while a CUDA graph is recorded, and what a recording that fails leaves."""

import gc
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from srnn import cuda_graphs
from srnn.cuda_graphs import Graph, recorded, undisturbed
from srnn.inference.sparsify import sparsify
from tests.kernels.common import prune

CPU = torch.device("cpu")


class Cycle:
    """Only the garbage collector lets go of it."""

    def __init__(self, held):
        self.held, self.itself = held, self


def test_nothing_is_collected_while_any_graph_is_recorded():
    with undisturbed(CPU, None):
        with undisturbed(CPU, None):
            assert not gc.isenabled()
        assert not gc.isenabled(), "another goes on"
    assert gc.isenabled()
    gc.disable()
    try:
        with undisturbed(CPU, None):
            pass
        assert not gc.isenabled(), "it was off before"
    finally:
        gc.enable()


def test_a_recording_that_fails_is_cleaned_up_after_and_collection_goes_on(monkeypatch):
    cleaned = []
    monkeypatch.setattr(cuda_graphs, "_clean_up", lambda *given: cleaned.append((*given, gc.isenabled())))
    with pytest.raises(KeyError), undisturbed(CPU, "pool"):
        raise KeyError
    assert cleaned == [(CPU, "pool", False)]
    assert gc.isenabled()


def test_a_ctrl_c_while_a_recording_begins_leaves_collection_on(monkeypatch):
    off = gc.disable

    def interrupted():
        off()
        raise KeyboardInterrupt

    monkeypatch.setattr(cuda_graphs, "_clean_up", lambda *_: None)
    monkeypatch.setattr(gc, "disable", interrupted)
    with pytest.raises(KeyboardInterrupt), undisturbed(CPU, None):
        raise AssertionError("not reached")
    monkeypatch.undo()
    assert gc.isenabled()
    with undisturbed(CPU, None):
        assert not gc.isenabled()
    assert gc.isenabled()


@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), AttributeError("torch is gone")])
def test_a_graph_that_is_let_go_late_tells_nobody(monkeypatch, error):
    """An exception that leaves a destructor is printed with its traceback."""

    def fails():
        raise error

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", fails)
    Graph.__del__("a graph")


def test_recording_is_on_a_stream_of_the_device(monkeypatch):
    """torch's own stream is of the device that was recorded on first."""
    used = []
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None, raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: ("new", device))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "current")
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool, stream, **_: nullcontext(used.append(stream)))
    second = torch.device("cuda:1")
    for stream in (None, "given"):
        with recorded("graph", second, stream=stream):
            pass
    assert used == [("new", second), "given"]


def test_a_graph_that_is_let_go_amid_a_recording_waits_for_the_next_one(monkeypatch):
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(cuda_graphs, "_let_go", [])
    Graph.__del__("a graph")
    assert cuda_graphs._let_go == ["a graph"]
    capturing[0] = False
    Graph.__del__("another")
    assert cuda_graphs._let_go == ["a graph"]
    with undisturbed(CPU, None):
        assert not cuda_graphs._let_go


def a_recorded_network(units=64):
    """With a graph of its own, and an input."""
    net = sparsify(prune(nn.GRU(units, units), 0.1).cuda(), "element", "fp16", "triton")
    x = torch.randn(4, 1, units, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        for _ in range(3):
            net(x)
    assert net._ready["replays"].recorded
    return net, x


def all_is_well(net, x):
    """Torch makes random numbers, memory that two streams used comes back, and calls are recorded and right."""
    assert torch.isfinite(torch.randn(100, device="cuda")).all()
    assert torch.ones(10).pin_memory().cuda(non_blocking=True).sum() == 10
    with torch.inference_mode():
        net.forget()
        truth = net(x)[0]
        for _ in range(3):
            assert net(x)[0].equal(truth)
        assert net._ready["replays"].recorded
    side, reserved = torch.cuda.Stream(), []
    for _ in range(40):
        made = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
        made.record_stream(side)
        del made
        torch.cuda.synchronize()
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] <= reserved[19]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_recorded_network_may_be_let_go_amid_a_users_recording():
    (net, x), (other, _) = a_recorded_network(), a_recorded_network()
    graph, number = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        number.add_(1)
        other.forget()
        del other
        gc.collect()
        number.add_(1)
    graph.replay()
    assert number.tolist() == [2, 2, 2]
    assert cuda_graphs._let_go
    all_is_well(net, x)
    assert not cuda_graphs._let_go


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graph_of_others_is_not_collected_amid_a_recording():
    net, x = a_recorded_network()
    theirs, number = torch.cuda.CUDAGraph(), torch.zeros(3, device="cuda")
    with torch.cuda.graph(theirs):
        number.add_(1)
    gc.collect()
    garbage = Cycle(theirs)
    del garbage, theirs
    graph = Graph()
    with recorded(graph, torch.device("cuda")):
        number.add_(1)
        [Cycle(None) for _ in range(10_000)]  # else enough for a collection
        number.add_(1)
    gc.collect()
    graph.replay()
    assert number.tolist() == [2, 2, 2]
    all_is_well(net, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("how", ["asks for a number", "lets a graph go", "raises"])
def test_a_recording_that_fails_leaves_torch_as_it_was(how):
    net, x = a_recorded_network()
    held, number = [torch.cuda.CUDAGraph()], torch.zeros(3, device="cuda")
    with torch.cuda.graph(held[0]):
        number.add_(1)

    def fails():
        with recorded(Graph(), torch.device("cuda")):
            made = torch.ones(1000, device="cuda")
            if how == "asks for a number":
                made.sum().item()
            elif how == "lets a graph go":  # CUDA refuses, which is told at the end
                held.clear()
            else:
                raise KeyError

    with pytest.raises((RuntimeError, KeyError)):
        fails()
    all_is_well(net, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_network_whose_step_cannot_be_recorded_runs_as_it_is():
    """One of its modules asks for a number: torch's random numbers go on after."""

    class Asking(nn.Module):
        def forward(self, x):
            return x * (1 if x.sum().item() == 0 else 2)

    net, x = a_recorded_network()
    asking = Asking().eval()
    whole = nn.ModuleList([net, asking])
    whole.eval()

    def plain(x, hx):
        y, after = net.step(x, hx)
        return asking(y), after

    with torch.inference_mode():
        truth = plain(x[0], None)[0]
        for _ in range(4):
            assert net.step_of(whole, plain, x[0], None)[0].equal(truth)
            torch.randn(3, device="cuda")
    all_is_well(net, x)
