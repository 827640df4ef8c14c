"""A chain in integers: int8 weights and activations, tables for tanh and sigmoid, states in 16 bits.

``IntegerNetwork`` is a numpy model of the arithmetic of the C program, which computes the same numbers. A whole number
stands for itself times a power of 2: sums that go into tanh or sigmoid have 12 bits behind the point, gates and h 15,
an LSTM's c 11. Products take h in 8 bits, of which 7 are behind the point. A ReLU's h has no bounds: it has as many
bits fewer behind the point as twice the largest state of an example needs, and stays at the largest number beyond.

Shapes: T steps, B streams, I inputs, H hidden units, G gates * H, O outputs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.cells import Cell
from srnn.errors import UserError
from srnn.exporting.c.program import layer_weights, packed_weight
from srnn.exporting.chain import ActivationPart, Chain, EmbeddingPart, LinearPart, RecurrentPart
from srnn.exporting.reading import ChainNetwork, some_inputs
from srnn.kernels.contract import LayerWeights
from srnn.sparse import SparseMatrix

_SUM_BITS, _STATE_BITS = 12, 15
_CELLS: tuple[Cell, ...] = ("gru", "lstm", "tanh", "relu")
_LARGEST_STATE = 1 << 12  # of a ReLU
_LARGEST_SUM = 1 << 29  # so that three of them fit 32 bits
_NEEDED = "values=w8a8"
# tanh at 257 places from -8 to 8, times 2 ** 15.
TANH_TABLE = np.clip(np.rint(np.tanh(np.arange(-128, 129) / 16) * 32768), -32767, 32767).astype(np.int16)


@dataclass(frozen=True)
class IntegerMatrix:
    """A matrix of int8 and what its products are multiplied with: ``(sum * multiplier + half) >> shift``.

    Attributes:
        packed: the matrix, with a scale for each group of rows.
        multipliers: [groups], int32.
        shift: how many bits of the product go.
    """

    packed: SparseMatrix
    multipliers: np.ndarray
    shift: int

    @cached_property
    def rows(self) -> np.ndarray:
        """[rows, columns], in floats that hold every sum of a product exactly, so that BLAS computes it."""
        assert self.packed.scales is not None
        dense = replace(self.packed, scales=torch.ones_like(self.packed.scales)).to_dense().double().numpy()
        fits_fp32 = 128 * np.abs(dense).sum(1).max(initial=0) < 1 << 24
        return dense.astype(np.float32) if fits_fp32 else dense

    @cached_property
    def row_multipliers(self) -> np.ndarray:
        """[rows], int64."""
        matrix, units = self.packed, self.packed.shape[0] // self.packed.gates
        groups = matrix.groups // matrix.gates
        row = np.arange(matrix.shape[0])
        return self.multipliers.astype(np.int64)[row // units * groups + row % units // matrix.height]

    def scaled(self, sums: np.ndarray, rows: Any = slice(None)) -> np.ndarray:
        """Sums of some rows, in the units of what comes next."""
        return (sums * self.row_multipliers[rows] + (1 << (self.shift - 1))) >> self.shift

    def product(self, x_BI: np.ndarray) -> np.ndarray:
        """[B, rows] of int8 inputs [B, columns]."""
        return self.scaled((x_BI.astype(self.rows.dtype) @ self.rows.T).astype(np.int64))

    @property
    def largest(self) -> int:
        """No product is larger, whatever its inputs."""
        sums = 128 * np.abs(self.rows.astype(np.int64)).sum(1)
        return int(self.scaled(sums).max(initial=0)) if sums.max(initial=0) < 1 << 31 else 1 << 62


@dataclass(frozen=True)
class IntegerLayer:
    """A recurrent layer.

    Attributes:
        cell: the recurrence.
        w_ih: [G, I].
        w_hh: [G, H].
        bias: [G], int32: what each sum begins with; but for ``new_bias``.
        new_bias: [H], int32, what a GRU's reset gate multiplies; zeros for other cells.
        doublings: h stands for so many times 2 more than a bounded state; 0 but for a ReLU.
    """

    cell: Cell
    w_ih: IntegerMatrix
    w_hh: IntegerMatrix
    bias: np.ndarray
    new_bias: np.ndarray
    doublings: int = 0

    def step(self, x_BI: np.ndarray, states: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        """The states after a step: h, and an LSTM's c.

        Args:
            x_BI: int8 inputs.
            states: h [B, H], and c.
        """
        h = states[0]
        u_BG, v_BG = self.w_ih.product(x_BI) + self.bias, self.w_hh.product(narrow(h))
        if self.cell == "tanh":
            return (_tanh(u_BG + v_BG),)
        if self.cell == "relu":
            return (_relu(u_BG + v_BG, self.doublings),)
        if self.cell == "lstm":
            i, f, g, o = np.split(u_BG + v_BG, 4, axis=1)
            added = (_sigmoid(i) * _tanh(g) + 8) >> 4
            c = np.clip((_sigmoid(f) * states[1] + added + 16384) >> 15, -32768, 32767)
            return (_sigmoid(o) * _tanh(2 * c) + 16384) >> 15, c
        (r_x, z_x, n_x), (r_h, z_h, n_h) = np.split(u_BG, 3, axis=1), np.split(v_BG, 3, axis=1)
        n = _tanh(n_x + ((_sigmoid(r_x + r_h) * (n_h + self.new_bias) + 16384) >> 15))
        return (n + ((_sigmoid(z_x + z_h) * (h - n) + 16384) >> 15),)


@dataclass(frozen=True)
class IntegerNetwork:
    """A network in integers.

    Attributes:
        layers: its recurrent layers, each with its directions.
        embedding: [V, I], or None.
        decoder: [O, H], or None.
        decoder_bias: [O], int32.
        input_scale: what 1 of an input stands for, where inputs are numbers.
        output_bits: of an output, behind the point.
        last_only: the outputs are those of the last step.
    """

    layers: tuple[tuple[IntegerLayer, ...], ...]
    embedding: IntegerMatrix | None
    decoder: IntegerMatrix | None
    decoder_bias: np.ndarray
    input_scale: float
    output_bits: int
    last_only: bool

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Name and size of each state, in the order of ``run``."""
        found: list[tuple[str, int]] = []
        for number, layer in enumerate(self.layers):
            for end, one in zip(("", "r"), layer, strict=False):
                size = one.w_hh.packed.shape[1]
                found += [(f"{letter}{number}{end}", size) for letter in ("hc" if one.cell == "lstm" else "h")]
        return tuple(found)

    def vector(self, given: np.ndarray) -> np.ndarray:
        """Tokens [B], or int8 numbers [B, I] as they are -> int8 vectors [B, I]."""
        if self.embedding is None:
            return given
        sums = self.embedding.rows[given].astype(np.int64)
        half = 1 << (self.embedding.shift - 1)
        scaled = (sums * self.embedding.row_multipliers[given][:, None] + half) >> self.embedding.shift
        return np.clip(scaled, -127, 127)

    def run(self, inputs: np.ndarray, states: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
        """Outputs [B, T, O], or [B, O], and the states after them.

        Args:
            inputs: tokens [B, T], or int8 numbers [B, T, I].
            states: [B, H] each, as ``members`` says.
        """
        steps, after = range(inputs.shape[1]), list[np.ndarray]()
        x_T, h_T = [self.vector(inputs[:, step]) for step in steps], list[np.ndarray]()
        for layer in self.layers:
            seen, ends = [], []
            for part, one in enumerate(layer):
                own = tuple(states[len(after) : len(after) + (2 if one.cell == "lstm" else 1)])
                found = {}
                for step in reversed(steps) if part else steps:
                    own = one.step(x_T[step], own)
                    found[step] = own[0]
                seen.append([found[step] for step in steps])
                ends.append(own[0])
                after += own
            h_T = [np.concatenate(both, axis=1) for both in zip(*seen, strict=True)]
            if self.last_only and layer is self.layers[-1]:
                h_T = [np.concatenate(ends, axis=1)]
            x_T = [narrow(h) for h in h_T]
        outputs = h_T if self.decoder is None else [self.decoder.product(x) + self.decoder_bias for x in x_T]
        return outputs[-1] if self.last_only else np.stack(outputs, axis=1), after


class IntegerModule(nn.Module):
    """An integer network called as torch's modules: numbers in, numbers and states out."""

    def __init__(self, network: IntegerNetwork, batch_first: bool) -> None:
        super().__init__()
        self.network, self.batch_first = network, batch_first

    def forward(self, inputs: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Outputs, and the state as a tensor or several."""
        given = (inputs if self.batch_first else inputs.transpose(0, 1)).numpy()
        if self.network.embedding is None:
            given = np.clip(np.rint(given / self.network.input_scale), -127, 127).astype(np.int64)
        before = [np.zeros((len(given), size), np.int64) for _, size in self.network.members]
        if state is not None:
            before = [s.numpy() for s in (state if isinstance(state, tuple) else (state,))]
        outputs, after = self.network.run(given, before)
        result = torch.from_numpy(outputs).float() * 2.0**-self.network.output_bits
        if not self.batch_first and not self.network.last_only:
            result = result.transpose(0, 1)
        ends = tuple(torch.from_numpy(s) for s in after)
        return result, ends[0] if len(ends) == 1 else ends


def integer_network(chain: Chain, example: Any = None) -> IntegerNetwork:
    """A chain of int8 matrices in integers.

    Args:
        chain: from ``packed_chain``.
        example: inputs, or a tuple that begins with them: of a network that reads numbers, the largest of them is the
            largest that it will tell from larger ones.

    Raises:
        UserError: a layer that there is not in integers, or no example where one is needed.
    """
    parts = list(chain.parts)
    first = parts.pop(0) if isinstance(parts[0], EmbeddingPart) else None
    last = parts.pop() if isinstance(parts[-1], LinearPart) else None
    embedding, input_scale = None, 1.0
    if first is not None:
        weight = packed_weight(first.weight)  # type: ignore[union-attr]
        input_scale = float(weight.to_dense().abs().max()) / 127 or 1.0
        embedding = _matrix(weight, 1 / input_scale)
    elif isinstance(parts[0] if parts else None, RecurrentPart):
        input_scale = _scale_of(chain, example)
    layers: list[tuple[IntegerLayer, ...]] = []
    for part in parts:
        _check(part)
        assert isinstance(part, RecurrentPart)
        for number, directions in enumerate(part.layers):
            doublings = _doublings(chain, part, number, example) if part.cell == "relu" else 0
            scale = 2.0 ** (layers[-1][0].doublings - 7) if layers else input_scale
            weights = [layer_weights(part.cell, direction) for direction in directions]
            layers.append(tuple(_layer(part.name, one, scale, doublings) for one in weights))
    doublings = layers[-1][0].doublings if layers else 0
    decoder, bits, bias_O = None, _STATE_BITS - doublings, np.zeros(0, np.int64)
    if isinstance(last, LinearPart):
        decoder, bias_O, bits = _decoder(last, doublings)
    return IntegerNetwork(tuple(layers), embedding, decoder, bias_O, input_scale, bits, chain.last_only)


def _layer(name: str, weights: LayerWeights, input_scale: float, doublings: int) -> IntegerLayer:
    w_ih = _matrix(weights.w_ih, input_scale * 2**_SUM_BITS)
    w_hh = _matrix(weights.w_hh, 2.0 ** (_SUM_BITS + doublings - 7))
    rows, units = weights.w_hh.shape[0], weights.hidden_size
    numbers = _whole(weights.input_bias, rows, _SUM_BITS), _whole(weights.new_bias, units, _SUM_BITS)
    if w_ih.largest + w_hh.largest + max(int(np.abs(n).max(initial=0)) for n in numbers) > _LARGEST_SUM:
        raise UserError(f"{_NEEDED}: the weights of {name} are too large for sums in 32 bits.")
    return IntegerLayer(weights.cell, w_ih, w_hh, *numbers, doublings)


def _decoder(part: LinearPart, doublings: int) -> tuple[IntegerMatrix, np.ndarray, int]:
    """Its matrix, its bias, and the bits behind the point that outputs have: as many as 32 bits allow."""
    weight = packed_weight(part.weight)
    for bits in range(16, -1, -1):
        matrix, bias_O = _matrix(weight, 2.0 ** (bits + doublings - 7)), _whole(part.bias, weight.shape[0], bits)
        if matrix.largest + int(np.abs(bias_O).max(initial=0)) <= _LARGEST_SUM:
            break
    return matrix, bias_O, bits


def _doublings(chain: Chain, part: RecurrentPart, number: int, example: Any) -> int:
    """How many times 2 the states of a ReLU layer need: for twice the largest one of the example, or, of a network that
    reads tokens and has none, of random tokens.
    """
    before = chain.parts[: chain.parts.index(part)]
    cut = replace(chain, parts=(*before, replace(part, layers=part.layers[: number + 1])), last_only=False)
    inputs = example[0] if isinstance(example, tuple | list) and example else example
    if not isinstance(inputs, Tensor) or inputs.is_floating_point() == (chain.vocabulary_size is not None):
        inputs = some_inputs(cut, 100, 8)
    with torch.inference_mode():
        largest = 2 * float(ChainNetwork(cut)(inputs)[0].abs().max())
    if not largest <= _LARGEST_STATE:
        raise UserError(
            f"{_NEEDED}: the states of {part.name}, a ReLU layer, grow to {largest / 2:.3g} on the example."
        )
    return max(0, math.ceil(math.log2(largest))) if largest > 0 else 0


def narrow(h: np.ndarray) -> np.ndarray:
    """h as products take it, in 8 bits."""
    return np.minimum((h + 128) >> 8, 127)


def _tanh(sums: np.ndarray) -> np.ndarray:
    """Of sums with 12 bits behind the point, with 15: between two entries of the table."""
    place = np.clip(sums, -32768, 32767) + 32768
    at, left = place >> 8, place & 255
    low, high = TANH_TABLE[at].astype(np.int64), TANH_TABLE[at + 1].astype(np.int64)
    return low + (((high - low) * left + 128) >> 8)


def _relu(sums: np.ndarray, doublings: int) -> np.ndarray:
    """Of sums with 12 bits behind the point, with 15 less the doublings."""
    bits = _STATE_BITS - _SUM_BITS - doublings
    positive = np.clip(sums, 0, 32768 >> bits if bits > 0 else None)
    shifted = positive << bits if bits >= 0 else (positive + (1 << (-bits - 1))) >> -bits
    return np.minimum(shifted, 32767)


def _sigmoid(sums: np.ndarray) -> np.ndarray:
    return (32768 + _tanh(sums >> 1)) >> 1


def _matrix(packed: SparseMatrix, unit: float) -> IntegerMatrix:
    """A matrix whose products count in 1 / unit; multipliers are as large as 31 bits allow."""
    assert packed.scales is not None
    factors = packed.scales.double().numpy() * unit
    largest = float(factors.max(initial=0.0))
    shift = int(np.clip(30 - np.floor(np.log2(largest)) if largest > 0 else 1, 1, 61))
    return IntegerMatrix(packed, np.minimum(np.rint(factors * 2.0**shift), 2**31 - 1).astype(np.int32), shift)


def _whole(bias: Tensor | None, count: int, bits: int) -> np.ndarray:
    numbers = np.zeros(count) if bias is None else bias.double().numpy()
    return np.clip(np.rint(numbers * 2.0**bits), -(2**31) + 1, 2**31 - 1).astype(np.int64)


def _scale_of(chain: Chain, example: Any) -> float:
    inputs = example[0] if isinstance(example, tuple | list) and example else example
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or not inputs.numel():
        raise UserError(
            f"{_NEEDED}: give example=, inputs as they will come, {chain.input_size} numbers a step: the largest "
            "sets the scale of all."
        )
    return float(inputs.abs().max()) / 127 or 1.0


def _check(part: Any) -> None:
    """Raises UserError for what there is not in integers."""
    if not isinstance(part, RecurrentPart):
        what: str = part.kind if isinstance(part, ActivationPart) else "a layer between or before recurrent ones"
        raise UserError(
            f"{_NEEDED}: {part.name} is {what}: there are an embedding, recurrent layers, and a linear one."
        )
    if part.cell not in _CELLS:
        raise UserError(
            f"{_NEEDED}: {part.name} is {part.cell}, which has no integer form: there are GRU, LSTM, tanh and ReLU."
        )
    if part.layers[0][0].w_hr is not None:
        raise UserError(f"{_NEEDED}: {part.name} is projected: there are layers without projection.")
