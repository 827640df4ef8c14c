"""K LSTM language models of one size whose training steps run as one: batched products, all parameters in stacks.

No part of srnn: what ``screen_ptb.py`` trains many networks with. Each network stays a module of srnn's whose
parameters are views of the stacks, so that a ``Pruner`` works on it. The step is written out by hand, without autograd.

Products take 16 bits where ``dtype`` is fp16: as many digits as TF32 has. Gradients are scaled for it; weights, cell
states, losses and updates stay in fp32. Rows of matrices are padded to 8 numbers, which fast products want.

Shapes: K networks, N = T * B tokens of a batch, step after step, H units, V words, R rows and C columns of a matrix.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import stacked_lstm_kernels as kernels
import torch
from torch import Tensor
from torch.nn import functional as F

SCALE = 16.0  # of a token's gradient, against underflow; divided out again in the update
EMBEDDING, DECODER, DECODER_BIAS = "embedding.weight", "decoder.weight", "decoder.bias"


class State:
    """What a set of streams carries on, and where its steps are computed. ``T`` steps of ``B`` streams at a time."""

    def __init__(self, stack: Stack, T: int, B: int) -> None:
        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(stack.K, *shape, dtype=dtype, device=stack.device)

        self.T, self.B, layers = T, B, range(stack.layers)
        self.y = [new(T + 1, B, stack.padded, dtype=stack.dtype) for _ in layers]  # the first is what is carried
        self.c = [new(T + 1, B, stack.H) for _ in layers]
        self.product = new(B, 4 * stack.H, dtype=stack.dtype)
        self.dh, self.dc = new(B, stack.padded, dtype=stack.dtype), new(B, stack.H)
        self.tokens = torch.zeros(T * B, dtype=torch.int64, device=stack.device)
        self.targets = torch.zeros_like(self.tokens)
        self.losses = new(T * B)

    def restart(self) -> None:
        """From zero."""
        for carried in (*self.y, *self.c):
            carried[:, 0].zero_()

    def go_on(self) -> None:
        """From where it ended."""
        for carried in (*self.y, *self.c):
            carried[:, 0].copy_(carried[:, -1])

    def batch(self, tokens_BT: Tensor, targets_BT: Tensor) -> None:
        """Take a batch; a narrower one is padded with targets that do not count."""
        missing = (0, self.T - tokens_BT.shape[1])
        self.tokens.copy_(F.pad(tokens_BT, missing).T.flatten())
        self.targets.copy_(F.pad(targets_BT, missing, value=kernels.IGNORED).T.flatten())


class Stack:
    """The networks.

    Args:
        models: srnn's ``LanguageModel`` of LSTMs, all of one size; their parameters become views.
        device: where they are trained.
        dtype: of products.
        clip: the largest norm of a network's gradients.
        means: which networks keep a mean of squared gradients.
        fused: whether Triton kernels do what is not a product.
    """

    def __init__(
        self, models: Sequence[Any], device: torch.device, dtype: torch.dtype, clip: float,
        means: Sequence[bool], fused: bool,
    ) -> None:  # fmt: skip
        self.K, self.device, self.dtype, self.clip, self.fused = len(models), device, dtype, clip, fused
        rnn = models[0].rnn
        self.layers, self.H, self.V = rnn.num_layers, rnn.hidden_size, models[0].decoder.out_features
        named = [dict(model.named_parameters()) for model in models]
        self.weights = {name: torch.stack([each[name].detach() for each in named]).to(device) for name in named[0]}
        for k, each in enumerate(named):
            for name, parameter in each.items():
                parameter.data = self.weights[name][k]
        self.matrices = [name for name, weight in self.weights.items() if weight.dim() == 3]
        self.copies = {name: _padded(self.weights[name], dtype) for name in self.matrices}
        self.padded = self.copies[DECODER].shape[2]
        gradients = {name: torch.zeros_like(copy) for name, copy in self.copies.items()}
        self.gradients = {name: gradients.get(name, torch.zeros_like(weight)) for name, weight in self.weights.items()}
        self.keep = {name: torch.ones_like(self.weights[name], dtype=torch.bool) for name in self.matrices}
        self.averaged = [k for k, wanted in enumerate(means) if wanted]
        rows = [self.averaged.index(k) if k in self.averaged else 0 for k in range(self.K)]
        self.mean_row = torch.tensor(rows, dtype=torch.int32, device=device)
        shapes = {name: (len(self.averaged), *self.weights[name].shape[1:]) for name in self.matrices}
        self.means = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        self._set_up(models)

    def _set_up(self, models: Sequence[Any]) -> None:
        """What a step reads of each network, at addresses that stay."""

        def each(values: Sequence[float]) -> Tensor:
            return torch.tensor(values, dtype=torch.float32, device=self.device)

        zeros = [0.0] * self.K
        self.dropout = each([model.dropout.p for model in models])
        self.embedding_dropout = each([model.embedding_dropout.p for model in models])
        self.lr, self.decay, self.weight, self.temperature = each(zeros), each(zeros), each(zeros), each([1.0] * self.K)
        self.teacher = each([-1.0] * self.K).int()  # row of ``taught``; -1 for none
        self.taught = torch.zeros(1, 1, self.V, dtype=torch.float16, device=self.device)  # log probabilities [M, N, V]
        # At this step: gradients of pruned weights count; they stay in the weights; squared gradients are averaged.
        self.wants, self.free, self.averages = (each(zeros).int() for _ in range(3))
        self.factor, self.skipped = each(zeros), each(zeros)

    def refresh(self, name: str, k: int) -> None:
        """The copy for products, after someone wrote weights."""
        self.copies[name][k, :, : self.weights[name].shape[2]].copy_(self.weights[name][k])

    def gradient(self, name: str, k: int) -> Tensor:
        """The gradient of a parameter as it was applied: clipped, in fp32."""
        found = self.gradients[name][k].float() * self.factor[k]
        if name in self.keep:
            found = found[:, : self.weights[name].shape[2]] * (self.keep[name][k] | (self.wants[k] > 0))
        return found

    def _mask(self, rates: Tensor, N: int, train: bool) -> Tensor | None:
        if not train:
            return None
        rates = rates[:, None, None]
        kept = torch.rand(self.K, N, self.padded, device=self.device) >= rates
        return (kept / (1 - rates)).to(self.dtype)

    def _forward(self, state: State, train: bool) -> tuple[Tensor, list[Any]]:
        """Logits without bias [K, N, V], and what the way back wants."""
        T, B, N, H = state.T, state.B, state.T * state.B, self.H
        x, kept = self.copies[EMBEDDING].index_select(1, state.tokens), []
        mask = self._mask(self.embedding_dropout, N, train)
        for layer in range(self.layers):
            x = x if mask is None else x * mask
            gates = torch.bmm(x, self.copies[f"rnn.weight_ih_l{layer}"].mT)
            gates_KTBG, recurrent = gates.view(self.K, T, B, 4 * H), self.copies[f"rnn.weight_hh_l{layer}"].mT
            bias = self.weights[f"rnn.bias_ih_l{layer}"] + self.weights[f"rnn.bias_hh_l{layer}"]
            y, c = state.y[layer], state.c[layer]
            for t in range(T):
                torch.bmm(y[:, t], recurrent, out=state.product)
                kernels.cell(self.fused, gates_KTBG[:, t], state.product, bias, c[:, t], c[:, t + 1], y[:, t + 1])
            kept.append((x, gates, mask))
            x, mask = y[:, 1:].flatten(1, 2), self._mask(self.dropout, N, train)
        x = x if mask is None else x * mask
        kept.append((x, None, mask))
        return torch.bmm(x, self.copies[DECODER].mT), kept

    def evaluate(self, state: State, nats: Tensor) -> None:
        """Add each network's loss of a batch to ``nats`` [K]; the state goes on."""
        logits, _ = self._forward(state, False)
        kernels.loss(self.fused, logits, self, state, None)
        nats += state.losses.double().sum(1)
        state.go_on()

    def step(self, state: State) -> None:
        """One optimiser step of all networks; the state goes on."""
        logits, kept = self._forward(state, True)
        count = (state.targets != kernels.IGNORED).sum()
        scale = SCALE * len(state.targets)
        kernels.loss(self.fused, logits, self, state, scale / count)
        self._backward(logits, kept, state)
        self._update(scale)
        state.go_on()

    def _backward(self, d_logits: Tensor, kept: list[Any], state: State) -> None:
        """All gradients, scaled."""
        T, B, N, H = state.T, state.B, state.T * state.B, self.H
        x, _, mask = kept[-1]
        torch.sum(d_logits, 1, dtype=torch.float32, out=self.gradients[DECODER_BIAS])
        torch.bmm(d_logits.mT, x, out=self.gradients[DECODER])
        dx = torch.bmm(d_logits, self.copies[DECODER])
        for layer in reversed(range(self.layers)):
            dy = dx.mul_(mask).view(self.K, T, B, -1)
            x, gates, mask = kept[layer]
            gates_KTBG, recurrent = gates.view(self.K, T, B, 4 * H), self.copies[f"rnn.weight_hh_l{layer}"]
            y, c = state.y[layer], state.c[layer]
            state.dh.zero_()
            state.dc.zero_()
            for t in reversed(range(T)):
                kernels.cell_backward(self.fused, gates_KTBG[:, t], c[:, t], c[:, t + 1], dy[:, t], state.dh, state.dc)
                torch.bmm(gates_KTBG[:, t], recurrent, out=state.dh)
            torch.bmm(gates.mT, y[:, :T].flatten(1, 2), out=self.gradients[f"rnn.weight_hh_l{layer}"])
            torch.bmm(gates.mT, x, out=self.gradients[f"rnn.weight_ih_l{layer}"])
            for name in ("ih", "hh"):
                torch.sum(gates, 1, dtype=torch.float32, out=self.gradients[f"rnn.bias_{name}_l{layer}"])
            dx = torch.bmm(gates, self.copies[f"rnn.weight_ih_l{layer}"])
        dx.mul_(mask)
        rows = torch.arange(self.V, device=self.device)
        one_hot = (state.tokens[:, None] == rows).to(self.dtype)  # a product adds up in the same order each time
        torch.bmm(one_hot.mT.expand(self.K, self.V, N), dx, out=self.gradients[EMBEDDING])

    def _update(self, scale: float) -> None:
        """Clip, and take a step of SGD. A step whose gradients overflow is skipped, as in mixed precision."""
        squares = [kernels.squares(self.fused, self, name) for name in self.weights]
        norm = torch.stack(squares).sum(0).sqrt() / scale
        finite = norm.isfinite()
        factor = (self.clip / (norm + 1e-6)).clamp(max=1.0) / scale
        self.factor.copy_(torch.where(finite, factor, 0.0))
        self.skipped += ~finite
        for name in self.weights:
            kernels.update(self.fused, self, name)


