"""What ``bench=network`` and the yardstick of ``bench=gpu`` time on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.inference.sparsify import sparsify
from srnn.kernels.timing import Call, graphed, timed
from srnn.sparse import PackedStructure

SIZE, LAYERS, VOCABULARY, STEPS = 2560, 3, 10_000, 256
STRUCTURES: tuple[PackedStructure, ...] = ("element", "32x1")


class Network(nn.Module):
    """Embedding, three layers of GRU 2560, logits: a language model's shape."""

    def __init__(self, size: int = SIZE, layers: int = LAYERS, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, size)
        self.gru = nn.GRU(size, size, layers)
        self.linear = nn.Linear(size, vocabulary)

    def forward(self, tokens_TB: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits [T, B, V] and the state."""
        y_TBH, state = self.gru(self.embedding(tokens_TB), state)
        return self.linear(y_TBH), state


def prune(network: Network, sparsity: float, structure: PackedStructure) -> Network:
    """Random weights with so many blocks zero, in place; the embedding, which is only looked up, stays dense."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim == 2 and not name.startswith("embedding"):
                gates = 3 if name.startswith("gru") else 1
                format = Format(sparsity, structure, "fp16")
                weight.copy_(pruned(weight.shape[0], weight.shape[1], gates, format, generator))
    return network.requires_grad_(False).eval()


def network_calls(
    device: torch.device, dtype: torch.dtype, kernel: Any = "triton", sparsity: float = 0.9, **sizes: int
) -> dict[tuple[str, str], Call]:
    """(network, what) -> call; ``what`` is a sequence of 256 tokens or one step, as it is or as a CUDA graph.

    Raises:
        RuntimeError: a sparse network's logits are not the dense one's with the same weights.
    """
    calls: dict[tuple[str, str], Call] = {}
    tokens_TB = torch.randint(sizes.get("vocabulary", VOCABULARY), (STEPS, 1), device=device)
    for structure in STRUCTURES:
        dense = prune(Network(**sizes), sparsity, structure).to(device)
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
        if structure == STRUCTURES[0]:
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


def barrier_us(device: torch.device, rounds: int = 1000) -> float:
    """Microseconds that a barrier over a program a multiprocessor takes: a yardstick for a step of a recurrence."""
    from srnn.kernels.triton.barrier import barriers

    programs = torch.cuda.get_device_properties(device).multi_processor_count

    def call() -> Callable[[], object]:
        counter = torch.zeros(1, dtype=torch.int32, device=device)
        return lambda: barriers[(programs,)](counter, rounds, num_warps=4, launch_cooperative_grid=True)

    with torch.cuda.device(device):
        call()()
        return min(1e6 * timed(call(), device) / rounds for _ in range(5))
