"""What ``stacked_lstm.py`` computes beside products: in Triton, a launch each, or in plain torch.

Shapes: K networks, B streams, H units, N tokens of a batch, V words, C columns of a matrix, P columns as padded.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from srnn.pruning.mean_squares import DECAY

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

IGNORED = -100  # a target that does not count
CAN_FUSE = triton is not None and (torch.cuda.is_available() or bool(os.environ.get("TRITON_INTERPRET")))
_BLOCK = 1024 if not os.environ.get("TRITON_INTERPRET") else 256

if triton is not None:

    @triton.jit
    def _read(at, inside):
        return tl.load(at, inside, 0.0).to(tl.float32)

    @triton.jit
    def _cell(gates, product, bias, c, c_next, y_next, gates_k, c_k, y_k, size,
              B: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        k = (place // (B * H)).to(tl.int64)
        rest = place % (B * H)
        b = rest // H
        j = rest % H
        u = gates + k * gates_k + b * 4 * H + j
        v = product + k * B * 4 * H + b * 4 * H + j
        w = bias + k * 4 * H + j
        a_i = _read(u, inside) + _read(v, inside) + _read(w, inside)
        a_f = _read(u + H, inside) + _read(v + H, inside) + _read(w + H, inside)
        a_g = _read(u + 2 * H, inside) + _read(v + 2 * H, inside) + _read(w + 2 * H, inside)
        a_o = _read(u + 3 * H, inside) + _read(v + 3 * H, inside) + _read(w + 3 * H, inside)
        i = tl.sigmoid(a_i)
        f = tl.sigmoid(a_f)
        g = 2 * tl.sigmoid(2 * a_g) - 1
        o = tl.sigmoid(a_o)
        cell = f * _read(c + k * c_k + rest, inside) + i * g
        tl.store(c_next + k * c_k + rest, cell, inside)
        tl.store(y_next + k * y_k + b * P + j, o * (2 * tl.sigmoid(2 * cell) - 1), inside)
        tl.store(u, i, inside)
        tl.store(u + H, f, inside)
        tl.store(u + 2 * H, g, inside)
        tl.store(u + 3 * H, o, inside)

    @triton.jit
    def _cell_backward(gates, c, c_next, dy, dh, dc, gates_k, c_k, dy_k, size,
                       B: tl.constexpr, H: tl.constexpr, P: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        k = (place // (B * H)).to(tl.int64)
        rest = place % (B * H)
        b = rest // H
        j = rest % H
        u = gates + k * gates_k + b * 4 * H + j
        i = _read(u, inside)
        f = _read(u + H, inside)
        g = _read(u + 2 * H, inside)
        o = _read(u + 3 * H, inside)
        t = 2 * tl.sigmoid(2 * _read(c_next + k * c_k + rest, inside)) - 1
        d = _read(dy + k * dy_k + b * P + j, inside)
        d += _read(dh + k * B * P + b * P + j, inside)
        d_c = _read(dc + place, inside) + d * o * (1 - t * t)
        tl.store(dc + place, d_c * f, inside)
        d_f = d_c * _read(c + k * c_k + rest, inside) * f * (1 - f)
        tl.store(u, d_c * g * i * (1 - i), inside)
        tl.store(u + H, d_f, inside)
        tl.store(u + 2 * H, d_c * i * (1 - g * g), inside)
        tl.store(u + 3 * H, d * t * o * (1 - o), inside)

    @triton.jit
    def _loss(logits, bias, targets, losses, scale, taught, teacher, weight, temperature,
              N: tl.constexpr, V: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        k = row // N
        n = row % N
        v = tl.arange(0, BLOCK)
        inside = v < V
        low = float("-inf")
        x = tl.load(logits + row * V + v, inside, 0.0).to(tl.float32) + tl.load(bias + k * V + v, inside, 0.0)
        x = tl.where(inside, x, low)
        top = tl.max(x, 0)
        e = tl.exp(x - top)
        total = tl.sum(e, 0)
        target = tl.load(targets + n)
        found = tl.sum(tl.where(v == target, x, 0.0), 0)  # what is beyond V is infinite, and no target
        counts = target >= 0
        tl.store(losses + row, tl.where(counts, tl.log(total) + top - found, 0.0))
        if GRADIENT:
            part = tl.load(weight + k)
            t = tl.load(temperature + k)
            m = tl.load(teacher + k)
            d = (1 - part) * (e / total - tl.where(v == target, 1.0, 0.0))
            # Of a network without a teacher nothing is read; its part is 0.
            q = tl.load(taught + (m.to(tl.int64) * N + n) * V + v, inside & (m >= 0), 0.0).to(tl.float32) / t
            q = tl.where(inside, q, low)
            q = tl.exp(q - tl.max(q, 0))
            s = tl.exp((x - top) / t)
            d += part * t * (s / tl.sum(s, 0) - q / tl.sum(q, 0))
            d = tl.where(counts, d * tl.load(scale), 0.0)
            tl.store(logits + row * V + v, d, inside)

    @triton.jit
    def _squares(gradient, keep, wants, out, size, C: tl.constexpr, P: tl.constexpr,
                 MASKED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        k = tl.program_id(1).to(tl.int64)
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        g = tl.load(gradient + k * (size // C * P) + place // C * P + place % C, inside, 0.0).to(tl.float32)
        if MASKED:
            all_count = tl.load(wants + k) > 0
            kept = tl.load(keep + k * size + place, inside, 0) != 0
            g = tl.where(kept | all_count, g, 0.0)
        tl.store(out + k * tl.num_programs(0) + tl.program_id(0), tl.sum(g * g, 0))

    @triton.jit
    def _update(weight, copy, gradient, keep, mean, mean_row, averages, wants, free, factor, lr, decay,
                size, C: tl.constexpr, P: tl.constexpr, MEAN: tl.constexpr, MASKED: tl.constexpr,
                AVERAGES: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        k = tl.program_id(1).to(tl.int64)
        place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = place < size
        padded = k * (size // C * P) + place // C * P + place % C
        scale = tl.load(factor + k)
        g = tl.load(gradient + padded, inside, 0.0).to(tl.float32)
        g = tl.where(scale > 0, g * scale, 0.0)
        w = tl.load(weight + k * size + place, inside, 0.0)
        if MASKED:
            kept = tl.load(keep + k * size + place, inside, 0) != 0
            g = tl.where(kept | (tl.load(wants + k) > 0), g, 0.0)
        if AVERAGES:
            counted = inside & (tl.load(averages + k) > 0)
            m = mean + tl.load(mean_row + k).to(tl.int64) * size + place
            tl.store(m, MEAN * tl.load(m, counted, 0.0) + (1 - MEAN) * g * g, counted)
        w -= tl.load(lr + k) * (g + tl.load(decay + k) * w)
        if MASKED:
            w = tl.where(kept | (tl.load(free + k) > 0), w, 0.0)
            tl.store(copy + padded, w, inside)
        tl.store(weight + k * size + place, w, inside)


def cell(fused: bool, gates: Tensor, product: Tensor, bias: Tensor, c: Tensor, c_next: Tensor, y_next: Tensor) -> None:
    """A step of LSTMs: the next states; ``gates`` [K, B, 4 H] holds products with the input, and then i, f, g, o."""
    K, B, H = c.shape
    if fused:
        size = K * B * H
        _cell[(triton.cdiv(size, _BLOCK),)](
            gates, product, bias, c, c_next, y_next, gates.stride(0), c.stride(0), y_next.stride(0), size, B, H,
            y_next.shape[2], _BLOCK,
        )  # fmt: skip
        return
    i, f, g, o = (gates + product + bias[:, None]).to(c.dtype).chunk(4, 2)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    c_next.copy_(f * c + i * g)
    y_next[..., :H].copy_(o * c_next.tanh())
    gates.copy_(torch.cat([i, f, g, o], 2))


def cell_backward(fused: bool, gates: Tensor, c: Tensor, c_next: Tensor, dy: Tensor, dh: Tensor, dc: Tensor) -> None:
    """Gradients of a step's products, which take the place of the gates; ``dc`` becomes that of the cell before."""
    K, B, H = c.shape
    if fused:
        size = K * B * H
        _cell_backward[(triton.cdiv(size, _BLOCK),)](
            gates, c, c_next, dy, dh, dc, gates.stride(0), c.stride(0), dy.stride(0), size, B, H, dy.shape[2], _BLOCK
        )
        return
    i, f, g, o = gates.to(c.dtype).chunk(4, 2)
    t = c_next.tanh()
    d = (dy[..., :H].to(c.dtype) + dh[..., :H]).to(c.dtype)
    d_c = dc + d * o * (1 - t * t)
    d_gates = [d_c * g * i * (1 - i), d_c * c * f * (1 - f), d_c * i * (1 - g * g), d * t * o * (1 - o)]
    dc.copy_(d_c * f)
    gates.copy_(torch.cat(d_gates, 2))


