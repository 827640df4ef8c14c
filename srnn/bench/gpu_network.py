"""A whole network on a GPU, dense and sparse."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.inference.sparsify import sparsify
from srnn.kernels.timing import Call, graphed, hardware, interleaved
from srnn.sparse import PackedStructure

_SIZE, _LAYERS, _VOCABULARY, _STEPS = 2560, 3, 10_000, 256
_STRUCTURES: tuple[PackedStructure, ...] = ("element", "32x1")
MEASURED_NETWORK = f"Embedding, {_LAYERS} x GRU {_SIZE}, {_VOCABULARY} logits; fp16, batch 1, sequences of {_STEPS}"


@dataclass(frozen=True)
class NetworkRow:
    """One network run in one way. Times are of a whole call; tokens are counted at the median.

    Attributes:
        network: ``dense``, or how it is pruned.
        what: a sequence of 256 tokens or a step, as it is or as a CUDA graph.
    """

    device: str
    network: str
    what: str
    rounds: int
    median_us: float
    p20_us: float
    p80_us: float
    tokens_per_second: int


class GruLanguageModel(nn.Module):
    """Embedding, three layers of GRU 2560, logits: a language model's shape."""

    def __init__(self, size: int = _SIZE, layers: int = _LAYERS, vocabulary: int = _VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.gru = nn.GRU(size, size, layers)
        self.linear = nn.Linear(size, vocabulary)

    def forward(self, tokens_TB: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [T, B, V] and the state."""
        y_TBH, state = self.gru(self.embedding(tokens_TB), state)
        return self.linear(y_TBH), state


def _prune(network: GruLanguageModel, sparsity: float, structure: PackedStructure) -> GruLanguageModel:
    """Random weights with so many blocks zero, in place; the embedding, which is only looked up, stays dense."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2 and not name.startswith("embedding"):
                gates = 3 if name.startswith("gru") else 1
                format = Format(sparsity, structure, "fp16")
                weight.copy_(pruned(weight.shape[0], weight.shape[1], gates, format, generator))
    return network.requires_grad_(False).eval()


def measure_network(device: torch.device, limit: float) -> list[NetworkRow]:
    """All networks in all ways, timed in turns in fp16; no round of turns is begun after ``limit`` seconds."""
    calls = network_calls(device, torch.float16)
    times = interleaved({"; ".join(key): call for key, call in calls.items()}, device, 50, limit)
    return [_row(device, *key, seconds) for key, seconds in zip(calls, times.values(), strict=True)]


def _row(device: torch.device, network: str, what: str, seconds: list[float]) -> NetworkRow:
    low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    median_us, p20_us, p80_us = (round(1e6 * x, 1) for x in (middle, low, high))
    tokens = round((_STEPS if what.startswith("sequence") else 1) / middle)
    return NetworkRow(hardware(device), network, what, len(seconds), median_us, p20_us, p80_us, tokens)


def network_calls(
    device: torch.device, dtype: torch.dtype, kernel: Any = "triton", sparsity: float = 0.9, **sizes: int
) -> dict[tuple[str, str], Call]:
    """(network, what) -> call; ``what`` is a sequence of 256 tokens or one step, as it is or as a CUDA graph.

    Raises:
        RuntimeError: a sparse network's logits are not the dense one's with the same weights.
    """
    calls: dict[tuple[str, str], Call] = {}
    tokens_TB = torch.randint(sizes.get("vocabulary", _VOCABULARY), (_STEPS, 1), device=device)
    for structure in _STRUCTURES:
        dense = _prune(GruLanguageModel(**sizes), sparsity, structure).to(device)
        sparse = sparsify(dense, structure, "fp16" if dtype == torch.float16 else "fp32", kernel)
        sparse.embedding = sparse.embedding.to(dtype)
        networks: dict[str, nn.Module] = {f"{100 * sparsity:g} % {structure}": sparse}
        dense = dense.to(dtype)
        with torch.inference_mode():
            truth, _ = dense(tokens_TB[:8])
            got, _ = networks[f"{100 * sparsity:g} % {structure}"](tokens_TB[:8])
        error = float((got - truth).double().norm() / truth.double().norm())
        if not error < (1e-2 if dtype == torch.float16 else 1e-4):
            raise RuntimeError(f"{structure}: the sparse network computes wrong, its error is {error:.1e}")
        if structure == _STRUCTURES[0]:
            networks["dense"] = dense
        for name, network in networks.items():
            for what, call in _ways(network, tokens_TB).items():
                calls[name, what] = call
                if device.type == "cuda":
                    calls[name, f"{what}, graph"] = graphed(call, device)[0]
    return calls


def _ways(network: nn.Module, tokens_TB: Tensor) -> dict[str, Call]:
    with torch.inference_mode():
        _, state = network(tokens_TB[:1])

    def step() -> object:
        return network(tokens_TB[:1], state)

    return {"sequence": lambda: network(tokens_TB), "step": step}
