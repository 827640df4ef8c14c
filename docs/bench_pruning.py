"""Pruning's share of training on a GPU: runs with and without it, in turns.

    python docs/bench_pruning.py FOLDER [PAIRS]

It writes pruning_share.csv there, a row a run, in about a minute a pair. Networks are Penn Treebank's medium and large
ones, by ``gradual`` and by ``obd``, on random words of a vocabulary as large, and a language model of 2,560 GRU units;
each eagerly and with CUDA graphs. All are trained in bfloat16, with masks updated every 100 steps, as in a run of
hours. The first pass is left out: it compiles, records graphs, and waits for memory. Other jobs of a host disturb eager
runs: the quietest of a run are those of its passes, from one update to the next, that took the least time.
"""

from __future__ import annotations

import csv
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import srnn.pruning.schedules as schedules
from srnn.bench.training_loop import Clock
from srnn.config.composing import compose_settings
from srnn.kernels.timing import hardware
from srnn.pruning.callback import PruningCallback
from srnn.registry import register
from srnn.training.fitting import quiet, trainer_for
from srnn.training.preparing import prepare

TRY = bool(os.environ.get("TRY"))  # tiny, on a CPU, to see that all runs
FREQ = 10 if TRY else 100
GRU = ["model.hidden_size=2560", "dataset.batch_size=64", "dataset.sequence_length=150"]
# Name -> options, passes, and batches of a pass: with the first left out, three updates in 300 steps.
CASES: dict[str, tuple[list[str], int, int]] = {
    "ptb_medium": (["experiment=ptb_medium"], 7, 5 if TRY else 50),
    "ptb_large": (["experiment=ptb_large"], 7, 5 if TRY else 50),
    "ptb_medium obd": (["experiment=ptb_medium", "pruning=obd"], 7, 5 if TRY else 50),
    "ptb_large obd": (["experiment=ptb_large", "pruning=obd"], 7, 5 if TRY else 50),
    "gru 2560": (GRU, 10, 5 if TRY else 33),
}
COLUMNS = (
    "device", "case", "cuda_graph", "loop", "pair", "steps",
    "ms_per_step", "quietest_ms_per_step", "inside_ms_per_step", "updates",
)  # fmt: skip


def make_text(folder: Path) -> None:
    """Words at random, a few of them often, with Penn Treebank's vocabulary and file names."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 3_000 if TRY else 100_000), ("valid", 2_000), ("test", 2_000)):
        words = np.minimum((generator.pareto(1.0, count) * 20).astype(int), 9_999)
        if part == "train" and not TRY:
            words[:10_000] = np.arange(10_000)
        lines = (" ".join(f"w{word}" for word in words[start : start + 20]) for start in range(0, count, 20))
        (folder / f"ptb.{part}.txt").write_text("\n".join(lines) + "\n")


def options_of(case: str, graph: bool, folder: Path) -> list[str]:
    """Of a run that prunes nearly from the start to nearly the end."""
    options, epochs, batches = CASES[case]
    steps = epochs * batches
    data = [f"dataset.folder={folder}"] if case.startswith("ptb") else []
    ramp = [] if "pruning=obd" in options else [f"pruning.ramp_itr={steps // 4}"]
    made = [
        *options, *data, f"trainer.max_epochs={epochs}", f"trainer.limit_train_batches={batches}", *ramp,
        f"pruning.start_itr={steps // 20}", f"pruning.end_itr={steps - 1}", f"pruning.freq={FREQ}",
        "tracking.mode=disabled",
    ]  # fmt: skip
    if TRY:
        return [*made, "model.hidden_size=16", "model.embedding_size=16", "dataset.batch_size=2"]
    return [
        *made,
        "trainer.accelerator=gpu",
        "trainer.precision=bf16-mixed",
        f"trainer.cuda_graph={str(graph).lower()}",
    ]


class PassClock(Clock):
    """Also what was spent inside pruning up to the end of each pass."""

    def __init__(self, pruning: PruningCallback) -> None:
        super().__init__()
        self.pruning = pruning
        self.inside: list[float] = []

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self.pruning.pruner is not None
        self.inside.append(self.pruning.pruner.seconds)


def quietest(seconds: list[float], passes: int) -> float:
    """The least that so many passes took."""
    return min(sum(seconds[first : first + passes]) for first in range(0, len(seconds) - passes + 1, passes))


def run(options: list[str], pruned: bool) -> dict[str, Any]:
    """Train, and measure all but the first pass."""
    settings = compose_settings(options)
    made = prepare(settings if pruned else replace(settings, pruning=register.check("pruning", {"name": "none"})))
    pruning = PruningCallback(made.method, made.model, made.reference)
    clock = PassClock(pruning)
    trainer_for(settings.trainer, [pruning, clock]).fit(made.objective, made.objective.data.train_dataloader())
    batches = len(made.objective.data.train_dataloader())
    steps = batches * (len(clock.seconds) - 1)
    last = batches * len(clock.seconds)
    passes = max(1, round(FREQ / batches))  # with one update
    return {
        "loop": "pruned" if pruned else "dense",
        "steps": steps,
        "ms_per_step": f"{1e3 * sum(clock.seconds[1:]) / steps:.4f}",
        "quietest_ms_per_step": f"{1e3 * quietest(clock.seconds[1:], passes) / (passes * batches):.4f}",
        "inside_ms_per_step": f"{1e3 * (clock.inside[-1] - clock.inside[0]) / steps:.4f}",
        "updates": sum(last - steps < itr <= last for itr in made.method.updates),
    }


def main(folder: Path, pairs: int) -> None:
    """All cases in each round, so that what stops later leaves pairs of all of them."""
    schedules.UPDATES = 3  # so short a run would have to update more often
    quiet()
    folder.mkdir(parents=True, exist_ok=True)
    make_text(folder)
    device = hardware(torch.device("cpu" if TRY else "cuda"))
    with (folder / "pruning_share.csv").open("w", newline="", buffering=1) as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for pair in range(pairs):
            for case in CASES:
                for graph in (False, True):
                    # Which comes first changes from pair to pair.
                    for pruned in (pair % 2 == 1, pair % 2 == 0):
                        row = run(options_of(case, graph, folder), pruned)
                        table.writerow({"device": device, "case": case, "cuda_graph": graph, "pair": pair, **row})
                        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
