"""The Triton kernels, in the interpreter on a CPU (in a process of its own) or on a GPU.

The interpreter reads past an array with a crash, and is switched on before triton is imported.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from srnn.cells import GATES
from srnn.kernels import LayerWeights
from srnn.kernels.contract import equal_lengths
from srnn.kernels.reference import run_layer
from srnn.sparse import SparseMatrix
from tests.kernels.common import relative_error

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}

here = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.skipif(INTERPRETED, reason="this is that run")
def test_in_the_interpreter():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", __file__],
        env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


def pruned(rows, columns, gates, height, density, values, generator):
    groups = -(-(rows // gates) // height)
    kept = torch.rand(gates, groups, columns, generator=generator) < density
    kept = kept.repeat_interleave(height, dim=1)[:, : rows // gates].reshape(rows, columns)
    scale = 0.8 / max(1.0, (columns * density) ** 0.5)
    weight = torch.randn(rows, columns, generator=generator) * scale * kept
    return SparseMatrix.from_dense(weight, "element" if height == 1 else f"{height}x1", values, gates)


def layer(cell, inputs, hidden, height=1, density=0.2, values="fp32", bias=True, reverse=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = GATES[cell]
    w_ih = pruned(gates * hidden, inputs, gates, height, density, values, generator)
    w_hh = pruned(gates * hidden, hidden, gates, height, density, values, generator)
    b = torch.randn(2, gates * hidden, generator=generator) * 0.1
    return LayerWeights(cell, w_ih, w_hh, b[0] if bias else None, b[1] if bias else None, reverse=reverse)


def state_of(weights, streams, generator):
    sizes = 2 if weights.cell == "lstm" else 1
    return tuple(torch.randn(streams, weights.hidden_size, generator=generator) * 0.5 for _ in range(sizes))


def check(weights, dtype, sizes, precision="tf32x3"):
    from srnn.kernels.triton.backend import Triton

    generator = torch.Generator().manual_seed(1)
    streams = int(sizes[0])
    x = torch.randn(int(sizes.sum()), weights.w_ih.shape[1], generator=generator).to(dtype)
    state = tuple(part.to(dtype) for part in state_of(weights, streams, generator))
    kernel = Triton(precision)
    assert kernel.supports(weights, DEVICE, dtype, streams) is None
    ready = kernel.layer(weights, DEVICE, dtype)
    given = tuple(part.to(DEVICE) for part in state)
    kept = [part.clone() for part in given]
    y, after = ready.run(x.to(DEVICE), sizes, given)
    truth, end = run_layer(weights, x.double(), sizes, tuple(part.double() for part in state))
    tolerance = 1e-3 if precision == "tf32" else TOLERANCE[dtype]
    assert y.dtype == dtype
    assert relative_error(y.cpu(), truth) < tolerance
    for got, wanted in zip(after, end, strict=True):
        assert got.shape == wanted.shape
        assert relative_error(got.cpu(), wanted) < tolerance
    for now, before in zip(given, kept, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)
    return y, after


def check_both(forward, backward, dtype, sizes):
    """Both directions in one launch are each as by itself. Returns the recurrence."""
    from srnn.kernels.triton.backend import Triton

    streams = int(sizes[0])
    x = torch.randn(int(sizes.sum()), forward.w_ih.shape[1]).to(dtype)
    each = [state_of(weights, streams, None) for weights in (forward, backward)]
    state = tuple(torch.stack(parts).to(dtype) for parts in zip(*each, strict=True))
    ready = Triton().both(forward, backward, DEVICE, dtype)
    assert ready.recurrence.count == 2
    y, end = ready.run(x.to(DEVICE), sizes, tuple(part.to(DEVICE) for part in state))
    for d, weights in enumerate((forward, backward)):
        wanted, after = run_layer(weights, x.double(), sizes, tuple(part[d].double() for part in state))
        assert relative_error(y.cpu().chunk(2, dim=1)[d], wanted) < TOLERANCE[dtype]
        for got, part in zip(end, after, strict=True):
            assert relative_error(got[d].cpu(), part) < TOLERANCE[dtype]
    return ready.recurrence


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
    from srnn.kernels.triton import backend

    monkeypatch.setattr(backend, "processors", lambda device: 8)
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
@pytest.mark.parametrize(("precision", "tiles"), [("tf32x3", 1), ("ieee", 3), ("tf32", 1)])
def test_precisions_of_fp32(precision, tiles, monkeypatch):
    """On tensor cores more values fit the registers."""
    from srnn.kernels.triton.backend import Triton

    monkeypatch.setattr("srnn.kernels.triton.backend.processors", lambda device: 40)
    weights = layer("gru", 8, 300, 32, density=1.0)
    assert Triton(precision).recurrence(weights, DEVICE, torch.float32).blocks(9).plan.tiles == tiles
    check(weights, torch.float32, equal_lengths(2, 9), precision)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("height", [1, 8])
def test_weights_that_do_not_fit_one_tile(height, monkeypatch):
    from srnn.kernels.triton import plan

    monkeypatch.setattr(plan, "MOST_VALUES", 2048)
    monkeypatch.setattr(plan, "LEAST_VALUES", 1 << 20)
    weights = layer("gru", 8, 130, height, density=0.5)
    assert plan.lay_out([weights.w_hh], 1).plan.tiles > 1
    check(weights, torch.float32, equal_lengths(2, 1))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
@pytest.mark.parametrize(("registers", "warps", "tiles"), [({4: 0, 8: 0, 16: 999}, 16, 1), ({4: 0, 8: 0, 16: 0}, 8, 2)])
def test_blocks_in_more_warps_or_from_the_cache(cell, registers, warps, tiles, monkeypatch):
    from srnn.kernels.triton import plan

    monkeypatch.setattr(plan, "OPERAND_REGISTERS", registers)
    monkeypatch.setattr(plan, "MOST_BY_GATE", 0)
    hidden = 300 if cell != "tanh" else 1100  # blocks of one gate fall into four times as many chunks
    weights = layer(cell, 8, hidden, 32, density=1.0)
    monkeypatch.setattr("srnn.kernels.triton.backend.processors", lambda device: 40)
    made = plan.plan_blocks([weights.w_hh], 40, 2, 9)
    assert (made.warps, made.tiles) == (warps, tiles)
    check(weights, torch.float16, equal_lengths(2, 9))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("streams", [9, 40])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_slices_of_streams_of_different_lengths(cell, reverse, streams):
    """Several slices a program, of which the last is not full."""
    lengths = torch.arange(streams) % 4 + 1
    lengths[0] = 4
    sizes = torch.tensor([int((lengths > t).sum()) for t in range(4)])
    check(layer(cell, 19, 40, 16, reverse=reverse), torch.float32, sizes)


@pytest.mark.gpu
@here
@pytest.mark.parametrize(
    ("cell", "reverse", "dtype"),
    [("gru", False, torch.float16), ("lstm", True, torch.float16), ("tanh", False, torch.bfloat16)],
)
@pytest.mark.parametrize(
    ("height", "processors", "wide"), [(32, 3, 64), (16, 6, 64), (16, 3, 64), (16, 12, 64), (16, 18, 32)]
)
def test_many_streams_in_wide_slices(cell, reverse, dtype, height, processors, wide, monkeypatch):
    """Of 64 in one product a gate where slices of 32 would not all run at once; the last slice is not full."""
    from srnn.kernels.triton import plan as planner

    monkeypatch.setattr("srnn.kernels.triton.backend.processors", lambda device: processors)
    weights = layer(cell, 19, 90, height, density=0.8, reverse=reverse)
    crowded = processors == 3 and height == 16
    if crowded and cell == "lstm":  # whose pairs of groups are slower than slices of 16, if those fit
        assert planner.plan_blocks([weights.w_hh], processors, 2, 70).wide == 16
        monkeypatch.setattr(planner, "OPERAND_REGISTERS", {4: 0})
    plan = planner.plan_blocks([weights.w_hh], processors, 2, 70)
    assert plan.wide == (wide if cell != "tanh" else 64), "a single gate is always faster so"
    assert plan.each == (2 if crowded and cell != "tanh" else 1)
    assert plan.resident == (2 if crowded and cell == "tanh" else 1)
    assert (plan.k_2 > 0) == plan.by_gate
    check(weights, dtype, equal_lengths(2, 70))
    check(weights, dtype, torch.tensor([70, 33, 1]))


@pytest.mark.gpu
@here
@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize(("hidden", "processors"), [(70, 3), (33, 2)])
def test_an_odd_number_of_groups_in_pairs(cell, hidden, processors, monkeypatch):
    """The last program has one group, and that is not full."""
    from srnn.kernels.triton import plan

    monkeypatch.setattr("srnn.kernels.triton.backend.processors", lambda device: processors)
    monkeypatch.setattr(plan, "OPERAND_REGISTERS", {4: 0})
    weights = layer(cell, 19, hidden, 16, density=0.8)
    assert plan.plan_blocks([weights.w_hh], processors, 2, 40).each == 2
    check(weights, torch.float16, equal_lengths(2, 40))
    check(weights, torch.float16, torch.tensor([130, 33, 1]))


@pytest.mark.gpu
@here
@pytest.mark.parametrize(("hidden", "height", "processors", "each"), [(90, 32, 6, 1), (37, 16, 4, 2)])
def test_both_directions_by_gates(hidden, height, processors, each, monkeypatch):
    monkeypatch.setattr("srnn.kernels.triton.backend.processors", lambda device: processors)
    forward, backward = (layer("gru", 19, hidden, height, density=0.8, reverse=d == 1, seed=d) for d in range(2))
    for sizes in (equal_lengths(3, 40), torch.tensor([40, 33, 1])):
        recurrence = check_both(forward, backward, torch.float16, sizes)
        assert recurrence.blocks(40).plan.by_gate
        assert recurrence.blocks(40).plan.each == each


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
@pytest.mark.parametrize("cell", ["gru", "lstm", "tanh"])
@pytest.mark.parametrize("sizes", [[3] * 4, [3, 2, 2, 1]])
def test_units_in_another_order(cell, sizes, monkeypatch):
    """The longest rows of each direction first: units are dealt out to programs one by one."""
    from srnn.kernels.triton import backend

    monkeypatch.setattr(backend, "processors", lambda device: 8)
    monkeypatch.setattr(backend, "programs_of", lambda matrices, processors, streams: 4)
    both, gates = [], GATES[cell]
    for d in range(2):
        weights = layer(cell, 19, 37, reverse=d == 1, seed=d, density=0.6)
        dense = weights.w_hh.to_dense()
        dense.view(gates, 37, 37)[:, 12 + d :] = 0
        both.append(replace(weights, w_hh=SparseMatrix.from_dense(dense, weights.w_hh.structure, "fp32", gates)))
        check(both[-1], torch.float32, torch.tensor(sizes))
    layout = check_both(*both, torch.float32, torch.tensor(sizes)).layout(3)
    assert layout.places.gather(1, layout.units).equal(torch.arange(37, device=DEVICE).expand(2, -1))
    assert not layout.units[0].equal(layout.units[1])


@pytest.mark.gpu
@here
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 2)])
def test_one_unit_and_one_step(height, streams):
    """Triton makes constants of arguments that are 1."""
    check(layer("gru", 3, 1, height, density=1.0), torch.float32, equal_lengths(1, streams))


@pytest.mark.gpu
@here
def test_a_matrix_of_zeros():
    weights = layer("lstm", 8, 20, density=0.0)
    assert weights.w_hh.blocks == 0
    check(weights, torch.float32, equal_lengths(2, 1))


@pytest.mark.gpu
@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("height", "streams"), [(1, 2), (16, 2)])
@pytest.mark.parametrize("cell", ["gru", "lstm", "relu", "clipped_relu"])
def test_what_is_not_a_number_reaches_the_output(cell, height, streams, bad):
    """In the one stream that holds it, as through torch; and nobody waits for ever."""
    from srnn.kernels.triton.backend import Triton

    weights = layer(cell, 8, 40, height, density=1.0)
    x = torch.randn(4 * streams, 8, generator=torch.Generator().manual_seed(2))
    x[streams] = bad  # step 1, stream 0
    state = state_of(weights, streams, torch.Generator().manual_seed(3))
    sizes = equal_lengths(4, streams)
    ready = Triton().layer(weights, DEVICE, torch.float32)
    y, _ = ready.run(x.to(DEVICE), sizes, tuple(part.to(DEVICE) for part in state))
    wanted, _ = run_layer(weights, x, sizes, state)
    torch.testing.assert_close(y.cpu(), wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.gpu
@here
def test_a_state_that_looks_unwritten_is_a_nan():
    """The bits that mark what is not written yet may come from outside."""
    from srnn.kernels.triton.backend import Triton

    weights = layer("gru", 8, 40)
    strange = torch.full((1, 40), -1, dtype=torch.int32).view(torch.float32)
    ready = Triton().layer(weights, DEVICE, torch.float32)
    y, _ = ready.run(torch.randn(3, 8, device=DEVICE), equal_lengths(3, 1), (strange.to(DEVICE),))
    assert y.isnan().all()


@pytest.mark.gpu
@here
@pytest.mark.parametrize("structure", ["element", "8x1", "16x1", "32x1"])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 40, 70, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_products(structure, rows, dtype):
    """Of few rows and of many, with and without a bias, whichever side is contiguous; a row of NaN stays one."""
    from srnn.kernels.triton.backend import Triton

    generator = torch.Generator().manual_seed(rows)
    height = 1 if structure == "element" else int(structure[:-2])
    values = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    matrix = pruned(3 * 37, 50, 3, height, 0.08, values, generator)
    dense = matrix.to_dense().double()
    x = torch.randn(rows, 50, generator=generator).to(dtype)
    b = torch.randn(111, generator=generator) if rows % 2 else None
    wanted = x.double() @ dense.T + (0 if b is None else b)
    product = Triton().product(matrix, b, DEVICE, dtype)
    lost = rows // 2 if rows > 1 and product.is_sparse_for(rows, dtype) else rows
    x[lost : lost + 1] = torch.nan
    others = [row for row in range(rows) if row != lost]
    for together in (False, True):
        y = product(x.to(DEVICE), streams_together=together).cpu()
        assert y.dtype == dtype
        assert y.stride() == ((1, rows) if together else (111, 1))
        assert relative_error(y[others], wanted[others]) < TOLERANCE[dtype]
        if lost < rows:
            assert torch.equal(y[lost].isnan(), (dense != 0).any(1))


@pytest.mark.gpu
@here
def test_products_of_so_many_inputs_that_columns_just_fit():
    """Places without a block multiply a row of zeros after the last input, which 16 bits cannot name."""
    from srnn.kernels.triton.backend import Triton

    dense = torch.zeros(16, 1 << 16)
    dense[:, 1:40] = 0.5
    matrix = SparseMatrix.from_dense(dense, "16x1", "fp16")
    assert matrix.columns.dtype == torch.uint16
    x = torch.ones(5, 1 << 16, dtype=torch.float16)
    x[:, 0] = torch.inf
    y = Triton().product(matrix, None, DEVICE, torch.float16)(x.to(DEVICE))
    assert (y == 0.5 * 39).all()


@pytest.mark.gpu
@here
def test_products_of_other_values_than_inputs():
    from srnn.kernels.triton.backend import Triton

    generator = torch.Generator().manual_seed(0)
    matrix = pruned(3 * 37, 50, 3, 16, 0.08, "fp32", generator)
    x = torch.randn(70, 50, generator=generator).half()
    y = Triton().product(matrix, None, DEVICE, torch.float16)(x.to(DEVICE))
    assert relative_error(y.cpu(), x.double() @ matrix.to_dense().double().T) < 1e-3


@pytest.mark.gpu
@here
def test_products_with_many_rows_are_dense_where_that_is_faster():
    from srnn.kernels.triton.backend import Triton

    generator = torch.Generator().manual_seed(0)
    for structure, density, sparse in (
        ("32x1", 0.1, True),
        ("32x1", 0.3, False),
        ("16x1", 0.3, False),
        ("8x1", 0.01, False),
    ):
        matrix = pruned(3 * 64, 64, 3, int(structure[:-2]), density, "fp16", generator)
        product = Triton().product(matrix, None, DEVICE, torch.float16)
        assert product.is_sparse_for(100, torch.float16) == sparse
        assert product.is_sparse_for(2, torch.float16)
        assert product.is_sparse_for(100, torch.float32) == (matrix.height >= 16)


def test_reasons():
    from srnn.kernels.triton.backend import Triton

    kernel, cpu = Triton(), torch.device("cpu")
    if not INTERPRETED:
        assert "GPU" in kernel.supports(None, cpu) or "not installed" in kernel.supports(None, cpu)


@pytest.mark.gpu
@here
def test_reasons_where_it_can_run():
    from srnn.kernels.triton.backend import Triton

    kernel = Triton()
    assert kernel.supports(None, DEVICE) is None
    assert "float64" in kernel.supports(None, DEVICE, torch.float64)
    assert "int8" in kernel.supports(layer("gru", 4, 8, values="int8"), DEVICE)


def test_programs_get_equal_shares():
    """Rows of 0 to 60 blocks, in an order that would leave one program most of them."""
    import numpy as np

    from srnn.kernels.triton.plan import lay_out, padded

    generator = torch.Generator().manual_seed(0)
    counts = torch.sort((torch.rand(512, generator=generator) * 61).long()).values
    dense = (torch.rand(512, 512, generator=generator).argsort(dim=1) < counts[:, None]).float()
    layout = lay_out([SparseMatrix.from_dense(dense)], 16)
    programs = layout.plan.programs
    shares = (layout.columns.view(programs, -1) != padded(512)).sum(dim=1).numpy()
    assert shares.sum() == counts.sum()
    assert shares.max() <= 1.05 * np.mean(shares)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("height", "streams"), [(1, 1), (16, 1), (16, 5)])
def test_graphs_streams_and_two_models_at_once(height, streams):
    from srnn.kernels.triton.backend import Triton

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
def test_a_kernel_that_waits_in_vain_gives_up_and_says_so():
    from dataclasses import replace

    from srnn.kernels.triton.backend import Triton

    weights = layer("gru", 64, 500, density=0.1)
    recurrence = Triton().recurrence(weights, DEVICE, torch.float32)
    whole = recurrence.layout(1)
    programs = whole.plan.programs
    assert programs > 2
    recurrence.layouts[programs] = replace(whole, plan=replace(whole.plan, programs=programs - 1))
    u, sizes = torch.randn(10, 1500, device=DEVICE), equal_lengths(10, 1)
    state = (torch.zeros(1, 500, device=DEVICE),)
    y, _ = recurrence(u, sizes, state)
    torch.cuda.synchronize()
    assert y.isnan().any()
    recurrence.layouts[programs] = whole
    with pytest.raises(RuntimeError, match="gave up waiting"):
        recurrence(u, sizes, state)
    assert recurrence(u, sizes, state)[0].isfinite().all()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("name", "streams", "height", "hidden"), [("recur_blocks", 4, 16, 500), ("recur_gates", 64, 32, 2560)]
)
def test_many_streams_that_wait_in_vain_give_up_too(name, streams, height, hidden, monkeypatch):
    """One program fewer than the others wait for."""
    from srnn.kernels.triton import blocks, gates
    from srnn.kernels.triton.backend import Triton

    class OneShort:
        def __getitem__(self, grid):
            if name == "recur_blocks":
                return lambda *given, **options: whole[(grid[0] - 1, *grid[1:])](*given, **options)
            # Programs count how many there are: one that there is more than were counted in is what they wait for.
            return lambda *given, **options: whole[grid](*given[:11], given[11] - 1, *given[12:], **options)

    kernels = blocks if name == "recur_blocks" else gates
    whole = getattr(kernels, name)
    dtype = torch.float32 if name == "recur_blocks" else torch.float16
    weights = layer("gru", 64, hidden, height, density=0.1, values="fp32" if dtype == torch.float32 else "fp16")
    recurrence = Triton().recurrence(weights, DEVICE, dtype)
    u, sizes = torch.randn(5 * streams, 3 * hidden, device=DEVICE, dtype=dtype), equal_lengths(5, streams)
    state = (torch.zeros(streams, hidden, device=DEVICE, dtype=dtype),)
    monkeypatch.setattr(kernels, name, OneShort())
    y, _ = recurrence(u, sizes, state)
    torch.cuda.synchronize()
    # Units wait for those they depend on, or for all.
    lost = y.view(5, streams, hidden)[(2 if name == "recur_blocks" else 1) :, :, : hidden * 4 // 5]
    assert lost.isnan().all(), "all depend on what was never written"
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="gave up waiting"):
        recurrence(u, sizes, state)
    assert recurrence(u, sizes, state)[0].isfinite().all()


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
