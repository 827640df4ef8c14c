"""Training from CUDA graphs. On a CPU: refused with advice."""

import gc
import json
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from srnn import cuda_graphs
from srnn.__main__ import main
from srnn.models import deepspeech2, gru, lstm, rnn
from srnn.training.cuda_graph import Graphed
from tests.conftest import SMALL


def losses(model, calls, dtype):
    """Of some steps of training with masks in place, as a run does it."""
    call = Graphed(model, torch.zeros(5, 12, dtype=torch.int64)) if calls == "graphed" else model
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    random = torch.Generator(device="cuda").manual_seed(0)
    state, found = None, []
    for step in range(8):
        tokens = torch.randint(0, 30, (5, 12 if step != 6 else 7), device="cuda", generator=random)
        with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
            logits, state = call(tokens, state if step != 4 else None)
        state = tuple(s.detach() for s in state) if isinstance(state, tuple) else state.detach()
        loss = F.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            model.rnn.weight_hh_l0.mul_(torch.arange(model.rnn.weight_hh_l0.shape[1], device="cuda") % 2)
        found.append(loss.item())
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("make", [gru, lstm, rnn])
def test_a_graph_trains_as_eager_does(make, dtype):
    results = []
    for calls in ("eager", "graphed"):
        torch.manual_seed(0)
        model = make(24, 8, num_layers=2, vocabulary_size=30).cuda()
        results.append(losses(model, calls, dtype))
    assert results[0][-1] < results[0][0]
    assert results[1] == pytest.approx(results[0], rel=1e-4 if dtype is None else 2e-2)


class Layers(nn.Module):
    """Recurrent layers with cuDNN's dropout between them, and no other."""

    def __init__(self, dropout=0.5):
        super().__init__()
        self.rnn = nn.LSTM(8, 24, 2, dropout=dropout, batch_first=True)

    def forward(self, x_BTI, state=None):
        return self.rnn(x_BTI, state)


@pytest.mark.gpu
def test_networks_with_dropout_between_layers_train_in_turns():
    """A seed for the second has torch let go of the states that the graph of the first draws its dropout from."""
    x_BTI = torch.randn(1, 12, 8, device="cuda").repeat(16, 1, 1)
    there = []
    for seed in range(3):
        torch.manual_seed(seed)
        call = Graphed(Layers().cuda(), x_BTI.cpu())
        call(x_BTI)[0].sum().backward()
        there.append(call)
    torch.cuda.empty_cache()
    other = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")  # in memory that was let go
    for _ in range(3):
        for call in there:
            rows = call(x_BTI)[0][:, -1]
            rows.sum().backward()
            assert len(rows.detach().unique(dim=0)) == len(rows), "units are dropped one by one"
    assert not other.any()
    last = there.pop()
    there.clear()
    gc.collect()
    torch.cuda.empty_cache()
    for seed in range(2):
        assert len(last(x_BTI)[0][:, -1].detach().unique(dim=0)) == len(x_BTI)
        eager = last.model(x_BTI[:, :5])[0][:, -1]
        assert len(eager.detach().unique(dim=0)) == len(x_BTI), "which goes on with the last states"
        torch.manual_seed(seed)


