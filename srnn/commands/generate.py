"""``python -m srnn generate RUN --prompt TEXT``: write text with a packed language model."""

from __future__ import annotations

import sys
from typing import Annotated, Any

from srnn.commands.options import Help, KernelOption, RunOption, command, packed_file
from srnn.errors import UserError
from srnn.registry import Range

_EMPTY = "--prompt is empty: give at least one character or word"


@command
def main(
    run: RunOption,
    prompt: Annotated[str, Help("what to continue; taken literally", metavar="TEXT")] = "\n",
    length: Annotated[int, Range(ge=0), Help("tokens to write")] = 300,
    temperature: Annotated[float, Help("0 takes the likeliest token")] = 0.7,
    top_k: Annotated[int | None, Range(ge=1), Help("sample among so many likeliest tokens (all)")] = None,
    kernel: KernelOption = "auto",
    seed: Annotated[int, Help("of the sampling")] = 0,
) -> int:
    """Write text with a run's packed file.

    Prints the prompt and what follows.
    """
    _check(0 <= temperature < float("inf"), f"--temperature={temperature} must be a number from 0 on")
    _check(-(2**63) <= seed < 2**63, f"--seed={seed} must fit in 64 bits")
    _check(prompt != "", _EMPTY)  # before the network is read
    path = packed_file(run)

    from srnn.inference.packed_file import load

    model: Any = load(path, kernel)
    vocabulary = model.vocabulary
    if vocabulary is None or not hasattr(model, "generate"):
        raise UserError(f"{path} is no language model, and writes no text of its own.")
    tokens = vocabulary.encode(prompt).tolist()
    _check(len(tokens) > 0, _EMPTY)
    if unknown := vocabulary.unknown(prompt):
        shown = ", ".join(map(repr, unknown))
        print(
            f"srnn: --prompt: {shown}: not among the {vocabulary.level} this network knows; read as unknown.",
            file=sys.stderr,
        )
    written = vocabulary.decode([*tokens, *model.generate(tokens, length, temperature, top_k, seed)])
    sys.stdout.write(f"{written}\n")
    return 0


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"generate: {message}.")
