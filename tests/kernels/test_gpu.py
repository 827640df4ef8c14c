import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from srnn.inference.sparsify import desparsify, sparsify
from tests.kernels.common import prune, relative_error

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kernel", ["dense", "csr", "auto"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3)])
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_sparse_layer_is_torchs(cell, kernel, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    module = prune(cell(40, 63, 2, bidirectional=True), 0.2)
    sparse = sparsify(module, values="fp16", kernel=kernel).cuda()
    truth = copy.deepcopy(desparsify(sparse)).double().cpu()
    x = torch.randn(9, 5, 40)
    lengths = torch.tensor([9, 3, 7, 1, 9])
    packed = pack_padded_sequence(x.to(dtype), lengths, enforce_sorted=False)
    for given in (x.to(dtype).cuda(), packed.to("cuda")):
        got, _ = sparse(given)
        if isinstance(given, PackedSequence):
            wanted, _ = truth(PackedSequence(packed.data.double(), *packed[1:]))
            got, wanted = got.data, wanted.data
        else:
            wanted, _ = truth(x.to(dtype).double())
        assert got.dtype == dtype
        assert relative_error(got.cpu(), wanted) < tolerance


def test_linear_and_embedding_move_with_their_network():
    network = prune(nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 70)), 0.2)
    sparse = sparsify(network).cuda()
    tokens = torch.randint(50, (3, 4))
    with torch.no_grad():
        wanted = network(tokens)
    torch.testing.assert_close(sparse(tokens.cuda()).cpu(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse(tokens[:1, :1].cuda()).cpu(), wanted[:1, :1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.cpu()(tokens), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", ["triton", "auto"])
@pytest.mark.parametrize("cell", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_sparse_layer_on_persistent_kernels_is_torchs(cell, kernel, monkeypatch, tmp_path):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    torch.manual_seed(0)
    sparse = sparsify(prune(cell(40, 160, 2, bidirectional=True), 0.1, 16).cuda(), "16x1", "fp16", kernel)
    truth = copy.deepcopy(desparsify(sparse)).double().cpu()
    for streams in (1, 5):
        x = torch.randn(12, streams, 40).half()
        wanted, _ = truth(x.double())
        for _ in range(2):  # the second time auto knows what to take
            got, _ = sparse(x.cuda())
            assert relative_error(got.cpu(), wanted) < 1e-3


def recurrence_of(dense, structure, values="fp16", cell="gru"):
    from srnn.kernels import LayerWeights
    from srnn.kernels.triton.backend import Triton
    from srnn.sparse import SparseMatrix

    matrix = SparseMatrix.from_dense(dense, structure, values, {"gru": 3, "tanh": 1}[cell])
    return Triton()._launched(LayerWeights(cell, matrix, matrix), torch.device("cuda"), torch.float16)


def microseconds(recurrence, streams, steps=256):
    """A step of a sequence, replayed as a CUDA graph."""
    from srnn.kernels.contract import equal_lengths
    from srnn.kernels.timing import graphed, timed

    weights, device = recurrence.weights, torch.device("cuda")
    u = torch.randn(weights.w_hh.shape[0], steps * streams, device=device, dtype=torch.float16).T
    state = (torch.zeros(streams, weights.hidden_size, device=device, dtype=torch.float16),)
    replay, (y, _) = graphed(lambda: recurrence(u, equal_lengths(steps, streams), state), device)
    seconds = sorted(timed(replay, device) for _ in range(20))[10]
    assert y.isfinite().all()
    return 1e6 * seconds / steps


def test_rows_of_very_different_lengths_take_little_longer():
    """The same number of non-zeros, dealt out evenly or not: at most half as long again."""
    torch.manual_seed(0)
    hidden, total = 1024, 300
    even = (torch.rand(3 * hidden, hidden).argsort(dim=1) < total // 3).float()
    rows = torch.zeros(3 * hidden, hidden)
    full = torch.randperm(3 * hidden)[: 3 * hidden * (total // 3) // 1000]
    rows[full] = (torch.rand(len(full), hidden).argsort(dim=1) < 1000).float()
    gate = torch.cat([even[:hidden] * 0, *[(torch.rand(hidden, hidden).argsort(dim=1) < total // 2).float()] * 2])
    balanced = microseconds(recurrence_of(even * 0.05, "element"), 1)
    for uneven in (rows, gate):
        assert uneven.sum() == pytest.approx(float(even.sum()), rel=0.01)
        assert microseconds(recurrence_of(uneven * 0.05, "element"), 1) < 1.5 * balanced


@pytest.mark.parametrize("streams", [1, 16])
def test_groups_with_very_different_numbers_of_blocks_take_little_longer(streams):
    """0 to 60 blocks a group, 12 in the median, against as many everywhere."""
    torch.manual_seed(0)
    groups, hidden = 3 * 64, 1024
    counts = (60 * torch.rand(groups).pow(2.32)).round().long()
    assert 10 <= int(counts.median()) <= 14
    mean = int(counts.float().mean().round())

    def blocks(counts):
        kept = torch.rand(groups, hidden).argsort(dim=1) < counts[:, None]
        return kept.float().repeat_interleave(16, dim=0) * 0.05

    even = microseconds(recurrence_of(blocks(torch.full((groups,), mean)), "16x1"), streams)
    assert microseconds(recurrence_of(blocks(counts), "16x1"), streams) < 1.5 * even


def test_both_directions_take_little_longer_than_one():
    from srnn.kernels.contract import equal_lengths
    from srnn.kernels.timing import graphed, timed
    from srnn.kernels.triton.backend import Triton

    torch.manual_seed(0)
    sparse = sparsify(prune(nn.GRU(64, 1024, bidirectional=True), 0.1, 16).cuda(), "16x1", "fp16", "triton")
    weights, device = [sparse.layer_weights(d) for d in range(2)], torch.device("cuda")
    x = torch.randn(256, 64, device=device, dtype=torch.float16)
    state = torch.zeros(2, 1, 1024, device=device, dtype=torch.float16)
    one, both = Triton().layer(weights[0], device, x.dtype), Triton().both(*weights, device, x.dtype)
    calls = {
        "one": graphed(lambda: one.run(x, equal_lengths(256, 1), (state[0],)), device)[0],
        "both": graphed(lambda: both.run(x, equal_lengths(256, 1), (state,)), device)[0],
    }
    seconds = {name: sorted(timed(call, device) for _ in range(20))[10] for name, call in calls.items()}
    assert seconds["both"] < 1.4 * seconds["one"], seconds


@pytest.mark.parametrize(
    ("structure", "streams", "hidden"), [("element", 1, 512), ("16x1", 1, 512), ("16x1", 16, 512), ("32x1", 64, 2560)]
)
def test_a_hundred_thousand_launches(structure, streams, hidden):
    """None of which waits for ever, or in vain."""
    from srnn.kernels.contract import equal_lengths

    torch.manual_seed(0)
    height = 1 if structure == "element" else int(structure[:-2])
    kept = (torch.rand(3 * hidden // height, hidden) < 0.1).float().repeat_interleave(height, dim=0)
    recurrence = recurrence_of(kept * torch.randn(3 * hidden, hidden) * 0.1, structure)
    u = torch.randn(4 * streams, 3 * hidden, device="cuda", dtype=torch.float16)
    state, sizes = (torch.zeros(streams, hidden, device="cuda", dtype=torch.float16),), equal_lengths(4, streams)
    first, _ = recurrence(u, sizes, state)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(100):
            y, _ = recurrence(u, sizes, state)
    for _ in range(334):
        graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(y, first, rtol=1e-2, atol=1e-3)
    assert not int(recurrence.failed)


def test_a_graphed_layer_serves_several_streams_and_shapes():
    from srnn.kernels.contract import equal_lengths
    from srnn.kernels.dense import Torch
    from srnn.kernels.replay import MOST_SHAPES
    from srnn.kernels.replayed import Replayed

    torch.manual_seed(0)
    device = torch.device("cuda")
    weights = sparsify(prune(nn.GRU(16, 32), 0.2).cuda(), kernel="dense").layer_weights(0)
    plain, graphed = (kernel.layer(weights, device, torch.float32) for kernel in (Torch(), Replayed(Torch())))
    inputs = [torch.randn(20 * streams, 16, device=device) for streams in range(1, MOST_SHAPES + 3)]
    wanted = [plain.run(x, equal_lengths(20, len(x) // 20), (x.new_zeros(len(x) // 20, 32),))[0] for x in inputs]
    torch.cuda.synchronize()
    queues = [torch.cuda.Stream(), torch.cuda.Stream()]
    for repeat in range(10):
        got = []
        for index, x in enumerate(inputs):
            with torch.cuda.stream(queues[(index + repeat) % 2]):
                got.append(graphed.run(x, equal_lengths(20, len(x) // 20), (x.new_zeros(len(x) // 20, 32),))[0])
        torch.cuda.synchronize()
        for y, truth in zip(got, wanted, strict=True):
            torch.testing.assert_close(y, truth, rtol=1e-4, atol=1e-5)
