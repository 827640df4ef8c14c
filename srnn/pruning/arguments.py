"""What the ``Pruner`` and its callback are given, checked and unwrapped: methods, models, averages."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from srnn.errors import UserError
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.parts import some_of
from srnn.pruning.schedules import RunLength
from srnn.registry import register


def check_argument(argument: str, value: object, types: tuple[type, ...], what: str) -> None:
    """Raise UserError unless an argument of the ``Pruner`` is of one of the types; ``what`` says them in words."""
    if not isinstance(value, types):
        shown = repr(value) if isinstance(value, str | float | int | None) else f"{type(value).__name__}(...)"
        raise UserError(f"Pruner: {argument}={shown} must be {what}.")


def run_length(run: Any) -> RunLength:
    """The length of a run from steps, or as it is. Raises UserError for anything else."""
    if isinstance(run, RunLength):
        return run
    whole = isinstance(run, Integral) or (isinstance(run, float) and run.is_integer())
    check_argument("run", 1 if whole else run, (int,), "a whole number of optimiser steps, or a RunLength")
    return RunLength(int(run))


def optimizers_of(given: Any) -> list[torch.optim.Optimizer]:
    """None, one optimiser or several as a list. Raises UserError for anything else."""
    several: list[Any] = [*given] if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    found = [each for each in several if each is not None]
    for each in found:
        check_argument("optimizer", each, (torch.optim.Optimizer,), "a torch optimizer, or a list of them")
    return found


def build_method(method: str | Mapping[str, Any] | PruningMethod, options: Mapping[str, Any]) -> PruningMethod:
    """A method from its name and options, from its config, or as it is.

    Raises:
        UserError: no such method, a wrong option, or options beside a method that is built already.
    """
    if isinstance(method, PruningMethod):
        if options:
            raise UserError(f"{', '.join(options)}: give options with a method's name, or to the method itself.")
        return method
    check_argument("method", method, (str, Mapping), "a method's name, its config, or a method")
    config = {"name": method} if isinstance(method, str) else dict(method)
    built: PruningMethod = register.build("pruning", config | dict(options))
    return built


def differing(then: str, now: str) -> str:
    """What differs between the settings of a checkpoint and those of now, as texts: only the options that do."""
    one, two = _options(then), _options(now)
    changed = [name for name in {**one, **two} if one.get(name) != two.get(name)]
    if not one or not two or not changed:
        return f"it is of {then}, and these are {now}"
    return ", ".join(f"{name} was {one.get(name, 'not there')} and is {two.get(name, 'not there')}" for name in changed)


def check_state(
    state: Any, masks: Mapping[str, Tensor], thresholds: Mapping[str, float], method: PruningMethod
) -> None:
    """Raise UserError if a ``state_dict`` is not of such a pruner; warn if its schedule ends at another step."""
    check_argument("state", state, (Mapping,), "what state_dict() gave")
    if missing := {"itr", "masks", "thresholds", "revived", "method"} - state.keys():
        raise UserError(f"the pruning state is of another version of srnn: it has no {', '.join(sorted(missing))}.")
    if state["masks"].keys() != masks.keys():
        raise UserError("the pruning state belongs to another model: its masks are named differently.")
    if wrong := [name for name, mask in masks.items() if len(state["masks"][name]) != -(-mask.numel() // 8)]:
        raise UserError(
            f"the pruning state belongs to another model: its masks of {', '.join(wrong)} are of other sizes."
        )
    if state["thresholds"].keys() != thresholds.keys():
        raise UserError(
            f"the pruning state belongs to other settings: its thresholds are of {', '.join(state['thresholds'])}, "
            f"and these of {', '.join(thresholds)}."
        )
    if state.get("settings", method.settings) != method.settings:
        raise UserError(
            f"the pruning state belongs to other settings: {differing(state['settings'], method.settings)}."
        )
    if state.get("done_from", method.done_from) != method.done_from:
        warnings.warn(
            f"the pruning state is of a schedule that ends at step {state['done_from']}, and this one ends at step "
            f"{method.done_from}, as the run is of another length: from here on this one counts.",
            stacklevel=4,  # torch's decorator is between
        )


def packed_in(model: nn.Module) -> str:
    """What to add for a model whose weights are packed already; nothing for others."""
    packed = any(name.endswith("_packed.row_pointers") for name, _ in model.named_buffers())
    return ", or packed: srnn.desparsify(model) gives weights that can be pruned" if packed else ""


def _options(settings: str) -> dict[str, str]:
    """Name -> text of each option, and ``method``, of a method's settings or of a callback's state key; none of
    others."""
    name, brace, inside = settings.partition("{")
    try:
        if name.isidentifier() and brace:
            named = ast.literal_eval(brace + inside)
            return {key: text for key, text in named.items() if key != "method"} | _options(named["method"])
        call = ast.parse(settings, mode="eval").body
    except (SyntaxError, ValueError, KeyError):
        return {}
    if not isinstance(call, ast.Call):
        return {}
    return {"method": ast.unparse(call.func)} | {str(k.arg): ast.unparse(k.value) for k in call.keywords}


def unwrapped(model: nn.Module) -> nn.Module:
    """The module itself, of one that is compiled, averaged or wrapped for data parallelism."""
    while True:
        if "_orig_mod" in model._modules:  # torch.compile's; naming its class would import the compiler
            model = model.get_submodule("_orig_mod")
        elif isinstance(model, DistributedDataParallel | nn.DataParallel | AveragedModel):
            model = model.module
        else:
            return model


def averaged(average: nn.Module | None, parameters: Mapping[str, nn.Parameter]) -> dict[str, list[Tensor]]:
    """The weights of a running average, by the name of what they average; empty without one.

    Raises:
        UserError: it is no average of these parameters.
    """
    if average is None:
        return {}
    named = dict(unwrapped(average).named_parameters())
    missing = [name for name, p in parameters.items() if name not in named or named[name].shape != p.shape]
    if missing:
        raise UserError(f"the average has no {', '.join(missing)}: give an average of the model that is pruned.")
    return {name: [named[name].detach()] for name in parameters}


def check_optimizers(optimizers: Sequence[torch.optim.Optimizer], parameters: Mapping[str, nn.Parameter]) -> None:
    """Warn of weights whose state would be left as it is, because another optimiser has it."""
    theirs = {id(p) for each in optimizers for group in each.param_groups for p in group["params"]}
    others = [name for name, p in parameters.items() if p.requires_grad and id(p) not in theirs]
    if optimizers and others:
        warnings.warn(
            f"no optimizer given to the Pruner updates {some_of(others)}: if another does, its state of pruned "
            f"weights stays; give all optimizers as a list.",
            stacklevel=3,
        )


def check_parameters(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise UserError if a model no longer has the parameters that are masked."""
    there = {id(parameter) for parameter in model.parameters()}
    if gone := [name for name, parameter in parameters.items() if id(parameter) not in there]:
        raise UserError(
            f"{gone[0]} is no longer the parameter that the Pruner was built with, and prunes: put new values in "
            f"place with `copy_`, or build the Pruner after the change."
        )


