"""``python -m srnn rerun FOLDER``: repeat a run, and say whether its numbers come out again."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from srnn.commands.options import Help, command, output_folder
from srnn.errors import UserError
from srnn.files import expanded
from srnn.registry import Range
from srnn.run_folder import RunFolder

TOLERANCE = 0.001  # relative: what other hardware or versions may round to


@command
def main(
    run: Annotated[str, Help("a finished run's folder", metavar="RUN")],
    output: Annotated[str | None, Help("where it is repeated (outputs/DATE_rerun_NAME)", metavar="FOLDER")] = None,
    tolerance: Annotated[float, Range(ge=0), Help("relative difference that still counts as the same")] = TOLERANCE,
) -> int:
    """Repeat a finished run; say whether its numbers come out again.

    Returns:
        0 if the numbers agree, 1 if not.
    """
    source = expanded(run)
    before = RunFolder(source.resolve())
    if not before.finished:
        raise UserError(f"rerun: {source}: no finished run is there: it has no report.json.{before.how_to_finish}")

    from srnn.config.composing import read_settings
    from srnn.files import nearest_there
    from srnn.recording import environment
    from srnn.terminal import console
    from srnn.training.run import train

    then, made_in = _finished(before), environment.read_environment(before)
    environment.require_plugins(before)
    settings = read_settings(before.config)
    name = f"{datetime.now():%Y-%m-%d_%H-%M-%S}_rerun_{source.resolve().name}"
    folder = Path(output) if output else Path("outputs") / name
    there = nearest_there(expanded(folder))
    folder = output_folder(folder).resolve()
    try:
        with environment.started_in(before):
            report = train(settings, folder, command=["srnn", "rerun", str(source)])
    except UserError:
        RunFolder(folder).take_back(there)
        raise
    verdict, agree = agreement(then, report, tolerance)
    console.print(verdict, soft_wrap=True)
    now = environment.read_environment(RunFolder(folder))
    changed = environment.differences(made_in, now) if made_in else ["nothing was recorded then"]
    for line in changed:
        console.print(f"differs: {line}", soft_wrap=True)
    if not changed:
        console.print("Code, packages, hardware and data are the same.")
    return 0 if agree else 1


def _finished(run: RunFolder) -> dict[str, Any]:
    """The report of a run, looked at before hours are spent on what it is compared with. Raises UserError."""
    report = run.read_report()
    try:
        list(_numbers(report))
    except (KeyError, OverflowError) as error:
        raise UserError(f"{run.report} is damaged: {type(error).__name__}: {error}.") from None
    return report


def agreement(then: Mapping[str, Any], now: Mapping[str, Any], tolerance: float) -> tuple[str, bool]:
    """What came out again: every score, each validation, sparsities and sizes. Times are not numbers of a run."""
    one, two = dict(_numbers(then)), dict(_numbers(now))
    missing = sorted(one.keys() ^ two.keys())
    if missing:
        return f"The numbers differ: only one of the runs has {', '.join(missing)}.", False
    off = {name: _relative(value, two[name]) for name, value in one.items() if not _same(value, two[name])}
    if not off:
        return f"All {len(one)} numbers are the same, bit for bit.", True
    worst = max(off, key=lambda name: off[name])
    words = f"{len(off)} of {len(one)} numbers, most of all {worst}: {_told_apart(one[worst], two[worst])}"
    if off[worst] <= tolerance:
        return f"The numbers agree within {100 * tolerance:g} %; not the same are {words}.", True
    return f"The numbers differ by more than {100 * tolerance:g} %: {words}.", False


def _told_apart(then: float, now: float) -> str:
    """Both with six digits, or as many as show that they differ."""
    digits = next((n for n in range(6, 17) if f"{then:.{n}g}" != f"{now:.{n}g}"), 17)
    return f"{then:.{digits}g} then, {now:.{digits}g} now"


def _same(one: float, two: float) -> bool:
    """NaN is the same as NaN alone."""
    return one == two or (math.isnan(one) and math.isnan(two))


def _relative(one: float, two: float) -> float:
    if not (math.isfinite(one) and math.isfinite(two)):
        return math.inf
    return abs(one - two) / max(abs(one), abs(two))


def _numbers(report: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    chosen = {key: report[key] for key in ("scores", "validations", "layers", "sparsity", "size", "steps")}
    yield from _flat(chosen, "")


def _flat(value: Any, name: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, int | float):
        yield name, float(value)
