"""``init_map``: which weights of a file become which of a model, where names alone do not tell."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from srnn.errors import UserError, did_you_mean


def layer_name(name: str) -> str:
    """A weight's name; a cell's ``weight_ih`` is the ``weight_ih_l0`` of a layer."""
    return re.sub(r"((?:^|\.)(?:weight|bias)_[ih]h)$", r"\1_l0", name)


def follow_map(init_map: Mapping[str, str], there: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> dict[str, str]:
    """What a map says: the model's name of a weight -> the file's.

    Args:
        init_map: pattern of the file's names -> what they are in the model: ``{"encoder.*": "rnn.*"}``. A star stands
            for anything, and for the same on both sides.
        there: the file's weights by name.
        here: the model's.

    Raises:
        UserError: a pattern matches nothing, leads to no weight of the model, to the same one as another, or to one of
            another shape.
    """
    model = {layer_name(name): name for name in here}
    found: dict[str, str] = {}
    for pattern, target in init_map.items():
        said = f'init_map: "{pattern}": "{target}"'
        if pattern.count("*") != target.count("*"):
            raise UserError(f"{said}: both sides must have as many stars.")
        renamed = _renamed(pattern, target, there)
        if not renamed:
            raise UserError(f"{said}: the file has no such weight.{_nearest(pattern, there)}")
        fitting = {name: model[layer_name(new)] for name, new in renamed.items() if layer_name(new) in model}
        if not fitting:
            first = next(iter(renamed.values()))
            raise UserError(f"{said}: the model has no weight {first}.{_nearest(target, here)}")
        for name, new in fitting.items():
            if new in found:
                raise UserError(f"{said}: both {found[new]} and {name} of the file become {new}.")
            if there[name].shape != here[new].shape:
                shapes = ["x".join(map(str, weight.shape)) for weight in (there[name], here[new])]
                raise UserError(f"{said}: {name} is {shapes[0]} in the file, and {new} {shapes[1]} in the model.")
            found[new] = name
    return found


def suggested_map(name: str, other: str) -> str:
    """A map that makes ``other``, of the file, ``name`` in the model, with all that lies beside them."""
    one, two = (text.rpartition(".")[0] for text in (other, name))
    return f"init_map='{{{one}.*: {two}.*}}'" if one and two else f"init_map='{{{other}: {name}}}'"


def _renamed(pattern: str, target: str, names: Iterable[str]) -> dict[str, str]:
    glob = re.compile("(.*)".join(map(re.escape, pattern.split("*"))))
    found = {}
    for name in names:
        if match := glob.fullmatch(name):
            stars = iter(match.groups())
            found[name] = re.sub(r"\*", lambda _: next(stars), target)  # noqa: B023  # used up at once
    return found


def _nearest(pattern: str, weights: Mapping[str, Tensor]) -> str:
    """The nearest name, or pattern of names, and what there is."""
    parts = {f"{name.rpartition('.')[0]}.*" for name in weights if "." in name} if "*" in pattern else set()
    return f"{did_you_mean(pattern, [*sorted(parts), *weights])} It has {', '.join(weights) or 'none'}."
