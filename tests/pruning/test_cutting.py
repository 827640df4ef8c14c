"""Masks and thresholds that a GPU finds by itself, against sorting; in Triton's interpreter, or on a GPU."""

import math
import random

import numpy as np
import pytest
import torch
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner
from srnn.pruning.cutting import Cut, GpuCut, UnitRow
from srnn.pruning.scores import RankedBy
from tests.kernels.triton_cases import DEVICE, here, on_gpu


def by_sorting(scores, keep, cut, before):
    """The masks and the threshold of scores on the CPU."""
    ordered, before = sorted(scores.tolist()), float(before)
    if cut.share is not None:
        q = ordered[cut.rank(len(scores)) - 1]
        epsilon = max(before, q * cut.factor) if math.isfinite(q) else before
        kept = scores.numpy() >= np.float32(epsilon)
        if kept.sum() >= keep:
            return torch.from_numpy(kept), epsilon
    largest = sorted(range(len(scores)), key=lambda place: -scores[place].item())  # stable: earlier ones of equals
    kept = torch.zeros(len(scores), dtype=torch.bool)
    kept[largest[:keep]] = True
    boundary = ordered[len(scores) - keep]
    return kept, max(before if cut.rising else 0.0, boundary) if math.isfinite(boundary) else before


def numbers(draw, size):
    """At random, of several sizes, with equals, or all zero."""
    generator = torch.Generator().manual_seed(draw.randrange(1 << 30))
    values = torch.randn(size, generator=generator) * draw.choice([1, 1, 1e-4, 1e4])
    return {0: (2 * values).round() / 2, 1: values * 0}.get(draw.randrange(5), values)


def drawn(draw, units):
    share = None if draw.random() < 0.4 else draw.random()
    return Cut(draw.randrange(units), share, 1.5 * draw.random(), draw.random() < 0.5)


@pytest.mark.gpu
@here
@pytest.mark.parametrize("by_moments", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_a_cut_of_weights_is_that_of_sorting(seed, by_moments):
    draw = random.Random(seed)
    sizes = [draw.choice([1, 7, 300, 4096, 9000]) for _ in range(draw.choice([1, 2, 3]))]
    weights = [numbers(draw, size) for size in sizes]
    masks = [torch.rand(size) > draw.choice([0, 0.3, 0.9]) for size in sizes]
    on_device = [weight.to(DEVICE) for weight in weights]
    moments = [numbers(draw, size).square() if by_moments else None for size in sizes]
    moments_there = [None if moment is None else moment.to(DEVICE) for moment in moments]
    cuts, before, soft = GpuCut(), 0.0, seed % 3 == 0
    ranked_by = RankedBy.SALIENCIES if by_moments else RankedBy.MAGNITUDES
    for again in range(4):  # from the third time on a GPU replays it
        cut = drawn(draw, sum(sizes))
        keep = sum(sizes) - cut.zeros
        scores = torch.cat(weights).abs()
        if by_moments:
            scores *= torch.from_numpy(np.sqrt(np.sqrt(torch.cat(moments).numpy())))  # torch's are not rounded alike
        if not soft:
            scores[~torch.cat(masks)] = -1
        wanted, epsilon = by_sorting(scores, keep, cut, before)
        if again == 0:
            outs = [mask.to(DEVICE) for mask in masks]
        owns = [None] * len(outs) if soft else outs
        rows = [UnitRow(*row) for row in zip(on_device, owns, outs, moments_there, strict=True)]
        found = cuts(rows, ranked_by, keep, cut, before)
        assert torch.cat(outs).cpu().equal(wanted)
        assert float(found) == epsilon
        assert not cuts.met_unrankable
        masks, before = [out.cpu() for out in outs], found if again % 2 else epsilon
    on_device[-1][-1] = draw.choice([math.nan, math.inf, -math.inf])
    outs[-1][-1] = True
    cuts(rows, ranked_by, 1, Cut(sum(sizes) - 1), 0.0)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert cuts.met_unrankable
    cuts.forget_unrankable()
    assert not cuts.met_unrankable


@pytest.mark.gpu
@here
@pytest.mark.parametrize("seed", range(4))
def test_a_cut_of_scores_is_that_of_sorting(seed):
    """Some are infinite, of what has to stay, and -1, of what is pruned; -0.0 is a zero."""
    draw = random.Random(seed)
    scores = numbers(draw, draw.choice([1, 300, 4097, 9000])).abs()
    scores[torch.rand(len(scores)) < draw.choice([0, 0.5])] = -1
    scores[torch.rand(len(scores)) < draw.choice([0, 0.1, 0.9])] = math.inf
    scores[torch.rand(len(scores)) < 0.1] = -0.0
    keep = torch.empty(len(scores), dtype=torch.bool, device=DEVICE)
    for _ in range(3):
        cut, before = drawn(draw, len(scores)), draw.random()
        wanted, epsilon = by_sorting(scores, len(scores) - cut.zeros, cut, before)
        row = UnitRow(scores.to(DEVICE), None, keep.fill_(False), None)
        found = GpuCut()([row], RankedBy.SCORES, len(scores) - cut.zeros, cut, before)
        assert keep.cpu().equal(wanted)
        assert float(found) == epsilon


def test_a_score_that_cannot_be_ranked_is_told_though_another_cut_comes_first():
    """The host may be several cuts ahead of a GPU."""
    cuts = GpuCut()
    cuts.note_unrankable(torch.tensor([0.0, torch.nan]))
    cuts.note_unrankable(torch.ones(2))
    assert cuts.met_unrankable
    cuts.forget_unrankable()
    cuts.note_unrankable(torch.ones(2))
    assert not cuts.met_unrankable, "it is told once"


@pytest.mark.gpu
@here
def test_a_share_that_is_pruned_already_gives_no_threshold_below_zero():
    scores = torch.full((300,), -1.0)
    scores[:100] = 1.0
    keep = torch.empty(300, dtype=torch.bool, device=DEVICE)
    row = UnitRow(scores.to(DEVICE), None, keep, None)
    found = GpuCut()([row], RankedBy.SCORES, 1, Cut(299, 0.5, 0.0), 0.0)
    assert math.copysign(1, float(found)) == 1
    assert keep.cpu().equal(scores > 0)


@pytest.mark.gpu
@here
def test_one_weight_stays_whatever_is_asked_for(monkeypatch):
    group = Pruner(nn.LSTM(8, 16).to(DEVICE), "cubic", 60).groups[0]
    if DEVICE.type == "cpu":
        rows = [UnitRow(p.of(p.parameter.detach()), p.of(p.mask), p.of(p.mask), None) for p in group.parts]
        monkeypatch.setattr(group, "_plain_rows", lambda: rows)
    largest = max(float(part.parameter.detach().abs().max()) for part in group.parts)
    group.prune_to(group.size)
    assert group.size - group.pruned == 1
    assert group.epsilon == largest


@pytest.mark.gpu
@here
def test_what_obd_ranks_by_is_the_same_to_the_bit_in_kernels_and_in_torch():
    torch.manual_seed(0)
    layer = nn.Linear(30, 20)
    group = Pruner(layer, "obd", 60, sparsity=0.9).groups[0]
    moment = torch.rand(20, 30)
    group.importance.moments = {"weight": moment}
    scores = group.importance(group.pieces[0]).flatten()
    keep = torch.empty(600, dtype=torch.bool, device=DEVICE)
    row = UnitRow(layer.weight.detach().flatten().to(DEVICE), None, keep, moment.flatten().to(DEVICE))
    cuts, ordered = GpuCut(), scores.sort().values
    for k in range(5, 600, 15):
        assert float(cuts([row], RankedBy.SALIENCIES, 600 - k, Cut(k), 0.0)) == float(ordered[k])


def trained(device, method, structure, soft=False, steps=60):
    torch.manual_seed(0)
    model = nn.LSTM(48, 64, 2).to(device)
    options = {"soft": True} if soft else {}
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, method, steps, optimizer, sparsity=0.8, structure=structure, **options)
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(steps):
        for parameter in model.parameters():  # alike on both devices, which training would not be
            parameter.data.add_(0.02 * torch.randn(parameter.shape, generator=generator).to(device))
            parameter.grad = torch.ones_like(parameter)
            optimizer.state[parameter] = {"exp_avg_sq": torch.full_like(parameter, 0.5)}
        if pruner.step():
            found.append((pruner.sparsity, pruner.thresholds, {n: m.cpu().clone() for n, m in pruner.masks().items()}))
    pruner.finalize()
    return found


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("structure", ["element", "16x1", "12x1"])
@pytest.mark.parametrize(("method", "soft"), [("gradual", False), ("gradual", True), ("cubic", False), ("obd", False)])
def test_on_a_gpu_pruning_is_that_of_a_cpu(method, soft, structure):
    wanted, found = trained("cpu", method, structure, soft), trained("cuda", method, structure, soft)
    assert len(wanted) == len(found) > 5
    for (sparsity, thresholds, masks), (share, epsilons, theirs) in zip(wanted, found, strict=True):
        assert share == sparsity
        assert all(theirs[name].equal(mask) for name, mask in masks.items())
        assert epsilons == pytest.approx(thresholds, rel=1e-6)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("structure", ["element", "16x1"])