def _padded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.pad(weight, (0, -weight.shape[2] % 8)).to(dtype).contiguous()


def changing(stack: Stack, state: State) -> list[Tensor]:
    """All that a step writes to and the next one reads."""
    stacks: list[dict[str, Tensor]] = [stack.weights, stack.copies, stack.means]
    return [*(tensor for each in stacks for tensor in each.values()), stack.skipped, *state.y, *state.c]


def recorded(call: Any, written: Sequence[Tensor]) -> Any:
    """A call as a CUDA graph; the few calls that it takes to record leave no trace in what is ``written``."""
    before = [tensor.clone() for tensor in written]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    for tensor, value in zip(written, before, strict=True):
        tensor.copy_(value)
    return graph.replay


def largest_difference(stack: Stack, state: State, steps: int = 2) -> float:
    """How far what ``steps`` steps with the Triton kernels change is from what they change without, at most.

    A relative norm of the networks' weights. Nothing is left changed, but for ``fused``.
    """
    written = changing(stack, state)
    before, moved = [tensor.clone() for tensor in written], []
    for fused in (True, False):
        stack.fused = fused
        torch.manual_seed(0)
        try:
            for _ in range(steps):
                stack.step(state)
            moved.append({name: weight.clone() for name, weight in stack.weights.items()})
        finally:
            for tensor, value in zip(written, before, strict=True):
                tensor.copy_(value)
    differences = []
    for name, plain in moved[1].items():
        change = (plain - stack.weights[name]).flatten(1).norm(dim=1)
        differences.append((moved[0][name] - plain).flatten(1).norm(dim=1) / (change + 1e-12))
    return float(torch.stack(differences).max())


def seconds_of(call: Any, written: Sequence[Tensor], times: int = 10, windows: int = 5) -> float:
    """How long a call takes, the least of some windows; nothing of it is left in what is ``written``."""
    before, took = [tensor.clone() for tensor in written], []
    for _ in range(windows):
        _wait(written[0])
        began = time.perf_counter()
        for _ in range(times):
            call()
        _wait(written[0])
        took.append((time.perf_counter() - began) / times)
    for tensor, value in zip(written, before, strict=True):
        tensor.copy_(value)
    return min(took)


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()
