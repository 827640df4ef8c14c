"""The recurrent half of a layer, in the form that suits the number of streams."""

from __future__ import annotations

import sys
import weakref

import torch
from torch import Tensor

from srnn.kernels.contract import LayerWeights, Recurrence, State
from srnn.kernels.triton.call import RecurrentCall, StepRows
from srnn.kernels.triton.chip import Chip, current
from srnn.kernels.triton.forms import lay_out_streams, plan_streams
from srnn.kernels.triton.gates.plan import GatePlan
from srnn.kernels.triton.slices.layout import SliceLayout
from srnn.kernels.triton.slices.plan import SlicePlan, Workload
from srnn.kernels.triton.vectors.layout import VectorLayout, lay_out_vectors
from srnn.kernels.triton.vectors.plan import programs_of

_GAVE_UP = (
    "a persistent kernel gave up waiting for its other programs in an earlier call, whose outputs are not numbers; the "
    "GPU may be shared with work that keeps it from running. kernel=dense does not wait"
)


def _tell(flag: Tensor) -> None:
    """Print a failure that nobody has seen: what calls this cannot raise."""
    if flag.numpy()[0]:
        print(f"srnn: {_GAVE_UP}.", file=sys.stderr)


class TritonRecurrence(Recurrence):
    """One direction, or both of a bidirectional layer.

    Args:
        weights: of each direction, whose matrices are alike.
        device: where it runs.
        dtype: of inputs and outputs.
        precision: ``tf32x3``, ``ieee`` or ``tf32``, of products of fp32; ``ieee`` where the device has no tf32.
        chip: the device's.

    Attributes:
        failed: [1], a flag that the device sets and the host reads without waiting.
    """

    def __init__(
        self, weights: tuple[LayerWeights, ...], device: torch.device, dtype: torch.dtype, precision: str, chip: Chip
    ) -> None:
        self.weights, self.device, self.dtype, self.chip = weights[0], device, dtype, chip
        self.precision = precision if chip.tf32 else "ieee"
        self.count = len(weights)  # of directions
        self.matrices = [direction.w_hh.to("cpu") for direction in weights]
        biases = [bias.to(device, torch.float32) for part in weights if (bias := part.new_bias) is not None]
        self.new_bias = torch.stack(biases) if len(biases) == self.count else None
        self.layouts: dict[int, VectorLayout] = {}  # by programs
        self.slice_layouts: dict[SlicePlan, SliceLayout | None] = {}
        self._for_streams: dict[int, SliceLayout | None] = {}  # planning takes as long as a launch
        with torch.inference_mode(False):  # it is written to in any mode
            self.failed = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._flag = self.failed.numpy()  # the same memory, faster to look at
        # A failure that no later call has told of is told of when the weights are let go, or the process ends.
        weakref.finalize(self, _tell, self.failed)

    def check(self) -> None:
        """Raise RuntimeError if a kernel of an earlier call gave up waiting; later calls may be right again."""
        if self._flag[0]:
            self.failed.zero_()
            raise RuntimeError(_GAVE_UP)

    def slices(self, streams: int) -> SliceLayout | None:
        """For ``slices`` or ``gates`` with so many streams, where they can run and are the faster."""
        if streams == 1 or self.matrices[0].height < 16:
            return None
        if streams not in self._for_streams:
            self._for_streams[streams] = self._planned(streams)
        return self._for_streams[streams]

    def _planned(self, streams: int) -> SliceLayout | None:
        work = Workload.of(self.matrices, self.dtype.itemsize, streams, self.precision == "ieee")
        plan = plan_streams(work, self.chip)
        if plan not in self.slice_layouts:
            fits = plan.fits(work, self.chip)
            layout = lay_out_streams(self.matrices, plan, self.dtype).to(self.device) if fits else None
            self.slice_layouts[plan] = layout
        return self.slice_layouts[plan]

    def layout(self, streams: int) -> VectorLayout:
        """For ``vectors``, with so many streams."""
        programs = programs_of(self.matrices, self.chip, streams)
        if programs not in self.layouts:
            self.layouts[programs] = lay_out_vectors(self.matrices, programs, self.chip.tuning).to(self.device)
        return self.layouts[programs]

    def __call__(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """One direction; see ``Recurrence``."""
        y_NH, end = self.directions(u_NG, batch_sizes, tuple(part[None] for part in state))
        return y_NH, tuple(part[0] for part in end)

    def directions(self, u_NG: Tensor, batch_sizes: Tensor, state: State) -> tuple[Tensor, State]:
        """All D directions.

        Args:
            u_NG: [N, D * G].
            batch_sizes: [T].
            state: parts [D, B, H].

        Returns:
            y [N, D * H], and the state after the last steps.

        Raises:
            RuntimeError: a kernel of an earlier call gave up waiting, so that call's outputs are NaN.
        """
        self.check()
        if not u_NG.shape[0]:
            return u_NG.new_empty(0, self.count * self.weights.output_size), state
        if 1 not in u_NG.stride():
            u_NG = u_NG.contiguous()
        rows = StepRows.of(batch_sizes, state[0].shape[1], u_NG.device)
        call = RecurrentCall(
            self.weights, self.count, u_NG, rows, state, self.new_bias, self.precision, self.failed, self.chip
        )
        slices = self.slices(call.streams)
        with current(u_NG.device):
            return _one_by_one(call, self.layout(call.streams)) if slices is None else _in_slices(call, slices)


# Imported here, because Triton may be missing.
def _one_by_one(call: RecurrentCall, layout: VectorLayout) -> tuple[Tensor, State]:
    from srnn.kernels.triton.vectors.kernel import run_vectors

    return run_vectors(call, layout)


def _in_slices(call: RecurrentCall, layout: SliceLayout) -> tuple[Tensor, State]:
    from srnn.kernels.triton.gates.kernel import run_gates
    from srnn.kernels.triton.slices.kernel import run_slices

    if isinstance(layout.plan, GatePlan):
        return run_gates(call, layout, layout.plan)
    return run_slices(call, layout)
