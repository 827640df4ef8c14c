"""``init_vocabulary``: the tokens of a network's embedding and decoder, row by row, where its file has none."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srnn.datasets.text import TextStreams, read_text
from srnn.errors import UserError
from srnn.files import expanded
from srnn.pruning.parts import some_of
from srnn.vocabulary import UNKNOWN, Vocabulary

# The logit of an unknown token in a network that has none: never chosen, and no share of the others' probability.
NEVER = -30.0


@dataclass(frozen=True)
class TokenRows:
    """The rows of a network by token.

    Attributes:
        path: the file that says so.
        tokens: of each row.
        vocabulary: the same tokens in srnn's order: <unk> first, then as they come.
    """

    path: Path
    tokens: list[str]
    vocabulary: Vocabulary

    @property
    def has_unknown(self) -> bool:
        """Whether a row stands for all other tokens."""
        return UNKNOWN in self.tokens

    def in_order(self, weight: Tensor) -> Tensor:
        """The rows of an embedding or decoder in srnn's order. A missing <unk> is zero, and never chosen."""
        rows = [row for row, token in enumerate(self.tokens) if token != UNKNOWN]
        if self.has_unknown:
            return weight[[self.tokens.index(UNKNOWN), *rows]]
        unknown = torch.full_like(weight[:1], NEVER if weight.ndim == 1 else 0.0)
        return torch.cat([unknown, weight[rows]])

    def check(self, data: Any, partly: bool) -> str | None:
        """What to say about tokens of the text that the network does not know; None if it knows all.

        Raises:
            UserError: there are some and no <unk> to read them as, and it may not start anew.
        """
        if not isinstance(data, TextStreams):
            raise UserError(f"init_vocabulary={self.path} is for text, which these data are not.")
        texts = data.texts()
        unknown = data.vocabulary.unknown(texts.train + texts.valid + texts.test)
        if not unknown:
            return None
        told = f"these {data.vocabulary.level} of the text are not in {self.path}: {_some(unknown)}"
        if not self.has_unknown and not partly:
            raise UserError(
                f"init_vocabulary: {told}; and it has no {UNKNOWN} to read them as. Choose other text, or add "
                f"init_partly=true: {UNKNOWN} then starts anew."
            )
        return f"{told}; they are read as {UNKNOWN}."


def unread(data: Any) -> str | None:
    """What to say about training text that the vocabulary of the network to start from lacks; None if it has all."""
    if not isinstance(data, TextStreams):
        return None
    text = data.texts().train
    if not (unknown := data.vocabulary.unknown(text)):
        return None
    share = float((data.vocabulary.encode(text) == 0).mean())
    return (
        f"{100 * share:.2f} % of the training text is read as {UNKNOWN}, one token for all: its vocabulary lacks "
        f"{_some(unknown)}. Scores then compare with those of no other vocabulary."
    )


def read_tokens(path: str, level: str | None) -> TokenRows:
    """Read a JSON list of tokens, or one token a line.

    Args:
        path: the file.
        level: of the data, ``characters`` or ``words``; None where they are no text.

    Raises:
        UserError: no such file, no list of tokens, a token twice, one that is no character, or no text at all.
    """
    file = expanded(path)
    if level not in ("characters", "words"):
        why = "bytes are their own numbers" if level == "bytes" else "these data are no text"
        raise UserError(f"init_vocabulary={path}: {why}; leave it out.")
    text = read_text(file, "init_vocabulary")
    tokens = _listed(file, text) if text.lstrip().startswith(("[", "{")) and file.suffix == ".json" else _lines(text)
    if twice := [token for token, count in Counter(tokens).items() if count > 1]:
        raise UserError(f"init_vocabulary={path}: {_some(twice)} stand in it more than once.")
    known = [token for token in tokens if token != UNKNOWN]
    if level == "characters" and (long := [token for token in known if len(token) != 1]):
        raise UserError(
            f"init_vocabulary={path}: {_some(long)}: no characters, which dataset.level=characters "
            f"asks for. Of names in brackets only {UNKNOWN} is known; a line end is '\\n' in a JSON list."
        )
    return TokenRows(file, tokens, Vocabulary.from_dict({"level": level, "tokens": known}))


def _some(tokens: Sequence[str]) -> str:
    return some_of([repr(token) for token in tokens])


def _lines(text: str) -> list[str]:
    lines = text.split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def _listed(path: Path, text: str) -> list[str]:
    try:
        tokens = json.loads(text)
    except ValueError as error:
        raise UserError(f"init_vocabulary={path} is no JSON: {error}.") from None
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise UserError(
            f"init_vocabulary={path} must be a JSON list of tokens in the order of their rows. Of a mapping of tokens "
            f"to rows it is json.dumps(sorted(mapping, key=mapping.get))."
        )
    return tokens
