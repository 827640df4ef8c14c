"""What runs have in common and how they differ: settings, each over its seeds, as tables."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from srnn.comparing.runs import FinishedRun
from srnn.errors import UserError
from srnn.kernels.remembering import BUSY
from srnn.registry import register

APART = ("seed", "tracking", "srnn")  # of a config: what does not make another setting
# Column -> key of a summary, digits behind the point, and by how much the number is multiplied for people.
MEASURED = {
    "sparsity, %": ("final/sparsity", 2, 100.0),
    "weights": ("final/nonzeros", 0, 1.0),
    "bytes": ("final/packed_bytes", 0, 1.0),
    "sequence, ms": ("latency/sequence", 2, 1000.0),
    "x dense": ("latency/sequence_speedup", 2, 1.0),
}
# Timed in turns, so that a busy or slow machine slows both; a dense time common to all runs would compare machines, and
# networks of other widths.
ABOUT_TIMES = (
    "sequence, ms: one stream, as each run timed it. x dense: how many times as fast that is as the same network on "
    "the fastest dense runtime, timed in turns in that run; both vary from run to run, also of dense networks."
)

MOST_COLUMNS = 4  # of options in a terminal: more stand below the table, a line a setting
HOW_READ = ("batch_size", "sequence_length", "eval_streams")  # options of data that leave text and tokens as they are
WHAT_IS_READ = ("dataset", "init_from", "init_vocabulary")  # of a config: all that a run's test data depend on


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only.

    Attributes:
        options: the options in which this comparison's settings differ, where this one has them.
        runs: one a seed.
    """

    options: Mapping[str, Any]
    runs: Sequence[FinishedRun]

    def values(self, key: str) -> list[float]:
        """A number of the summary, of each run that measured it."""
        return [float(run.summary[key]) for run in self.runs if run.summary.get(key) is not None]

    def mean(self, key: str) -> float | None:
        """Over the seeds; None if it was not measured."""
        values = self.values(key)
        return statistics.fmean(values) if values else None

    def deviation(self, key: str) -> float | None:
        """The sample standard deviation over the seeds; None for fewer than two."""
        values = self.values(key)
        return statistics.stdev(values) if len(values) > 1 else None

    @property
    def is_dense(self) -> bool:
        """Whether its runs prune nothing."""
        pruning = self.runs[0].config.get("pruning")
        return isinstance(pruning, Mapping) and pruning.get("name") == "none"

    def label(self, without: Sequence[str] = ()) -> str:
        """The options in short, for legends."""
        shown = [(key, value) for key, value in self.options.items() if key not in without]
        words = [str(v) if "." not in key else f"{key.rpartition('.')[2]} {v}" for key, v in shown]
        return ", ".join(words) or "all"


