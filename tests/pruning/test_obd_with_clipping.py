"""``pruning=obd`` beside SGD, where clipping takes gradients into its means: each step once, and as SGD sees them."""

import copy
import itertools

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from srnn import PruningCallback
from srnn.pruning import Pruner, callback, clipping, mean_squares
from srnn.pruning.methods.obd import OBD
from tests.kernels.triton_cases import DEVICE, INTERPRETED, here, on_gpu

SGD = torch.optim.SGD
LAST = 8  # of the steps in which means are kept
TAKEN = "o" + "c" * (LAST - 1)  # before the first step there are no means yet


class Loop:
    """A network that trains on drawn gradients, and what its means, masks and weights were after each step."""

    def __init__(self, make=None, clips=1.0, sizes=(9, 8, 7), device="cpu", **options):
        self.random = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        layers = [nn.Linear(*two) for two in itertools.pairwise(sizes)]
        self.network, self.max_norm, self.device = nn.ModuleList(layers).to(device), clips, device
        made = (make or (lambda network: SGD(network.parameters(), lr=0.1, momentum=0.9)))(self.network)
        self.optimizers = made if isinstance(made, list) else [made]
        options = {"sparsity": 0.75, "start_itr": 1, "end_itr": LAST, "freq": 1} | options
        self.pruner = Pruner(self.network, "obd", 40, self.optimizers, **options)
        self.clipping, self.history = self.pruner.clips(), []

    def zero(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def backward(self):
        for parameter in self.network.parameters():
            gradient = torch.randn(parameter.shape, generator=self.random).to(self.device)
            parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def clip(self, *more):
        self.clipping([*self.network.parameters(), *more], self.max_norm)

    def step(self, skips=False):
        for optimizer in [] if skips else self.optimizers:
            optimizer.step()
        self.pruner.step()
        means = self.pruner.method.state_dict()
        assert len(means) == (0 if self.pruner.itr >= self.pruner.method.done_from or not self.kept() else 2)
        tensors = [*means.values(), *self.pruner.masks().values(), *self.network.parameters()]
        self.history.append([tensor.detach().cpu().clone() for tensor in tensors])

    def kept(self):
        return not any("exp_avg_sq" in state for each in self.optimizers for state in each.state.values())

    def plain(self, count=LAST + 2):
        for _ in range(count):
            self.zero(), self.backward(), self.clip(), self.step()


def clip_in_torch(self, gradients, max_norm, means=()):
    """What ``GpuClipping`` does, on a CPU."""
    several = [gradient if mask is None else gradient.masked_fill_(~mask, 0) for gradient, mask in gradients]
    norm = nn.utils.get_total_norm(several)
    torch._foreach_mul_(several, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    taken = {str(place): mean for place, mean in enumerate(means) if mean is not None}
    there = {name: several[int(name)] for name in taken}
    mean_squares.MeanSquares(mean_squares.DECAY)(taken, there, [norm.isfinite()] if taken else [])


def recorded(patch, serves):
    """How steps come into means from now on: ``c`` in clipping, ``o`` in a pass of obd's own."""
    seen, own, asked = [], OBD._with_this_step, OBD.means_to_take_in

    def by_itself(method, *given):
        means = own(method, *given)
        seen.extend("o" if means else "")
        return means

    def by_clipping(method, *given):
        means = asked(method, *given) if serves else {}
        seen.extend("c" if means else "")
        return means

    patch.setattr(OBD, "_with_this_step", by_itself)
    patch.setattr(OBD, "means_to_take_in", by_clipping)
    return seen


def on_a_cpu(patch):
    """Let clipping take over there."""
    patch.setattr(clipping, "can_clip", bool)
    patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def compared(monkeypatch, train, *given, kernels=False, **options):
    """How steps were taken in; where clipping may take none, all else is the same to the bit."""
    histories = []
    for serves in (False, True):
        with monkeypatch.context() as patch:
            if not kernels or INTERPRETED:
                on_a_cpu(patch)
            if kernels and INTERPRETED:
                patch.setattr(mean_squares, "_lie_alike", lambda *_: True)
            elif not kernels:
                patch.setattr(clipping.GpuClipping, "__call__", clip_in_torch)
            seen, loop = recorded(patch, serves), Loop(*given, **options)
            train(loop)
            assert serves or "c" not in seen
            histories.append(loop.history)
    for apart, served in zip(*histories, strict=True):
        for one, other in zip(apart, served, strict=True):
            assert torch.equal(one, other)
    return "".join(seen)


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "dampening": 0.1}, {"weight_decay": 0.1, "maximize": True}, {"foreach": True},
     {"fused": True}, {"momentum": 0.9, "nesterov": True, "fused": True}],
    ids=str,
)  # fmt: skip
def test_beside_one_sgd_clipping_takes_in_each_step(monkeypatch, options):
    def make(network):
        return SGD(network.parameters(), **{"lr": 0.1} | options)

    assert compared(monkeypatch, Loop.plain, make) == TAKEN
    assert compared(monkeypatch, Loop.plain, make, clips=1e9, start_itr=3) == "ooo" + "c" * (LAST - 3)


