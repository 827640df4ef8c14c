"""The Triton kernels compiled for a Hopper GPU, without one: what waiting relies on is decided by the compiler."""

import re

import pytest
import torch

from srnn.cells import GATES
from srnn.kernels import LayerWeights
from srnn.kernels.contract import equal_lengths
from srnn.kernels.triton.chip import Chip
from srnn.kernels.triton.tuning import Tuning
from srnn.sparse import SparseMatrix

H100 = Chip(132, 228 << 10, True, True, Tuning())
triton = pytest.importorskip("triton")


class Caught:
    """Stands for a kernel, and keeps what it is launched with."""

    def __init__(self, kernel):
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid):
        return lambda **given: self.launches.append(given)


def compiled(kernel, given):
    """A kernel as one launch would compile it."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    options = ("num_warps", "launch_cooperative_grid", "maxnreg")
    compiler = {name: given[name] for name in options if name in given}
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = given[name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[name], constants[(index,)] = "constexpr", value
            continue
        signature[name] = mangle_type(value)
        if not isinstance(value, int) or value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=compiler)


def compiled_for(cell, hidden, height, streams, kernel, dtype, monkeypatch):
    """What a layer that is 90 % sparse would launch on an H100, and with which arguments."""
    from srnn.kernels.triton.gates import kernel as gates_module
    from srnn.kernels.triton.recurrence import TritonRecurrence
    from srnn.kernels.triton.slices import kernel as slices_module
    from srnn.kernels.triton.slices import states
    from srnn.kernels.triton.vectors import kernel as vectors_module

    modules = {"recur_vectors": vectors_module, "recur_slices": slices_module, "recur_gates": gates_module}
    where, gates = modules[kernel], GATES[cell]
    generator = torch.Generator().manual_seed(0)
    groups = -(-hidden // height)
    kept = torch.rand(gates, groups, hidden, generator=generator) < 0.1
    dense = kept.repeat_interleave(height, dim=1)[:, :hidden].reshape(gates * hidden, hidden).float()
    values = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    matrix = SparseMatrix.from_dense(dense, "element" if height == 1 else f"{height}x1", values, gates)
    caught = Caught(getattr(where, kernel))
    monkeypatch.setattr(where, kernel, caught)
    monkeypatch.setattr(states, "write_outputs", Caught(states.write_outputs))
    ready = TritonRecurrence((LayerWeights(cell, matrix, matrix),), torch.device("cpu"), dtype, "tf32x3", H100)
    state = tuple(torch.zeros(streams, hidden, dtype=dtype) for _ in range(2 if cell == "lstm" else 1))
    u = torch.zeros(gates * hidden, 3 * streams, dtype=dtype).T  # as a layer's product leaves it for slices
    if streams == 1:
        u = u.contiguous()
    ready(u, equal_lengths(3, streams), state)
    (given,) = caught.launches
    made = compiled(caught.kernel, given)
    if kernel == "recur_gates":
        assert made.metadata.shared <= ready.slices(streams).plan.shared_bytes(height, dtype.itemsize)
    return made, given


@pytest.mark.parametrize(
    ("cell", "hidden", "height", "streams", "kernel"),
    [
        ("gru", 1024, 1, 1, "recur_vectors"),
        ("lstm", 1500, 16, 1, "recur_vectors"),
        ("gru", 1024, 16, 4, "recur_slices"),
        ("lstm", 1024, 32, 40, "recur_slices"),
        ("gru", 1024, 16, 64, "recur_slices"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_threads_wait_for_whole_vectors_of_their_own(cell, hidden, height, streams, kernel, dtype, monkeypatch):
    """The assembly takes a thread's elements, one after the other, for vectors of 16 bytes: the layout must make them
    so, or it would load from wrong places. Blocks must stay in registers."""
    made, given = compiled_for(cell, hidden, height, streams, kernel, dtype, monkeypatch)
    layouts = dict(re.findall(r"^(#\w+) = (#ttg\.blocked.*)$", made.asm["ttgir"], re.MULTILINE))
    waits = re.findall(r"elementwise_inline_asm.*? : tensor<[^,]*, (#\w+)>", made.asm["ttgir"])
    assert waits
    for name in waits:
        sizes = [int(n) for n in re.search(r"sizePerThread = \[([\d, ]+)\]", layouts[name]).group(1).split(",")]
        order = [int(n) for n in re.search(r"order = \[([\d, ]+)\]", layouts[name]).group(1).split(",")]
        assert sizes[-1] * dtype.itemsize >= 16
        assert order[0] == len(sizes) - 1
    if kernel == "recur_slices" and dtype == torch.float16:
        assert given["TILES"] == 1
        _, loop = re.split(r"scf\.(?:while|for)", made.asm["ttgir"], maxsplit=1)
        operands = re.findall(r"tt\.dot (%\w+),", loop)
        assert operands
        for operand in operands:
            assert not re.search(rf"{operand} = ttg\.local_(load|alloc)", loop), "values are loaded anew at each step"


@pytest.mark.parametrize(
    ("cell", "hidden", "height"),
    [("gru", 2560, 32), ("lstm", 2150, 32), ("tanh", 3072, 16), ("tanh", 4500, 32), ("gru", 2560, 16)],
)
def test_products_of_a_gate_read_shared_memory(cell, hidden, height, monkeypatch):
    """Rows of h that went through registers would take two barriers a small piece; values have to be there already."""
    made, given = compiled_for(cell, hidden, height, 64, "recur_gates", torch.float16, monkeypatch)
    _, loop = re.split(r"scf\.while", made.asm["ttgir"], maxsplit=1)
    operands = re.findall(r"warp_group_dot (%\w+), (%\w+),.*? : (\S+)<", loop)
    assert len(operands) == given["GATES"] * given["EACH"] * (2 if given["K_2"] else 1)
    for _, value, kind in operands:
        assert kind == "!ttg.memdesc"
        assert not re.search(rf"{value} = ttg\.local_(load|alloc)", loop), "values are loaded anew at each step"
    shares = re.findall(r"nvidia_mma<.*warpsPerCTA = \[(\d), (\d)\]", made.asm["ttgir"])
    assert set(shares) == {("4", str(given["num_warps"] // 4))}, "warps repeat what others do"


@pytest.mark.parametrize("cell", list(GATES))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16], ids=str)
def test_a_step_of_training_compiles(cell, dtype, products):
    """The interpreter takes operations on 16-bit values that the compiler refuses."""
    from srnn.models import recurring_gpu, recurring_kernel

    u = torch.zeros(2, 1, 3, GATES[cell] * 20, dtype=dtype)
    arrays = recurring_gpu._Arrays.empty(cell, torch.zeros(1, GATES[cell] * 20, 20, dtype=products), u, backward=True)
    shared = {"size": 60, "H": 20, "CELL": cell, "BLOCK": 256, "num_warps": 4, "launch_cooperative_grid": False}
    shared |= {"c": arrays.c, "gates": arrays.gates}
    v = torch.zeros(60, dtype=products)
    forward = {"u": u, "v": v, "h": arrays.h, "h_next": arrays.h, "c_next": arrays.c, "h_low": arrays.low}
    for keep in (True, False):
        launch = shared | forward | {"LOW": arrays.low is not arrays.h, "KEEP": keep}
        made = compiled(recurring_kernel.step_forward, launch)
        states = 1 + (cell == "lstm") + (arrays.low is not arrays.h)
        assert made.asm["ttir"].count("tt.store") == states + (4 if keep and cell in ("gru", "lstm") else 0)
    backward = {"dy": arrays.dy, "dh": arrays.dh, "carry": arrays.carry, "y": arrays.h, "c_next": arrays.c}
    backward |= {"du": arrays.u, "dv": arrays.dv, "APART": arrays.dv is not arrays.u}
    compiled(recurring_kernel.step_backward, shared | backward)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("look", [0, 1, 2])
def test_masking_compiles(size, look):
    from srnn.pruning import masking_kernel

    numbers, small = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    given = {"tables": numbers, "owners": small, "firsts": small, "BITS": masking_kernel._INTEGERS[size], "COUNT": 3}
    given |= {"LOOK": look, "BLOCK": masking_kernel.BLOCK, "num_warps": 4, "launch_cooperative_grid": False}
    made = compiled(masking_kernel.zero_where_pruned, given)
    assert ("tt.reduce" in made.asm["ttir"]) == (look == 2), "only what tells counts"


@pytest.mark.parametrize("kind", ["SCORES", "MAGNITUDES", "SALIENCIES"])
def test_cutting_compiles(kind, monkeypatch):
    """The interpreter does not know which values a branch may change."""
    from srnn.pruning import cutting_kernel

    names = ("count_bins", "pick_bins", "count_equals", "add_up", "write_masks")
    kernels = [getattr(cutting_kernel, name) for name in names]
    launched = {}

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            parameters = [parameter.name for parameter in self.kernel.params]
            return lambda *given, **options: launched.update(
                {self.kernel: dict(zip(parameters, given, strict=True)) | options}
            )

    for name, kernel in zip(names, kernels, strict=True):
        monkeypatch.setattr(cutting_kernel, name, Kernel(kernel))
    numbers, small = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    reals = torch.zeros(6, dtype=torch.float64)
    for launch in cutting_kernel.launches(
        (numbers, small, small), reals, reals[:1], small, 30_000, getattr(cutting_kernel, kind).value
    ):
        launch()
    for kernel in kernels:
        made = compiled(kernel, launched[kernel] | {"launch_cooperative_grid": False})
        assert made.metadata.shared < 8192, "as many programs as there may be run at once"


def test_means_of_squares_compile():
    from srnn.pruning import mean_squares_kernel

    numbers, small = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    given = {"tables": numbers, "owners": small, "firsts": small, "taken": torch.zeros(1, dtype=torch.uint8)}
    given |= {"decay": 0.9, "BLOCK": mean_squares_kernel.MEAN_BLOCK, "num_warps": 4, "launch_cooperative_grid": False}
    made = compiled(mean_squares_kernel.take_in, given)
    assert made.asm["ttir"].count("tt.store") == 1


@pytest.mark.parametrize("means", [False, True])
def test_clipping_compiles(means):
    from srnn.pruning import clipping_kernel

    numbers, small = torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int32)
    given = {"tables": numbers, "owners": small, "firsts": small, "found": torch.zeros(2), "decay": 0.9, "MEANS": means}
    given |= {"BLOCK": clipping_kernel.CLIP_BLOCK, "num_warps": clipping_kernel.WARPS, "launch_cooperative_grid": False}
    given |= {"maxnreg": clipping_kernel._REGISTERS} if means else {}
    text = compiled(clipping_kernel.scale_kept, given).asm["ttir"]
    assert text.count("tt.store") == 1 + means
    assert max(text.rfind("tt.load"), 0) < text.find("tt.store"), "all is read before anything is written"