@dataclass(frozen=True)
class Comparison:
    """Settings, the best one first.

    Attributes:
        metric: the score they are compared by, on the test part.
        settings: at least one.
        repeated: runs left out, as another has the same config and seed.
    """

    metric: str
    settings: Sequence[Setting]
    repeated: Sequence[FinishedRun] = ()

    @property
    def key(self) -> str:
        """Where summaries have the metric."""
        return f"test/{self.metric}"

    @property
    def higher_is_better(self) -> bool:
        """Of the metric."""
        objective = self.settings[0].runs[0].summary["objective"]
        learned: Any = register.get("objective", objective).factory
        return self.metric in learned.higher_is_better

    @property
    def options(self) -> list[str]:
        """The options that differ, in the order of the config."""
        return list(dict.fromkeys(key for setting in self.settings for key in setting.options))

    @property
    def best_dense(self) -> Setting | None:
        """The first in rank of those that prune nothing, if others do: what those are measured by."""
        dense = [setting for setting in self.settings if setting.is_dense]
        return dense[0] if 0 < len(dense) < len(self.settings) else None

    def over_dense(self, setting: Setting) -> float | None:
        """How much higher its mean score is than the best dense setting's, as a share; None where there is none."""
        own, dense = setting.mean(self.key), self.best_dense and self.best_dense.mean(self.key)
        return own / dense - 1 if own is not None and dense else None

    @property
    def notes(self) -> str:
        """What to know before the table is believed."""
        return " ".join(filter(None, [ABOUT_TIMES, self._on_machines, self._on_data, self._on_changed_data]))

    @property
    def _on_machines(self) -> str:
        """Said where the runs' times were not taken alike; otherwise nothing."""

        def known(what: str) -> list[float]:
            values = [run.summary.get(f"machine/{what}") for setting in self.settings for run in setting.runs]
            return sorted({float(value) for value in values if value is not None})

        differ = [f"{what} {', '.join(f'{n:g}' for n in known(what))}" for what in ("cpus", "threads", "dense runtimes")
                  if len(known(what)) > 1]  # fmt: skip
        loads = known("load")
        if loads and loads[0] <= BUSY < loads[-1]:
            differ.append(f"load {loads[0]:.1f} to {loads[-1]:.1f} for each CPU")
        return f"These times were not taken alike ({'; '.join(differ)}): they rank no networks." if differ else ""

    @property
    def _on_data(self) -> str:
        """Said where the data themselves differ; otherwise nothing."""
        differ = [name for name in self.options if name.partition(".")[0] == "dataset"]
        differ = [name for name in differ if name.rpartition(".")[2] not in HOW_READ]
        differ += [name for name in self.options if name == "trainer.limit_eval_batches"]
        if not differ:
            return ""
        of_tokens = (
            " Bits per character compare networks on one text only, and an unknown word counts as one token however "
            "long it is, which flatters words beside characters."
        )
        return (
            f"These runs were scored on different data ({', '.join(differ)}): the order of their scores ranks no "
            f"networks.{of_tokens if self.metric == 'bits_per_character' else ''}"
        )

    @property
    def _on_changed_data(self) -> str:
        """Said where test data differ though the options that choose them are the same; otherwise nothing."""
        runs = [run for setting in self.settings for run in setting.runs]
        found: dict[str, dict[str, str]] = {}  # options -> checksum -> a run
        for run in [*runs, *self.repeated]:
            if run.test_data is not None:
                chosen = repr({name: run.config.get(name) for name in WHAT_IS_READ})
                found.setdefault(chosen, {}).setdefault(run.test_data, run.name)
        apart = [" and ".join(names.values()) for names in found.values() if len(names) > 1]
        if not apart:
            return ""
        return (
            f"The options of these runs choose the same test data, and they were not the same ({'; '.join(apart)}): a "
            f"file has changed, or is another one, or data are drawn by the seed. Their scores rank no networks."
        )

    @property
    def words(self) -> str:
        """The metric for people."""
        return self.metric.replace("_", " ")


def compare(runs: Sequence[FinishedRun], metric: str | None = None) -> Comparison:
    """Group runs by their config without the seed. Of several with the same seed the first counts.

    Args:
        runs: of one objective.
        metric: a score of the test part; None takes the one that tells most.

    Raises:
        UserError: no runs; or their objectives differ; or they have no such score.
    """
    objectives = sorted({str(run.summary["objective"]) for run in runs})
    if len(objectives) != 1:
        raise UserError(f"these runs learn {' and '.join(objectives) or 'nothing'}: compare those of one objective.")
    objective: Any = register.get("objective", objectives[0]).factory
    metric = metric or str(objective.telling)
    scores = sorted(name.partition("/")[2] for name in runs[0].summary if name.startswith("test/"))
    if any(f"test/{metric}" not in run.summary for run in runs):
        raise UserError(f"--metric={metric}: these runs have no such score; they have {', '.join(scores)}.")
    groups: dict[tuple[tuple[str, str], ...], list[FinishedRun]] = {}
    flat: dict[tuple[tuple[str, str], ...], dict[str, Any]] = {}
    repeated: list[FinishedRun] = []
    for run in runs:
        options = dict(_flat(run.config))
        key = tuple(sorted((name, repr(value)) for name, value in options.items()))
        group = groups.setdefault(key, [])
        there = any(run.config.get("seed") == other.config.get("seed") for other in group)
        (repeated if there else group).append(run)
        flat[key] = options
    differing = _differing(list(flat.values()))
    settings = [
        Setting({name: flat[key][name] for name in differing if name in flat[key]}, group)
        for key, group in groups.items()
    ]
    sign = -1 if metric in objective.higher_is_better else 1
    settings.sort(key=lambda setting: sign * (setting.mean(f"test/{metric}") or 0.0))
    return Comparison(metric, settings, repeated)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Option by option, as on the command line: a component's name is its group's value."""
    for key, value in config.items():
        if not prefix and key in APART:
            continue
        if isinstance(value, Mapping) and not prefix:
            # What a teacher's part weighs says nothing where there is no teacher.
            silent = key == "distill" and not value.get("teacher")
            yield from _flat({"teacher": None} if silent else value, f"{key}.")
        else:
            yield (prefix.rstrip(".") if prefix and key == "name" else f"{prefix}{key}"), value


def _differing(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The options with several values among those who have them: what ``none`` lacks is no difference by itself."""
    names = dict.fromkeys(name for config in configs for name in config)
    return [name for name in names if len({repr(config[name]) for config in configs if name in config}) > 1]


