"""The ways of a GPU to rank, run on a CPU: they find what the ways of a CPU do."""

import pytest
import torch
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Pruner, ranking
from srnn.pruning.groups import Group
from srnn.pruning.ranking import Ranking


def masks_of(monkeypatch, as_on_gpu, scores, zeros, soft, plain=False, sort=True):
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
            patch.setattr(Group, "_is_plain", lambda self: plain)
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
    for plain, sort in ((False, False), (True, True)):
        got, theirs = masks_of(monkeypatch, True, scores, zeros, soft, plain, sort)
        assert theirs == thresholds
        assert all(got[name].equal(wanted[name]) for name in wanted)
        assert sum(int(mask.sum()) for mask in got.values()) == size - round(zeros * size)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scores_of_all_refuse_what_has_diverged(monkeypatch, value):
    monkeypatch.setattr(Group, "_is_plain", lambda self: True)
    model = nn.GRU(30, 40, 2)
    pruner = Pruner(model, "gradual", 100)
    with torch.no_grad():
        model.weight_hh_l1[7, 3] = value
    pruner.itr = pruner.method.updates[0] - 1
    with pytest.raises(UserError, match="weight_hh_l1 holds weights that are NaN or infinite"):
        pruner.step()
