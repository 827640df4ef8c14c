"""Timing the pruner: updates of the masks, masking between them, the memory they take, their share of training."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.bench.cases import LayerShape
from srnn.pruning import Pruner, RunLength

# Each takes another way through the code: thresholds, ranks, blocks, N:M, growing by gradients.
PRUNING_METHODS: dict[str, dict[str, Any]] = {
    "gradual": {},
    "gradual 16x1": {"structure": "16x1"},
    "cubic": {},
    "cubic 16x1": {"structure": "16x1"},
    "cubic 2:4": {"structure": "2:4", "sparsity": 0.5},
    "rigl": {},
}
_REPEATS = 5
# Of the training whose time pruning takes a share of.
_STEPS, _STREAMS, _FREQ, _TRAINED = 150, 64, 100, 300


@dataclass(frozen=True)
class PruningRow:
    """What pruning one layer costs, with Adam's state.

    Attributes:
        shape: the layer.
        method: and its structure.
        weights: that are pruned.
        update_ms: a step that finds new masks, the median.
        step_ms: a step that only masks, the median.
        extra_bytes: the most that was allocated in an update beside what there was; None on a CPU.
        training_ms: a training step of a language model on such a layer, pruning included; on a GPU.
        share: of these, inside pruning with an update every 100 steps, by the GPU's own clock.
        device: name and torch's version.
    """

    shape: str
    method: str
    weights: int
    update_ms: float
    step_ms: float
    extra_bytes: int | None
    training_ms: float | None
    share: float | None
    device: str


def measure_pruning(shapes: tuple[LayerShape, ...], device: torch.device) -> Iterator[PruningRow]:
    """A row for each layer and method."""
    for shape in shapes:
        for name, options in PRUNING_METHODS.items():
            yield _row(shape, name, options, device)


def _row(shape: LayerShape, name: str, options: dict[str, Any], device: torch.device) -> PruningRow:
    torch.manual_seed(0)
    model = _layer(shape).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    pruner = Pruner(model, name.split()[0], RunLength(1000, 50), optimizer, **options)
    updates = list(pruner.method.updates)
    middle = updates[len(updates) // 2]
    # The first update finds memory and libraries as they are afterwards.
    pruner.itr = updates[0] - 1
    pruner.step()
    update = [_milliseconds(pruner, middle - 1, device) for _ in range(_REPEATS)]
    step = [_milliseconds(pruner, pruner.run.total_steps - 1, device) for _ in range(_REPEATS)]
    extra = _extra_bytes(lambda: _milliseconds(pruner, middle - 1, device)) if device.type == "cuda" else None
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"
    weights = sum(part.size for part in pruner.parts)
    trains = device.type == "cuda" and shape.kind != "product"
    training, share = _share_of_training(shape, name, options, device) if trains else (None, None)
    return PruningRow(
        str(shape), name, weights, median(update), median(step), extra, training, share,
        f"{where}, torch {torch.__version__}",
    )  # fmt: skip


def _layer(shape: LayerShape) -> nn.Module:
    if shape.kind == "product":
        return nn.Linear(shape.inputs, shape.outputs, bias=False)
    made: nn.Module = {"gru": nn.GRU, "lstm": nn.LSTM}.get(shape.kind, nn.RNN)(shape.inputs, shape.outputs)
    return made


class _LanguageModel(nn.Module):
    """Over bytes."""

    def __init__(self, shape: LayerShape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 256)
        self.rnn = _layer(LayerShape(shape.kind, 256, shape.outputs))
        self.linear = nn.Linear(shape.outputs, 256)

    def forward(self, tokens_TB: Tensor) -> Tensor:
        logits_TBV = self.linear(self.rnn(self.embedding(tokens_TB))[0])
        return F.cross_entropy(logits_TBV.flatten(0, 1).float(), tokens_TB.flatten())


def _share_of_training(
    shape: LayerShape, name: str, options: dict[str, Any], device: torch.device
) -> tuple[float, float]:
    """Milliseconds of a step in bf16 with a fused Adam and clipping, and the share of them inside pruning."""
    model = _LanguageModel(shape).to(device)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    pruner = Pruner(model, name.split()[0], RunLength(20_000, 2_000), optimizer, freq=_FREQ, **options)
    tokens_TB = torch.randint(256, (_STEPS, _STREAMS), device=device)

    def step() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        with torch.autocast(device.type, torch.bfloat16):
            loss = model(tokens_TB)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        pruner.step()
        after.record()
        return before, after

    updates = list(pruner.method.updates)
    for itr in (updates[0], updates[len(updates) // 2]):
        pruner.itr = itr - 1
        _, began = step()  # the first of all, and the first at this sparsity, take longer
    inside = [step() for _ in range(_TRAINED)]
    torch.cuda.synchronize(device)
    total = began.elapsed_time(inside[-1][1])
    return total / _TRAINED, sum(before.elapsed_time(after) for before, after in inside) / total


def _milliseconds(pruner: Pruner, before: int, device: torch.device) -> float:
    """Of the step after iteration ``before``."""
    pruner.itr = before
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    pruner.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began)


def _extra_bytes(action: Callable[[], object]) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    action()
    return torch.cuda.max_memory_allocated() - before
