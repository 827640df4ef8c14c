"""Pruning's share of training on a GPU: a run with it and one without, in turns, a pass at a time.

    python docs/bench_pruning.py FOLDER [PAIRS]
    python docs/bench_pruning.py FOLDER busy

The first writes pruning_share.csv there, a row a pass, in two minutes for five pairs. The second writes
pruning_share_busy.csv: for how long the GPU is busy in a step and in an update, whatever else the host does. Networks
are Penn Treebank's medium and large ones, on random words of a vocabulary as large, and a language model of 2,560 GRU
units; each with CUDA graphs and eagerly. All are trained in bfloat16. A pass has 100 steps and one update of the masks,
as every 100 steps of a run of hours. The first pass is left out: it compiles, records graphs, and waits for memory.
"""

from __future__ import annotations

import csv
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from threading import Condition, Thread
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

import srnn.pruning.schedules as schedules
from srnn.bench.training_loop import Clock
from srnn.config.composing import compose_settings
from srnn.kernels.timing import hardware
from srnn.pruning.callback import PruningCallback
from srnn.registry import register
from srnn.training.fitting import quiet, trainer_for
from srnn.training.preparing import prepare

TRY = bool(os.environ.get("TRY"))  # tiny, on a CPU, to see that all runs
BUSY = sys.argv[2:] == ["busy"]
STEPS = 10 if TRY else 40 if BUSY else 100  # of a pass
UPDATE = STEPS // 2  # the step of a pass in which masks are updated
WINDOW = 2 if TRY else 10  # steps that are profiled
WATCHED = [ProfilerActivity.CPU if TRY else ProfilerActivity.CUDA]
GRU = ["model.hidden_size=2560", "dataset.batch_size=64", "dataset.sequence_length=150"]
CASES = {"ptb_large": ["experiment=ptb_large"], "ptb_medium": ["experiment=ptb_medium"], "gru 2560": GRU}


def make_text(folder: Path) -> None:
    """Words at random, a few of them often, with Penn Treebank's vocabulary and file names."""
    generator = np.random.default_rng(0)
    for part, count in (("train", 3_000 if TRY else 100_000), ("valid", 2_000), ("test", 2_000)):
        words = np.minimum((generator.pareto(1.0, count) * 20).astype(int), 9_999)
        if part == "train" and not TRY:
            words[:10_000] = np.arange(10_000)
        lines = (" ".join(f"w{word}" for word in words[start : start + 20]) for start in range(0, count, 20))
        (folder / f"ptb.{part}.txt").write_text("\n".join(lines) + "\n")


