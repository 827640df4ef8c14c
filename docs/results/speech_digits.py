"""Draws speech_digits.png from the two CSVs of spoken digits beside it: loss over passes, errors over weights."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

HERE = Path(__file__).parent
NAMES = {
    "dense": "dense",
    "gradual90": "gradual, 90 %",
    "hard90": "hard, 90 %",
    "blocks16x1_90": "gradual in 16 x 1 blocks, 90 %",
    "wider90": "twice as wide, gradual, 90 %",
}
PHASES = {1: "pruning starts", 12.5: "and ends"}  # passes, of the gradual ones


def draw(curves: Path, scores: Path, target: Path) -> None:
    """Validation loss of each setting, the mean over seeds; test errors of the short runs over their weights."""
    figure = Figure(figsize=(10, 4.2), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    losses: dict[str, dict[int, list[float]]] = {name: defaultdict(list) for name in NAMES}
    with curves.open() as file:
        for row in csv.DictReader(file):
            losses[row["run"]][int(row["pass"])].append(float(row["valid_loss"]))
    colours = {}
    for name, by_pass in losses.items():
        seeds = max(map(len, by_pass.values()))
        means = {number: sum(several) / seeds for number, several in by_pass.items() if len(several) == seeds}
        (line,) = left.plot(list(means), list(means.values()), label=NAMES[name], linewidth=1.3)
        colours[name] = line.get_color()
    for number, words in PHASES.items():
        left.axvline(number, color="grey", linestyle=":", linewidth=1)
        left.annotate(words, (number + 0.2, 2.2), fontsize=8, color="grey")
    left.set(xlabel="passes over the training strings", ylabel="validation CTC loss, nats a character", yscale="log")
    left.set_ylim(0.006, 3)
    left.legend(fontsize=8, loc="lower left")
    with scores.open() as file:
        for row in csv.DictReader(file):
            place = int(row["nonzeros"]) / 1e6, 100 * float(row["packed_cer"])
            right.plot(*place, "o", color=colours[row["run"]])
            below = row["run"] == "gradual90"  # as good as that in blocks, where the other name stands
            right.annotate(
                NAMES[row["run"]], place, xytext=(6, -12 if below else 4), textcoords="offset points", fontsize=8
            )
    right.set(xlabel="weights that are not zero, millions", ylabel="test CER, unseen speakers, %")
    right.set_xlim(0, 1.2)
    right.set_ylim(0, 22)
    figure.savefig(target)


if __name__ == "__main__":
    draw(HERE / "speech_digits_curves_h200.csv", HERE / "speech_digits_h200.csv", HERE / "speech_digits.png")