_Cell = tuple[str, str]  # title, text


def _cells(comparison: Comparison, setting: Setting) -> list[_Cell]:
    """A row of the tables for people."""
    row = [(_short(name, comparison.options), _plain(setting.options.get(name))) for name in comparison.options]
    mean, deviation = setting.mean(comparison.key), setting.deviation(comparison.key)
    score = f"{mean:.4f}" if mean is not None else ""
    row.append((comparison.words, score + (f" ± {deviation:.4f}" if deviation is not None else "")))
    if comparison.best_dense is not None:
        over = comparison.over_dense(setting)
        row.append(("over dense", "" if over is None else f"{100 * over:+.1f} %"))
    row.append(("seeds", str(len(setting.runs))))
    for title, (key, digits, factor) in MEASURED.items():
        value = setting.mean(key)
        row.append((title, "" if value is None else f"{factor * value:,.{digits}f}"))
    return row


def _short(name: str, names: Sequence[str]) -> str:
    """An option without its group, where that is clear."""
    last = name.rpartition(".")[2]
    return last if sum(other.rpartition(".")[2] == last for other in names) == 1 else name


def _plain(value: Any) -> str:
    if isinstance(value, str) and os.path.isabs(value):  # a teacher's folder: its end tells it from others
        return "/".join(Path(value).parts[-2:])
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def rich_table(comparison: Comparison) -> Table:
    """For the terminal."""
    rows = [_cells(comparison, setting) for setting in comparison.settings]
    options, lines = len(comparison.options), []
    if options > MOST_COLUMNS:
        told = [" ".join(f"{title}={text}" for title, text in row[:options] if text) for row in rows]
        lines = [f"{number}: {text}" for number, text in enumerate(told, 1)]
        rows = [[("setting", str(number)), *row[options:]] for number, row in enumerate(rows, 1)]
        options = 1
    table = Table(title=f"{comparison.words}, test: mean ± standard deviation over seeds", title_justify="left")
    table.caption, table.caption_justify = "\n".join([*map(escape, lines), comparison.notes]), "left"
    for index, (title, _) in enumerate(rows[0]):
        option, score = index < options, index == options
        table.add_column(title, justify="left" if option else "right", overflow="fold", no_wrap=score)
    for row in rows:
        table.add_row(*(text for _, text in row))
    return table


def markdown(comparison: Comparison) -> str:
    """A table for documents, and a word on its times."""
    rows = [_cells(comparison, setting) for setting in comparison.settings]
    titles = [title for title, _ in rows[0]]
    marks = ["---" if index < len(comparison.options) else "---:" for index in range(len(titles))]
    lines = [titles, marks, *([text.replace("|", "\\|") for _, text in row] for row in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + f"\n{comparison.notes}\n"


Row = dict[str, Any]


def setting_rows(comparison: Comparison) -> list[Row]:
    """A row a setting, numbers as they are: the mean over the seeds, and the metric's spread."""
    names = dict.fromkeys(name for setting in comparison.settings for run in setting.runs for name in run.summary)
    measured = [name for name in names if name.startswith(("final/", "latency/"))]

    def row(setting: Setting) -> Row:
        values = setting.values(comparison.key)
        spread = {"mean": setting.mean(comparison.key), "std": setting.deviation(comparison.key)}
        spread |= {"min": min(values), "max": max(values)}
        scores = {f"{comparison.metric}_{name}": value for name, value in spread.items()}
        scores |= {"over_dense": comparison.over_dense(setting)} if comparison.best_dense is not None else {}
        options = {name: setting.options.get(name) for name in comparison.options}
        return {**options, "seeds": len(values), **scores} | {key: setting.mean(key) for key in measured}

    return [row(setting) for setting in comparison.settings]


def run_rows(comparison: Comparison) -> list[Row]:
    """A row a run, with all numbers of its summary."""
    return [
        {"run": run.name}
        | {name: setting.options.get(name) for name in comparison.options}
        | {"seed": run.config["seed"], **run.summary}
        for setting in comparison.settings
        for run in setting.runs
    ]


def pareto(
    settings: Sequence[Setting], cost: Callable[[Setting], float], loss: Callable[[Setting], float]
) -> list[Setting]:
    """Those that no other beats in both, the cheapest first: less ``loss`` at the same ``cost`` or less."""
    front: list[Setting] = []
    for setting in sorted(settings, key=lambda s: (cost(s), loss(s))):
        if not front or loss(setting) < loss(front[-1]):
            front.append(setting)
    return front
