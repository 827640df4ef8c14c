"""The scores of each objective: which one tells most, which way is better, and how they are written."""

from __future__ import annotations

from collections.abc import Mapping

SHORT = {"bits_per_character": "bpc", "perplexity": "ppl"}
# Objective -> its scores, the telling one first.
SCORES = {
    "next_token": "{bits_per_character:.4f} bits/char, perplexity {perplexity:.3f}",
    "classification": "accuracy {accuracy:.4f}, F1 {f1:.4f}, loss {loss:.4f}",
    "regression": "mean squared error {loss:.6f}, mean absolute error {mae:.5f}",
}
# Objective -> the score that runs are compared by.
TELLING = {"next_token": "bits_per_character", "classification": "accuracy", "regression": "loss"}
HIGHER_IS_BETTER = frozenset({"accuracy", "f1"})  # of all others less is better


def score_words(objective: str, scores: Mapping[str, float]) -> str:
    """The scores of an objective, as they are written in tables."""
    return SCORES[objective].format(**scores)
