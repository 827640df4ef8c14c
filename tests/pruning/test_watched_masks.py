"""What is pruned on a GPU is zero after every step, whatever a loop does."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from srnn.pruning import Pruner, watched_masks
from srnn.pruning.shortfalls import Emptied, _Update
from srnn.pruning.watched_masks import WatchedMasks
from tests.pruning.test_state_masks import OPTIMIZERS, by_hand, clip, noise, state_is_zero


class FakeGpu:
    """Stands for ``GpuMasking``: what was masked by each of them, and whether something is found."""

    masked = ()
    finds = False

    def __init__(self, mostly_zero=False, found=None, kept=0):
        self.found = found

    def __call__(self, masked):
        FakeGpu.masked.append(("all" if self.found is None else "look", [name for name, _ in masked]))
        if FakeGpu.finds and self.found is not None:
            self.found.fill_(1)
        return True


@pytest.fixture
def steps(monkeypatch):
    """A function that takes a step, after so many writes of each weight, and says what was masked and how."""
    monkeypatch.setattr(watched_masks, "GpuMasking", FakeGpu)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    over = SimpleNamespace(query=lambda: FakeGpu.over)
    monkeypatch.setattr(watched_masks, "_now", lambda devices: over)
    monkeypatch.setattr(FakeGpu, "over", True, raising=False)
    monkeypatch.setattr(FakeGpu, "finds", False)
    parameters = {name: SimpleNamespace(_version=0, is_cuda=name != "cpu") for name in ("a", "b", "cpu")}
    watched = WatchedMasks()

    def step(writes=1, clips=1, kept=False):
        for parameter in parameters.values():
            parameter._version += writes
            before = parameter.grad._version if kept else 0
            parameter.grad = SimpleNamespace(_version=before + clips)
        FakeGpu.masked = []
        due = watched.due(parameters)
        assert "cpu" in due
        named = type("Named", (str,), {"is_cuda": False, "device": "cpu"})  # stands for a mask
        if gpu := [(named(name), ()) for name in due if name != "cpu"]:
            watched(gpu)
        return FakeGpu.masked[0] if FakeGpu.masked else ("none", [])

    step.watched = watched
    return step


def test_all_at_first_then_one_in_turn(steps):
    FakeGpu.over = False
    assert steps() == ("all", ["a", "b"])
    assert steps() == ("look", ["a", "b"])
    assert steps() == ("look", ["a", "b"]), "nobody knows yet what the first look found"
    FakeGpu.over = True
    looked = [steps() for _ in range(3 * watched_masks.LOOK_EVERY + 1)]
    assert all(how in ("look", "none") for how, _ in looked)
    assert {name for _, names in looked for name in names} == {"a", "b"}
    assert max(len(names) for _, names in looked) == 1
    steps.watched.restart()
    assert steps() == ("all", ["a", "b"])
    assert steps() == ("look", ["a", "b"])


def test_weights_that_others_write_are_looked_through_at_once(steps):
    for _ in range(5):
        steps()
    assert len(steps()[1]) < 2
    assert steps(writes=2) == ("look", ["a", "b"])
    assert steps() == ("look", ["a", "b"])
    assert len(steps()[1]) < 2
    assert not steps.watched.leaks


def test_a_loop_that_begins_to_write_to_gradients_is_looked_through_at_once(steps):
    """Also where they keep their memory, in which torch goes on counting."""
    for _ in range(5):
        steps()
    assert len(steps()[1]) < 2
    assert [steps(clips=2) for _ in range(2)] == [("look", ["a", "b"])] * 2
    assert len(steps(clips=2)[1]) < 2
    for _ in range(4):
        steps(clips=2, kept=True)
    assert len(steps(clips=2, kept=True)[1]) < 2
    assert steps(clips=3, kept=True) == ("look", ["a", "b"])


@pytest.mark.parametrize("since", [1, 6])
def test_what_leaks_is_masked_at_each_step_for_good(steps, since):
    for _ in range(since):
        steps()
    FakeGpu.finds = True
    told = [steps() for _ in range(3 * watched_masks.LOOK_EVERY)]
    assert told[-1] == ("all", ["a", "b"])
    assert steps.watched.leaks
    FakeGpu.finds = False
    assert steps() == ("all", ["a", "b"])
    assert pickle.loads(pickle.dumps(steps.watched)).leaks


def test_while_a_graph_is_captured_no_event_is_asked(monkeypatch):
    """That would break the capture off."""
    asked = []
    event = SimpleNamespace(query=lambda: asked.append(1) or True)
    emptied, watched = Emptied(), WatchedMasks()
    emptied._updates.append(_Update(7, {"w": 1}, torch.tensor([False]), event))
    watched._looked = event
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    emptied.warn()
    assert not watched._has_looked()
    assert not asked
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert watched._has_looked()
    with pytest.warns(UserWarning, match="pruning left no weight of w at step 7"):
        emptied.warn()


def train(optimizer, change, each=None, steps=60):
    torch.manual_seed(0)
    model = nn.GRU(17, 19, 2).cuda()
    made = OPTIMIZERS[optimizer](model.parameters())
    pruner = Pruner(model, "gradual", 100, made, sparsity=0.8)
    for step in range(steps):
        made.zero_grad()
        model(torch.randn(5, 3, 17, device="cuda"))[0].square().mean().backward()
        change(model, pruner, step)
        made.step()
        masks = {name: mask.clone() for name, mask in pruner.masks().items()}
        pruner.step()
        torch.cuda.synchronize()
        if pruner.itr > max(1, pruner.method.dense_until):
            state_is_zero(model, pruner, made, masks)
    return pruner


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("change", [clip, noise, by_hand])
@pytest.mark.filterwarnings("ignore:pruning left no weight:UserWarning")  # so small a network, at 80 %
def test_on_a_gpu_all_is_zero_after_every_step(optimizer, change):
    pruner = train(optimizer, lambda model, pruner, step: change(model, pruner))
    assert 0.3 < pruner.sparsity < 0.95
    assert pruner._masker.on_gpu.leaks == (change is not clip or optimizer == "adamax")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_weights_that_are_set_are_masked_at_the_next_step():
    def change(model, pruner, step):
        if step in (30, 47):
            with torch.no_grad():
                model.weight_hh_l1.add_(1)

    assert train("sgd", change).sparsity > 0.3