class OwnSGD(SGD):
    pass


NESTEROV = {"momentum": 0.9, "nesterov": True}


@pytest.mark.parametrize(
    "make",
    [
        lambda network: SGD(network.parameters(), lr=0.1, foreach=True, **NESTEROV),  # writes to gradients
        lambda network: SGD([{"params": network[0].parameters()}, {"params": network[1].parameters()} | NESTEROV], 0.1),
        lambda network: [SGD(layer.parameters(), lr=0.1) for layer in network],
        lambda network: OwnSGD(network.parameters(), lr=0.1),
        lambda network: torch.optim.RMSprop(network.parameters(), lr=0.01),
    ],
    ids=["nesterov", "nesterov of some", "two", "a subclass", "rmsprop"],
)
def test_beside_others_obd_takes_in_each_step_itself(monkeypatch, make):
    assert compared(monkeypatch, Loop.plain, make) == "o" * LAST


def test_beside_adam_nobody_does(monkeypatch):
    assert compared(monkeypatch, Loop.plain, lambda network: torch.optim.Adam(network.parameters())) == ""


def double(optimizer, *_):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.mul_(2)


@pytest.mark.parametrize("everywhere", [False, True])
def test_what_hooks_of_the_optimizer_write_is_taken_in(monkeypatch, everywhere):
    def train(loop):
        loop.plain(3)
        register = register_optimizer_step_pre_hook if everywhere else loop.optimizers[0].register_step_pre_hook
        hook = register(double)
        try:
            loop.plain(2)
        finally:
            hook.remove()
        loop.plain(LAST - 5)

    assert compared(monkeypatch, train) == "occ" + "oo" + "ccc"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["0.weight", "1.bias"])
def test_a_step_without_finite_gradients_is_passed_over(monkeypatch, where, bad):
    def train(loop):
        for step in range(LAST):
            loop.zero(), loop.backward()
            if skips := step in (2, 3, 5):
                gradient = loop.network.get_parameter(where).grad
                kept = loop.pruner.masks().get(where, torch.ones_like(gradient, dtype=torch.bool)).nonzero()[0]
                gradient[tuple(kept)] = bad
            before = loop.pruner.method.state_dict()
            loop.clip(), loop.step(skips)
            after = loop.pruner.method.state_dict()
            assert all(torch.equal(before[name], mean) == skips for name, mean in after.items() if before)

    assert compared(monkeypatch, train) == TAKEN


def test_gradients_that_are_added_up_are_one_step(monkeypatch):
    def train(loop):
        for _ in range(LAST):
            loop.zero(), loop.backward(), loop.backward(), loop.clip(), loop.step()

    assert compared(monkeypatch, train) == TAKEN


def test_a_branch_that_was_not_taken_counts_as_zeros(monkeypatch):
    def train(loop):
        for step in range(LAST):
            loop.zero(), loop.backward()
            if step in (2, 5):
                loop.network[1].weight.grad = None
            if step in (3, 5):
                loop.network[0].bias.grad = None  # which has no mean
            loop.clip(), loop.step()

    assert compared(monkeypatch, train) == "oc" + "oc" + "co" + "cc"


def test_a_loop_that_does_not_clip_once_a_step(monkeypatch):
    def train(loop):
        for step in range(LAST):
            loop.zero(), loop.backward()
            for _ in range({2: 0, 4: 2}.get(step, 1)):
                loop.clip()
            loop.step()

    assert compared(monkeypatch, train, clips=1e9) == "oc" + "o" + "ccccc"


def test_what_is_clipped_has_to_be_what_is_trained(monkeypatch):
    """Else nobody knows whether all that is trained is finite."""
    other = nn.Parameter(torch.zeros(3))

    def train(loop):
        for step in range(LAST):
            loop.zero(), loop.backward()
            other.grad = torch.full((3,), 0.0 if step == 3 else torch.nan) if step in (2, 3) else None
            if step in (4, 5):
                loop.network[1].bias.grad.mul_(torch.inf if step == 4 else 1)
                loop.clipping([*loop.network.parameters()][:3], loop.max_norm)
            else:
                loop.clip(other)
            loop.step(skips=step in (2, 4))

    assert compared(monkeypatch, train) == "oc" + "oo" + "oo" + "cc"


def test_a_graph_that_clips_is_told_no_means(monkeypatch):
    def train(loop):
        for step in range(LAST):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: step in (2, 3))  # noqa: B023
                loop.plain(1)

    assert compared(monkeypatch, train) == "oc" + "oo" + "cccc"


