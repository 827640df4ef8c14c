"""The same GRU, pruned to 90 % while it trains, by four tools: what each can do, and what survives.

    python docs/compare_pruning_tools.py

prints the table of docs/pruning.md. All but its first four lines are tried here, on a CPU, with what is installed.
"""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, ModelPruning
from torch import Tensor, nn
from torch.ao.pruning import WeightNormSparsifier
from torch.ao.pruning.scheduler.cubic_scheduler import CubicSL
from torch.nn.utils import prune

from srnn import PruningCallback

EPOCHS, BATCHES = 6, 10
STEPS = EPOCHS * BATCHES
NAMES = ("weight_ih_l0", "weight_hh_l0")


class Module(pl.LightningModule):
    """A GRU that copies random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 16, batch_first=True)
        self.out = nn.Linear(16, 8)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """The copy."""
        return self.out(self.rnn(x_BTI)[0])

    def training_step(self, x_BTI: Tensor, batch_idx: int) -> Tensor:
        """Mean squared error."""
        return (self(x_BTI) - x_BTI).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam, whose moments show what becomes of pruned weights."""
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Steps(pl.Callback):
    """Calls a tool without a callback of its own after each optimiser step."""

    def __init__(self, step: Callable[[int], None]) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """After the step."""
        self.step(trainer.global_step)


def cubic(itr: int) -> float:
    """Zhu and Gupta's schedule, written by hand where a tool has none."""
    return 0.9 - 0.9 * (1 - min(max(itr - BATCHES, 0) / (STEPS / 2 - BATCHES), 1)) ** 3


# The code a user writes for each, beside that schedule: what "lines" counts.


def by_torch(module: Module) -> pl.Callback:
    """``torch.nn.utils.prune``: amounts are shares of what is left, so a schedule has to be converted."""

    def step(itr: int) -> None:
        for name in NAMES:
            prune.l1_unstructured(module.rnn, name, amount=1 - (1 - cubic(itr)) / (1 - cubic(itr - 1)))

    for name in NAMES:
        prune.identity(module.rnn, name)
    return Steps(step)


def by_lightning(module: Module) -> pl.Callback:
    """``ModelPruning``: once an epoch; recurrent weights cannot be named, but are taken with their module."""

    def amount(epoch: int) -> float:
        return 1 - (1 - cubic(BATCHES * (epoch + 1))) / (1 - cubic(BATCHES * epoch))

    weights = [(module.rnn, name) for name in NAMES]
    return ModelPruning("l1_unstructured", weights, amount=amount, use_global_unstructured=False)


def by_ao(module: Module) -> pl.Callback:
    """``torch.ao.pruning``: a sparsifier and its cubic scheduler."""

    def step(itr: int) -> None:
        sparsifier.step()
        scheduler.step()

    sparsifier = WeightNormSparsifier(0.9, sparse_block_shape=(1, 1), zeros_per_block=1)
    sparsifier.prepare(module.rnn, [{"tensor_fqn": name} for name in NAMES])
    scheduler = CubicSL(sparsifier, init_sl=0.0, init_t=BATCHES, delta_t=1, total_t=STEPS // 2 - BATCHES)
    return Steps(step)


def by_srnn(module: Module) -> pl.Callback:
    """``srnn``."""
    return PruningCallback(
        "cubic", sparsity=0.9, start_itr="1 epoch", freq=1, layer_types=["recurrent"], share="matrix"
    )


Tool = Callable[[Module], pl.Callback]
TOOLS: dict[str, Tool] = {
    "torch.nn.utils.prune": by_torch,
    "Lightning ModelPruning": by_lightning,
    "torch.ao.pruning": by_ao,
    "srnn": by_srnn,
}
# What their interfaces offer; from their documentation.
OFFERED = {
    "prunes": ("weights, rows, columns", "the same", "weights, blocks, n:m", "weights, blocks, n:m"),
    "settings of a gate": ("no", "no", "no", "yes"),
    "schedule": ("by hand", "an amount an epoch", "yes", "yes"),
    "regrowth": ("no", "no", "no", "yes"),
}


class Tried(pl.Callback):
    """Looks at the network after a step in the middle of the training."""

    def __init__(self) -> None:
        self.found: dict[str, bool] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """After everything else in the step."""
        if trainer.global_step != STEPS // 2 + 5:
            return
        rnn = pl_module.rnn
        masks = [getattr(rnn, name) == 0 for name in NAMES]
        stored = [p for p in rnn.parameters() if p.shape in [m.shape for m in masks]]
        state = trainer.optimizers[0].state
        self.found = {
            "prunes recurrent weights": all(float(mask.float().mean()) > 0.5 for mask in masks),
            "parameters keep their names": list(rnn.state_dict()) == list(nn.GRU(8, 16).state_dict()),
            "pruned weights are zero in the parameters": all(float((p == 0).float().mean()) > 0.5 for p in stored),
            "and in the optimiser's state": all(float((state[p]["exp_avg"] == 0).float().mean()) > 0.5 for p in stored),
            "deepcopy works": _works(lambda: copy.deepcopy(pl_module.rnn)),
            "weights load into a plain nn.GRU": _works(lambda: nn.GRU(8, 16).load_state_dict(rnn.state_dict())),
            "cuDNN's flat weights stay parameters": all(isinstance(w, nn.Parameter) for w in rnn._flat_weights),
        }


def _works(action: Callable[[], object]) -> bool:
    try:
        action()
    except Exception:
        return False
    return True


def fit(folder: Path, tool: Tool, *callbacks: pl.Callback, **options: Any) -> Module:
    """Train the network under a tool."""
    torch.manual_seed(0)
    module = Module()
    data = torch.utils.data.DataLoader(torch.randn(BATCHES * 4, 5, 8), batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    saved = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    trainer = pl.Trainer(max_epochs=EPOCHS, callbacks=[tool(module), *callbacks, saved], **quiet)
    trainer.fit(module, data, **options)
    return module


def resumes(folder: Path, tool: Tool, whole: Module) -> bool:
    """Whether a run that goes on from a checkpoint in the middle ends with the same weights."""

    def weights(module: Module) -> list[Tensor]:
        return [getattr(module.rnn, name).detach() for name in NAMES]

    try:
        again = fit(folder, tool, ckpt_path=folder / "epoch=1.ckpt", weights_only=False)
    except Exception:
        return False
    return all(torch.equal(one, two) for one, two in zip(weights(whole), weights(again), strict=True))


def lines_of(tool: Tool) -> int:
    """Lines of code, without the head and the docstring."""
    return sum(bool(line.strip()) for line in inspect.getsource(tool).splitlines()[2:])


def table() -> str:
    """The comparison as Markdown."""
    rows: dict[str, list[str]] = {row: list(cells) for row, cells in OFFERED.items()}
    for tool in TOOLS.values():
        tried = Tried()
        with tempfile.TemporaryDirectory() as folder:
            whole = fit(Path(folder), tool, tried)
            found = tried.found | {
                "a stopped run goes on bitwise, without more code": resumes(Path(folder), tool, whole)
            }
        for name, works in found.items():
            rows.setdefault(name, []).append("yes" if works else "no")
    rows["lines, beside a schedule by hand"] = [str(lines_of(tool)) for tool in TOOLS.values()]
    head = f"| | {' | '.join(TOOLS)} |\n|{'---|' * (len(TOOLS) + 1)}\n"
    return head + "".join(f"| {name} | {' | '.join(cells)} |\n" for name, cells in rows.items())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    print(table(), end="")