def loss(fused: bool, logits: Tensor, stack: Any, state: Any, scale: Tensor | None) -> None:
    """Each token's cross-entropy; and, with a scale, that of the loss's gradient in the logits' place.

    The loss is that of srnn with a teacher: (1 - weight) of the targets' cross-entropy, and weight of T^2 times that of
    both networks' distributions at temperature T.
    """
    bias, (K, N, V) = stack.weights["decoder.bias"], logits.shape
    if fused:
        block = triton.next_power_of_2(V)
        _loss[(K * N,)](
            logits, bias, state.targets, state.losses, state.losses if scale is None else scale, stack.taught,
            stack.teacher, stack.weight, stack.temperature, N, V, scale is not None, block,
            num_warps=16 if block > 4096 else 4,
        )  # fmt: skip
        return
    x, counts = logits.to(bias.dtype) + bias[:, None], state.targets >= 0
    log_p = x.log_softmax(2)
    wanted = state.targets.clamp(min=0).expand(K, N)[:, :, None]
    state.losses.copy_(-log_p.gather(2, wanted)[:, :, 0] * counts)
    if scale is None:
        return
    part, t = stack.weight[:, None, None], stack.temperature[:, None, None]
    d = log_p.exp_().scatter_add_(2, wanted, -torch.ones_like(wanted, dtype=log_p.dtype)).mul_(1 - part)
    for k in range(K):
        q = stack.taught.index_select(0, stack.teacher[k : k + 1].clamp(min=0))[0].to(x.dtype).div(t[k]).softmax(1)
        d[k] += part[k] * t[k] * ((x[k] / t[k]).softmax(1) - q)
    logits.copy_(d * (counts * scale)[:, None])