def test_on_a_gpu_an_update_is_launched_and_not_awaited(structure):
    """Behind a kernel that takes a second: all of an update comes back before it is over."""
    model = nn.LSTM(48, 64, 2).cuda()
    pruner = Pruner(model, "gradual", 60, sparsity=0.8, structure=structure)
    updates = 0
    for _ in range(60):
        torch.cuda.synchronize()
        update = pruner.method.is_update(pruner.itr + 1)
        if update and updates > 3:
            torch.cuda._sleep(2_000_000_000)
            over = torch.cuda.Event()
            over.record()
        pruner.step()
        if update and updates > 3:
            assert not over.query()
        updates += update
    assert updates > 5


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("structure", ["element", "16x1"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_on_a_gpu_what_has_diverged_is_told_at_the_next_step(value, structure):
    model = nn.LSTM(48, 64, 2).cuda()
    pruner = Pruner(model, "gradual", 60, sparsity=0.8, structure=structure)
    pruner.itr = pruner.method.updates[0] - 1
    with torch.no_grad():
        model.weight_hh_l1[7, 3] = value
    pruner.step()
    torch.cuda.synchronize()
    with pytest.raises(UserError, match="weight_hh_l1 holds weights that are NaN or infinite"):
        pruner.step()


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_what_has_diverged_is_told_of_weights_on_several_devices():
    layers = nn.ModuleList([nn.GRU(32, 32).cuda(), nn.GRU(32, 32)])
    pruner = Pruner(layers, "cubic", 60, sparsity=0.8, share="global")
    pruner.itr = pruner.method.updates[1] - 1
    with torch.no_grad():
        layers[0].weight_hh_l0[7, 3] = math.nan
    pruner.step()
    torch.cuda.synchronize()
    with pytest.raises(UserError, match="weight_hh_l0 holds weights that are NaN or infinite"):
        pruner.step()
