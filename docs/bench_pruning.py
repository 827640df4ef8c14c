"""Pruning's share of training on a GPU: pairs of runs with and without it, in turns of ten steps.

    python docs/bench_pruning.py FOLDER [PAIRS]

It writes pruning_share.csv there, a row a run, in about a minute a pair, and one for a pair before the first, which
compiles. Networks are Penn Treebank's medium and large ones, by ``gradual`` and by ``obd``, on random words of a
vocabulary as large, and a language model of 2,560 GRU units; each eagerly and with CUDA graphs. All are trained in
bfloat16, with masks updated every 100 steps, as in a run of hours. The first pass is left out: it records graphs, and
waits for memory. Both runs of a pair are threads of one process, of which one waits while the other trains: what else
a host does, for seconds, then slows both.
"""

from __future__ import annotations

import csv
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

import srnn.pruning.schedules as schedules
from srnn.config.composing import compose_settings
from srnn.kernels.timing import hardware
from srnn.pruning.callback import PruningCallback
from srnn.registry import register
from srnn.training.fitting import quiet, trainer_for
from srnn.training.preparing import prepare

TRY = bool(os.environ.get("TRY"))  # tiny, on a CPU, to see that all runs
FREQ = 10 if TRY else 100
TURN = 5 if TRY else 10  # steps
GRU = ["model.hidden_size=2560", "dataset.batch_size=64", "dataset.sequence_length=150"]
# Name -> options, passes, and batches of a pass: with the first left out, three updates in 300 steps.
CASES: dict[str, tuple[list[str], int, int]] = {
    "ptb_medium": (["experiment=ptb_medium"], 7, 5 if TRY else 50),
    "ptb_large": (["experiment=ptb_large"], 7, 5 if TRY else 50),
    "ptb_medium obd": (["experiment=ptb_medium", "pruning=obd"], 7, 5 if TRY else 50),
    "ptb_large obd": (["experiment=ptb_large", "pruning=obd"], 7, 5 if TRY else 50),
    "gru 2560": (GRU, 10, 5 if TRY else 33),
}
COLUMNS = ("device", "case", "cuda_graph", "loop", "pair", "steps", "ms_per_step", "inside_ms_per_step", "updates")


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


class Turns:
    """Says which of two runs goes on."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.at_work, self.there = 0, {0, 1}

    def wait(self, me: int) -> None:
        """Until it is my turn."""
        with self.changed:
            self.changed.wait_for(lambda: self.at_work == me)

    def hand_on(self, me: int) -> None:
        """Let the other go on, if it is still there, and wait for my next turn."""
        with self.changed:
            if 1 - me in self.there:
                self.at_work = 1 - me
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.at_work == me)

    def leave(self, me: int) -> None:
        """Leave all to the other."""
        with self.changed:
            self.there.discard(me)
            self.at_work = 1 - me
            self.changed.notify_all()


class InTurns(pl.Callback):
    """Trains in turns, and times one's own: steps, seconds, and those inside pruning, after the first pass."""

    def __init__(self, turns: Turns, me: int, pruning: PruningCallback) -> None:
        self.turns, self.me, self.pruning = turns, me, pruning
        self.steps, self.seconds, self.inside, self.last = 0, 0.0, 0.0, 0
        self._began = self._inside_before = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first turn begins."""
        self._begin()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """A turn ends after so many steps."""
        if trainer.global_step % TURN:
            return
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if trainer.global_step - TURN >= trainer.num_training_batches:
            assert self.pruning.pruner is not None
            self.steps, self.last = self.steps + TURN, trainer.global_step
            self.seconds += time.perf_counter() - self._began
            self.inside += self.pruning.pruner.seconds - self._inside_before
        self.turns.hand_on(self.me)
        self._begin()

    def _begin(self) -> None:
        pruner = self.pruning.pruner
        self._inside_before = 0.0 if pruner is None else pruner.seconds
        self._began = time.perf_counter()


def run(options: list[str], pruned: bool, turns: Turns, me: int) -> dict[str, Any]:
    """Train, and measure all but the first pass."""
    turns.wait(me)
    try:
        settings = compose_settings(options)
        made = prepare(settings if pruned else replace(settings, pruning=register.check("pruning", {"name": "none"})))
        pruning = PruningCallback(made.method, made.model, made.reference)
        clock = InTurns(turns, me, pruning)
        trainer_for(settings.trainer, [pruning, clock]).fit(made.objective, made.objective.data.train_dataloader())
    finally:
        turns.leave(me)
    return {
        "loop": "pruned" if pruned else "dense",
        "steps": clock.steps,
        "ms_per_step": f"{1e3 * clock.seconds / clock.steps:.4f}",
        "inside_ms_per_step": f"{1e3 * clock.inside / clock.steps:.4f}",
        "updates": sum(clock.last - clock.steps < itr <= clock.last for itr in made.method.updates),
    }


def a_pair(options: list[str], first: bool) -> list[dict[str, Any]]:
    """The rows of a run with and one without pruning; ``first`` says whether it is the former that begins."""
    turns = Turns()
    with ThreadPoolExecutor(2) as threads:
        both = [threads.submit(run, options, pruned, turns, me) for me, pruned in enumerate((first, not first))]
    torch.cuda.empty_cache()
    return [one.result() for one in both]


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
        for pair in range(-1, pairs):
            for case in CASES:
                for graph in (False, True):
                    rows = a_pair(options_of(case, graph, folder), pair % 2 == 1)  # which begins changes
                    for row in rows if pair >= 0 else ():  # kernels are compiled before
                        table.writerow({"device": device, "case": case, "cuda_graph": graph, "pair": pair, **row})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 5)