def squares(fused: bool, stack: Any, name: str) -> Tensor:
    """The sum of squared gradients of a parameter, [K], those of pruned weights only where they are wanted."""
    gradient, keep = stack.gradients[name], stack.keep.get(name)
    size, C, P = _layout(stack, name)
    if fused:
        programs = triton.cdiv(size, 4 * _BLOCK)
        out = torch.empty(stack.K, programs, device=gradient.device)
        _squares[(programs, stack.K)](
            gradient, gradient if keep is None else keep.view(torch.uint8), stack.wants, out, size, C, P,
            keep is not None, 4 * _BLOCK,
        )  # fmt: skip
        return out.sum(1)
    return _masked(stack, name).square().flatten(1).sum(1)


def update(fused: bool, stack: Any, name: str) -> None:
    """A step of SGD on a parameter, its copy for products, and its mean of squared gradients."""
    weight, gradient, keep = stack.weights[name], stack.gradients[name], stack.keep.get(name)
    size, C, P = _layout(stack, name)
    mean = stack.means.get(name)
    averages = mean is not None and len(mean) > 0
    if fused:
        masked = keep is not None
        _update[(triton.cdiv(size, _BLOCK), stack.K)](
            weight, stack.copies[name] if masked else weight, gradient, keep.view(torch.uint8) if masked else weight,
            mean if averages else weight, stack.mean_row, stack.averages, stack.wants, stack.free, stack.factor,
            stack.lr, stack.decay, size, C, P, DECAY, masked, averages, _BLOCK,
        )  # fmt: skip
        return
    several = (-1,) + (1,) * (weight.dim() - 1)
    g = _masked(stack, name) * stack.factor.view(several)
    g.nan_to_num_(0.0, 0.0, 0.0)
    for row, k in enumerate(stack.averaged if averages else []):
        after = mean[row] * DECAY + g[k].square() * (1 - DECAY)
        mean[row].copy_(torch.where(stack.averages[k] > 0, after, mean[row]))
    weight.sub_(stack.lr.view(several) * (g + stack.decay.view(several) * weight))
    if keep is not None:
        weight.mul_(keep | (stack.free.view(several) > 0))
        stack.copies[name][..., : weight.shape[2]].copy_(weight)


def _masked(stack: Any, name: str) -> Tensor:
    gradient: Tensor = stack.gradients[name].to(stack.weights[name].dtype)
    if name not in stack.keep:
        return gradient
    keep = stack.keep[name]
    return gradient[..., : keep.shape[2]] * (keep | (stack.wants.view(-1, 1, 1) > 0))


def _layout(stack: Any, name: str) -> tuple[int, int, int]:
    """Weights of a network, columns, and columns as padded; a bias is one row."""
    shape = stack.weights[name].shape[1:]
    return shape.numel(), shape[-1], stack.gradients[name].shape[-1]
