"""The ways of a GPU to rank, run on a CPU: they find what the ways of a CPU do."""

import pytest
import torch
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner, ranking
from srnn.pruning.methods.cubic import Cubic
from srnn.pruning.ranking import Ranking
from tests.kernels.triton_cases import on_gpu


def masks_of(monkeypatch, as_on_gpu, scores, zeros, soft, sort=True):
    def like_on_gpu(self, *arguments):
        made(self, *arguments)
        self._on_gpu, self._together = True, torch.cat(self._held)
        self._held = list(self._together.split([len(one) for one in self._held]))

    made = Ranking.__init__
    torch.manual_seed(0)
    model = nn.GRU(30, 40, 2)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(index)
            parameter.copy_(scores(torch.randn(parameter.shape, generator=generator)))
    with monkeypatch.context() as patch:
        if as_on_gpu:
            patch.setattr(Ranking, "__init__", like_on_gpu)
            patch.setattr(ranking, "_SORTED", ranking._SORTED if sort else -1)
        pruner = Pruner(model, "gradual", 100, sparsity=zeros, soft=soft)
        for _ in range(100):
            pruner.step()
    return pruner.masks(), pruner.thresholds


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("zeros", [0.5, 0.93])
@pytest.mark.parametrize(
    "scores", [lambda w: w, lambda w: (4 * w).round() / 4, torch.zeros_like], ids=["numbers", "equals", "zeros"]
)
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_masks_and_thresholds_are_those_of_a_cpu(monkeypatch, scores, zeros, soft):
    wanted, thresholds = masks_of(monkeypatch, False, scores, zeros, soft)
    size = sum(mask.numel() for mask in wanted.values())
    for sort in (False, True):
        got, theirs = masks_of(monkeypatch, True, scores, zeros, soft, sort)
        assert theirs == thresholds
        assert all(got[name].equal(wanted[name]) for name in wanted)
        assert sum(int(mask.sum()) for mask in got.values()) == size - round(zeros * size)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("values", ["numbers", "equals", "pruned", "zeros"])
def test_on_a_gpu_masks_and_thresholds_are_those_of_a_cpu(values):
    """Of many units, and with fewer left than are to go."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(700, 900, generator=generator)
    if values == "equals":
        weights = (4 * weights).round() / 4
    if values == "zeros":
        weights[:, 1:] = 0
    found = []
    for device in ("cpu", "cuda"):
        model = nn.Linear(900, 700)
        with torch.no_grad():
            model.weight.copy_(weights)
        pruner = Pruner(model.to(device), "gradual", 100, sparsity=0.9)
        (group,) = pruner.groups
        if values == "pruned":
            group.prune_to(500_000)
        ranking = group.ranking()
        ks = (1, 100_000, 315_000, 567_001, 630_000)
        numbers = [ranking.kth_smallest(k) for k in ks]
        numbers += [ranking.count_at_least(number) for number in numbers if number >= 0]
        numbers += [ranking.count_at_least(0.3), ranking.keep_largest(63_000)]
        found.append((numbers, group.parts[0].mask.cpu().clone()))
    assert found[0][0] == found[1][0]
    assert found[0][1].equal(found[1][1])
    assert int(found[0][1].sum()) == 63_000


class ByImportance(Cubic):
    """Ranks by what a test says."""

    of = staticmethod(torch.abs)

    def importance(self, piece):
        return self.of(piece.weight)


def importance_of(of):
    method = ByImportance(sparsity=0.5)
    method.of = of
    (group,) = Pruner(nn.Linear(8, 8), method, 100).groups
    return group


@pytest.mark.parametrize("soft", [False, True])
def test_zeros_with_a_sign_are_zeros(soft):
    """Their bits, by which scores are ranked on a GPU, are those of a large negative integer."""
    group = importance_of(lambda weight: torch.where(weight > 0, weight, -0.0))
    group.soft = soft
    for ranked in (group.ranking(), group.ranking(lambda piece: torch.full((64,), -0.0))):
        assert not any(scores.signbit().any() for _, scores in ranked)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -1.0])
def test_a_plug_in_that_cannot_be_ranked_by_is_named(value):
    group = importance_of(lambda weight: weight.abs().index_fill(2, torch.tensor([3]), value))
    with pytest.raises(UserError, match=rf"ByImportance\.importance gives {value:g} for a weight of weight: .* finite"):
        group.prune_to(32)
    if value != torch.inf:  # which stands for what must stay
        with pytest.raises(UserError, match="scores of weight are negative or NaN"):
            group.ranking(lambda piece: torch.full((64,), value))
    with pytest.raises(UserError, match=r"importance gives \[8\] numbers for \[1, 8, 8\] weights of weight"):
        importance_of(lambda weight: weight[0, 0]).prune_to(32)


def test_a_training_that_has_diverged_is_no_fault_of_the_plug_in():
    group = importance_of(torch.abs)
    with torch.no_grad():
        group.parts[0].parameter[0, 0] = torch.nan
    with pytest.raises(UserError, match="weight holds weights that are NaN or infinite"):
        group.prune_to(32)
