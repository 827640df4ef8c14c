"""Reading a network as a chain, and making sure that the network is that chain: both are run and compared.

Shapes: T steps, B streams, V tokens, I inputs, O outputs, P outputs of a recurrent layer, L layers times directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from srnn.errors import UserError
from srnn.exporting.chain import (
    ActivationPart,
    Chain,
    Direction,
    EmbeddingPart,
    LinearPart,
    RecurrentPart,
    dense_weight,
    layers_of,
)
from srnn.meta_device import without_memory

# Largest difference of an output or state, over the larger of 1 and the largest output.
AGREEMENT = 1e-5
_LENGTHS = (1, 7, 24)
_BATCHES = (1, 3)

States = Mapping[str, Tensor]


class Runs(Protocol):
    """A chain that runs, somewhere: inputs and states -> outputs and states; None starts from zero."""

    def __call__(self, inputs: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """As ``ChainNetwork``."""


class ChainNetwork(nn.Module):
    """A chain on torch's own modules, with its states by name: what exports are compared with."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.chain = chain
        self.layers = nn.ModuleDict({part.name: _torch_layers(part, chain) for part in chain.recurrent})
        self.requires_grad_(False).eval()

    def forward(self, inputs: Tensor, states: States | None = None) -> tuple[Tensor, States]:
        """Outputs and states after them.

        Args:
            inputs: tokens [B, T], or vectors [B, T, I]; [T, B, ...] of a chain that is not batch first.
            states: name -> [L, B, size]; None starts from zero.
        """
        after: dict[str, Tensor] = {}
        x, last = inputs, self.chain.recurrent[-1]
        for part in self.chain.parts:
            if isinstance(part, EmbeddingPart):
                x = F.embedding(x, dense_weight(part.weight))
            elif isinstance(part, LinearPart):
                x = F.linear(x, dense_weight(part.weight), part.bias)
            elif isinstance(part, ActivationPart):
                x = getattr(torch, part.kind)(x, *([-1] if "softmax" in part.kind else []))
            else:
                before = None if states is None else tuple(states[name] for name in part.states)
                hx = before[0] if before is not None and len(before) == 1 else before
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that oneDNN has no projections
                    x, end = self.layers[part.name](x, hx)
                ends = end if isinstance(end, tuple) else (end,)
                after |= dict(zip(part.states, ends, strict=True))
                if self.chain.last_only and part is last:
                    x = ends[0][-part.directions :].transpose(0, 1).flatten(1)
        return x, after


def _torch_layers(part: RecurrentPart, chain: Chain) -> nn.Module:
    kinds: dict[str, Any] = {"gru": nn.GRU, "lstm": nn.LSTM}
    options: dict[str, Any] = {} if part.cell in kinds else {"nonlinearity": part.cell}
    if part.hidden_size != part.output_size:
        options["proj_size"] = part.output_size
    bias = part.layers[0][0].b_ih is not None
    with without_memory():
        module: nn.RNNBase = kinds.get(part.cell, nn.RNN)(
            part.input_size, part.hidden_size, len(part.layers), bias=bias, batch_first=chain.batch_first,
            bidirectional=part.directions == 2, **options,
        )  # fmt: skip
    tensors: dict[str, Tensor] = {}
    for index, layer in enumerate(part.layers):
        for direction, ending in zip(layer, ("", "_reverse"), strict=False):
            tensors |= {f"{name}_l{index}{ending}": t for name, t in _named(direction).items()}
    module.load_state_dict(tensors, assign=True)
    return module


def _named(direction: Direction) -> dict[str, Tensor]:
    weights = {"weight_ih": direction.w_ih, "weight_hh": direction.w_hh, "weight_hr": direction.w_hr}
    found = {name: dense_weight(weight) for name, weight in weights.items() if weight is not None}
    biases = {"bias_ih": direction.b_ih, "bias_hh": direction.b_hh}
    return found | {name: bias for name, bias in biases.items() if bias is not None}


