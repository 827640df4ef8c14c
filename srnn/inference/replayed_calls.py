"""Calls of recurrent layers, or of a network around them, as replays of a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from srnn.cells import Cell
from srnn.inference.base import TORCH, SparseModule, marks_of
from srnn.kernels.calls_in_parts import Steps
from srnn.kernels.contract import Layer
from srnn.kernels.replay import Recordable, Replays
from srnn.kernels.replayed import ReplayedLayer


class ReplayedCalls(SparseModule):
    """What replays the calls of all layers of a sparse recurrent module on a GPU.

    Attributes:
        cell: of the layers.
        batch_first: whether streams are an input's first dimension.
        bidirectional: whether layers have two directions.
    """

    cell: Cell
    batch_first: bool
    bidirectional: bool

    def step_of(self, network: nn.Module, plain: Callable[[Tensor, Any], Any], x: Tensor, hx: Any) -> Any:
        """One step of a network that this is part of: on a GPU all of it is one replay, from the second call on.

        Args:
            network: all of whose modules the step may call.
            plain: the step as it is, of its input and the state of this module.
            x: its input, of B streams.
            hx: the state; None starts from zero.

        Returns:
            What ``plain`` does, in memory of its own: outputs and the next state.
        """
        parts = marks_of(network)
        if parts is None:
            return plain(x, hx)
        kind = ("network", *parts)
        done = None if torch.compiler.is_compiling() else self._again(kind, x, hx)
        replayed = self._replayed(kind, x, hx, plain) if done is None else done
        return plain(x, hx) if replayed is None else replayed

    def _again(self, kind: Any, input: Any, hx: Any) -> tuple[Tensor, Any] | None:
        """A call of all layers that was recorded, replayed: it asks no more than it must, as a GPU waits for it."""
        if type(input) is not Tensor or not input.is_cuda or self.recorder is not None:
            return None
        self.follow()
        replays: Replays | None = self._ready.get("replays")
        given = None if replays is None else self._given(input, hx)
        done = None if given is None or replays is None else replays.again(kind, given)
        return None if done is None else self._as_given(done)

    def _given(self, input: Tensor, hx: Any) -> list[Tensor] | None:
        """Input and state, if they are plain tensors of which no gradient is asked."""
        given = [input]
        if hx is not None:
            given += hx if self.cell == "lstm" and isinstance(hx, tuple | list) else (hx,)
        asked = torch.is_grad_enabled()
        for part in given:  # a generator would take longer than all of it
            if type(part) is not Tensor or (asked and part.requires_grad):
                return None
        return given

    def _as_given(self, done: list[Tensor]) -> tuple[Tensor, Any]:
        return done[0], tuple(done[1:]) if self.cell == "lstm" else done[1]

    def _replayed(self, kind: Any, input: Any, hx: Any, plain: Callable[[Any, Any], Any]) -> tuple[Tensor, Any] | None:
        """A call of all layers recorded as a CUDA graph, and replayed; None where it has to run as it is."""
        if type(input) is not Tensor or not input.is_cuda or torch.compiler.is_compiling() or self.recorder is not None:
            return None
        given, lstm = self._given(input, hx), self.cell == "lstm"
        if given is None:
            return None

        def run(given: list[Tensor]) -> list[Tensor]:
            x, *state = given
            y, after = plain(x, (tuple(state) if lstm else state[0]) if state else None)
            return [y, *after] if lstm else [y, after]

        replays: Replays = self._ready.get("replays") or self._ready.setdefault("replays", Replays())
        done = replays(kind, given, run, lambda: self._recordable(kind, input))
        return None if done is None else self._as_given(done)

    def _recordable(self, kind: Any, input: Tensor) -> Recordable | None:
        """What there is to know of a call that has run before; None if its layers are not known to launch alike."""
        if kind != "sequence":
            steps, streams = 1, input.shape[0]
        elif input.dim() == 2:
            steps, streams = input.shape[0], 1
        else:
            steps, streams = (input.shape[1], input.shape[0]) if self.batch_first else (input.shape[0], input.shape[1])
        name = self._decision(input, streams, steps)
        if name == TORCH:
            return None
        # A network's input may be numbers of tokens, whose type is not that of the layers' inputs.
        of_this = [
            ready
            for key, ready in list(self._ready.items())
            if isinstance(ready, Layer)
            and (key[0], key[2]) == (name, input.device)
            and (key[3] == input.dtype or not input.is_floating_point())
        ]
        chosen = [ready.chosen(steps, streams) for ready in of_this]
        layers = [layer for layer in chosen if isinstance(layer, ReplayedLayer)]
        if not layers or len(layers) < len(chosen):
            return None
        about = [layer.recordable(steps * streams, streams) for layer in layers]
        checks = tuple(check for one in about for check in one.checks)
        held = input.nbytes if len(layers) > 1 else 0  # while the layers behind the first run
        may_be_cut = kind == "sequence" and not self.bidirectional
        between = Steps(int(self.batch_first and input.dim() == 3), 1) if may_be_cut else None
        return Recordable(max(one.memory for one in about) + held, checks, between)
