"""Draws speech_digits.png from the two CSVs of spoken digits beside it: loss over passes, errors over weights."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path
from statistics import mean

from matplotlib.figure import Figure

HERE = Path(__file__).parent
BESIDE = {"gradual90": -0.014, "blocks16x1_90": 0.014}  # millions: these have as many weights as the hard ones
NAMES = {
    "dense": "dense",
    "gradual90": "gradual, 90 %",
    "hard90": "hard, 90 %",
    "blocks16x1_90": "gradual in 16 x 1 blocks, 90 %",
    "wider90": "wider, gradual, 90 %",
}
PASSES = 13  # of the longer runs, whose losses are drawn; the shorter ones made 6
PHASES = {1: "gradual pruning starts", PASSES / 4: "rises faster; hard pruning", PASSES / 2: "ends; step size falls"}


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of the runs that are compared."""
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row["run"] in NAMES]


def draw(curves: Path, scores: Path, target: Path) -> None:
    """The mean over seeds and all that they span: validation loss of each pass; test errors over weights."""
    figure = Figure(figsize=(11, 4.6), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in NAMES}
    for row in rows_of(curves):
        if int(row["passes"]) != PASSES:
            continue
        losses[row["run"]][int(row["pass"])].append(float(row["valid_loss"]))
    colours = {}
    for name, by_pass in losses.items():
        passes, several = list(by_pass), list(by_pass.values())
        (line,) = left.plot(passes, list(map(mean, several)), label=NAMES[name], linewidth=1.4)
        colours[name] = line.get_color()
        left.fill_between(passes, list(map(min, several)), list(map(max, several)), color=colours[name], alpha=0.12)
    for number, words in PHASES.items():
        left.axvline(number, color="grey", linestyle=":", linewidth=1)
        left.text(number + 0.08, 0.02, words, transform=left.get_xaxis_transform(), fontsize=8, color="grey",
                  rotation=90, va="bottom")  # fmt: skip
    left.set(xlabel="passes over the training strings", ylabel="validation CTC loss, nats a character", yscale="log")
    left.set_xticks(range(1, PASSES + 1))
    left.legend(fontsize=8)
    found: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for row in rows_of(scores):
        place = int(row["nonzeros"]) / 1e6, 100 * float(row["packed_cer"])
        found[row["run"], int(row["passes"])].append(place)
    for (name, passes), points in found.items():
        weights, errors = mean(w for w, _ in points), [e for _, e in points]
        spans = [[mean(errors) - min(errors)], [max(errors) - mean(errors)]]
        longer = passes == PASSES  # beside the shorter ones, too
        right.errorbar(
            weights + BESIDE.get(name, 0) + 0.045 * longer, mean(errors), yerr=spans, fmt="o", capsize=3,
            color=colours[name], markerfacecolor="white" if longer else None, label=None if longer else NAMES[name],
        )  # fmt: skip
    right.plot([], [], "o", color="grey", markerfacecolor="white", label=f"{PASSES} passes, two seeds; else 6, three")
    right.set(xlabel="weights that are not zero, millions", ylabel="test CER, unseen speakers, %")
    right.set_xlim(left=0)
    right.set_ylim(8, 20)
    right.legend(fontsize=8, loc="lower right")
    figure.savefig(target)


if __name__ == "__main__":
    draw(HERE / "speech_digits_curves_h200.csv", HERE / "speech_digits_h200.csv", HERE / "speech_digits.png")
