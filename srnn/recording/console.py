"""What a person sees: the plan before, one progress bar while, one table at the end."""

from __future__ import annotations

import math
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from itertools import groupby, islice
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from srnn.datasets.base import DataModule
from srnn.kernels.remembering import BUSY
from srnn.pruning.callback import PruningCallback
from srnn.pruning.pruner import Pruner
from srnn.pruning.schedules import GradualSchedule
from srnn.recording.report import transcripts
from srnn.recording.wandb import sync_command
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.terminal import Screen, console, plural, screen
from srnn.vocabulary import Vocabulary

SHORT = {"bits_per_character": "bpc", "perplexity": "ppl"}  # of scores, in the line of a validation
PROMPT = 20  # characters
SILENCE = 60.0  # seconds
FORECAST_ROWS = 7  # of a schedule's updates in the table


def print_plan(pruner: Pruner) -> None:
    """What will be pruned, and the schedule's forecast."""
    if not pruner.groups:
        console.print("Nothing is pruned: this is a dense run.")
        return
    table = Table(title="What will be pruned")
    for column in ("parameter", "shape", "weights", "structure", "sparsity", "threshold of"):
        right = column in ("weights", "sparsity")
        table.add_column(column, justify="right" if right else "left", overflow="fold", no_wrap=column == "parameter")
    for group in pruner.groups:
        for part in group.parts:
            gates, *sizes = part.shape
            shape = " x ".join(map(str, (gates * sizes[0], sizes[1])))
            wanted = "as it is" if group.sparsity is None else f"{100 * group.target / group.size:.1f} %"
            row = (part.name, shape, f"{part.size:,}", str(group.structure), wanted, group.name)
            table.add_row(*row)
    table.add_section()
    table.add_row("total", "", f"{sum(g.size for g in pruner.groups):,}")
    console.print(table)
    if pruner.method.updates:
        _print_forecast(pruner)


def _print_forecast(pruner: Pruner) -> None:
    """Some updates of the schedule: steps, sparsities, and for Algorithm 1 thresholds."""
    run, method = pruner.run, pruner.method
    schedule = getattr(method, "schedule", None)
    over_q = schedule if isinstance(schedule, GradualSchedule) else None
    q = getattr(method, "fixed_q", None)
    table = Table(title=f"Forecast: {run.total_steps:,} steps, {run.epochs:.3g} epochs")
    columns = ["step", "epoch", *(["threshold / q"] if over_q else [])]
    columns += [f"threshold {name}" for name in q or ()]
    columns += [f"sparsity {group.name}" for group in pruner.groups[:4]]
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for itr in shown_updates(method.updates):
        row = [str(itr), f"{itr / run.steps_per_epoch:.2f}"]
        if over_q:
            share = over_q.epsilon(itr, 1.0)
            row += [f"{share:.3f}", *(f"{share * value:.4f}" for value in (q or {}).values())]
        expected = [method.expected(itr, group) for group in pruner.groups[:4]]
        row += ["" if share is None else f"{100 * share:.1f} %" for share in expected]
        table.add_row(*row)
    notes = [plural(len(method.updates), "update")]
    if over_q:
        told = "q is estimated at each update" if q is None else "q is fixed"
        notes.append(f"sparsities if weights are normally distributed; {told}")
    if len(pruner.groups) > 4:
        notes.append(f"the first 4 of {len(pruner.groups)} groups")
    table.caption = "; ".join(notes)
    console.print(table)


def shown_updates(updates: Sequence[int]) -> list[int]:
    """The first, the last, and some between."""
    if len(updates) <= FORECAST_ROWS:
        return list(updates)
    places = [round(i * (len(updates) - 1) / (FORECAST_ROWS - 1)) for i in range(FORECAST_ROWS)]
    return [updates[place] for place in places]


