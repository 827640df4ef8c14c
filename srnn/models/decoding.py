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


# What may come after a beginning, and what after that; 0 among them says that a text may end here.
_Followers = dict[int, "_Followers"]


class WordSequences:
    """Words any of which may follow another, with a space between them: what a text is to consist of.

    Args:
        words: tokens of each; none of them empty.
        space: the token between two words; None for a network that writes none, whose texts are single words.

    Raises:
        ValueError: there are none, or an empty one.

    Example:
        >>> import torch
        >>> logits_TV = torch.tensor([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1], [0.1, 0.3, 0.6]]).log()
        >>> beam_search(logits_TV, 10), beam_search(logits_TV, 10, WordSequences([[2, 1], [1]], space=None))
        ([2, 2], [2, 1])
    """

    def __init__(self, words: Iterable[Sequence[int]], space: int | None) -> None:
        several = [tuple(word) for word in words]
        if not all(several) or not several:
            raise ValueError("words must be there, and none of them empty")
        first: _Followers = {}
        for word in several:
            here = first
            for token in word:
                here = here.setdefault(token, {})
            here[0] = {}
            if space is not None:
                here[space] = first
        self.followers: _Followers = first | {0: {}}  # no word at all is a text, too

    def whole(self, text: tuple[int, ...]) -> tuple[int, ...]:
        """A beginning without the word that it does not finish."""
        here, end = self.followers, 0
        for place, token in enumerate(text, start=1):
            here = here[token]
            end = place if 0 in here else end
        return text[:end]


def beam_search(logits_TV: Tensor, width: int, words: WordSequences | None = None) -> list[int]:
    """The likeliest text, all its alignments added up, among the ``width`` likeliest beginnings of each step.

    A text has many alignments, and the one alignment that ``greedy`` finds need not be of the likeliest text. With a
    width of all beginnings there are the result is exact (Graves et al. 2006; Hannun et al. 2014).

    Args:
        logits_TV: of one utterance.
        width: beginnings kept.
        words: what the text is to consist of; None allows all. Where none of the beginnings kept ends with a word, the
            likeliest loses its unfinished one.

    Example:
        >>> import torch
        >>> logits_TV = torch.tensor([[0.4, 0.35, 0.25], [0.4, 0.35, 0.25]]).log()
        >>> greedy(logits_TV[None], torch.tensor([2])), beam_search(logits_TV, 10)
        ([[]], [1])
    """
    anything: _Followers = {}
    anything.update(dict.fromkeys(range(logits_TV.shape[1]), anything))
    followers: dict[tuple[int, ...], _Followers] = {(): words.followers if words else anything}
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
            for token, following in followers[text].items():
                if not token:
                    continue
                followers[*text, token] = following
                longer = after[*text, token]
                # The same once more needs a blank before it.
                longer[1] = _added(longer[1], (blank if token == last else both) + log_V[token])
        best = sorted(after.items(), key=lambda item: -_added(*item[1]))[:width]
        beams = {text: (blank, other) for text, (blank, other) in best}
        followers = {text: followers[text] for text in beams}
    if words is None:
        return list(next(iter(beams)))
    return list(next((text for text in beams if 0 in followers[text]), words.whole(next(iter(beams)))))


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
