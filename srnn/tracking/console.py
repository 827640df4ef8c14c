"""What a person sees: the plan before, one progress bar while, one table at the end."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from srnn.pruning.callback import PruningCallback
from srnn.pruning.pruner import Pruner

console = Console(width=None if sys.stdout.isatty() else 110, highlight=False, soft_wrap=False)


def print_plan(pruner: Pruner) -> None:
    """What will be pruned, and the schedule's forecast."""
    if not pruner.groups:
        console.print("Nothing is pruned: this is a dense run.")
        return
    table = Table(title="What will be pruned")
    for column in ("parameter", "layer type", "shape", "weights"):
        table.add_column(column, justify="right" if column == "weights" else "left", overflow="fold")
    for group in pruner.groups:
        for name, parameter in group.parameters.items():
            shape = " x ".join(map(str, parameter.shape))
            table.add_row(name, group.layer_type, shape, f"{parameter.numel():,}")
    table.add_section()
    table.add_row("total", "", "", f"{sum(g.size for g in pruner.groups):,}")
    console.print(table)
    _print_forecast(pruner)


def _print_forecast(pruner: Pruner) -> None:
    run, method = pruner.run, pruner.method
    q = getattr(method, "fixed_q", None)
    table = Table(title=f"Forecast: {run.total_steps:,} steps, {run.epochs:.3g} epochs")
    kinds = [group.layer_type for group in pruner.groups] if q else []
    for column in (
        "",
        "step",
        "epoch",
        "threshold / q",
        *(f"threshold {k}" for k in kinds),
        "expected sparsity",
    ):
        table.add_column(column, justify="left" if not column else "right")
    for row in method.forecast():
        over_q = row.epsilon_over_q
        thresholds = [f"{over_q * q[kind]:.4f}" for kind in kinds] if q and over_q is not None else []
        share = "by rank" if over_q is None else f"{over_q:.3f}"
        epoch = f"{row.itr / run.steps_per_epoch:.2f}"
        table.add_row(row.event, str(row.itr), epoch, share, *thresholds, f"{100 * row.sparsity:.1f} %")
    note = "q is estimated at each update" if q is None else "q is fixed"
    table.caption = f"expected if weights are normally distributed; {note}"
    console.print(table)


class RunProgress(ProgressBar):
    """One bar over all steps with loss, bits per character, sparsity and threshold; and a line an epoch."""

    def __init__(self, pruning: PruningCallback) -> None:
        super().__init__()
        self.pruning = pruning
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._shown = 0.0

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._progress = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the plan, then the bar."""
        assert self.pruning.pruner is not None
        print_plan(self.pruning.pruner)
        if not console.is_terminal:
            return
        self._progress = Progress(
            TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("", total=self.pruning.pruner.run.total_steps, numbers="")
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ten times a second at most: reading the loss waits for the device."""
        now = time.monotonic()
        if self._progress is not None and now - self._shown > 0.1:
            self._shown = now
            self._progress.update(self._task, completed=trainer.global_step, numbers=self._numbers(trainer, "train"))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}"
        console.print(f"{epoch}: valid {self._numbers(trainer, 'valid')}")

    def _numbers(self, trainer: pl.Trainer, part: str) -> str:
        assert self.pruning.pruner is not None
        pruner, metrics = self.pruning.pruner, trainer.callback_metrics
        loss, bits = metrics.get(f"{part}_loss"), metrics.get(f"{part}_bits_per_character")
        numbers = f"loss {float(loss):.3f}  bpc {float(bits):.3f}" if loss is not None and bits is not None else ""
        if pruner.groups:
            kind, epsilon = next(iter(pruner.thresholds.items()))
            numbers += f"  sparsity {100 * pruner.sparsity:.1f} %  threshold {epsilon:.4f} ({kind})"
        return numbers

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the terminal as it was."""
        self._stop()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Leave the terminal as it was."""
        self._stop()


def print_report(report: dict[str, Any]) -> None:
    """The run in one table."""
    table = Table(title=f"{report['model']} on {report['dataset']}, pruning={report['pruning']}", show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    scores = report["scores"]
    for key, title in MILESTONES.items():
        if scores.get(key):
            table.add_row(title.format(**scores[key]), _score(scores[key]))
    table.add_section()
    for layer in report["layers"]:
        table.add_row(
            f"{layer['parameter']}: {layer['nonzeros']:,} of {layer['weights']:,} weights left",
            f"{100 * layer['sparsity']:.2f} % sparse",
        )
    table.add_section()
    sparsity = report["sparsity"]
    if report["layers"]:
        reached, wanted = (f"{100 * sparsity[key]:.2f} %" for key in ("reached", "wanted"))
        table.add_row("sparsity reached, wanted", f"{reached}, {wanted}")
    sizes = report["size"]
    table.add_row("parameters, of which non-zero", f"{sizes['parameters']:,}, {sizes['nonzeros']:,}")
    ratio = sizes["dense_bytes"] / sizes["packed_bytes"]
    table.add_row(
        "bytes dense (fp32), packed file",
        f"{sizes['dense_bytes']:,}, {sizes['packed_bytes']:,} ({ratio:.1f}x smaller)",
    )
    latency = report["latency"]
    for kind, words in (("sequence", f"one stream, {latency['steps']} steps"), ("step", "one stream, one step")):
        if kind in latency:
            dense, sparse = latency[kind]["dense"], latency[kind]["sparse"]
            table.add_row(
                f"{words}: best dense, packed ({latency['threads']} threads)",
                f"{1e6 * dense:,.0f} us, {1e6 * sparse:,.0f} us ({dense / sparse:.2f}x)",
            )
    seconds = report["seconds"]
    share = 100 * seconds["pruning"] / seconds["training_loop"]
    table.add_row("time in the training loop, inside pruning", f"{seconds['training_loop']:.1f} s, {share:.2f} %")
    console.print(table)
    for line in latency["choices"]:
        console.print(f"kernel: {line}", markup=False, highlight=False)
    if abs(sparsity["reached"] - sparsity["wanted"]) > MISSED:
        console.print(
            f"The sparsity is {100 * sparsity['reached']:.2f} %, not {100 * sparsity['wanted']:g} %: with a fixed q it "
            f"results from the schedule; pruning.q=auto meets it exactly.",
        )


MISSED = 0.001  # a tenth of a percent: sparsities further apart get a warning
# Report key -> row title.
MILESTONES = {
    "pruning_started": "validation when pruning started (step {step})",
    "best_dense": "best validation while dense (step {step})",
    "best": "best validation at the end (step {step})",
    "test": "test, the same checkpoint",
    "test_packed": "test, packed file read back",
}


def _score(score: dict[str, Any]) -> str:
    return f"{score['bits_per_character']:.4f} bits/char, perplexity {score['perplexity']:.3f}"