def read_chain(model: nn.Module) -> Chain:
    """A network as a chain of its layers, in the order it holds them; checked by running both.

    A network is a chain if it computes what its layers do one after the other: embedding, ``nn.RNN``, ``nn.GRU`` and
    ``nn.LSTM`` of any options, linear layers, ReLU, tanh, sigmoid and softmax; dropout is nothing. Its outputs are
    those of every step, or of the recurrent layers' final state. It is called with inputs alone, and returns the
    outputs, or a tuple that starts with them. Sparse modules are read as torch's.

    Raises:
        UserError: it is no chain; says why.
    """
    parts, batch_first = layers_of(model)
    _check_finite(model)
    chain = Chain(parts, batch_first)
    outputs = outputs_of(model, some_inputs(chain, 5, 2))
    if outputs.dim() == 2:
        chain = replace(chain, last_only=True)
    network = ChainNetwork(chain)
    for inputs in _trials(chain):
        wanted = outputs_of(model, inputs)
        with torch.inference_mode():
            got, _ = network(inputs)
        away = difference(got, wanted)
        if not away <= AGREEMENT:
            raise UserError(
                f"{type(model).__name__} computes something else than its layers one after the other "
                f"({', '.join(part.name for part in parts)}): outputs differ by {away:.1e}."
            )
    return chain


def _check_finite(model: nn.Module) -> None:
    """Raises UserError that names a weight which holds NaN or infinity: such a network agrees with nothing."""
    for name, weight in model.state_dict().items():
        if isinstance(weight, Tensor) and weight.is_floating_point() and not weight.isfinite().all():
            raise UserError(f"{name} holds values that are not finite: the training has probably diverged.")


def outputs_of(model: nn.Module, inputs: Tensor) -> Tensor:
    """The outputs of a network called with these inputs, fp32 on the CPU. Raises UserError if it cannot be."""
    like = next((p for p in model.parameters()), inputs)
    try:
        with torch.inference_mode():
            given = inputs.to(like.device, like.dtype if inputs.is_floating_point() else inputs.dtype)
            result = model(given)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        shape = list(inputs.shape)
        raise UserError(
            f"{type(model).__name__} cannot be called with inputs {shape} alone: {str(error).splitlines()[0]}."
        ) from error
    outputs = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(outputs, Tensor):
        raise UserError(f"{type(model).__name__} returns a {type(result).__name__}, not outputs or a tuple of them.")
    return outputs.detach().float().cpu()


def some_inputs(chain: Chain, steps: int, streams: int, seed: int = 0) -> Tensor:
    """Random tokens or vectors, in the chain's layout."""
    random = torch.Generator().manual_seed(seed)
    shape = (streams, steps) if chain.batch_first else (steps, streams)
    if chain.vocabulary_size is not None:
        return torch.randint(chain.vocabulary_size, shape, generator=random)
    return torch.randn(*shape, chain.input_size, generator=random)


def _trials(chain: Chain) -> Iterator[Tensor]:
    for seed, streams in enumerate(_BATCHES):
        for steps in _LENGTHS:
            yield some_inputs(chain, steps, streams, seed)


def largest_difference(exported: Runs, model: nn.Module, chain: Chain) -> float:
    """How far an exported network is from the network, over three lengths, two batches and chained calls.

    The outputs from zero states are compared with the network's own; chained calls, each going on from the states of
    the one before, with torch's modules of the same weights, states too; and, where all steps have outputs and none
    sees the end, with the network's own outputs over the whole sequence.
    """
    network, away = ChainNetwork(chain), [0.0]
    time = 1 if chain.batch_first else 0
    with torch.inference_mode():
        for inputs in _trials(chain):
            got, _ = exported(inputs)
            away.append(difference(got, outputs_of(model, inputs)))
        for seed, streams in enumerate(_BATCHES):
            whole = some_inputs(chain, sum(_LENGTHS), streams, seed)
            states, reference, outputs = None, None, []
            for piece in whole.split(_LENGTHS, dim=time):
                got, states = exported(piece, states)
                wanted, reference = network(piece, reference)
                away += [difference(got, wanted), *(difference(states[n], reference[n]) for n in chain.states)]
                outputs.append(got)
            if not chain.bidirectional:
                joined = outputs[-1] if chain.last_only else torch.cat(outputs, dim=time)
                away.append(difference(joined, outputs_of(model, whole)))
    return max(away, key=lambda value: float("inf") if value != value else value)


def difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference over the larger of 1 and the largest number wanted; infinite where shapes differ."""
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    return float((got - wanted).abs().max() / max(1.0, float(wanted.abs().max())))
