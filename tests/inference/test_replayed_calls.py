"""Calls of sparse modules as replays: which may be recorded, and, on a GPU, that replays are the calls."""

import copy

import pytest
import torch
from torch import nn

from srnn.inference.sparsify import sparsify
from srnn.kernels.calls_in_parts import Steps
from srnn.kernels.contract import Layer
from srnn.kernels.replay import nothing_recorded
from tests.kernels.common import prune
from tests.kernels.test_replay import Counted, replayed
from tests.kernels.triton_cases import on_gpu


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_module_knows_which_calls_may_be_recorded(batch_first, monkeypatch):
    """Those of which all layers are replayed; the memory is that of the layer that takes most, beside the input."""
    network = sparsify(prune(nn.GRU(8, 32, 2, batch_first=batch_first), 0.1), kernel="dense")
    checks = [lambda: None, lambda: None]

    class Other(Counted):
        def chosen(self, steps, streams):
            raise AssertionError("not of this call")

    network(torch.zeros(5, 3, 8))  # which makes its layers ready, under keys of its own
    own = [key for key, ready in network._ready.items() if isinstance(ready, Layer)]
    assert len(own) == 2
    for index, (key, check) in enumerate(zip(own, checks, strict=True)):
        network._ready[key] = replayed(Counted(), 1000 * (index + 1), check)
        network._ready[*key[:-1], torch.float16] = Other()
    for kind, shape, rows in (("sequence", (5, 3, 8), 15), ("sequence", (5, 8), 5), ("step", (3, 8), 3)):
        x = torch.zeros(shape)
        about = network._recordable(kind, x)
        assert about.memory == 2000 * rows + x.nbytes
        assert about.checks == tuple(checks)
        between = Steps(int(batch_first and len(shape) == 3), 1)
        assert about.steps == (between if kind == "sequence" else None), "where it may be cut"
    monkeypatch.setattr(network, "bidirectional", True)
    assert network._recordable("sequence", torch.zeros(5, 3, 8)).steps is None, "the last steps come first"
    network._ready[own[1]] = Counted()
    assert network._recordable("step", torch.zeros(3, 8)) is None


@pytest.mark.gpu
@on_gpu
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # of torch.compile's own imports
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning")  # and of a graph of its own
def test_changed_weights_and_a_compiled_network(tmp_path, monkeypatch):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    first = sparsify(prune(nn.GRU(40, 160), 0.1).cuda(), kernel="triton")
    second = copy.deepcopy(first)
    for buffer in second.buffers():
        if buffer.is_floating_point():
            buffer.mul_(0.5)
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


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kernel", ["triton", "auto"])
@pytest.mark.parametrize(("cell", "options"), [(nn.GRU, {}), (nn.LSTM, {"batch_first": True, "bidirectional": True})])
def test_a_modules_calls_are_replayed(cell, options, kernel, tmp_path, monkeypatch):
    """All layers at once: sequences and steps, from zero and from a state, in turns."""
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    network = sparsify(prune(cell(40, 160, 2, **options), 0.1).cuda(), kernel=kernel)
    both = options.get("bidirectional", False)
    given = [torch.randn(*shape, 40, device="cuda") for shape in ((12, 3), (3, 12), (12,), (12, 3))]
    given = given[:1] if kernel == "auto" else given  # which measures
    state = network(given[0])[1]

    def calls():
        found = [network(x) for x in given] + [network(given[0], state)]
        if not both and kernel == "triton":
            found += [network.step(given[0][0]), network.step(given[0][1], state)]
        return [[y, *(end if isinstance(end, tuple) else [end])] for y, end in found]

    with nothing_recorded():
        wanted = calls()
    for index in range(4):
        with torch.inference_mode(index == 2):
            for got, truth in zip(calls(), wanted, strict=True):
                for a, b in zip(got, truth, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    if kernel == "triton":
        assert len(network._ready["replays"].recorded) == (4 if both else 6)
    asking = given[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        network(asking)[0].sum().backward()
    moved = network.cpu().cuda()
    torch.testing.assert_close(moved(given[0])[0], wanted[0][0], rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("structure", ["element", "16x1"])
def test_a_loaded_networks_step_is_one_replay(cell, structure, tmp_path):
    """From zero and from a state; what earlier steps gave stays; it runs anew after weights change, and with hooks."""
    from srnn import models
    from srnn.inference.packed_file import load, write
    from srnn.inference.packing import pack

    config, sizes = {"name": cell, "hidden_size": 160, "embedding_size": 48, "num_layers": 3}, {"vocabulary_size": 50}
    torch.manual_seed(0)
    trained = getattr(models, cell)(160, 48, num_layers=3, **sizes)
    prune(trained, 0.2, 1 if structure == "element" else 16)
    write(tmp_path / "model.safetensors", pack(trained, config, sizes, structure=structure))
    network = load(tmp_path / "model.safetensors", "triton", device="cuda")
    tokens = torch.randint(50, (40, 2), device="cuda")

    def stream():
        got, state = [], None
        for tokens_B in tokens:
            logits, state = network.step(tokens_B, state)
            got.append((logits, *(state if isinstance(state, tuple) else [state])))
        return got

    with nothing_recorded():
        wanted = stream()
    got = stream()
    recorded = network.rnn._ready["replays"].recorded
    assert {key[0][0] for key in recorded} == {"network"}, "nothing else is replayed"
    stream()
    assert len(recorded) == 2
    for one, truth in zip(got, wanted, strict=True):
        for a, b in zip(one, truth, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    state = {
        name: tensor.mul(0.5) if tensor.is_floating_point() else tensor for name, tensor in network.state_dict().items()
    }
    network.decoder.load_state_dict(
        {n.removeprefix("decoder."): t for n, t in state.items() if n.startswith("decoder.")}
    )
    with nothing_recorded():
        wanted = stream()
    for _ in range(3):
        again = stream()
    torch.testing.assert_close(again[-1][0], wanted[-1][0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again[-1][0], got[-1][0])
    seen = []
    network.decoder.register_forward_hook(lambda *_: seen.append(1))
    stream()
    assert len(seen) == len(tokens)
