"""``pruning=obd``: what the loss misses least goes first, on the schedule of ``cubic``.

LeCun, Denker and Solla, *Optimal brain damage*, NIPS 1989: without a weight w the loss rises by about h w^2 / 2, where
h is its second derivative. Adam divides a step by the square root of v, its mean of squared gradients, which stands for
h here and costs nothing to know. (Theis et al. 2018 take v itself, the diagonal of the Fisher information.)
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import _global_optimizer_pre_hooks

from srnn.errors import UserError
from srnn.pruning.groups import Saliency
from srnn.pruning.mean_squares import DECAY, MeanSquares, are_finite
from srnn.pruning.methods.base import PrunerView
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.parts import Part, Piece, some_of
from srnn.pruning.scope import Sharing, in_a_scope
from srnn.registry import register

SECOND_MOMENT = "exp_avg_sq"  # torch's name of v in the state of Adam and its kind


@register.pruning("obd")
@dataclass(kw_only=True)
class OBD(Cubic):
    """Prune the weights that the loss misses least, by Adam's second moments (LeCun et al. 1989), as fast as cubic.

    Its scores are parts of the loss whatever matrix a weight is in, so all weights share one threshold unless told
    otherwise: where the sparsity goes is found. What is pruned stays so. Beside an optimiser that keeps no mean of
    squared gradients it keeps one of its own, in fp32 and as large as the weights, until pruning is over.
    """

    share: Sharing = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._own: dict[str, Tensor] = {}  # parameter name -> a mean of squared gradients, where no optimiser has one
        self._saliency = Saliency()
        self._taking_in = MeanSquares(DECAY)
        self._has_looked = False  # whether there are gradients
        self._taken_in = -1  # the last step that its own means hold

    def before_update(self, pruner: PrunerView) -> None:
        """Look up the means of squared gradients, this step's among them.

        Raises:
            UserError: no step had finite gradients to look at, of any weight that shares a threshold.
        """
        self._take_in(pruner)
        self._saliency.moments = _of_one_age(pruner, {**_of_optimizers(pruner), **self._own})
        for group in [] if self._has_looked else pruner.groups:
            if not any(bool(self._saliency.moments[part.parameter_name].any()) for part in group.parts):
                raise _no_gradients(pruner, group.parts)  # all scores would be zero, and the first weights be kept
        self._has_looked = True  # once: a GPU is waited for

    def after_masks(self, pruner: PrunerView) -> None:
        """Take in the step's gradients, and let go of what is the optimiser's.

        Raises:
            UserError: there are no gradients to look at.
        """
        self._saliency.moments = {}
        if pruner.itr < self.done_from:
            self._take_in(pruner)
        else:
            self._own = {}

    def means_to_take_in(self, pruner: PrunerView, given: Collection[nn.Parameter]) -> Mapping[nn.Parameter, Tensor]:
        """Its own, where these hold all steps so far, and ``after_masks`` would find what clipping leaves."""
        if not self._own or self._taken_in != pruner.itr or not _leaves_gradients(pruner.optimizers):
            return {}
        names = {part.parameter: part.parameter_name for part in pruner.parts}
        means = {p: self._own[name] for p, name in names.items() if name in self._own and _is_plain(self._own[name], p)}
        # Of the same parameters, clipping finds what ``are_finite`` does, unless squares overflow.
        trained = {p for p in _all_of(pruner.optimizers) if p.grad is not None}
        if not (means.keys() == names.keys() <= trained == set(given)):
            return {}
        self._taken_in += 1
        return means

    def _take_in(self, pruner: PrunerView) -> None:
        if self._taken_in != pruner.itr:
            self._taken_in = pruner.itr
            self._own = self._with_this_step(pruner, self._without(pruner))

    def _with_this_step(self, pruner: PrunerView, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Its own means of some parameters, with the gradients of this step."""
        finite = are_finite([*parameters.values(), *_all_of(pruner.optimizers)]) if parameters else []
        means = {
            # In fp32, as bfloat16 would round each small change away.
            name: self._own[name].to(p.device) if name in self._own else torch.zeros_like(p, dtype=torch.float32)
            for name, p in parameters.items()
        }
        for device in {mean.device for mean in means.values()}:
            here = {name: mean for name, mean in means.items() if mean.device == device}
            gradients = {name: _gradient(parameters[name]) for name in here}
            self._taking_in(here, gradients, [each.to(device) for each in finite])
        return means

    def _without(self, pruner: PrunerView) -> dict[str, nn.Parameter]:
        """The parameters of which no optimiser keeps a mean of squared gradients."""
        theirs, parameters = _of_optimizers(pruner), {part.parameter_name: part.parameter for part in pruner.parts}
        if not (theirs or self._own) and all(parameter.grad is None for parameter in parameters.values()):
            raise _no_gradients(pruner, pruner.parts)
        return {name: parameter for name, parameter in parameters.items() if name not in theirs}

    def importance(self, piece: Piece) -> Tensor:
        """The root of w^2 sqrt(v): |w| v^(1/4)."""
        return self._saliency(piece)

    def ranked_by(self) -> Callable[[Piece], Tensor]:
        """``importance``, in a form that a GPU finds in its kernels."""
        return self._saliency if type(self).importance is OBD.importance else self.importance

    def state_dict(self) -> dict[str, Any]:
        """Its own means of squared gradients."""
        return {name: mean.clone() for name, mean in self._own.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them up again."""
        self._taken_in = -1
        # In fp32, whatever a file holds: kernels read it as such.
        self._own = {name: mean.to(torch.float32, copy=True) for name, mean in state.items()}


def _of_optimizers(pruner: PrunerView) -> dict[str, Tensor]:
    """Parameter name -> the optimiser's own mean of squared gradients, where it keeps one."""
    states = {parameter: state for each in pruner.optimizers for parameter, state in each.state.items()}
    kept = {part.parameter_name: states.get(part.parameter, {}).get(SECOND_MOMENT) for part in pruner.parts}
    return {name: moment for name, moment in kept.items() if moment is not None}


def _of_one_age(pruner: PrunerView, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Means of squared gradients that can be compared: all start at zero, and those of other decays rise sooner."""
    names = {part.parameter: part.parameter_name for part in pruner.parts}
    ages: dict[str, tuple[float, Any]] = dict.fromkeys(moments, (DECAY, pruner.itr))
    for optimizer in pruner.optimizers:
        for group in (group for group in optimizer.param_groups if "betas" in group):
            states = {names[p]: optimizer.state.get(p, {}) for p in group["params"] if p in names}
            kept = {name: state["step"] for name, state in states.items() if {SECOND_MOMENT, "step"} <= state.keys()}
            ages |= {name: (float(group["betas"][1]), steps) for name, steps in kept.items()}
    if len({decay for decay, _ in ages.values()}) == 1:  # as usual: what all are too small by changes no rank
        return dict(moments)
    return {name: moment / (1 - ages[name][0] ** max(1.0, float(ages[name][1]))) for name, moment in moments.items()}


def _no_gradients(pruner: PrunerView, parts: Sequence[Part]) -> UserError:
    names, parameters = some_of([part.name for part in parts]), [part.parameter for part in parts]
    if not all(are_finite([*parameters, *_all_of(pruner.optimizers)])):
        return UserError(
            f"pruning=obd ranks {names} by squared gradients, and no step so far had any that were all finite and not "
            f"all zero: the training has diverged; lower the learning rate, or look where the loss becomes NaN."
        )
    leave_out = in_a_scope(parts[0].name, "0")
    frozen = not any(parameter.requires_grad for parameter in parameters)
    called = f"call pruner.step() before optimizer.zero_grad(), or leave out what the loss does not need: {leave_out}"
    return UserError(
        f"pruning=obd ranks by squared gradients, and there are none of {names}: "
        f"{f'they are frozen; leave them out: {leave_out}' if frozen else called}, or choose pruning=cubic."
    )


def _all_of(optimizers: Iterable[torch.optim.Optimizer]) -> list[nn.Parameter]:
    return [parameter for each in optimizers for group in each.param_groups for parameter in group["params"]]


def _is_plain(mean: Tensor, parameter: nn.Parameter) -> bool:
    return mean.is_contiguous() and mean.device == parameter.device and mean.shape == parameter.shape


def _leaves_gradients(optimizers: Sequence[torch.optim.Optimizer]) -> bool:
    """Whether gradients stay as they are between clipping and ``Pruner.step``: beside one SGD of torch's.

    Several may be clipped and stepped one after the other. Nesterov's momentum is added to the gradients themselves
    where the step is not fused, and hooks may write to them.
    """
    if [type(each) for each in optimizers] != [torch.optim.SGD]:
        return False
    hooks = optimizers[0]._optimizer_step_pre_hooks or _global_optimizer_pre_hooks
    return not hooks and all(group["fused"] or not group["nesterov"] for group in optimizers[0].param_groups)


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    """Its gradient, dense; None of a branch that was not taken."""
    gradient = None if parameter.grad is None else parameter.grad.detach()
    return gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient
