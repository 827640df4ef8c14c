"""Which weights are pruned, with which settings, and which of them share a threshold."""

from __future__ import annotations

import fnmatch
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from srnn.cells import GATE_LETTERS, gates_of
from srnn.errors import UserError
from srnn.formats import Structure
from srnn.pruning.groups import Group
from srnn.pruning.left_out import FROZEN, check_built, is_half_of_a_norm, left_out, warn_of_left_out
from srnn.pruning.parts import Part, some_of
from srnn.pruning.scores import Score
from srnn.registry import Component, check_options
from srnn.registry.option_types import Share

LayerType = Literal["recurrent", "linear", "embedding", "convolution"]
LAYER_TYPES: tuple[LayerType, ...] = get_args(LayerType)
DEFAULT_LAYER_TYPES: tuple[LayerType, ...] = ("recurrent", "linear", "embedding")  # the paper's, and embeddings
_ORDER = (*LAYER_TYPES, "other")  # in which groups are reported
Sharing = Literal["layer_type", "matrix", "global"]
Scope = dict[str, dict[str, Any]]  # pattern -> settings, those of Rule


@dataclass(frozen=True)
class Rule:
    """Settings of weights that a pattern names; None leaves the method's own.

    Attributes:
        sparsity: the share of zeros, 0 to below 1; 0 leaves the weights dense.
        structure: what is kept or zeroed as a whole.
        score: what stands for a block.
        keep_diagonal: the recurrent diagonal stays.
    """

    sparsity: Share | None = None
    structure: str | None = None
    score: Score | None = None
    keep_diagonal: bool | None = None

    @classmethod
    def read(cls, pattern: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """Check a rule of a config.

        Args:
            pattern: what it is given for, for messages.
            given: setting -> value.

        Returns:
            The settings it makes, without those that are None.

        Raises:
            UserError: an unknown or wrong setting, or none at all.
        """
        where = f'pruning.scope."{pattern}"'
        settings = check_options(Component("", "", cls, "").options, given, where)
        settings = {name: value for name, value in settings.items() if value is not None}
        if not settings:
            names = ", ".join(field.name for field in fields(cls))
            raise UserError(f"{where} sets nothing: give it one of {names}; sparsity: 0 leaves weights dense.")
        if "structure" in settings:
            settings["structure"] = Structure.parse(settings["structure"], f"{where}.structure")
        return settings


@dataclass(frozen=True)
class GroupSettings:
    """The settings of a group, where no rule changes them.

    Attributes:
        sparsity: the share of zeros, 0 to below 1; None where it is not asked for.
        structure: what is kept or zeroed as a whole.
        score: what stands for a block.
        keep_diagonal: the recurrent diagonal stays.
    """

    sparsity: float | None = None
    structure: Structure = field(default_factory=Structure)
    score: Score = "max"
    keep_diagonal: bool = False


@dataclass
class Weight:
    """A parameter that can be pruned.

    Attributes:
        names: of the parameter; a shared one has several.
        parameter: itself.
        layer_type: of the first layer it belongs to.
        gates: how many row blocks it falls into.
    """

    names: list[str]
    parameter: nn.Parameter
    layer_type: str
    gates: int


def prunable(model: nn.Module) -> list[Weight]:
    """All the weights of a model that can be pruned, in its order; one that layers share is listed once.

    Recurrent: every ``weight_*`` matrix of ``nn.RNN/GRU/LSTM`` and their cells: input, recurrent, projection, all
    layers and directions; linear, embedding and convolution (1-D and 2-D): the weight. A module with the attribute
    ``layer_type`` says itself what its ``weight*`` count as. Other matrices are ``other``: they are pruned only where a
    pattern names them. Biases and normalisation cannot be.

    Raises:
        UserError: a weight is sharded over devices, or of a lazy layer that has seen no batch.
    """
    # By identity: a weight that layers share, such as a tied embedding, has one mask, and the type of the first layer.
    found: dict[int, Weight] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module.named_parameters(prefix, recurse=False, remove_duplicate=False):
            check_built(name, parameter)
            if is_half_of_a_norm(module, name.rpartition(".")[2]):
                continue
            if parameter.ndim < 2 or not parameter.is_floating_point() or not parameter.numel():
                continue
            if id(parameter) in found:
                found[id(parameter)].names.append(name)
                continue
            # A DTensor. Each rank has a slice of it, and would rank that alone.
            if hasattr(parameter, "device_mesh"):
                raise UserError(
                    f"{name} is sharded over devices (FSDP or tensor parallelism), and pruning needs whole weights: "
                    f"use DistributedDataParallel (trainer strategy ddp)."
                )
            own = name.rpartition(".")[2]
            layer_type = _layer_type(module) if own.startswith("weight") else "other"
            found[id(parameter)] = Weight([name], parameter, layer_type, _gates(module, own))
    return list(found.values())


def _layer_type(module: nn.Module) -> str:
    own = getattr(module, "layer_type", None)
    if own in LAYER_TYPES:
        return str(own)
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return "recurrent"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return "convolution"
    return "embedding" if isinstance(module, nn.Embedding) else "other"


def _gates(module: nn.Module, own: str) -> int:
    if not own.startswith(("weight_ih", "weight_hh")):  # a projection, weight_hr, has none
        return 1
    return gates_of(module)


def build_groups(
    model: nn.Module,
    layer_types: Sequence[str],
    scope: Scope | None,
    share: Sharing,
    settings: GroupSettings,
    frozen: bool = False,
) -> list[Group]:
    """The groups of a model that share a threshold: by layer type, then in the model's order.

    Args:
        model: whose weights.
        layer_types: which are pruned.
        scope: settings of weights by pattern. A pattern is a glob over parameter names, such as ``rnn.weight_hh*``, and
            may end with gates: ``"*.weight_hh_l0[z]"``, of torch's ``r z n`` (GRU) or ``i f g o`` (LSTM). It
            also selects what ``layer_types`` leaves out.
        share: which weights share a threshold, as far as their settings are the same.
        settings: of what no pattern names.
        frozen: whether weights that are not trained are pruned too, if no pattern names them. They cannot adapt to
            zeros, and never share a threshold with trained ones.

    Warns where a structure is larger than all the weights that it is for, and of each matrix of the chosen layer types
    that is left dense: one that cannot be pruned, such as under weight norm, or is frozen.

    Raises:
        UserError: a pattern matches nothing; two disagree about a weight; a diagonal is to be kept and there is none.
    """
    # A stable sort: within a layer type the model's own order stays, on which ties and checkpoints depend.
    weights = sorted(prunable(model), key=lambda weight: _ORDER.index(weight.layer_type))
    rules = _Rules(scope or {}, weights)
    warn_of_left_out(_layers(model, layer_types), list(scope or {}))
    general = vars(settings)
    members: dict[tuple[Any, ...], list[Part]] = {}
    left = []
    for weight in weights:
        # Contiguous whatever the parameter is, so that parts and pieces of it are views that can be written to.
        mask = torch.ones_like(weight.parameter, dtype=torch.bool, memory_format=torch.contiguous_format)
        for first, count, own in rules.parts(weight):
            part = Part(
                weight.names[0], weight.parameter, mask, weight.layer_type, weight.gates, first, count, frozenset(own)
            )
            # A weight that a pattern names is selected, whatever its type; sparsity 0 leaves it out, whatever names it.
            together = general | own
            selected = weight.layer_type in layer_types or bool(own)
            trained = weight.parameter.requires_grad
            if selected and together["sparsity"] != 0 and not (trained or own or frozen):
                left.append(part.name)
            elif selected and together["sparsity"] != 0:
                # The settings are part of the key: weights with other ones cannot share a threshold.
                key = {"layer_type": weight.layer_type, "matrix": part.name, "global": "all"}[share]
                key += "" if trained or share == "matrix" else " frozen"
                members.setdefault((key, *together.values()), []).append(part)
    _warn_of_frozen(left)
    groups = [_group(key, general, parts) for key, parts in members.items()]
    _check_diagonals(groups)
    _warn_of_large_blocks(groups)
    return groups


def _layers(model: nn.Module, layer_types: Sequence[str]) -> list[tuple[str, nn.Module]]:
    return [(name, module) for name, module in model.named_modules() if _layer_type(module) in layer_types]


def left_dense(
    model: nn.Module, layer_types: Sequence[str], scope: Scope | None, parts: Sequence[Part]
) -> dict[str, str]:
    """Every matrix of a model that is not pruned, or the gates of it that are not, and why.

    Args:
        model, layer_types, scope: what the groups were built of.
        parts: of the groups: what is pruned.
    """
    found = dict(left_out(_layers(model, layer_types), list(scope or {})))
    pruned = {(id(part.parameter), gate) for part in parts for gate in range(part.first, part.first + part.count)}
    for weight in prunable(model):
        gates = [gate for gate in range(weight.gates) if (id(weight.parameter), gate) not in pruned]
        whole = len(gates) == weight.gates
        letters = "".join(GATE_LETTERS[weight.gates][gate] for gate in gates) if not whole else ""
        if weight.layer_type == "other":
            why = "is of no layer type: a pattern of scope may name it"
        elif weight.layer_type not in layer_types:
            why = f"is of type {weight.layer_type}, which is not in layer_types"
        else:
            why = "has sparsity 0 in scope" if weight.parameter.requires_grad else f"is {FROZEN}"
        if gates and ".parametrizations." not in f".{weight.names[0]}":  # their layer has been named
            found[f"{weight.names[0]}[{letters}]" if letters else weight.names[0]] = why
    return found


def _check_diagonals(groups: Sequence[Group]) -> None:
    """Raise UserError if none of the matrices whose diagonal is to be kept has one."""
    keeping = [part for group in groups if group.keep_diagonal for part in group.parts]
    if keeping and not any(part.is_square for part in keeping):
        raise UserError(
            f"pruning.keep_diagonal=true: of {', '.join(part.name for part in keeping)} none is a recurrent matrix "
            f"(weight_hh) with a diagonal."
        )


def _warn_of_frozen(names: Sequence[str]) -> None:
    if names:
        warnings.warn(
            f"pruning leaves {some_of(names)} dense, also if they are trained later: they are {FROZEN}. "
            f"To prune them, name them: {in_a_scope(names[0])}.",
            stacklevel=2,
        )


def _warn_of_large_blocks(groups: Sequence[Group]) -> None:
    """Blocks that fit into none of their weights are usually a slip. A few too small weights, such as those of an
    output layer, are none."""
    for structure in dict.fromkeys(group.structure for group in groups):
        parts = [part for group in groups if group.structure == structure for part in group.parts]
        if any(structure.fits(part.shape) for part in parts):
            continue
        sizes = ", ".join(f"{part.name} ({part.shape[1]} x {part.shape[2]})" for part in parts)
        warnings.warn(
            f"pruning.structure={structure} is larger than every weight, or gate of a weight, that it is for: {sizes}. "
            f"What is kept or zeroed as a whole is cut off there: choose a smaller structure, unless you mean whole "
            f"rows or columns of a gate.",
            stacklevel=2,
        )


def _group(key: tuple[Any, ...], general: dict[str, Any], parts: list[Part]) -> Group:
    shared, *values = key
    settings = dict(zip(general, values, strict=True))
    own = [_words(name, value) for name, value in settings.items() if value != general[name]]
    types = {part.layer_type for part in parts}
    return Group(" ".join([shared, *own]), types.pop() if len(types) == 1 else "all", parts, **settings)


def _words(name: str, value: Any) -> str:
    if name == "keep_diagonal":
        return "diagonal" if value else "no-diagonal"
    return str(value)


class _Rules:
    """The settings of the weights that patterns name.

    Kept by gate, because a pattern may name some gates of a weight and another pattern others. A weight none of whose
    gates is named apart stays one part: fewer, larger pieces to rank.
    """

    def __init__(self, scope: Scope, weights: Sequence[Weight]) -> None:
        self._of: dict[tuple[int, int], dict[str, tuple[Any, str]]] = {}  # (weight, gate) -> setting -> value, pattern
        self._apart: set[int] = set()  # weights some pattern names a gate of
        for pattern, given in scope.items():
            self._add(pattern, Rule.read(pattern, given), weights)

    def _add(self, pattern: str, settings: dict[str, Any], weights: Sequence[Weight]) -> None:
        glob, letters = _split(pattern)
        named = [weight for weight in weights if any(fnmatch.fnmatchcase(name, glob) for name in weight.names)]
        if not named:
            there = ", ".join(name for weight in weights for name in weight.names) or "none"
            raise UserError(f'pruning.scope: "{pattern}" matches no weight that can be pruned; there are: {there}.')
        matched = False
        for weight in named:
            gates = [
                g for g in range(weight.gates) if letters is None or GATE_LETTERS[weight.gates][g : g + 1] in letters
            ]
            if letters is not None and weight.gates == 1:
                gates = []  # its one gate has no letter, and an empty letter is in every string
            self._apart |= {id(weight.parameter)} if letters is not None and gates else set()
            matched |= bool(gates)
            for gate in gates:
                self._set(weight, gate, pattern, settings)
        if not matched:
            raise UserError(
                f'pruning.scope: "{pattern}": {named[0].names[0]} has no gate {letters}; a GRU has r, z, n, an LSTM '
                f"i, f, g, o, a plain RNN none."
            )

    def _set(self, weight: Weight, gate: int, pattern: str, settings: dict[str, Any]) -> None:
        there = self._of.setdefault((id(weight.parameter), gate), {})
        for name, value in settings.items():
            # No order of precedence: which of two patterns is the more special is a matter of opinion.
            before, other = there.setdefault(name, (value, pattern))
            if before != value:
                letter = GATE_LETTERS[weight.gates][gate : gate + 1]
                which = f"{weight.names[0]}[{letter}]" if letter else weight.names[0]
                raise UserError(
                    f'pruning.scope: "{other}" and "{pattern}" disagree about {name} of {which}: {before} and {value}.'
                )

    def parts(self, weight: Weight) -> list[tuple[int, int, dict[str, Any]]]:
        """First gate, number of gates and own settings of each part of a weight."""
        whole = id(weight.parameter) not in self._apart
        firsts, count = ([0], weight.gates) if whole else (range(weight.gates), 1)
        found = []
        for first in firsts:
            own = self._of.get((id(weight.parameter), first), {})
            found.append((first, count, {name: value for name, (value, _) in own.items()}))
        return found


def _split(pattern: str) -> tuple[str, str | None]:
    """A glob, and the gates named behind it: ``weight_hh*[rz]`` -> ``weight_hh*``, ``rz``."""
    found = re.fullmatch(r"(.+?)\[([a-z]+)\]", pattern)
    return (found[1], found[2]) if found else (pattern, None)


def masks_of(groups: Sequence[Group]) -> dict[str, Tensor]:
    """Parameter name -> mask, in the order of the groups."""
    return {part.parameter_name: part.mask for group in groups for part in group.parts}


def in_a_scope(name: str, sparsity: str = "...") -> str:
    """How to give a part a sparsity of its own, in Python and on the command line, where brackets are escaped.

    Example:
        >>> print(in_a_scope("w[z]"))
        scope={"w[z]": {"sparsity": ...}}, on the command line pruning.scope='{w\\[z\\]: {sparsity: ...}}'
    """
    escaped = name.replace("[", "\\[").replace("]", "\\]")
    in_python = f'scope={{"{name}": {{"sparsity": {sparsity}}}}}'
    return f"{in_python}, on the command line pruning.scope='{{{escaped}: {{sparsity: {sparsity}}}}}'"
