"""Layers on the Triton kernels, whatever form runs them: in the interpreter (in a process of its own), or on a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from srnn.cells import GATES
from srnn.kernels import LayerWeights
from srnn.kernels.contract import equal_lengths
from srnn.kernels.reference import run_layer
from srnn.kernels.triton.backend import Triton
from srnn.sparse import SparseMatrix
from tests.kernels.triton_cases import DEVICE, INTERPRETED, check, check_both, here, layer, on_gpu, state_of, use_chip

TESTS = Path(__file__).parents[1]
PRUNING = [
    f"pruning/test_{name}.py" for name in ("masking", "clipping", "cutting", "mean_squares", "obd_with_clipping")
]
KERNELS = [f"kernels/test_{name}.py" for name in ("triton", "gates", "slices", "vectors", "products")]
FILES = [*KERNELS, "models/test_recurring.py", *PRUNING]
QUICK = (
    "test_what_is_found or test_the_norm_is_of or test_a_matrix_of_zeros or test_an_odd_number_of_groups_in_pairs "
    "or test_recurring or test_a_cut_of_scores or test_means_of_squares"
)
# In parts of about a minute, so that two workers end at about the same time.
PARTS = [KERNELS[:1], KERNELS[1:3], [*KERNELS[3:], FILES[5]], PRUNING]


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
@pytest.mark.parametrize(
    ("which", "files"),
    [(QUICK, FILES), *(pytest.param(f"not ({QUICK})", part, marks=pytest.mark.slow) for part in PARTS)],
    ids=["some", "layers", "blocks", "others", "pruning"],
)
def test_in_the_interpreter(which, files):
    pytest.importorskip("triton")
    paths = [str(TESTS / file) for file in files]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-qx", "-m", "gpu", "-k", which, "-p", "no:cacheprovider", *paths],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (4, 2), (16, 1), (16, 3), (32, 20)])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_layer_is_the_reference(cell, height, streams, reverse):
    weights = layer(cell, 19, 37, height, reverse=reverse)
    check(weights, torch.float32, equal_lengths(3, streams))
    if streams > 1:
        check(weights, torch.float32, torch.tensor([streams, streams, 1]))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (1, 3), (16, 1), (16, 3), (16, 20)])
@pytest.mark.parametrize("equal", [True, False])
def test_both_directions_in_one_launch(cell, height, streams, equal, monkeypatch):
    use_chip(monkeypatch, processors=8)
    forward, backward = (layer(cell, 19, 37, height, reverse=reverse, seed=int(reverse)) for reverse in (False, True))
    sizes = equal_lengths(3, streams) if equal else torch.tensor([streams, -(-streams // 2), 1])
    check_both(forward, backward, torch.float32, sizes)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 1), (16, 2)])
def test_dtypes(dtype, values, height, streams):
    check(layer("gru", 16, 33, height, values=values), dtype, equal_lengths(3, streams))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("height", [1, 16])
def test_rows_of_very_different_lengths(height):
    """Rows with nothing and full ones, and a gate without weights."""
    weights = layer("gru", 8, 96, height, density=1.0)
    dense = weights.w_hh.to_dense()
    dense[96:192] = 0
    dense[16:80] = 0
    dense[192:224] = 0
    matrix = SparseMatrix.from_dense(dense, weights.w_hh.structure, "fp32", 3)
    check(LayerWeights("gru", weights.w_ih, matrix, weights.b_ih, weights.b_hh), torch.float32, equal_lengths(3, 2))


@pytest.mark.gpu
@here
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 2)])
def test_one_unit_and_one_step(height, streams):
    """Triton makes constants of arguments that are 1."""
    check(layer("gru", 3, 1, height, density=1.0), torch.float32, equal_lengths(1, streams))


@pytest.mark.gpu
@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("height", "streams"), [(1, 2), (16, 2)])
@pytest.mark.parametrize("cell", ["gru", "lstm", "relu", "clipped_relu"])
def test_what_is_not_a_number_reaches_the_output(cell, height, streams, bad):
    """In the one stream that holds it, as through torch; and nobody waits for ever."""
    weights = layer(cell, 8, 40, height, density=1.0)
    x = torch.randn(4 * streams, 8, generator=torch.Generator().manual_seed(2))
    x[streams] = bad  # step 1, stream 0
    state = state_of(weights, streams, torch.Generator().manual_seed(3))
    sizes = equal_lengths(4, streams)
    ready = Triton().layer(weights, DEVICE, torch.float32)
    y, _ = ready.run(x.to(DEVICE), sizes, tuple(part.to(DEVICE) for part in state))
    wanted, _ = run_layer(weights, x, sizes, state)
    torch.testing.assert_close(y.cpu(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_reasons():
    kernel, cpu = Triton(), torch.device("cpu")
    if not INTERPRETED:
        assert "GPU" in kernel.supports(None, cpu) or "not installed" in kernel.supports(None, cpu)


@pytest.mark.gpu
@here
def test_reasons_where_it_can_run():
    kernel = Triton()
    assert kernel.supports(None, DEVICE) is None
    assert "float64" in kernel.supports(None, DEVICE, torch.float64)
    assert "int8" in kernel.supports(layer("gru", 4, 8, values="int8"), DEVICE)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 1), (16, 5)])
def test_graphs_streams_and_two_models_at_once(height, streams):
    steps, models = 40, [layer("gru", 64, 500, height, density=0.1, seed=seed) for seed in range(2)]
    sizes = equal_lengths(steps, streams)
    x = torch.randn(steps * streams, 64, device=DEVICE)
    state = (torch.zeros(streams, 500, device=DEVICE),)
    ready = [Triton().layer(m, DEVICE, torch.float32) for m in models]
    with torch.inference_mode():
        wanted = [r.run(x, sizes, state)[0].clone() for r in ready]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, _ = ready[0].run(x, sizes, state)
    for _ in range(20):
        y.fill_(float("nan"))
        graph.replay()
        torch.testing.assert_close(y, wanted[0], rtol=1e-4, atol=1e-5)
    queues = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    got = [[], []]
    for _ in range(50):
        for queue, r, outputs in zip(queues, ready, got, strict=True):
            with torch.cuda.stream(queue):
                outputs.append(r.run(x, sizes, state)[0])
    torch.cuda.synchronize()
    for outputs, truth in zip(got, wanted, strict=True):
        for output in outputs:
            torch.testing.assert_close(output, truth, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("index", range(9))
def test_many_configurations(index):
    """Random ones, 25 of a layer, over a bounded set of compiled shapes."""
    generator = torch.Generator().manual_seed(index)

    def pick(*several):
        return several[int(torch.randint(len(several), (1,), generator=generator))]

    cell, reverse = [("gru", False), ("lstm", True), ("tanh", False)][index // 3]
    floats = [(torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")]
    dtype, values = floats[index % 3 if index < 6 else 1]
    hidden, density = pick(333, 1024, 1760), pick(0.02, 0.1)
    weights = layer(cell, 32, hidden, [1, 16, 32][index % 3], density, values, True, reverse, index)
    for _ in range(25):
        streams, steps = pick(1, 2, 16, 50), pick(1, 5, 12)
        sizes = equal_lengths(steps, streams)
        if pick(False, True):
            sizes = torch.sort(torch.randint(1, streams + 1, (steps,), generator=generator), descending=True).values
            sizes[0] = streams
        check(weights, dtype, sizes)
