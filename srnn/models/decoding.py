"""From what a network says at every step to a text, under CTC: greedy, by prefix beam search, or from a list.

Shapes: B batch, T steps, V vocabulary, of which number 0 is the blank.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def greedy(logits_BTV: Tensor, lengths_B: Tensor) -> list[list[int]]:
    """The likeliest character of each step, repeated ones merged, then blanks taken out.

    Example:
        >>> import torch
        >>> greedy(torch.eye(3)[torch.tensor([[1, 1, 0, 1, 2, 2]])], torch.tensor([5]))
        [[1, 1, 2]]
    """
    best_BT = logits_BTV.argmax(-1).cpu()
    rows = zip(best_BT, lengths_B.tolist(), strict=True)
    return [[token for token in best_T[:steps].unique_consecutive().tolist() if token] for best_T, steps in rows]


def beam_search(logits_TV: Tensor, width: int) -> list[int]:
    """The likeliest text, all its alignments added up, among the ``width`` likeliest beginnings of each step.

    A text has many alignments, and the one alignment that ``greedy`` finds need not be of the likeliest text. With a
    width of all beginnings there are the result is exact (Graves et al. 2006; Hannun et al. 2014).

    Args:
        logits_TV: of one utterance.
        width: beginnings kept.

    Example:
        >>> import torch
        >>> logits_TV = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]]).log()
        >>> greedy(logits_TV[None], torch.tensor([2])), beam_search(logits_TV, 10)
        ([[]], [1])
    """
    # Beginning -> log-probability of its alignments that end with a blank, and of those that end with its last one.
    beams: dict[tuple[int, ...], tuple[float, float]] = {(): (0.0, -math.inf)}
    for log_V in logits_TV.float().log_softmax(-1).tolist():
        after: dict[tuple[int, ...], list[float]] = defaultdict(lambda: [-math.inf, -math.inf])
        for text, (blank, other) in beams.items():
            both, last = _added(blank, other), text[-1] if text else 0
            here = after[text]
            here[0] = _added(here[0], both + log_V[0])
            if last:
                here[1] = _added(here[1], other + log_V[last])
            for token in range(1, len(log_V)):
                longer = after[(*text, token)]
                # The same once more needs a blank before it.
                longer[1] = _added(longer[1], (blank if token == last else both) + log_V[token])
        best = sorted(after.items(), key=lambda item: -_added(*item[1]))[:width]
        beams = {text: (blank, other) for text, (blank, other) in best}
    return list(next(iter(beams)))


def _added(a: float, b: float) -> float:
    """log(exp(a) + exp(b))."""
    high, low = max(a, b), min(a, b)
    return high if low == -math.inf else high + math.log1p(math.exp(low - high))


class Phrases:
    """Decoding to one of a list of phrases: the likeliest of them, all alignments of each added up. It is exact.

    Phrases that begin alike share the work on their beginning: they make a tree, and each of its nodes is a beginning
    whose alignments are added up once, for all nodes together.

    Args:
        phrases: tokens of each; none of them empty.

    Raises:
        ValueError: there are none, or an empty one.

    Example:
        >>> import torch
        >>> logits_TV = torch.tensor([[0.1, 0.6, 0.3], [0.1, 0.6, 0.3], [0.1, 0.5, 0.4]]).log()
        >>> greedy(logits_TV[None], torch.tensor([3])), Phrases([[2], [2, 1]])(logits_TV)
        ([[1]], [2, 1])
    """

    def __init__(self, phrases: Iterable[Sequence[int]]) -> None:
        self._phrases = [tuple(phrase) for phrase in phrases]
        if not all(self._phrases) or not self._phrases:
            raise ValueError("phrases must be there, and none of them empty")
        nodes: dict[tuple[int, ...], int] = {(): 0}
        for phrase in self._phrases:
            for length in range(1, len(phrase) + 1):
                nodes.setdefault(phrase[:length], len(nodes))
        beginnings = list(nodes)[1:]
        self._parent_N = torch.tensor([nodes[text[:-1]] for text in beginnings])
        self._token_N = torch.tensor([text[-1] for text in beginnings])
        self._doubled_N = torch.tensor([text[-2:-1] == text[-1:] for text in beginnings])
        self._end_P = torch.tensor([nodes[phrase] for phrase in self._phrases])

    def __call__(self, logits_TV: Tensor) -> list[int]:
        """The likeliest phrase, logits being those of one utterance; the first of the list if none is possible."""
        # Log-probabilities of the alignments of each beginning, those that end with a blank and those that do not.
        blank = torch.full((len(self._token_N) + 1,), -math.inf)
        blank[0], other = 0.0, torch.full_like(blank, -math.inf)
        for log_V in logits_TV.float().cpu().log_softmax(-1):
            both = torch.logaddexp(blank, other)
            # The same character once more needs a blank before it.
            before = torch.where(self._doubled_N, blank[self._parent_N], both[self._parent_N])
            other[1:] = torch.logaddexp(other[1:], before) + log_V[self._token_N]
            blank = both + log_V[0]
        return list(self._phrases[int(torch.logaddexp(blank, other)[self._end_P].argmax())])