@pytest.mark.parametrize(
    "change", [lambda mean: mean.t().contiguous().t(), lambda mean: mean.to("meta"), lambda mean: mean[1:]]
)
def test_means_that_lie_otherwise_are_none_of_clippings(change):
    loop = Loop()
    loop.plain(2)
    method, given = loop.pruner.method, [*loop.network.parameters()]
    method._own["0.weight"] = change(method._own["0.weight"])
    assert not method.means_to_take_in(loop.pruner, given)
    assert method._taken_in == loop.pruner.itr


@pytest.mark.parametrize("done", [0, 5])
def test_a_resumed_run_goes_on_to_the_bit(monkeypatch, done):
    """Also where what is loaded into is a step ahead."""
    on_a_cpu(monkeypatch)
    monkeypatch.setattr(clipping.GpuClipping, "__call__", clip_in_torch)
    seen, loop, other = recorded(monkeypatch, serves=True), Loop(), Loop()
    loop.plain(4), other.plain(done)
    for one, two in [
        (loop.pruner, other.pruner),
        (loop.network, other.network),
        (loop.optimizers[0], other.optimizers[0]),
    ]:
        two.load_state_dict(copy.deepcopy(one.state_dict()))
    other.random.set_state(loop.random.get_state())
    seen.clear()
    loop.plain(), other.plain()
    assert "".join(seen) == "c" * (LAST - 4) + "o" + "c" * (LAST - 5)
    for before, after in zip(loop.history[4:], other.history[done:], strict=True):
        assert all(map(torch.equal, before, after))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_means_of_a_state_are_fp32_from_then_on(dtype):
    """Kernels know no other type."""
    state = {"0.weight": torch.ones(8, 9, dtype=dtype)}
    method = Loop().pruner.method
    method.load_state_dict(state)
    assert method._own["0.weight"].dtype == torch.float32
    method._own["0.weight"].zero_()
    assert state["0.weight"].all(), "the file's own stays as it is"


@pytest.mark.gpu
@here
@pytest.mark.parametrize(
    ("options", "clips"),
    [({}, 1e6), ({"fused": True} | NESTEROV, 0.5), ({"foreach": True} | NESTEROV, 0.5)],
    ids=["plain", "fused", "foreach"],
)
def test_means_of_squares_are_to_the_bit_those_of_obds_own_pass(monkeypatch, options, clips):
    """In the kernels; gradients move in memory at first, and then lie still until launches are recorded."""

    def train(loop):
        for step in range(14):
            loop.zero(set_to_none=step < 5), loop.backward()
            if skips := step == 8:
                loop.network[0].bias.grad[1] = torch.nan
            loop.clip(), loop.step(skips)

    def make(network):
        return SGD(network.parameters(), **{"lr": 0.1, "momentum": 0.9} | options)

    seen = compared(monkeypatch, train, make, clips, (70, 65, 3), DEVICE, kernels=True, end_itr=13)
    assert seen == ("o" * 13 if "foreach" in options else "o" + "c" * 12)


class Copying(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(17, 80), nn.Tanh(), nn.Linear(80, 17))

    def training_step(self, batch, _):
        return (self.layers(batch) - batch).square().mean()

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=0.5, momentum=0.9)


def fitted(accelerator, **options):
    """The masks of a Trainer's run of 20 batches in two epochs, and its weights."""
    torch.manual_seed(0)
    module, pruning = Copying(), PruningCallback("obd", sparsity=0.8, start_itr=2, end_itr=9, freq=1)
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=2, callbacks=[pruning], logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(40, 17), batch_size=4))
    return [*pruning.pruner.masks().values(), *module.parameters()]


@pytest.mark.parametrize("batches", [1, 2])
def test_in_a_trainer_each_optimizer_step_is_taken_in_once(monkeypatch, batches):
    on_a_cpu(monkeypatch)
    monkeypatch.setattr(callback, "_only_clips", lambda *_: True)
    monkeypatch.setattr(clipping.GpuClipping, "__call__", clip_in_torch)
    seen, results = [], []
    for serves in (False, True):
        with monkeypatch.context() as patch:
            seen = recorded(patch, serves)
            results.append(fitted("cpu", gradient_clip_val=0.1, accumulate_grad_batches=batches))
    assert "".join(seen) == "oo" + "c" * 7
    assert all(map(torch.equal, *results))


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
@pytest.mark.parametrize("clip", [{"gradient_clip_val": 0.1}, {"gradient_clip_val": 1.0,
                                  "gradient_clip_algorithm": "value"}, {}], ids=str)  # fmt: skip
def test_on_a_gpu_a_trainer_ends_with_the_same_masks_and_weights(monkeypatch, clip, options):
    results, seen = [], []
    for serves in (False, True):
        with monkeypatch.context() as patch:
            seen = recorded(patch, serves)
            results.append(fitted("gpu", **clip, **options))
    by_norm = clip == {"gradient_clip_val": 0.1}
    assert "".join(seen) == ("oo" + "c" * 7 if by_norm else "o" * 9)
    assert all(map(torch.equal, *results))
