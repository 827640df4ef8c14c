"""``python -m srnn generate --run FOLDER --prompt TEXT``: write text with a packed language model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from srnn.commands.options import Parser, packed_file
from srnn.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Read the packed file, print the prompt and what follows."""
    parser = Parser(prog="srnn generate", description="Write text with a run's packed file.")
    parser.add_argument("--run", required=True, metavar="FOLDER", help="a run's folder, or a packed file")
    parser.add_argument("--prompt", default="\n", metavar="TEXT", help="where to go on from; taken literally")
    parser.add_argument("--length", type=int, default=300, help="tokens to write (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, help="sample among so many likeliest tokens (all)")
    parser.add_argument("--kernel", default="auto", help="the backend that runs it (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (%(default)s)")
    options = parser.parse(argv)
    _check(options.length >= 0, f"--length={options.length} must be at least 0")
    _check(
        0 <= options.temperature < float("inf"),
        f"--temperature={options.temperature} must be a number from 0 on",
    )
    _check(options.top_k is None or options.top_k >= 1, f"--top-k={options.top_k} must be at least 1")
    _check(-(2**63) <= options.seed < 2**63, f"--seed={options.seed} must fit in 64 bits")
    path = packed_file(options.run)

    from srnn.inference.packed_file import load

    model: Any = load(path, options.kernel)
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise UserError(f"{path} is no language model: it has no vocabulary.")
    prompt = vocabulary.encode(options.prompt).tolist()
    _check(len(prompt) > 0, "--prompt is empty: give at least one character or word")
    if unknown := vocabulary.unknown(options.prompt):
        shown = ", ".join(map(repr, unknown))
        print(
            f"srnn: --prompt: {shown}: not among the {vocabulary.level} this network knows; read as unknown.",
            file=sys.stderr,
        )
    tokens = model.generate(prompt, options.length, options.temperature, options.top_k, options.seed)
    written = vocabulary.decode([*prompt, *tokens])
    sys.stdout.write(f"{written}\n")
    return 0


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise UserError(f"generate: {message}.")
