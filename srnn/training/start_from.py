"""Starting from an existing network: ``init_from``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srnn.config.composing import read_plain
from srnn.errors import UserError
from srnn.files import expanded
from srnn.inference.packing import recurrent_layers
from srnn.inference.weights import read_checkpoint, read_packed_or_plain, weights_of
from srnn.run_folder import RunFolder
from srnn.training.init_map import follow_map, layer_name, suggested_map
from srnn.training.init_vocabulary import TokenRows
from srnn.vocabulary import Vocabulary


@dataclass(frozen=True)
class Initial:
    """An existing network.

    Attributes:
        path: its file.
        weights: by name.
        vocabulary: None where it is not known.
        model: the config it was built of; empty where it is not known.
        layers: name of a recurrent layer -> what ``recurrent_layers`` said of it, where the file says it.
    """

    path: Path
    weights: dict[str, Tensor]
    vocabulary: Vocabulary | None
    model: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Match:
    """What became of the weights of a file.

    Attributes:
        loaded: names that are the same in both.
        renamed: the model's name -> the file's.
        fresh: weights of the model that the file does not have in this shape; they start as always.
        unused: weights of the file that the model has no place for.
        near: a fresh name -> why no weight of the file was taken for it, though one has that last name.
        hint: an ``init_map`` that would choose among several that fit; empty if there are none.
    """

    loaded: list[str] = field(default_factory=list)
    renamed: dict[str, str] = field(default_factory=dict)
    fresh: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    near: dict[str, str] = field(default_factory=dict)
    hint: str = ""

    def lines(self) -> list[str]:
        """For people."""
        shown = [f"{len(self.loaded) + len(self.renamed)} weights loaded"]
        shown += [f"{name}: taken from {source}" for name, source in self.renamed.items()]
        shown += [f"{name}: {self.near.get(name, 'not there')}, starts anew" for name in self.fresh]
        return shown + [f"{name}: has no place in this model" for name in self.unused]


def read_initial(path: str) -> Initial:
    """Read a checkpoint, a packed file, a plain ``state_dict`` file, or the best checkpoint of a run's folder.

    Raises:
        UserError: no such file, or none of these.
    """
    file = expanded(path)
    if file.is_dir():
        run = RunFolder(file)
        found = [path for path in (run.best, run.packed) if path.is_file()]
        if not found:
            raise UserError(
                f"init_from={path}: this folder is no finished run: it has no best checkpoint.{run.how_to_finish}"
            )
        run.warn_unless_finished("init_from")
        file = found[0]
    if not file.is_file():
        raise UserError(f"init_from={path}: no such file; give a checkpoint, a packed file or a state_dict.")
    if file.suffix == ".safetensors":
        weights, packed = read_packed_or_plain(file)
        if packed is None:
            return Initial(file, weights, None)
        layers = packed.about.get("layers")
        known = layers if isinstance(layers, Mapping) else {}
        return Initial(file, weights, packed.vocabulary, packed.model, known)
    checkpoint = read_checkpoint(file)
    return Initial(file, weights_of(checkpoint, file), _vocabulary(checkpoint), _model_config(file))


def _model_config(checkpoint: Path) -> Mapping[str, Any]:
    """Of a checkpoint in a run's folder."""
    config = RunFolder(checkpoint.resolve().parent.parent).config
    found = read_plain(config).get("model") if config.is_file() else None
    return found if isinstance(found, Mapping) else {}


def _vocabulary(checkpoint: Mapping[str, Any]) -> Vocabulary | None:
    """srnn's; what others call a vocabulary may be anything, and says nothing here."""
    given = checkpoint.get("vocabulary")
    try:
        return Vocabulary.from_dict(given) if isinstance(given, Mapping) else None
    except ValueError:
        return None


@torch.no_grad()
def load_weights(
    model: nn.Module,
    initial: Initial,
    partly: bool = False,
    init_map: Mapping[str, str] | None = None,
    rows: TokenRows | None = None,
) -> Match:
    """Copy into the model what fits: as the map says, then by name and shape, else the only weight of that last name
    and shape in both.

    Args:
        model: takes the weights, in place.
        initial: the existing network.
        partly: whether its embedding or decoder may be left as they are, where the file has none that fits.
        init_map: patterns of the file's names -> what they are in the model; see ``follow_map``.
        rows: the tokens of its embedding's and decoder's rows, where they are in another order than the model's.

    Raises:
        UserError: nothing fits; the map or the rows don't; or embedding or decoder would start anew, and may not.
    """
    parameters: dict[str, Tensor] = dict(model.named_parameters()) | dict(model.named_buffers())
    wanted = parameters | _by_token(parameters, rows)
    left = dict(initial.weights)
    match = Match(renamed=follow_map(init_map or {}, left, wanted))
    taken = {name: left.pop(source) for name, source in match.renamed.items()}
    for name, weight in wanted.items():
        if name not in taken and name in left and left[name].shape == weight.shape:
            taken[name] = left.pop(name)
            match.loaded.append(name)
    unnamed = [name for name in parameters if name not in taken]
    for name in unnamed:
        here = [n for n in unnamed if _alike(n, wanted, name, wanted)]
        there = [n for n in left if _alike(n, left, name, wanted)]
        if len(here) == len(there) == 1:
            match.renamed[name] = there[0]
            taken[name] = left[there[0]]
        else:
            match.fresh.append(name)
            match.hint = match.hint or (suggested_map(name, there[0]) if there else "")
    left = {name: weight for name, weight in left.items() if name not in match.renamed.values()}
    if rows and not any(wanted[name] is not parameters[name] for name in taken):
        raise UserError(
            f"init_vocabulary={rows.path} has {len(rows.tokens)} tokens, and no embedding or decoder of "
            f"init_from={initial.path} has as many rows; it has {_some(initial.weights)}."
        )
    for name, weight in taken.items():
        parameters[name].copy_(weight if rows is None or wanted[name] is parameters[name] else rows.in_order(weight))
    match.near = {name: near for name in match.fresh if (near := _near(name, wanted, left))}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - parameters.keys()
    match.unused = [name for name in left if name not in tied]
    _refuse_what_hardly_fits(match, initial, wanted, partly)
    return match