def figure(value: float) -> str:
    """A score with four digits that count, and no exponent: 2.529, 0.002346, 1,234."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:,.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"


class RunProgress(ProgressBar):
    """One bar over all steps with the loss, sparsity and threshold; and a line an epoch with all scores.

    Where the output is no terminal there is no bar, but a line after each ``SILENCE`` seconds without one. A job of a
    sweep shows no lines of epochs: they are in its log.
    """

    def __init__(self, pruning: PruningCallback) -> None:
        super().__init__()
        self.pruning = pruning
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._screen: Screen = screen()
        self._shown = 0.0

    def disable(self) -> None:
        """Lightning calls this on all ranks but the first."""
        self._progress = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the plan, then the bar."""
        assert self.pruning.pruner is not None
        print_plan(self.pruning.pruner)
        if trainer.global_step:
            console.print(f"Going on from step {trainer.global_step:,}")
        self._shown = time.monotonic()
        self._screen = screen()
        if not self._screen.bar:
            return
        self._progress = Progress(
            TextColumn("{task.fields[title]}step {task.completed:.0f}/{task.total:.0f}", markup=False),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._screen.console,
            transient=bool(self._screen.title),
        )
        total = self.pruning.pruner.run.total_steps
        done, title = trainer.global_step, self._screen.title
        self._task = self._progress.add_task("", total=total, completed=done, numbers="", title=title)
        self._progress.start()

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        """Ten times a second at most: reading the loss waits for the device."""
        now = time.monotonic()
        if now - self._shown < (SILENCE if self._progress is None else 0.1):
            return
        self._shown = now
        numbers = f"loss {figure(float(pl_module.train_loss))}{self._pruning()}"  # type: ignore[arg-type]
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step, numbers=numbers)
        else:
            assert self.pruning.pruner is not None
            step = f"step {trainer.global_step}/{self.pruning.pruner.run.total_steps}"
            self._screen.console.print(f"{self._screen.title}{step}: {numbers}", soft_wrap=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """A line that stays."""
        if self._progress is not None:
            self._progress.update(self._task, completed=trainer.global_step)
        epoch = f"epoch {trainer.current_epoch + 1}/{trainer.max_epochs}, step {trainer.global_step}"
        if self._screen.console is console:
            self._shown = time.monotonic()
        console.print(f"{epoch}: valid {self._scores(trainer)}{self._pruning()}", soft_wrap=True)

    def _scores(self, trainer: pl.Trainer) -> str:
        metrics = trainer.callback_metrics.items()
        scores = {name.removeprefix("valid_"): value for name, value in metrics if name.startswith("valid_")}
        return "  ".join(f"{SHORT.get(name, name)} {figure(float(value))}" for name, value in scores.items())

    def _pruning(self) -> str:
        assert self.pruning.pruner is not None
        pruner = self.pruning.pruner
        if not pruner.groups:
            return ""
        kind, epsilon = next(iter(pruner.thresholds.items()))
        return f"  sparsity {100 * pruner.sparsity:.1f} %  threshold {epsilon:.3g} ({kind})"

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
    scores, objective = report["scores"], register.get("objective", report["objective"])
    words: str = objective.factory.words  # type: ignore[attr-defined]
    beside = {
        "sparse": " sparse" if report["layers"] else "",
        "a_token": f" a {report['token']}" if report["token"] in ("word", "byte") else "",
    }
    for key, title in MILESTONES.items():
        if scores.get(key):
            told = scores[key] | beside
            table.add_row(title.format(**told), words.format(**told))
    if report.get("beside"):
        telling: str = objective.factory.telling  # type: ignore[attr-defined]
        _add_beside(table, report["beside"], scores["test_packed"], words, beside, telling)
    _add_transcripts(table, report)
    table.add_section()
    for layer in report["layers"]:
        left = f"{layer['nonzeros']:,} of {layer['weights']:,} left"
        table.add_row(layer["parameter"], f"{left}, {100 * layer['sparsity']:.2f} % sparse")
    table.add_section()
    sparsity = report["sparsity"]
    if report["layers"]:
        wanted = "what there was" if sparsity["wanted"] is None else f"{100 * sparsity['wanted']:.2f} %"
        table.add_row("sparsity reached, wanted", f"{100 * sparsity['reached']:.2f} %, {wanted}")
    sizes = report["size"]
    table.add_row("parameters, of which non-zero", f"{sizes['parameters']:,}, {sizes['nonzeros']:,}")
    ratio = sizes["dense_bytes"] / sizes["packed_bytes"]
    smaller = f" ({ratio:.1f}x smaller)" if ratio >= 1.05 else ""
    table.add_row("bytes dense (fp32), packed file", f"{sizes['dense_bytes']:,}, {sizes['packed_bytes']:,}{smaller}")
    for why, count in report.get("left_out", {}).items():  # reports of older versions lack it
        table.add_row(f"{report['unit']} left out: {why}", f"{count:,}")
    latency = report["latency"]
    _add_latency(table, latency)
    seconds = report["seconds"]
    if seconds["training_loop"]:
        share = 100 * seconds["pruning"] / seconds["training_loop"]
        table.add_row("training loop, of it inside pruning", f"{seconds['training_loop']:.1f} s, {share:.2f} %")
    table.caption = f"one stream: {plural(latency['threads'], 'thread')}; dense {_compared(latency)}"
    load = report["machine"]["load"]
    if load is not None and load > BUSY:
        table.caption += f"\nThe machine was busy ({load:.1f} threads for each CPU): take no speed from these times."
    console.print(table)
    if report["limits"]:
        used = ", ".join(f"{batches} of {part}" for part, batches in report["limits"].items())
        whole = "; `srnn evaluate` takes all" if report["limits"].keys() - {"train"} else ""
        console.print(f"Only the first batches were used, {used} (trainer.limit_...){whole}.")
    if latency["choices"]:
        _print_choices(latency["choices"], latency["threads"])
    if sparsity["wanted"] is not None and abs(sparsity["reached"] - sparsity["wanted"]) > MISSED:
        fixed = report["config"]["pruning"].get("q", "auto") != "auto"
        reason = ": with a fixed q it results from the schedule; pruning.q=auto meets it exactly" if fixed else ""
        console.print(
            f"The sparsity is {100 * sparsity['reached']:.2f} %, not {100 * sparsity['wanted']:.4g} %{reason}.",
        )


def _compared(latency: Mapping[str, Any]) -> str:
    """Which dense runtimes the packed network was compared with."""
    *others, last = latency.get("dense_runtimes", ("torch", "oneDNN"))  # reports of older versions lack it
    if last == "onnxruntime":
        return f"by the fastest of {', '.join(others)} and {last}\n`srnn bench RUN` shows each of them"
    where = "where that is installed (pip install 'srnn[onnx]') and can run it"
    return f"by the faster of {', '.join(others)} and {last}\n`srnn bench RUN` compares with onnxruntime too, {where}"


def _add_latency(table: Table, latency: Mapping[str, Any]) -> None:
    """Rows of the times of one stream."""
    for kind, steps in (("sequence", plural(latency["steps"], "step")), ("step", "1 step")):
        if kind in latency:
            dense, sparse = latency[kind]["dense"], latency[kind]["sparse"]
            table.add_row(
                f"one stream, {steps}: dense, packed",
                f"{1e6 * dense:,.0f} us, {1e6 * sparse:,.0f} us ({dense / sparse:.2f}x)",
            )


def _add_beside(
    table: Table, other: Mapping[str, Any], own: Mapping[str, float], words: str, beside: Mapping[str, str], score: str
) -> None:
    """Rows of what the run that this one learned from scored, and how far this one is from it."""
    kind = f"{100 * other['sparsity']:.0f} % sparse" if other["sparsity"] else "dense"
    table.add_row(f"test, of {other['run']} ({kind})", words.format(**{**other["scores"], **beside}))
    if other["scores"].get(score):
        table.add_row(
            f"beside it: {score.replace('_', ' ')}", f"{100 * (own[score] / other['scores'][score] - 1):+.2f} %"
        )


def _add_transcripts(table: Table, report: dict[str, Any]) -> None:
    """Those of the validation that was best."""
    table.add_section()
    for example in transcripts(report):
        if example["step"] == report["scores"]["best"]["step"]:
            table.add_row(f"said: {escape(example['said'])}", f"heard: {escape(example['heard'])}")


def _print_choices(choices: Sequence[Mapping[str, Any]], threads: int) -> None:
    """The backend that each layer runs on; the times behind a choice, which may be older, are not the report's."""
    table = Table(title=f"Backends chosen ({plural(threads, 'thread')})")
    table.caption = "all measurements, and what cannot run: report.json, latency.choices"
    for column in ("layer, inputs to units", "use", "backend"):
        table.add_column(column)
    for choice in choices:
        table.add_row(choice["layer"], choice["use"], choice["winner"])
    console.print(table)


def _prompt(data: DataModule, vocabulary: Vocabulary) -> str:
    """To continue: the first words of a line of the validation text, the longest near its start; known words only."""
    tokens = [token for inputs_BT, _ in islice(data.batches("valid"), 4) for token in inputs_BT[0].tolist()]
    text = vocabulary.decode(tokens)
    for border in ("\n",) if vocabulary.level == "words" else ("\n", r"\s"):
        if whole := re.search(rf"{border}.*\S.*{border}", text, re.DOTALL):
            text = whole[0]  # of a line and a word at the ends only a part may be there
            break
    longest = max((piece for line in text.splitlines() for piece in _known(line, vocabulary)), key=len, default="")
    if len(longest) <= PROMPT:
        return longest
    first = longest.partition(" ")[0] if vocabulary.level == "words" else longest[:PROMPT]
    return longest[: PROMPT + 1].rpartition(" ")[0].strip() or first


def _known(line: str, vocabulary: Vocabulary) -> list[str]:
    """What lies between unknown words; between unknown characters where a line is a single word, as in Chinese."""
    if " " not in line and vocabulary.level != "words":
        return line.split(vocabulary.placeholder)
    runs = groupby(line.split(" "), lambda word: vocabulary.placeholder in word)
    return [" ".join(words).strip() for unknown, words in runs if not unknown]


def print_folder(folder: RunFolder) -> None:
    """Where a run writes: said at its start, for whoever wants to look while it trains."""
    console.print(f"This run is in {folder}", soft_wrap=True)


def print_way_back(folder: RunFolder) -> None:
    """How a stopped run is resumed."""
    console.print(f"Resume it: srnn resume {shlex.quote(str(folder))}", soft_wrap=True)


def print_ways_on(folder: RunFolder, data: DataModule) -> None:
    """Where the run's files are, and what can be done with them."""
    console.print(f"Everything is in {folder}", soft_wrap=True)
    run = shlex.quote(str(folder))
    if data.objective == "ctc":
        console.print(f"Try it: srnn transcribe {run} --audio FILE", soft_wrap=True)
    elif data.vocabulary is None or data.objective != "next_token":
        console.print(f"Try it: srnn evaluate {run}", soft_wrap=True)
    else:
        prompt = _prompt(data, data.vocabulary)
        words = f" --prompt {shlex.quote(prompt)}" if prompt else ""
        console.print(f"Try it: srnn generate {run}{words}", soft_wrap=True)
    if command := sync_command(folder.path):
        console.print(f"Upload to W&B: {command}", soft_wrap=True)


MISSED = 0.001  # a tenth of a percent: sparsities further apart get a warning
# Report key -> row title.
MILESTONES = {
    "pruning_started": "validation: pruning started (step {step})",
    "best_dense": "validation: best dense (step {step})",
    "best": "validation: best{sparse} (step {step})",
    "test": "test, the same checkpoint",
    "test_packed": "test, packed file read back",
}