def options_of(case: str, graph: bool, folder: Path, passes: int) -> list[str]:
    """Of a run that prunes nearly from the start to nearly the end."""
    data = [f"dataset.folder={folder}"] if case.startswith("ptb") else []
    steps = passes * STEPS
    made = [
        *CASES[case], *data, f"trainer.max_epochs={passes}", f"trainer.limit_train_batches={STEPS}",
        f"pruning.start_itr={UPDATE}", f"pruning.ramp_itr={UPDATE + STEPS}", f"pruning.end_itr={steps - 1}",
        f"pruning.freq={STEPS}", "tracking.mode=disabled",
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
    """Two threads of which one goes on at a time."""

    def __init__(self) -> None:
        self._turn, self._there, self._changed = 0, {0, 1}, Condition()

    def wait(self, me: int) -> None:
        """Until it is my turn, or the other has left."""
        with self._changed:
            self._changed.wait_for(lambda: self._turn == me or 1 - me not in self._there)

    def give(self, me: int, leave: bool = False) -> None:
        """Let the other go on."""
        with self._changed:
            self._turn = 1 - me
            if leave:
                self._there.discard(me)
            self._changed.notify_all()


class PassClock(Clock):
    """Wall time of each pass and what was spent inside pruning; or what the GPU does in the last pass."""

    def __init__(self, pruning: PruningCallback, turns: Turns, me: int, passes: int) -> None:
        super().__init__()
        self.pruning, self.turns, self.me, self.passes = pruning, turns, me, passes
        self.inside: list[float] = []
        self.busy: list[float] = []  # milliseconds of a window without an update, and of one with it
        self._profile: Any = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Begin a window in the last pass."""
        last = BUSY and trainer.current_epoch == self.passes - 1
        if last and batch_idx in (UPDATE - 2 * WINDOW, UPDATE - WINDOW // 2):
            self._profile = profile(activities=WATCHED)
            self._profile.start()
            self._until = batch_idx + WINDOW - 1

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End it."""
        if self._profile is not None and batch_idx == self._until:
            if not TRY:
                torch.cuda.synchronize()
            self._profile.stop()
            self.busy.append(busy_in(self._profile))
            self._profile = None

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Stop, and let the other run have a pass."""
        super().on_train_epoch_end(trainer, pl_module)
        assert self.pruning.pruner is not None
        self.inside.append(self.pruning.pruner.seconds)
        if trainer.current_epoch < self.passes - 1:
            self.turns.give(self.me)
            self.turns.wait(self.me)


def busy_in(profiled: Any) -> float:
    """Milliseconds for which the GPU did anything; kernels side by side count once."""
    kind = torch.autograd.DeviceType.CPU if TRY else torch.autograd.DeviceType.CUDA
    events = [e for e in profiled.profiler.kineto_results.events() if e.device_type() == kind]
    # Marks that span several kernels, and what is between them.
    events = [e for e in events if not e.name().startswith(("Optimizer.", "ProfilerStep", "[pl]", "##"))]
    spans = sorted((e.start_ns(), e.start_ns() + e.duration_ns()) for e in events)
    total = until = 0
    for start, end in spans:
        total += max(0, end - max(start, until))
        until = max(until, end)
    return total / 1e6


def train(options: list[str], pruned: bool, clock_of: Callable[[PruningCallback], PassClock]) -> PassClock:
    """Train, with a pruner or with one that has nothing to do."""
    settings = compose_settings(options)
    made = prepare(settings if pruned else replace(settings, pruning=register.check("pruning", {"name": "none"})))
    pruning = PruningCallback(made.method, made.model, made.reference)
    clock = clock_of(pruning)
    trainer_for(settings.trainer, [pruning, clock]).fit(made.objective, made.objective.data.train_dataloader())
    return clock


def train_both(options: list[str], passes: int) -> list[PassClock]:
    """Dense and pruned, in turns."""
    turns, clocks, errors = Turns(), [None, None], []

    def one(me: int) -> None:
        turns.wait(me)
        try:
            clocks[me] = train(options, me == 1, lambda pruning: PassClock(pruning, turns, me, passes))  # type: ignore
        except BaseException as error:
            errors.append(error)
        finally:
            turns.give(me, leave=True)

    threads = [Thread(target=one, args=(me,)) for me in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return clocks  # type: ignore[return-value]


def rows_of(clock: PassClock) -> Iterable[dict[str, Any]]:
    """Of all passes but the first; or of the one that was profiled."""
    if BUSY:
        usual, update = clock.busy
        yield {
            "steps": WINDOW,
            "busy_ms_per_step": f"{usual / WINDOW:.4f}",
            "busy_ms_more_with_an_update": f"{update - usual:.4f}",
        }
    for pair in range(1, 0 if BUSY else len(clock.seconds)):
        inside = clock.inside[pair] - clock.inside[pair - 1]
        yield {
            "pair": pair - 1, "steps": STEPS, "ms_per_step": f"{1e3 * clock.seconds[pair] / STEPS:.4f}",
            "inside_ms_per_step": f"{1e3 * inside / STEPS:.4f}",
        }  # fmt: skip


def main(folder: Path, passes: int) -> None:
    """All cases, each as soon as it is known."""
    schedules.UPDATES = 3  # so short a run would have to update more often
    quiet()
    make_text(folder)
    device = hardware(torch.device("cpu" if TRY else "cuda"))
    if BUSY:
        os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}  # as graphs need it
        with profile(activities=WATCHED):  # which the main thread has to begin with
            torch.zeros(1, device="cpu" if TRY else "cuda")
    name = "pruning_share_busy.csv" if BUSY else "pruning_share.csv"
    with (folder / name).open("w", newline="", buffering=1) as file:
        table = None
        for graph in (True, False):
            for case in CASES:
                began = time.monotonic()
                clocks = train_both(options_of(case, graph, folder, passes), passes)
                for loop, clock in zip(("dense", "pruned"), clocks, strict=True):
                    for row in rows_of(clock):
                        row = {"device": device, "case": case, "cuda_graph": graph, "loop": loop} | row
                        if table is None:
                            table = csv.DictWriter(file, list(row), lineterminator="\n")
                            table.writeheader()
                        table.writerow(row)
                print(f"{case}, cuda_graph={graph}: {time.monotonic() - began:.0f} s", flush=True)
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main(Path(sys.argv[1]), 5 if BUSY else 1 + int(sys.argv[2] if len(sys.argv) > 2 else 5))