def check_recurrence(initial: Initial, match: Match, model: nn.Module, config: Mapping[str, Any]) -> None:
    """Refuse weights that fit and would compute something else, as those of a ReLU's recurrence with tanh.

    Args:
        initial: where the weights come from.
        match: what became of them.
        model: the network that took them.
        config: what it was built of.

    Raises:
        UserError: an option that is a name differs in two networks of the same kind and shapes, or a layer's cell.
    """
    go_on = "its weights fit, and would compute something else"
    anyway = "or, if that is meant, give its weights alone, in a state_dict file"
    if initial.model.get("name") == config.get("name") and not (match.fresh or match.unused):
        for option, theirs in initial.model.items():
            ours = config.get(option, theirs)
            if isinstance(theirs, str) and isinstance(ours, str) and theirs != ours:
                raise UserError(
                    f"init_from={initial.path}: its network has model.{option}={theirs[:40]}, and this one {ours}: "
                    f"{go_on}. Set model.{option}={theirs[:40]}, {anyway}."
                )
    here = recurrent_layers(model)
    for name in (*match.loaded, *match.renamed):
        layer, there = (n.rpartition(".")[0] for n in (name, match.renamed.get(name, name)))
        was = initial.layers.get(there)
        cell = was.get("cell") if isinstance(was, Mapping) else None
        if layer in here and cell is not None and cell != here[layer]["cell"]:
            raise UserError(
                f"init_from={initial.path}: {there or 'the network'} has the cell {str(cell)[:20]!r}, and {layer} here "
                f"{here[layer]['cell']!r}: {go_on}. Choose a model with that cell (model=rnn has model.nonlinearity), "
                f"{anyway}."
            )


def _by_token(parameters: Mapping[str, Tensor], rows: TokenRows | None) -> dict[str, Tensor]:
    """What stands for embedding and decoder when shapes are compared: as many rows as the file has tokens."""
    if rows is None:
        return {}
    ends = {n: p for n, p in parameters.items() if _is_end(n) and len(p) == len(rows.vocabulary)}
    return {name: torch.empty(len(rows.tokens), *p.shape[1:], device="meta") for name, p in ends.items()}


def _is_end(name: str) -> bool:
    return bool({"embedding", "decoder"} & set(name.split(".")))


def _refuse_what_hardly_fits(match: Match, initial: Initial, parameters: Mapping[str, Tensor], partly: bool) -> None:
    if not match.loaded and not match.renamed:
        raise UserError(
            f"init_from={initial.path}: none of its weights fits the model; it has {_some(initial.weights)}, and the "
            f"model {_some(parameters)}. {_how_to_go_on(match)}".rstrip()
        )
    ends = [name for name in match.fresh if _is_end(name)]
    if ends and not partly:
        raise UserError(
            f"init_from={initial.path}: {', '.join(ends)} would start anew: what was learned is of no use without "
            f"them. {_how_to_go_on(match)} Where that is meant, add init_partly=true.".replace("  ", " ")
        )


def _how_to_go_on(match: Match) -> str:
    """What almost fits, and what to do about it; empty where nothing does."""
    if not match.near:
        return ""
    almost = "; ".join(f"{name}: {near}" for name, near in match.near.items())
    ways = "Choose the model and data of these shapes, or save the part that is meant alone"
    return f"Almost fit: {almost}. {ways}{f', or say which by {match.hint}' if match.hint else ''}."


def _some(weights: Mapping[str, Tensor]) -> str:
    return ", ".join(f"{name} {_shape(weight)}" for name, weight in list(weights.items())[:6]) or "none"


def _near(name: str, parameters: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> str | None:
    """Why none of the file's weights of this last name was taken; None if there is none."""
    fits = [n for n in left if _alike(n, left, name, parameters)]
    others = [n for n in left if n == name] or [n for n in left if _resembles(n, left, name, parameters)]
    shape = _shape(parameters[name])
    if fits:
        return f"{shape} here, and more than one could be meant, such as {_some({n: left[n] for n in fits})}"
    if others:
        return f"{shape} here, in the file {_some({n: left[n] for n in others})}"
    return None


def _alike(name: str, weights: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> bool:
    return _kind(name) == _kind(other) and weights[name].shape == others[other].shape


def _resembles(name: str, weights: Mapping[str, Tensor], other: str, others: Mapping[str, Tensor]) -> bool:
    """Whether it may be the same weight of a network of other sizes."""
    if _kind(name) != _kind(other) or weights[name].ndim != others[other].ndim:
        return False
    # Any module has a `weight`: only one that shares a size says anything.
    sizes = zip(weights[name].shape, others[other].shape, strict=True)
    return _kind(name) not in ("weight", "bias") or any(one == two for one, two in sizes)


def _kind(name: str) -> str:
    """The last part of a name; a cell's ``weight_ih`` is the ``weight_ih_l0`` of a layer."""
    return layer_name(name.rpartition(".")[2])


def _shape(weight: Any) -> str:
    return "x".join(map(str, weight.shape))
