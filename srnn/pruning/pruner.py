"""The pruner: masks weights in place after every optimiser step, in anyone's training loop."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from srnn.distributed import check_equal
from srnn.errors import UserError
from srnn.pruning.arguments import (
    averaged,
    build_method,
    check_argument,
    check_cast_alike,
    check_not_moved,
    check_optimizers,
    check_parameters,
    check_state,
    optimizers_of,
    packed_in,
    run_length,
    unwrapped,
)
from srnn.pruning.clipping import MaskingClip
from srnn.pruning.gradient_hooks import GradientHooks
from srnn.pruning.masker import Masker
from srnn.pruning.methods.base import PruningMethod
from srnn.pruning.other_pruners import OtherPruners
from srnn.pruning.parts import Part, count
from srnn.pruning.report_rows import ReportRow, group_lines, report_rows
from srnn.pruning.schedules import RunLength
from srnn.pruning.scope import masks_of
from srnn.pruning.shortfalls import Emptied, warn_of_the_end, warn_of_zeros_there
from srnn.pruning.state_masks import state_beside

_COMPARE_EVERY = 100  # steps between two comparisons of the ranks, beside those at updates: each reads all weights


class Pruner:
    """Prunes a model while it trains (Narang et al., ICLR 2017). Call ``step()`` after every ``optimizer.step()``.

    Weights are masked in place: parameters keep their identity, names and memory, so cuDNN's flat weights stay valid.
    The optimiser's state of a pruned weight (momentum, Adam's moments) is zeroed too, and its gradient as soon as it is
    there, so that clipping sees the gradients of a network without these weights.

    Example:
        >>> import torch
        >>> from srnn import Pruner
        >>> model = torch.nn.GRU(16, 16)
        >>> optimizer = torch.optim.Adam(model.parameters())
        >>> pruner = Pruner(model, "cubic", 60, optimizer, sparsity=0.9)
        >>> for _ in range(60):
        ...     x_TBI = torch.randn(5, 4, 16)
        ...     (model(x_TBI)[0] - x_TBI).square().mean().backward()
        ...     optimizer.step()
        ...     updated = pruner.step()
        ...     optimizer.zero_grad()
        >>> pruner.finalize()
        >>> round(pruner.sparsity, 2)
        0.9

    Args:
        model: any module with recurrent layers and their cells, ``nn.Linear``, ``nn.Embedding``, ``nn.Conv1d/2d``. One
            that is wrapped for data parallelism, or compiled, is looked into.
        method: what to do: the name of a method (``gradual``, ``cubic``, ...), its config as a mapping with ``name``,
            or a method, which belongs to this pruner from now on.
        run: how long the training is: optimiser steps, or a ``RunLength``, which also knows epochs.
        optimizer: whose state to zero along with the weights, one or several; None leaves states alone.
        reference: a dense model's weights by name, for a method that wants one.
        average: a running average of the model, such as ``torch.optim.swa_utils.AveragedModel``: its weights are masked
            too. Update it before ``step()``.
        options: of the method, where it is given by name.

    Attributes:
        method: what it does; it knows its schedule from now on.
        run: how long the training is.
        optimizers: those that were given.
        itr: optimiser steps done so far.
        seconds: spent in here, without the waiting for a GPU's earlier work; what is launched on it is not awaited.
        groups: the weights that are pruned; those of a group share a threshold.

    Raises:
        UserError: nothing in the model can be pruned, an option is wrong, or the schedule cannot run.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Mapping[str, Any] | PruningMethod,
        run: int | RunLength,
        optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
        reference: Mapping[str, Tensor] | None = None,
        average: nn.Module | None = None,
        **options: Any,
    ) -> None:
        """See ``Pruner``."""
        check_argument("model", model, (nn.Module,), "a torch module")
        self.run = run_length(run)
        check_argument("average", average, (nn.Module, NoneType), "a torch module")
        check_argument("reference", reference, (Mapping, NoneType), "weights by name, such as a state_dict")
        self.method = build_method(method, options)
        self.optimizers = optimizers_of(optimizer)
        self._model = unwrapped(model)
        self.groups = self.method.groups(self._model)
        if self.method.layer_types and not self.groups:
            raise UserError(
                f"pruning.layer_types={list(self.method.layer_types)}: the model has no weights of these types to "
                f"prune, or all of them are frozen or left out{packed_in(self._model)}."
            )
        for group in self.groups:
            group.importance = self.method.ranked_by()
            # What a delayed method ranks is masked already: pruned weights are zeros.
            group.soft = self.method.soft or self.method.delayed
        self.itr, self.seconds = 0, 0.0
        self._masks = masks_of(self.groups)
        self._parameters = {part.parameter_name: part.parameter for part in self.parts}
        check_optimizers(self.optimizers, self._parameters)
        self._masker = Masker(self._parameters, self._masks, averaged(average, self._parameters), self.optimizers)
        self._others, self._emptied = OtherPruners(), Emptied()
        self._checked = False  # whether parameters have been checked since this was built or loaded
        self._gradient_hooks = self._make_hooks()
        first_look = not self.method.updates  # a run makes two pruners of its method
        self.method.prepare(self.run, self.groups, reference)
        if first_look and not self.method.needs_training:
            warn_of_zeros_there(self.groups)
        self._gradient_hooks.attach(self._parameters)
        self._mask_weights()

    def __repr__(self) -> str:
        """As torch's modules: the method and the step, and a line a group. Waits for a GPU that still prunes."""
        lines = group_lines(self.groups, self.method.wanted) or ["nothing is pruned"]
        steps = f"step {self.itr} of {self.run.total_steps}"
        return "\n  ".join([f"Pruner({type(self.method).__name__}, {steps}", *lines]) + "\n)"

    def _make_hooks(self) -> GradientHooks:
        return GradientHooks(self, Pruner._mask_gradient, Pruner._mask_gradients_on_gpu, Pruner._check_state)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_gradient_hooks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._gradient_hooks = self._make_hooks()
        self._gradient_hooks.attach(self._parameters)

    @torch.no_grad()
    def _mask_weights(self) -> None:
        """Apply masks that are there before the first step, to weights alone; ``load_state_dict`` gives these back."""
        if self.itr > self.method.dense_until and not self._acts_later():
            self._masker.take_weights()

    def _acts_later(self) -> bool:
        """Whether masks were found at this step that act from the next on; what ``prepare`` masks acts at once."""
        return self.itr > 0 and self.method.delayed and self.method.is_update(self.itr)

    @property
    def parts(self) -> list[Part]:
        """All that is pruned: parameters, or gates of parameters."""
        return [part for group in self.groups for part in group.parts]

    @torch.no_grad()
    def step(self) -> bool:
        """One iteration: mask, and at an update find new masks.

        With a method that is ``delayed`` the order is Algorithm 1's: masks found here act from the next step on.

        Returns:
            Whether this was an update. Warns if it emptied a matrix or gate, and if another ``Pruner`` masks too.

        Raises:
            UserError: the training has diverged; ranks differ; the model's parameters were exchanged or moved; a
                threshold that was given would prune every weight.
        """
        self.itr += 1
        self._masker.forget_taken()
        update = self.method.is_update(self.itr)
        if self._gradient_hooks.were_left() or update:
            self._masker.restart()
        began, waited = time.perf_counter(), sum(group.waited for group in self.groups)
        for group in self.groups:
            group.check()
        if update or self.itr % _COMPARE_EVERY == 0 or not self._checked:
            self._checked = True
            self._gradient_hooks.attach(self._parameters)  # some may have been frozen
            check_parameters(self._model, self._parameters)
            check_not_moved(self._parameters, self._masks)
            self._others.look(self._parameters)
            check_equal(self._compared(), self.itr)
        self._mask_and_update(update)
        self.method.after_masks(self)
        self._emptied.warn()
        waited -= sum(group.waited for group in self.groups)  # for what a GPU was given before, which is not pruning's
        self.seconds += time.perf_counter() - began + waited
        return update

    @torch.no_grad()
    def finalize(self) -> None:
        """Apply the masks once more, for a loop that ends on an update.

        Warns if the sparsity asked for was missed, and if nothing is left of a matrix or gate.

        Raises:
            UserError: ranks differ, the training had diverged by the last update, or parameters were exchanged since.
        """
        self._masker.restart()
        self._apply()
        self._gradient_hooks.remove()
        check_parameters(self._model, self._parameters)
        check_equal(self._compared(), self.itr)
        for group in self.groups:
            float(group.epsilon)  # a GPU has done all then
            group.check()
        warn_of_the_end(self.method, self.itr, self.groups, self._masks)

    @torch.no_grad()
    def mask_now(self) -> None:
        """Zero all that is pruned, before it is saved or scored: a step on a GPU may look at one parameter, or none."""
        if self.method.soft or self._acts_later():
            return  # a soft method's are masked at each step
        if all(parameter.device == self._masks[name].device for name, parameter in self._parameters.items()):
            self._masker.restart()
            self._apply()

    def clips(self) -> MaskingClip:
        """What a loop promises to clip all gradients by from now on, once before each optimiser step, unscaled.

        It masks them on its way, and the method may take them in.
        """
        wanted, mask_all = lambda: not self._wants_gradients(), self._mask_gradients_on_gpu
        means = partial(self.method.means_to_take_in, self)
        return MaskingClip(self._gradient_hooks, self._parameters, self._masks, wanted, mask_all, means)

    @torch.no_grad()
    def mask_again(self) -> list[str]:
        """Zero the pruned weights that something else wrote since they were masked.

        Returns:
            The names of the parameters it found them in.
        """
        if self.itr <= self.method.dense_until:
            return []
        return self._masker.mask_written()

    def _mask_and_update(self, update: bool) -> None:
        """In the method's order."""
        if update and not self.method.delayed:
            if self.method.regrows:
                self._apply()  # what grows starts from zero, and not from the optimiser's step on a pruned weight
            self._update()
            self._apply()
        else:
            self._apply()
            if update:
                self._update()

    def _update(self) -> None:
        self.method.before_update(self)
        comes_back = self.method.soft or self.method.regrows
        for group in self.groups:
            before = [part.of(part.mask).clone() for part in group.parts] if comes_back else []
            self.method.update(self.itr, group)
            for part, mask in zip(group.parts, before, strict=False):
                part.revived += torch.stack([count(gate) for gate in part.of(part.mask) > mask])
        self._emptied.look(self.method, self.itr, self.groups, self._masks)
        self._masker.masks_changed()

    def _apply(self) -> None:
        if self.itr <= self.method.dense_until:
            return
        # Momentum is what lets a soft method's weights come back.
        with_state = self.method.zero_state and (not self.method.soft or self.itr >= self.method.done_from)
        self._masker.mask(with_state)

    def _mask_gradient(self, name: str, gradient: Tensor) -> None:
        if not self._wants_gradients():
            began = time.perf_counter()
            self._masker.mask_gradient(name, gradient)
            self.seconds += time.perf_counter() - began

    def _mask_gradients_on_gpu(self) -> None:
        if not self._wants_gradients():
            began = time.perf_counter()
            self._masker.mask_gradients_on_gpu()
            self.seconds += time.perf_counter() - began

    def _check_state(self, name: str, dtype: torch.dtype) -> None:
        check_cast_alike(name, self._parameters[name], dtype, self.optimizers)

    def _wants_gradients(self) -> bool:
        """Whether the next step needs the gradients of pruned weights, or nothing is pruned yet."""
        method = self.method
        grows = method.regrows and method.is_update(self.itr + 1)
        return grows or (method.soft and self.itr < method.done_from) or self.itr < method.dense_until

    def state_of(self, parameter: nn.Parameter) -> list[Tensor]:
        """The optimisers' tensors that go with a parameter, element for element."""
        return state_beside(self.optimizers, parameter)

    def _compared(self) -> dict[str, Tensor]:
        """What has to be equal on all ranks."""
        return self._parameters | {f"the mask of {name}": mask for name, mask in self._masks.items()}

    @property
    def sparsity(self) -> float:
        """Share of zeros among all the weights that get pruned, 0 to 1; 0 when nothing does."""
        size = sum(group.size for group in self.groups)
        return sum(group.pruned for group in self.groups) / size if size else 0.0

    @property
    def thresholds(self) -> dict[str, float]:
        """Group (usually a layer type) -> epsilon of the last update."""
        return {group.name: group.epsilon for group in self.groups}

    def masks(self) -> dict[str, Tensor]:
        """Parameter name -> bool mask of its shape; True keeps the weight. The masks themselves, not copies."""
        return dict(self._masks)

    def sparsities(self) -> dict[str, float]:
        """Parameter name -> share of zeros in its mask, 0 to 1."""
        counts = [count(mask) for mask in self._masks.values()]
        kept = torch.stack([one.to(counts[0].device) for one in counts]).tolist() if counts else []  # awaited once
        return {name: 1 - n / mask.numel() for (name, mask), n in zip(self._masks.items(), kept, strict=True)}

    def report(self) -> list[ReportRow]:
        """A row for each parameter, and for each gate of a recurrent one."""
        return [row for group in self.groups for part in group.parts for row in report_rows(group, part)]

    def reached(self) -> bool:
        """Whether pruning is over and every group has the zeros it was asked for, to a block: the last one may stay."""
        wanted = [(group.pruned + group.largest_unit, self.method.wanted(group)) for group in self.groups]
        return self.itr >= self.method.done_from and all(want is None or have >= want for have, want in wanted)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to resume: iteration, seconds, thresholds, and the masks at one bit a weight.

        All that is pruned is zeroed, as the weights are saved beside it.
        """
        self.mask_now()
        packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy())) for name, mask in self._masks.items()}
        revived = {part.name: part.revived.tolist() for part in self.parts}
        return {
            "itr": self.itr, "seconds": self.seconds, "thresholds": self.thresholds, "masks": packed,
            "revived": revived, "method": self.method.state_dict(), "settings": self.method.settings,
            "done_from": self.method.done_from,
        }  # fmt: skip

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a ``state_dict``, and mask the weights by it: they and the optimiser may be loaded before or after.

        Warns if its schedule ends at another step, as that of a shorter run does.

        Raises:
            UserError: it belongs to another model, settings or version of srnn.
        """
        check_state(state, self._masks, self.thresholds, self.method)
        self._masker.give_back()
        self.itr, self.seconds = int(state["itr"]), float(state["seconds"])
        for name, mask in self._masks.items():
            bits = np.unpackbits(state["masks"][name].cpu().numpy(), count=mask.numel())
            mask.copy_(torch.from_numpy(bits).view(mask.shape))
        for group in self.groups:
            group.restore(float(state["thresholds"][group.name]))
        for part in self.parts:
            part.revived.copy_(torch.tensor(state["revived"][part.name], device="cpu"))
        self.method.load_state_dict(state["method"])
        self._masker.masks_changed()
        self._mask_weights()
        self._checked = False
