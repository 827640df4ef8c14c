"""``kernel=triton``: persistent kernels on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.kernels.contract import Kernel, Layer, LayerWeights, Recurrence, State
from srnn.kernels.triton.plan import (
    MOST_UNITS,
    BlockLayout,
    BlockPlan,
    Layout,
    lay_out,
    lay_out_blocks,
    padded,
    plan_blocks,
    programs_of,
)
from srnn.registry import register
from srnn.sparse import SparseMatrix, stacked

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
# Rows up to which the matrix-vector form of a product is used; above, dense, or for blocks of 16 and more the form of
# dot products. On an H100, 7680x2560, 90 %: elements take 9.7 us for 4 rows and 14 for 8, cuBLAS 9.7 and 8.8; 32x1
# blocks 5.1 for 2 rows and 6.8 for 4, as dot products 6.2 for both.
FEW_ROWS, FEW_ROWS_OF_BLOCKS = 4, 2
# Dense products of 16 bits are the faster ones from this share of a block's height on. On an H100, 7680x2560 by 4096
# rows: cuBLAS takes 197 us; 32x1 blocks 103 at 90 %, 16x1 blocks 173.
DENSE_FROM = 150

# Units of a program that transposes outputs.
OUTPUTS = 64

# Of a whole recurrent matrix, a multiprocessor: half of its registers.
DENSE_BYTES = 128 << 10


@functools.cache
def interpreted() -> bool:
    """Whether Triton runs kernels in Python on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _current(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device, wherever the tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@functools.cache
def _missing() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed"


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors; for the interpreter, few."""
    return 3 if interpreted() else int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes that the programs of a multiprocessor share; for the interpreter, as on an H100."""
    return 228 << 10 if interpreted() else torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@functools.cache
def has_warpgroups(device: torch.device) -> bool:
    """Whether it is a Hopper GPU; the interpreter is one."""
    return interpreted() or torch.cuda.get_device_capability(device)[0] == 9


@functools.cache
def has_tf32(device: torch.device) -> bool:
    """Whether it multiplies in tf32, as GPUs since Ampere do."""
    return interpreted() or torch.cuda.get_device_capability(device) >= (8, 0)


@register.kernel("triton")
class Triton(Kernel):
    """A whole sequence in one launch, the weights on the chip.

    Values of fp16, bf16 or fp32, sums in fp32. ``precision`` is that of products of fp32 with several streams or many
    rows: ``tf32x3`` makes three of tf32 of one where that is faster, and is as exact as ``ieee``; ``tf32`` has 11 bits.
    ``structure`` lays recurrent weights out in these blocks, zeros and all, instead of as they are stored: for weights
    with few zeros, of layers that fit the chip.
    """

    device_types = ("cuda",)

    def __init__(
        self,
        precision: Literal["tf32x3", "ieee", "tf32"] = "tf32x3",
        structure: Literal["stored", "8x1", "16x1", "32x1"] = "stored",
    ) -> None:
        self.precision, self.structure = precision, structure

    def supports(
        self,
        weights: LayerWeights | SparseMatrix | None,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        batch: int = 1,
    ) -> str | None:
        """A CUDA GPU of compute capability 7.0 and up, or Triton's interpreter."""
        if (reason := _missing()) is not None:
            return reason
        if device.type == "cuda":
            if torch.cuda.get_device_capability(device) < (7, 0):
                return "needs a GPU of compute capability 7.0 or newer"
        elif not (device.type == "cpu" and interpreted()):
            return f"runs on CUDA GPUs, not on {device.type}"
        if dtype not in FLOATS:
            return f"computes in fp16, bf16 or fp32, not in {dtype}"
        one = [] if weights is None or isinstance(weights, LayerWeights) else [weights]
        for matrix in weights.matrices.values() if isinstance(weights, LayerWeights) else one:
            if matrix.values_name == "int8":
                return "takes fp16, bf16 or fp32 values, not int8"
        if isinstance(weights, LayerWeights):
            if weights.w_hr is not None:
                return "has no projections of an LSTM's output"
            if weights.hidden_size > MOST_UNITS:
                return f"takes up to {MOST_UNITS} hidden units, not {weights.hidden_size}"
            rows, columns = weights.w_hh.shape
            if self.structure != "stored" and rows * columns * dtype.itemsize > processors(device) * DENSE_BYTES:
                return f"in {self.structure} blocks its recurrent weights may not fit the chip"
        return None

    def product(self, matrix: SparseMatrix, bias: Tensor | None, device: torch.device, dtype: torch.dtype) -> _Product:
        """Sparse for few rows, and for many of tall blocks; else dense."""
        bias = None if bias is None else bias.to(device)
        # As exact, and with as many rows as a sequence has faster: on an H100 4096 of fp32 by 7680x2560 32x1 90 % take
        # 466 us, as tf32x3 537.
        precision = "ieee" if self.precision == "tf32x3" else self.precision
        return _Product(matrix.to(device), bias, dtype, precision)

    def recurrence(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> _Recurrence:
        """One launch a sequence."""
        return _Recurrence((self._laid_out(weights),), device, dtype, self.precision)

    def _laid_out(self, weights: LayerWeights) -> LayerWeights:
        matrix = weights.w_hh
        if self.structure in ("stored", matrix.structure):
            return weights
        dense, structure = matrix.to_dense(), self.structure
        blocks = SparseMatrix.from_dense(dense, structure, matrix.values_name, matrix.gates)  # type: ignore[arg-type]
        return replace(weights, w_hh=blocks)

    def layer(self, weights: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """The product hands its outputs on in the order in which the recurrence reads them."""
        product = self.product(weights.w_ih, weights.input_bias, device, dtype)
        return _Layer(product, self.recurrence(weights, device, dtype))

    def both(self, forward: LayerWeights, backward: LayerWeights, device: torch.device, dtype: torch.dtype) -> Layer:
        """In one launch, where weights are stored alike and both directions fit the device."""
        forward, backward = self._laid_out(forward), self._laid_out(backward)
        alike = forward.w_hh.height == backward.w_hh.height and forward.w_ih.height == backward.w_ih.height
        fit = 2 * forward.w_hh.groups // forward.w_hh.gates <= 2 * processors(device) or forward.w_hh.height == 1
        if not (alike and fit):
            return super().both(forward, backward, device, dtype)
        biases = forward.input_bias, backward.input_bias
        bias = None if biases[0] is None or biases[1] is None else torch.cat([biases[0], biases[1]])
        product = self.product(stacked([forward.w_ih, backward.w_ih]), bias, device, dtype)
        return _Layer(product, _Recurrence((forward, backward), device, dtype, self.precision))


@dataclass(frozen=True)
class _Layer(Layer):
    """One direction, or both, as the recurrence has them."""

    product: _Product
    recurrence: _Recurrence

    def run(self, x_NI: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        in_slices = self.recurrence.blocks(state[0].shape[-2]) is not None
        recur = self.recurrence.directions if self.recurrence.count == 2 else self.recurrence
        return recur(self.product(x_NI, streams_together=in_slices), batch_sizes, state)


class _Product:
    """``y_MO = x_MI W' + bias``."""

    def __init__(self, matrix: SparseMatrix, bias: Tensor | None, dtype: torch.dtype, precision: str) -> None:
        if matrix.shape[1] > torch.iinfo(matrix.columns.dtype).max:  # to name the row after the last
            matrix = replace(matrix, columns=matrix.columns.to(torch.int32))
        self.matrix, self.bias, self.dtype, self.precision = matrix, bias, dtype, precision

    @functools.cached_property
    def dense(self) -> tuple[Tensor, Tensor | None]:
        """[O, I] and the bias, for many rows of short blocks."""
        return self.matrix.to_dense().to(self.dtype), None if self.bias is None else self.bias.to(self.dtype)

    def __call__(self, x_MI: Tensor, streams_together: bool = False) -> Tensor:
        """y_MO, whose columns lie one after the other in memory if the M rows of an output are to lie together."""
        matrix, rows = self.matrix, x_MI.shape[0]
        if not rows:
            return x_MI.new_empty(0, matrix.shape[0])
        if not self.is_sparse_for(rows, x_MI.dtype):
            weight, bias = self.dense
            if not streams_together:
                return F.linear(x_MI, weight, bias)
            return (weight @ x_MI.T if bias is None else torch.addmm(bias[:, None], weight, x_MI.T)).T
        y_MO = x_MI.new_empty(matrix.shape[0], rows).T if streams_together else x_MI.new_empty(rows, matrix.shape[0])
        with _current(x_MI.device):
            (self._few if rows <= self.few else self._many)(x_MI, y_MO)
        return y_MO

    @property
    def few(self) -> int:
        """Rows up to which the matrix-vector form is used."""
        return FEW_ROWS if self.matrix.height < 16 else FEW_ROWS_OF_BLOCKS

    def is_sparse_for(self, rows: int, dtype: torch.dtype) -> bool:
        """Whether so many rows are multiplied with the sparse matrix."""
        matrix = self.matrix
        density = matrix.entries / max(1, matrix.shape[0] * matrix.shape[1])
        tall = matrix.height >= 16 and (dtype == torch.float32 or density * DENSE_FROM <= matrix.height)
        return tall or rows <= self.few

    def _few(self, x_MI: Tensor, y_MO: Tensor) -> None:
        from srnn.kernels.triton.products import multiply_few

        m, (rows, inputs) = self.matrix, x_MI.shape
        together = 1 << (rows - 1).bit_length() if m.height == 1 else 1
        x = _transposed(x_MI, together) if together > 1 else x_MI.contiguous()
        each, kt = (8, 64) if m.height == 1 else (1, max(64, 2048 // m.height))
        multiply_few[(-(-m.groups // each), -(-rows // together))](
            x, y_MO, m.values, m.columns, m.row_pointers, y_MO if self.bias is None else self.bias,
            rows, inputs, m.units, m.groups // m.gates, m.gates, *y_MO.stride(),
            N=m.height, R=together, GROUPS=each, KT=kt, BIASED=self.bias is not None, num_warps=4,
        )  # fmt: skip

    def _many(self, x_MI: Tensor, y_MO: Tensor) -> None:
        from srnn.kernels.triton.products import multiply_many

        m, (rows, inputs) = self.matrix, x_MI.shape
        tall, kt = _tile(rows, x_MI.dtype)
        widen = m.values.dtype != x_MI.dtype
        x = _transposed(x_MI, -(-rows // tall) * tall)
        multiply_many[(m.groups, -(-rows // tall))](
            x, y_MO, m.values, m.columns, m.row_pointers, y_MO if self.bias is None else self.bias,
            rows, inputs, x.shape[1], m.units, m.groups // m.gates, *y_MO.stride(),
            N=m.height, KT=kt, MT=tall, STAGES=4, ACROSS=x.itemsize == 2 and not widen, BIASED=self.bias is not None,
            PRECISION=self.precision, WIDEN=widen or interpreted(), num_warps=4,
        )  # fmt: skip


def _tile(rows: int, dtype: torch.dtype) -> tuple[int, int]:
    """Rows of a product, and blocks of a tile. On an H100 4096 rows of 16 bits by 256 and 16 take 89 us, by 256 and 32
    108, by 128 and 64 168; of fp32 by 128 and 32 as tf32 285, by 64 and 32 430."""
    if dtype == torch.float32:
        return min(128, max(16, 1 << (rows - 1).bit_length())), 32
    tall = min(256, max(16, 1 << (rows - 1).bit_length()))
    return tall, 16 if tall > 64 else 32 if tall > 32 else 64


def _transposed(x_MI: Tensor, wide: int) -> Tensor:
    """[I + 1, wide], zero beyond M and I."""
    from srnn.kernels.triton.products import transpose

    rows, inputs = x_MI.shape
    out = x_MI.new_empty(inputs + 1, wide)
    tall = min(64, 1 << (wide - 1).bit_length())
    grid = -(-wide // tall), -(-(inputs + 1) // 64)
    transpose[grid](x_MI.contiguous(), out, rows, inputs, wide, MT=tall, IT=64, num_warps=4)
    return out


class _Recurrence(Recurrence):
    """One direction, or both of a bidirectional layer. Chooses the form for the number of streams."""

    def __init__(
        self, weights: tuple[LayerWeights, ...], device: torch.device, dtype: torch.dtype, precision: str
    ) -> None:
        self.weights, self.device, self.dtype = weights[0], device, dtype
        self.precision = precision if has_tf32(device) else "ieee"
        self.count = len(weights)  # of directions
        self.matrices = [direction.w_hh.to("cpu") for direction in weights]
        self.height, self.gates = self.matrices[0].height, self.matrices[0].gates
        biases = [bias.to(device, torch.float32) for part in weights if (bias := part.new_bias) is not None]
        self.new_bias = torch.stack(biases) if len(biases) == self.count else None
        self.layouts: dict[int, Layout] = {}  # by programs
        self.block_layouts: dict[BlockPlan, BlockLayout | None] = {}

    @functools.cached_property
    def failed(self) -> Tensor:
        """A flag that the device sets and the host reads without waiting."""
        return torch.zeros(1, dtype=torch.int32, pin_memory=self.device.type == "cuda")

    def blocks(self, streams: int) -> BlockLayout | None:
        """For ``recur_blocks`` or ``recur_gates`` with so many streams, where they can run and are the faster."""
        if streams == 1 or self.height < 16:
            return None
        size, shared = self.dtype.itemsize, shared_memory(self.device)
        plan = plan_blocks(
            self.matrices, processors(self.device), size, streams, shared, has_warpgroups(self.device),
            self.precision == "ieee",
        )  # fmt: skip
        if plan not in self.block_layouts:
            fits = plan.fits(processors(self.device) // self.count, shared, self.height, size)
            self.block_layouts[plan] = lay_out_blocks(self.matrices, plan, self.dtype).to(self.device) if fits else None
        return self.block_layouts[plan]

    def layout(self, streams: int) -> Layout:
        """For ``recur_vectors``, with so many streams."""
        programs = programs_of(self.matrices, processors(self.device), streams)
        if programs not in self.layouts:
            self.layouts[programs] = lay_out(self.matrices, programs).to(self.device)
        return self.layouts[programs]

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        y_NH, end = self.directions(u_NG, batch_sizes, tuple(part[None] for part in state))
        return y_NH, tuple(part[0] for part in end)

    def directions(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """As a recurrence, of D directions: u [N, D * G], parts of the state [D, B, H]; y is [N, D * H]."""
        if int(self.failed):
            self.failed.zero_()
            raise RuntimeError(
                "a persistent kernel gave up waiting for its other programs in an earlier call, whose outputs are not "
                "numbers; the GPU may be shared with work that keeps it from running. kernel=dense does not wait"
            )
        if not u_NG.shape[0]:
            return u_NG.new_empty(0, self.count * self.weights.output_size), state
        if 1 not in u_NG.stride():
            u_NG = u_NG.contiguous()
        streams = state[0].shape[1]
        sequence = _Sequence.of(batch_sizes, streams, u_NG.device)
        blocks = self.blocks(streams)
        with _current(u_NG.device):
            if blocks is not None:
                return self._in_slices(blocks, u_NG, sequence, state)
            return self._one_by_one(u_NG, sequence, state)

    def _one_by_one(self, u_NG: Tensor, sequence: _Sequence, state: State) -> tuple[Tensor, State]:
        from srnn.kernels.triton.vectors import recur_vectors

        weights, (_, streams, hidden) = self.weights, state[0].shape
        layout = self.layout(streams)
        plan, programs = layout.plan, self.count * layout.plan.programs
        bits = torch.int32 if u_NG.dtype == torch.float32 else torch.int16
        stride = padded(hidden)
        h = torch.empty(streams + u_NG.shape[0], self.count, stride, dtype=bits, device=u_NG.device)
        if sequence.steps > 1:
            h[streams:].fill_(-1)
        h[:streams, :, :hidden] = _in_order(state[0].view(bits), layout.units).transpose(0, 1)
        if stride > hidden:
            h[:, :, hidden:] = 0
        c_DBH = _in_order(_cell_state(state, u_NG), layout.units if len(state) > 1 else None)
        new_bias = c_DBH if self.new_bias is None else _in_order(self.new_bias[:, None], layout.units)
        at_once = max(1, processors(self.device) // programs)
        per_vector = 16 // bits.itemsize
        width = max(1 << stride.bit_length(), 32 * plan.warps * per_vector)  # over stride
        for stream in range(0, streams, at_once):
            for first, last in self._launches(sequence):
                recur_vectors[(programs, min(at_once, streams - stream))](
                    u_NG, h, c_DBH, layout.values, layout.columns, layout.groups, layout.groups_in_h, layout.chunks,
                    new_bias, sequence.lengths, sequence.offsets, self.failed, stream, first, last, sequence.steps,
                    streams, hidden, *u_NG.stride(), stride,
                    CELL=weights.cell, GATES=self.gates, N=self.height, SLOTS=plan.slots,
                    MOST=plan.most, TILES=plan.tiles, CHUNKS=plan.chunks, K=plan.chunk, WIDTH=width,
                    VECTORS=width // (32 * plan.warps * per_vector), EQUAL=sequence.equal, REVERSE=weights.reverse,
                    BOTH=self.count == 2, BIASED=self.new_bias is not None, ALONE=plan.programs == 1,
                    WAITS=not interpreted(), num_warps=plan.warps, launch_cooperative_grid=not interpreted(),
                )  # fmt: skip
        y = _in_order(h[streams:, :, :hidden].transpose(0, 1), layout.places).transpose(0, 1).view(u_NG.dtype)
        end = torch.stack([sequence.ends(y[:, d], d == 1 or weights.reverse) for d in range(self.count)])
        y_NH = y.reshape(u_NG.shape[0], self.count * hidden)
        if len(state) == 1:
            return y_NH, (end,)
        return y_NH, (end, _in_order(c_DBH, layout.places).to(state[1].dtype))

    def _in_slices(self, layout: BlockLayout, u_NG: Tensor, sequence: _Sequence, state: State) -> tuple[Tensor, State]:
        from srnn.kernels.triton.blocks import recur_blocks, write_outputs
        from srnn.kernels.triton.gates import recur_gates

        weights, plan, (_, streams, hidden) = self.weights, layout.plan, state[0].shape
        bits = torch.int32 if u_NG.dtype == torch.float32 else torch.int16
        wide, programs, steps = plan.wide, self.count * plan.programs, sequence.steps
        slices = -(-streams // wide)
        h = torch.empty(self.count, slices, steps + 1, hidden, wide, dtype=bits, device=u_NG.device)
        if steps > 1 and not plan.by_gate:
            h.fill_(-1)
        starts = [0, steps] if self.count == 2 else [steps if weights.reverse else 0]  # in the order of time
        for d, h0 in enumerate(_sliced(state[0].contiguous().view(bits), wide)):
            h[d, :, starts[d]] = h0
        c = _sliced(state[1].float(), wide).contiguous() if len(state) > 1 else layout.values
        at_once = min(slices, max(1, plan.resident * processors(self.device) // programs))
        given = (
            c, layout.values, layout.columns, layout.values_2, layout.columns_2, layout.units,
            c if self.new_bias is None else self.new_bias, sequence.sizes, sequence.offsets,
        )  # fmt: skip
        options: dict[str, Any] = {
            "CELL": weights.cell, "GATES": self.gates, "N": self.height, "K": plan.k, "K_2": plan.k_2, "BP": wide,
            "ONE_SLICE": slices == at_once, "EQUAL": sequence.equal, "REVERSE": weights.reverse,
            "BOTH": self.count == 2, "BIASED": self.new_bias is not None, "WIDEN": interpreted(),
            "WAITS": not interpreted(), "num_warps": plan.warps, "launch_cooperative_grid": not interpreted(),
        }  # fmt: skip
        for first, last in self._launches(sequence):
            where = (slices, first, last, steps, streams, hidden, *u_NG.stride())
            if plan.by_gate:
                counters = torch.zeros(self.count, slices, dtype=torch.int32, device=u_NG.device)
                recur_gates[(programs, at_once)](
                    u_NG, h.view(u_NG.dtype), *given, counters, self.failed, *where,
                    EACH=plan.each, AHEAD=plan.ahead, **options,
                )  # fmt: skip
            else:
                recur_blocks[(programs, at_once)](
                    u_NG, h, *given, self.failed, *where, S=plan.chunks, TILES=plan.tiles, WARPS=plan.warps,
                    VECTORS=plan.vectors(plan.k, bits.itemsize), VECTORS_2=plan.vectors(plan.k_2, bits.itemsize),
                    PRECISION=self.precision, **options,
                )  # fmt: skip
        y_NH = u_NG.new_empty(u_NG.shape[0], self.count * hidden)
        write_outputs[(steps, self.count * slices, -(-hidden // OUTPUTS))](
            h, y_NH.view(bits), sequence.sizes, sequence.offsets, slices, steps, streams, hidden,
            BP=wide, UNITS=OUTPUTS, EQUAL=sequence.equal, REVERSE=weights.reverse, BOTH=self.count == 2, num_warps=4,
        )  # fmt: skip
        last_h = torch.stack([h[d, :, steps - start] for d, start in enumerate(starts)])
        end = _unsliced(last_h, streams).view(u_NG.dtype)
        return y_NH, (end, _unsliced(c, streams).to(state[1].dtype)) if len(state) > 1 else (end,)

    def _launches(self, sequence: _Sequence) -> list[tuple[int, int]]:
        """First and last step of each: one launch, but where programs cannot wait for each other."""
        if interpreted():
            return [(k, k + 1) for k in range(sequence.steps)]
        return [(0, sequence.steps)]


def _cell_state(state: State, otherwise: Tensor) -> Tensor:
    """A copy of an LSTM's c in fp32, which a kernel goes on with; for others, something to point to."""
    return torch.clone(state[1].float(), memory_format=torch.contiguous_format) if len(state) > 1 else otherwise


def _in_order(part_DXH: Tensor, index_DH: Tensor | None) -> Tensor:
    """Each direction's units as ``index`` wants them; as they are without."""
    if index_DH is None:
        return part_DXH
    return part_DXH.gather(2, index_DH[:, None].expand(-1, part_DXH.shape[1], -1))


def _sliced(part_DBH: Tensor, wide: int) -> Tensor:
    """[D, slices, H, wide] of [D, B, H]; streams that there are not are zero."""
    directions, streams, hidden = part_DBH.shape
    slices = -(-streams // wide)
    padded_DBH = F.pad(part_DBH, (0, 0, 0, slices * wide - streams))
    return padded_DBH.view(directions, slices, wide, hidden).transpose(2, 3)


def _unsliced(part: Tensor, streams: int) -> Tensor:
    """[D, B, H] of [D, slices, H, wide]."""
    directions, _, hidden, _ = part.shape
    return part.transpose(2, 3).reshape(directions, -1, hidden)[:, :streams].contiguous()


@dataclass(frozen=True)
class _Sequence:
    """``batch_sizes`` as the kernels take them. Tensors are there only where lengths differ."""

    steps: int
    streams: int
    equal: bool
    sizes: Tensor
    offsets: Tensor
    lengths: Tensor
    lengths_on_host: Any

    @classmethod
    def of(cls, batch_sizes: Tensor, streams: int, device: torch.device) -> _Sequence:
        steps = len(batch_sizes)
        if int(batch_sizes[-1]) == streams:
            nothing = _nothing(device)
            return cls(steps, streams, True, nothing, nothing, nothing, None)
        offsets = batch_sizes.cumsum(0) - batch_sizes
        lengths = (batch_sizes[:, None] > torch.arange(streams)).sum(0)
        sizes, rows, long = (part.to(device, torch.int32) for part in (batch_sizes, offsets, lengths))
        return cls(steps, streams, False, sizes, rows, long, (lengths, offsets))

    def ends(self, y_NH: Tensor, reverse: bool) -> Tensor:
        """Each stream's output after the last step it takes: of its last row, or its first where reversed."""
        if reverse or self.equal:
            first = 0 if reverse else y_NH.shape[0] - self.streams
            return y_NH[first : first + self.streams].clone()
        lengths, offsets = self.lengths_on_host
        rows = offsets[lengths - 1] + torch.arange(self.streams)
        return y_NH[rows.to(y_NH.device)]


@functools.cache
def _nothing(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)
