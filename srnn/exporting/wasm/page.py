"""The page of a network: ``page.html`` with the module, the vocabulary and what is known of the network put in."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from srnn.exporting.c.program import Program
from srnn.exporting.chain import Chain, Direction, RecurrentPart, dense_weight
from srnn.sparse import SparseMatrix
from srnn.vocabulary import Vocabulary

_TEMPLATE = Path(__file__).with_name("page.html")
_EXAMPLE_STEPS = 32  # at most: what a page shows first


def page_html(
    program: Program,
    module: bytes,
    chain: Chain,
    about: Sequence[str],
    vocabulary: Vocabulary | None = None,
    example: Any = None,
) -> str:
    """The page, in one file that asks for no other.

    Args:
        program: what the module was compiled of.
        module: from ``webassembly``.
        chain: of the same packed weights.
        about: lines that say what the network is.
        vocabulary: of a language model; it goes into the page.
        example: inputs, or a tuple that begins with them; of a network that reads numbers the first sequence is shown.
    """
    calls = program.calls
    data = {
        "name": calls.name,
        "tokens": calls.tokens,
        "wide": calls.token_type == "uint32_t",
        "inputs": calls.inputs,
        "outputs": calls.outputs,
        "steps": calls.can_step,
        "last": calls.reads_last,
        "scratch": calls.scratch,
        "state": program.ram,
        "vocabulary": vocabulary.to_dict() if vocabulary is not None else None,
        "example": _rows(chain, example),
        "facts": {
            "WebAssembly": f"{len(module):,} bytes",
            "sparsity": f"{100 * sparsity(chain):.1f} %",
            "multiply-adds a step": f"{program.multiply_adds:,}",
            "state": f"{program.ram:,} bytes",
        },
        "wasm": base64.b64encode(module).decode(),
    }
    lines = "<br>".join(html.escape(line) for line in about)
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{TITLE}}", html.escape(calls.name))
    # No text can end the script that it stands in.
    return page.replace("{{ABOUT}}", lines).replace("{{DATA}}", json.dumps(data).replace("<", "\\u003c"))


def sparsity(chain: Chain) -> float:
    """The share of zeros among the weights of all matrices, each counted once."""
    weights: dict[int, Tensor] = {}
    for part in chain.parts:
        for owner in [d for layer in part.layers for d in layer] if isinstance(part, RecurrentPart) else [part]:
            fields = ("w_ih", "w_hh", "w_hr") if isinstance(owner, Direction) else ("weight",)
            for weight in (getattr(owner, field, None) for field in fields):
                if weight is not None:
                    address = weight.values.data_ptr() if isinstance(weight, SparseMatrix) else weight.data_ptr()
                    weights[address] = dense_weight(weight)
    total = sum(weight.numel() for weight in weights.values())
    return 1.0 - sum(int(weight.count_nonzero()) for weight in weights.values()) / max(1, total)


def _rows(chain: Chain, example: Any) -> list[list[float]]:
    """The first steps of the first sequence of an example, or of random numbers; none of a network of tokens."""
    if chain.vocabulary_size is not None:
        return []
    inputs = example[0] if isinstance(example, tuple | list) else example
    if not isinstance(inputs, Tensor) or inputs.dim() != 3 or inputs.shape[-1] != chain.input_size:
        inputs = torch.randn(1, 8, chain.input_size, generator=torch.Generator().manual_seed(0))
    elif not chain.batch_first:
        inputs = inputs.transpose(0, 1)
    return [[round(number, 4) for number in row] for row in inputs[0, :_EXAMPLE_STEPS].float().tolist()]