class Products(nn.Module):
    """Products that cuBLAS splits: it adds up what is in its workspace."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 650), nn.Linear(650, 10_000)

    def forward(self, x_BTI, state=None):
        y = self.second(self.first(x_BTI))
        return y, (y[:, -1] * 0).detach() if state is None else state + y[:, -1] * 0


@pytest.mark.gpu
def test_a_graph_works_in_memory_of_its_own(monkeypatch):
    """Though torch warmed it up on the stream that it records on, as it does when its streams have taken turns."""
    x_BTI = torch.randn(20, 35, 8, device="cuda")
    network = Products().cuda()

    def gradient(call):
        network.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            y, _ = call(x_BTI)
            y.float().square().mean().backward()
        return network.first.weight.grad.clone()

    Graphed(Layers().cuda(), torch.randn(2, 4, 8))(torch.randn(2, 4, 8, device="cuda"))
    stream = torch.cuda.graph.default_capture_stream
    wanted = gradient(network)
    monkeypatch.setattr(torch.cuda, "Stream", lambda *_, **__: stream)
    call = Graphed(network, x_BTI.cpu())
    gradient(call)
    monkeypatch.undo()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()
    other = torch.zeros(1 << 30, dtype=torch.uint8, device="cuda")
    torch.testing.assert_close(gradient(call), wanted, rtol=2e-2, atol=1e-7)
    assert not other.any(), "it wrote into memory of others"


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(
    "data",
    [
        [],
        ["dataset=adding", "dataset.train_sequences=400"],
        ["dataset=adding", "dataset.train_sequences=400", "averaging=ema", "schedule=cosine"],
    ],
    ids=["text", "adding", "averaged"],
)
def test_runs_on_a_gpu(tmp_path, precision, data):
    small = [o for o in SMALL if not data or not o.startswith(("dataset.sequence", "model.embedding"))]
    chosen = [*small, "trainer=gpu", f"trainer.precision={precision}", "trainer.limit_epochs=5",
              "trainer.limit_train_batches=8", "trainer.limit_eval_batches=8", *data]  # fmt: skip
    chosen.remove("trainer=fast")
    assert main([*chosen, "tracking.mode=disabled", f"hydra.run.dir={tmp_path}/run"]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.002)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path, capsys):
    run = ["tracking.mode=disabled", f"hydra.run.dir={tmp_path}/run"]
    assert main([*SMALL, "trainer.cuda_graph=true", *run]) == 2
    assert "trainer.cuda_graph=true needs a CUDA GPU" in capsys.readouterr().err
    assert main(["trainer=gpu", f"hydra.run.dir={tmp_path}/other", "tracking.mode=disabled"]) == 2
    assert "trainer.accelerator=gpu cannot be used here" in capsys.readouterr().err


def test_mixed_precision_on_a_cpu(tmp_path):
    run = ["tracking.mode=disabled", "kernel=dense", f"hydra.run.dir={tmp_path}/run"]
    assert main([*SMALL, "trainer.precision=bf16-mixed", *run]) == 0
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.002)


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
def test_none_starts_from_zero_again_and_norms_see_batches_alone(monkeypatch):
    """With what a recorded graph does: it copies what it is called with into its samples."""

    def recorded(call, samples, pool):
        def replay(*given):
            for sample, tensor in zip(samples, given, strict=True):
                if sample.data_ptr() != tensor.data_ptr():
                    sample.copy_(tensor)
            return call(*samples)

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tokens_BT = torch.randint(0, 30, (5, 12))
    model = gru(24, 8, vocabulary_size=30)
    call = Graphed(model, tokens_BT.clone())
    first, state = call(tokens_BT)
    call(tokens_BT, state)
    assert torch.equal(call(tokens_BT)[0], first)
    x_BTI = torch.randn(2, 20, 33)
    speech = deepspeech2("rnn", 8, 1, channels=2, input_size=33, output_size=5)
    call = Graphed(speech, x_BTI.clone())
    once = 0.1 * speech.convolutions[0].convolution(F.pad(x_BTI, (0, 0, 5, 5)).transpose(1, 2)[:, None]).mean((0, 3))
    call(x_BTI)
    assert torch.allclose(speech.convolutions[0].norm.running_mean, once.flatten(), atol=1e-6)


@pytest.fixture
def told(monkeypatch):
    """What torch's allocator and the recording are told, in order, without a GPU."""
    told = []
    for name in ("_cuda_beginAllocateCurrentThreadToPool", "_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda index, pool, name=name: told.append((name, pool)), raising=False)
    for name in ("get_rng_state", "set_rng_state"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, name=name: told.append((name, (0, 1))))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(cuda_graphs, "_clean_up", lambda *_: None)

    def recorded(call, samples, pool):
        told.append(("recorded", pool))
        return call

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    return told


ORDER = [
    "get_rng_state", "set_rng_state", "_cuda_beginAllocateCurrentThreadToPool", "drawn", "_cuda_endAllocateToPool",
    "recorded", "_cuda_releasePool",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:User provided device_type of 'cuda'")
@pytest.mark.parametrize("fails", [None, "drawn", "recorded"])
def test_a_recording_has_the_states_that_its_dropout_reads(told, fails, monkeypatch):
    """A seed has torch make new ones, at the first call that draws, in the recording's memory."""
    if fails == "recorded":
        monkeypatch.setattr(torch.cuda, "make_graphed_callables", out_of_memory)
    plain = nn.LSTM.forward

    def draws(layers, x_BTI, state=None):
        if layers.input_size == 1:
            if fails == "drawn":
                out_of_memory()
            told.append(("drawn", (0, 1)))
        return plain(layers, x_BTI, state)

    monkeypatch.setattr(nn.LSTM, "forward", draws)
    network = Layers(0.5)
    numbers = torch.get_rng_state()
    call, x_BTI = Graphed(network, torch.zeros(2, 4, 8)), torch.zeros(2, 4, 8)
    with nullcontext() if fails is None else pytest.raises(torch.OutOfMemoryError):
        call(x_BTI)
    missing = {None: (), "drawn": ("drawn", "recorded"), "recorded": ("recorded",)}[fails]
    assert told == [(name, (0, 1)) for name in ORDER if name not in missing], "what is begun ends, once"
    if fails == "drawn":
        assert torch.equal(torch.get_rng_state(), numbers), "weights take no numbers from the run"


def test_a_network_without_dropout_needs_no_states(told):
    Graphed(Layers(0.0), torch.zeros(2, 4, 8))(torch.zeros(2, 4, 8))
    assert told == [("recorded", (0, 1))]


def out_of_memory(*_, **__):
    raise torch.OutOfMemoryError
