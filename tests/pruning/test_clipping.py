"""Clipping that masks: its kernels, on a GPU or in Triton's interpreter (``tests/kernels/test_triton.py``), and where
it takes the place of Lightning's own."""

import math
from types import SimpleNamespace

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import DoublePrecision, MixedPrecision, Precision
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import nn

from srnn import PruningCallback
from srnn.pruning import Pruner, callback, clipping
from tests.kernels.triton_cases import DEVICE, here, on_gpu

SHAPES = [(70, 100), (5,), (4097,), (0, 3), (1,), (3, 8, 5)]  # less than a program's, more, and nothing


def gradients(seed=0, scale=1.0):
    """Some with masks and some without; what is pruned is NaN, and what is kept has numbers near zero."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for place, shape in enumerate(SHAPES):
        gradient = scale * torch.randn(shape, generator=generator)
        mask = torch.rand(shape, generator=generator) < 0.3 if place % 2 == 0 else None
        gradient.view(-1)[:2] = 1e-40  # no normal number
        if mask is not None:
            gradient[~mask] = torch.nan
        made.append((gradient.to(DEVICE), None if mask is None else mask.to(DEVICE)))
    return made


def in_float64(made, max_norm):
    """The norm, and what is left, by the book."""
    kept = [g.double() if mask is None else g.double().masked_fill(~mask, 0) for g, mask in made]
    norm = math.sqrt(sum(float(one.square().sum()) for one in kept))
    return norm, [one * min(1.0, max_norm / (norm + 1e-6)) for one in kept]


@pytest.mark.gpu
@here
@pytest.mark.parametrize("max_norm", [1e6, 0.5])
def test_the_norm_is_of_what_is_kept_and_the_rest_is_zero(max_norm):
    from srnn.pruning.clipping import GpuClipping

    clipping, made = GpuClipping(), []
    for turn in range(5):  # with new addresses, then with the same ones until they are recorded
        made = gradients(turn) if turn < 2 else made
        before = [gradient.clone() for gradient, _ in made]
        norm, wanted = in_float64(made, max_norm)
        assert float(clipping(made, max_norm)) == pytest.approx(norm, rel=1e-6)
        for (gradient, mask), old, truth in zip(made, before, wanted, strict=True):
            torch.testing.assert_close(gradient.double(), truth, rtol=1e-6, atol=1e-44)
            if max_norm > norm:  # to the bit: numbers near zero too, and zeros without a sign
                masked = old if mask is None else old.masked_fill(~mask, 0)
                assert gradient.view(torch.int32).equal(masked.view(torch.int32))
            gradient.copy_(old)


@pytest.mark.gpu
@here
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_kept_and_no_number_spoils_all_as_in_torch(bad):
    from srnn.pruning.clipping import GpuClipping

    made = gradients()
    made[1][0][2] = bad
    wanted = [(g if mask is None else g.masked_fill(~mask, 0)).clone().requires_grad_() for g, mask in made]
    for one in wanted:
        one.grad = one.detach().clone()
    norm = torch.nn.utils.clip_grad_norm_(wanted, 1.0)
    torch.testing.assert_close(GpuClipping()(made, 1.0), norm, equal_nan=True)
    for (gradient, mask), one in zip(made, wanted, strict=True):
        kept = slice(None) if mask is None else mask
        torch.testing.assert_close(gradient[kept], one.grad[kept], equal_nan=True)


class Copying(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(17, 19, batch_first=True)
        self.out = nn.Linear(19, 17)

    def training_step(self, batch, _):
        return (self.out(self.rnn(batch)[0]) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9, nesterov=True)


class Stops(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, index):
        if trainer.global_step == 20:
            raise ZeroDivisionError


def train(monkeypatch, accelerator, taken, clip, stops=False, **options):
    """The weights, and how often gradients were masked in clipping."""
    calls, call = [], clipping.GpuClipping.__call__
    with monkeypatch.context() as patch:
        if taken is not None:
            patch.setattr(callback, "_only_clips", lambda *_: taken)
        patch.setattr(clipping.GpuClipping, "__call__", lambda *given: (calls.append(given), call(*given))[1])
        return fitted(accelerator, clip, stops, **options), len(calls)


def fitted(accelerator, clip, stops, **options):
    torch.manual_seed(0)
    module, pruning = Copying(), PruningCallback("gradual", sparsity=0.8)
    data = torch.utils.data.DataLoader(torch.randn(40, 5, 17), batch_size=4)
    callbacks = [pruning, *([Stops()] if stops else [])]
    trainer = pl.Trainer(
        accelerator=accelerator, devices=1, max_epochs=6, gradient_clip_val=clip, callbacks=callbacks,
        logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    try:
        trainer.fit(module, data)
    except ZeroDivisionError:
        assert stops
    assert "clip_grad_by_norm" not in vars(trainer.precision_plugin), "the Trainer was not left as it was"
    assert not pruning.pruner._gradient_hooks.clip_masks
    return nn.utils.parameters_to_vector(module.parameters()).detach()


@pytest.mark.parametrize("stops", [False, True])
def test_where_it_cannot_be_done_at_once_a_loop_gets_the_same(monkeypatch, stops):
    """On a CPU the two are done one after the other."""
    (taken, _), (plain, _) = (train(monkeypatch, "cpu", taken, 0.01, stops) for taken in (True, False))
    assert torch.equal(taken, plain)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}], ids=str)
def test_on_a_gpu_training_is_what_it_is_with_masks_apart(monkeypatch, options):
    """To the bit where no clip binds; the masks too, which follow from the weights."""
    torch.backends.cudnn.deterministic = True
    try:
        for clip in (1e6, 0.01):
            (taken, calls), (plain, none) = (train(monkeypatch, "gpu", yes, clip, **options) for yes in (None, False))
            assert calls > 10 // options.get("accumulate_grad_batches", 1)
            assert none == 0
            assert torch.equal(taken == 0, plain == 0)
            torch.testing.assert_close(taken, plain, rtol=0 if clip > 1 else 1e-3, atol=0 if clip > 1 else 1e-5)
    finally:
        torch.backends.cudnn.deterministic = False


@pytest.mark.gpu
@on_gpu
def test_on_a_gpu_a_loop_that_breaks_its_promise_still_has_zeros():
    torch.manual_seed(0)
    model = nn.GRU(17, 19).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    pruner = Pruner(model, "hard", 20, optimizer, sparsity=0.8, prune_itr=1)
    clip = pruner.clips()
    for step in range(8):
        optimizer.zero_grad()
        model(torch.randn(5, 3, 17, device="cuda"))[0].square().mean().backward()
        if step % 2:
            clip(model.parameters(), 1.0)
        optimizer.step()
        pruner.step()
        if step > 1:
            for name, mask in pruner.masks().items():
                weight = model.get_parameter(name)
                assert not weight[~mask].any()
                assert not optimizer.state[weight]["momentum_buffer"][~mask].any()


def usual(**changes):
    """A Trainer, as far as it is looked at."""
    chosen = {
        "precision_plugin": MixedPrecision("bf16-mixed", "cuda"), "strategy": SingleDeviceStrategy("cuda:0"),
        "gradient_clip_val": 1.0, "gradient_clip_algorithm": None, "callbacks": [PruningCallback("gradual")],
    }  # fmt: skip
    return SimpleNamespace(**chosen | changes)


class Looks(pl.Callback):
    def on_before_optimizer_step(self, *_):
        pass


class ClipsItself(Copying):
    def configure_gradient_clipping(self, *_, **__):
        pass


def other(plugin):
    plugin.clip_grad_by_norm = print
    return plugin


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_clip_val": None},
        {"gradient_clip_algorithm": "value"},
        {"strategy": SingleDeviceStrategy("cpu")},
        {"strategy": pl.strategies.DDPStrategy()},
        {"precision_plugin": DoublePrecision()},
        {"precision_plugin": other(Precision())},
        {"precision_plugin": MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu"))},
        {"callbacks": [Looks()]},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_it_leaves_alone_what_others_may_look_at(changes):
    assert callback._only_clips(usual(), Copying())
    assert callback._only_clips(usual(precision_plugin=Precision()), Copying())
    assert not callback._only_clips(usual(**changes), Copying())


def test_it_leaves_a_module_alone_that_clips_itself():
    assert not callback._only_clips(usual(), ClipsItself())
    module = Copying()
    module.on_after_backward = print
    assert not callback._only_clips(usual(), module)