def check_not_moved(parameters: Mapping[str, nn.Parameter], masks: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if parameters have been moved from where their masks are."""
    for name, parameter in parameters.items():
        if parameter.device != masks[name].device:
            raise UserError(
                f"{name} is on {parameter.device} now, and was on {masks[name].device} when the Pruner was "
                f"built: move the model first."
            )


def check_cast_alike(
    name: str, parameter: nn.Parameter, before: torch.dtype, optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Raise UserError if a parameter has another dtype than before, and Adam's kind would fail at its next step.

    Others, such as SGD, compute with state of another dtype than the weights.
    """
    for optimizer in optimizers:
        state, kind = optimizer.state.get(parameter, {}), type(optimizer).__name__
        moment = state.get("exp_avg")
        fails = isinstance(moment, Tensor) and moment.dtype == before
        if (eps := _eps_lost(optimizer, parameter)) and (fails or _has_beside(state, parameter)):
            raise UserError(
                f"{name} is float16 now, in which {kind}'s eps={eps:g} is 0: pruned weights would become NaN. Leave "
                f"the weights as they were and train under torch.autocast, or cast them to bfloat16."
            )
        if fails:
            was, now = (str(dtype).removeprefix("torch.") for dtype in (before, parameter.dtype))
            raise UserError(
                f"{name} was {was} when the Pruner was built and is {now} now, and the state that "
                f"{kind} keeps of it is still {was}: cast the model before training, or call "
                f"`optimizer.load_state_dict(optimizer.state_dict())` after it is cast, which casts the state too."
            )


def _eps_lost(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> float | None:
    """What an optimiser adds before it divides, where that rounds to 0 in fp16 and the parameter is of that."""
    if parameter.dtype != torch.float16:
        return None
    groups = [g for g in optimizer.param_groups if "eps" in g and any(p is parameter for p in g["params"])]
    given = [g["eps"] for g in groups if not g.get("fused")]  # which computes in fp32
    return next((eps for eps in given if isinstance(eps, float) and torch.tensor(eps, dtype=torch.float16) == 0), None)


def _has_beside(state: Mapping[str, Any], parameter: nn.Parameter) -> bool:
    """Whether an optimiser keeps state of a parameter, element for element, in its dtype."""
    tensors = (value for value in state.values() if isinstance(value, Tensor))
    return any(each.dtype == parameter.dtype and each.shape == parameter.shape for each in tensors)
