"""The ways of a GPU to rank, run on a CPU: they find what the ways of a CPU do."""

import pytest
import torch
from torch import nn

from srnn.pruning import Pruner, ranking
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
