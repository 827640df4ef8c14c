"""The callback in a plain Lightning Trainer, with a module that knows nothing of srnn."""

import warnings

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import (
    BackboneFinetuning,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch import nn

from srnn import PruningCallback, UserError

pytestmark = pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights


class Copying(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(4, 8, batch_first=True)
        self.out = nn.Linear(8, 4)

    def training_step(self, batch, _):
        return (self.out(self.rnn(batch)[0]) - batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.01)


def trainer(tmp_path, *callbacks, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    quiet["enable_checkpointing"] = any(isinstance(c, ModelCheckpoint) for c in callbacks)
    chosen = {"max_epochs": 6, "default_root_dir": tmp_path} | quiet | options
    return pl.Trainer(callbacks=list(callbacks), **chosen)


def data():
    generator = torch.Generator().manual_seed(1)
    return torch.utils.data.DataLoader(torch.randn(60, 5, 4, generator=generator), batch_size=4)  # 15 batches


def zeros(module):
    return {name: parameter == 0 for name, parameter in module.named_parameters() if parameter.ndim > 1}


@pytest.mark.parametrize(
    "method", ["gradual", {"name": "cubic", "structure": "4x1"}, "rigl"], ids=["name", "config", "rigl"]
)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_any_module_ends_at_the_sparsity_asked_for(tmp_path, method, accumulate):
    torch.manual_seed(0)
    module = Copying()
    options = {} if isinstance(method, dict) else {"sparsity": 0.75}
    pruning = PruningCallback(method, **options)
    trainer(tmp_path, pruning, accumulate_grad_batches=accumulate, gradient_clip_val=0.5).fit(module, data())
    pruner = pruning.pruner
    assert pruner.run.total_steps == pruner.itr == 6 * -(-15 // accumulate)
    assert pruner.reached()
    masks = pruner.masks()
    assert set(masks) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"}
    assert all(torch.equal(zeros(module)[name], ~mask) for name, mask in masks.items())


class TwoOptimizers(Copying):
    """Trains its layers in turns, each with an optimiser of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, _):
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, _))
            optimizer.step()

    def configure_optimizers(self):
        return [torch.optim.Adam(layer.parameters(), lr=1e-2) for layer in (self.rnn, self.out)]


def test_the_states_of_all_optimizers_are_masked(tmp_path):
    callback = PruningCallback("cubic", sparsity=0.8)
    module, run = TwoOptimizers(), trainer(tmp_path, callback)
    run.fit(module, data())
    masks = callback.pruner.masks()
    for optimizer, layer in zip(run.optimizers, ("rnn", "out"), strict=True):
        named = {name: p for name, p in module.named_parameters() if name in masks and name.startswith(layer)}
        assert named
        for name, parameter in named.items():
            assert 0.5 < (parameter == 0).float().mean() < 1
            assert (optimizer.state[parameter]["exp_avg"][~masks[name]] == 0).all(), name


def test_a_part_of_the_module(tmp_path):
    module = Copying()
    pruning = PruningCallback("cubic", model=module.rnn, share="matrix")
    trainer(tmp_path, pruning).fit(module, data())
    assert set(pruning.pruner.masks()) == {"weight_ih_l0", "weight_hh_l0"}
    assert (module.out.weight != 0).all()


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")  # the resumed Trainer saves nothing
@pytest.mark.parametrize("method", ["gradual", "rigl"])
def test_a_trainers_checkpoint_goes_on_bitwise(tmp_path, method):
    def fit(*callbacks, **options):
        torch.manual_seed(0)
        module, pruning = Copying(), PruningCallback(method, sparsity=0.75)
        trainer(tmp_path, pruning, *callbacks).fit(module, data(), **options)
        return module, pruning.pruner

    whole, pruner = fit(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    for epoch in (0, 2, 4):  # dense, while pruning, after it
        again, resumed = fit(ckpt_path=tmp_path / f"epoch={epoch}.ckpt", weights_only=True)
        assert all(torch.equal(p, whole.get_parameter(name)) for name, p in again.named_parameters())
        assert resumed.report() == pruner.report()


@pytest.mark.parametrize("part", [False, True])
def test_averaged_weights_are_masked(tmp_path, part):
    module = Copying()
    pruning = PruningCallback("cubic", model=module.rnn if part else None, sparsity=0.75)
    average = EMAWeightAveraging(decay=0.9)
    trainer(tmp_path, average, pruning).fit(module, data())
    gone = ~pruning.pruner.masks()["weight_hh_l0" if part else "rnn.weight_hh_l0"]
    assert gone.any()
    assert (average._average_model.module.rnn.weight_hh_l0[gone] == 0).all()
    assert (module.rnn.weight_hh_l0[gone] == 0).all()
    with pytest.raises(UserError, match="EMAWeightAveraging must stand before PruningCallback"):
        trainer(tmp_path, PruningCallback("cubic"), EMAWeightAveraging(decay=0.9)).fit(Copying(), data())


@pytest.mark.parametrize("start", [0.3, 0.8])
def test_stochastic_averages_are_masked(tmp_path, start):
    module = Copying()
    pruning = PruningCallback("gradual", sparsity=0.75)
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=start)
    trainer(tmp_path, average, pruning, max_epochs=10).fit(module, data())
    for name, mask in pruning.pruner.masks().items():
        assert torch.equal(module.get_parameter(name) != 0, mask), name
        assert (average._average_model.get_parameter(name)[~mask] == 0).all(), name
    assert pruning.pruner.reached()
    average = StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=start)
    with pytest.raises(UserError, match="StochasticWeightAveraging must stand before PruningCallback"):
        trainer(tmp_path, PruningCallback("gradual"), average).fit(Copying(), data())


def test_what_is_written_when_training_ends_is_masked_again(tmp_path):
    class Writer(pl.Callback):
        def on_train_end(self, trainer, module):
            with torch.no_grad():
                module.rnn.weight_hh_l0.fill_(0.5)

    module, pruning = Copying(), PruningCallback("cubic", sparsity=0.75)
    with pytest.warns(UserWarning, match=r"pruned weights of rnn\.weight_hh_l0 were written after"):
        trainer(tmp_path, pruning, Writer()).fit(module, data())
    assert torch.equal(module.rnn.weight_hh_l0 != 0, pruning.pruner.masks()["rnn.weight_hh_l0"])


class Manual(TwoOptimizers):
    """Steps one optimiser, both or none on a batch."""

    def __init__(self, way):
        super().__init__()
        self.way = way

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        self.manual_backward(Copying.training_step(self, batch, index))
        chosen = {"both": optimizers, "turns": [optimizers[index % 2]], "third": optimizers if index % 3 == 2 else []}
        for optimizer in chosen[self.way]:
            optimizer.step()
            optimizer.zero_grad()


LIMITS = [{"max_epochs": 6}, {"max_epochs": -1, "max_steps": 120}, {"max_epochs": 6, "max_steps": 120},
          {"max_epochs": 20, "max_steps": 90}]  # fmt: skip


@pytest.mark.parametrize("limits", LIMITS, ids=["epochs", "steps", "either", "steps first"])
@pytest.mark.parametrize("way", ["both", "turns", "third"])
def test_manual_optimisation_ends_with_its_schedule(tmp_path, way, limits):
    pruning = PruningCallback("cubic", sparsity=0.75, start_itr=0.1, end_itr=0.8)
    module = Manual(way)
    trainer(tmp_path, pruning, **limits).fit(module, data())
    assert pruning.pruner.itr == pytest.approx(pruning.pruner.run.total_steps, rel=0.02)
    assert pruning.pruner.reached()
    assert all(torch.equal(gone, ~pruning.pruner.masks()[name]) for name, gone in zeros(module).items())


def test_accumulation_that_changes_over_epochs(tmp_path):
    pruning = PruningCallback("cubic", sparsity=0.75, end_itr=0.9)
    trainer(tmp_path, GradientAccumulationScheduler({0: 1, 2: 4}), pruning).fit(Copying(), data())
    assert pruning.pruner.itr == pruning.pruner.run.total_steps == 2 * 15 + 4 * 4
    assert pruning.pruner.run.epochs == pytest.approx(6)
    assert pruning.pruner.reached()
    few = PruningCallback("cubic", sparsity=0.75, start_itr=0.1, end_itr=0.9)
    runner = trainer(tmp_path, GradientAccumulationScheduler({0: 1, 2: 4}), few, max_steps=40)
    runner.fit(Copying(), data())
    assert few.pruner.itr == few.pruner.run.total_steps == 40


def test_the_epoch_that_only_measures_batch_norm_is_no_part_of_the_schedule(tmp_path):
    class Normed(Copying):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def training_step(self, batch, index):
            return super().training_step(self.norm(batch), index)

    module, pruning = Normed(), PruningCallback("cubic", sparsity=0.75, end_itr=1.0)
    trainer(tmp_path, StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=0.5), pruning).fit(module, data())
    assert pruning.pruner.run.total_steps == 6 * 15
    assert pruning.pruner.reached()
    assert all(torch.equal(gone, ~pruning.pruner.masks()[name]) for name, gone in zeros(module).items())


def test_a_layer_that_is_frozen_for_some_epochs_is_named_and_left_alone(tmp_path):
    class Backbone(Copying):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 4)

        def training_step(self, batch, index):
            return super().training_step(self.backbone(batch), index)

        def configure_optimizers(self):
            return torch.optim.Adam([p for p in self.parameters() if p.requires_grad], lr=0.01)

    def fit(**options):
        module, pruning = Backbone(), PruningCallback("cubic", sparsity=0.75, **options)
        trainer(tmp_path, BackboneFinetuning(unfreeze_backbone_at_epoch=3), pruning).fit(module, data())
        assert pruning.pruner.itr == 6 * 15
        assert pruning.pruner.reached()
        return module

    with pytest.warns(UserWarning, match=r"leaves backbone\.weight dense, also if they are trained later"):
        assert not (fit().backbone.weight == 0).any()
    named = fit(scope={"backbone.weight": {"sparsity": 0.75}})
    assert int((named.backbone.weight == 0).sum()) == 12, "ranked alone"


def test_a_run_without_an_end_is_refused(tmp_path):
    with pytest.raises(UserError, match="set max_epochs or max_steps"):
        trainer(tmp_path, PruningCallback("cubic"), max_epochs=-1).fit(Copying(), data())
    with pytest.raises(UserError, match="'sparsity'"):
        PruningCallback("cubic", sparcity=0.9)


def test_several_in_a_trainer_go_on_each_with_its_own_masks(tmp_path):
    def fit(*callbacks, scope="out.weight", **options):
        torch.manual_seed(0)
        module = Copying()
        prunings = [
            PruningCallback("cubic", layer_types=[], scope={"rnn.*": {"sparsity": 0.75}}),
            PruningCallback("cubic", layer_types=[], scope={scope: {"sparsity": 0.5}}),
        ]
        trainer(tmp_path, *prunings, *callbacks).fit(module, data(), **options)
        return module, [pruning.pruner for pruning in prunings]

    whole, pruners = fit(ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1))
    assert [set(pruner.masks()) for pruner in pruners] == [{"rnn.weight_ih_l0", "rnn.weight_hh_l0"}, {"out.weight"}]
    for epoch in (1, 4):
        path = tmp_path / f"epoch={epoch}.ckpt"
        with pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"):  # this Trainer saves nothing
            again, resumed = fit(ckpt_path=path, weights_only=True)
        assert all(torch.equal(p, whole.get_parameter(name)) for name, p in again.named_parameters())
        assert [one.report() for one in resumed] == [one.report() for one in pruners]
        assert [one.itr for one in resumed] == [90, 90]
    with (
        pytest.warns(UserWarning, match="Be aware that when using `ckpt_path`"),
        pytest.raises(UserError) as error,
    ):
        fit(scope="out.*", ckpt_path=path, weights_only=True)
    assert str(error.value) == (
        "the checkpoint was pruned with other settings: scope was {'out.weight': {'sparsity': 0.5}} and is {'out.*': "
        "{'sparsity': 0.5}}. Go on with the same method, options and module."
    )


class Validating(Copying):
    """Is at its best before it is pruned."""

    def validation_step(self, batch, _):
        self.log("valid_loss", (self.rnn.weight_hh_l0 == 0).float().sum() + 1 / (1 + self.global_step))


def test_a_best_network_from_before_pruning_is_over_is_warned_of_and_avoided(tmp_path):
    def best(pruning, checkpoint, **options):
        torch.manual_seed(0)
        module = Validating()
        trainer(tmp_path, pruning, checkpoint, **options).fit(module, data(), data())
        weights = torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"]
        return float((weights["rnn.weight_hh_l0"] == 0).float().mean())

    pruning = PruningCallback("gradual", sparsity=0.75, share="matrix")
    with pytest.warns(
        UserWarning, match=r"ModelCheckpoint\(monitor='valid_loss'\) .* at step 45, .*Put pruning_callback\.checkpoint"
    ):
        assert best(pruning, ModelCheckpoint(tmp_path / "any", monitor="valid_loss")) < 0.1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*keeps the best network")
        for how in ({}, {"every_n_epochs": 1, "save_on_train_epoch_end": True}, {"every_n_train_steps": 7}):
            pruning = PruningCallback("gradual", sparsity=0.75, share="matrix")
            checkpoint = pruning.checkpoint(dirpath=tmp_path / "over", monitor="valid_loss", **how)
            assert best(pruning, checkpoint) == pytest.approx(0.75, abs=0.01), how
            assert len(checkpoint.best_k_models) == 1
        # What keeps all, or the last, is no trap; nor is a network that was pruned before.
        for harmless in (
            ModelCheckpoint(tmp_path / "all", monitor="valid_loss", save_top_k=-1),
            ModelCheckpoint(tmp_path),
        ):
            trainer(tmp_path, PruningCallback("cubic"), harmless).fit(Validating(), data(), data())
        rigl = ModelCheckpoint(tmp_path / "rigl", monitor="valid_loss")
        trainer(tmp_path, PruningCallback("rigl"), rigl).fit(Validating(), data(), data())


class WritesBehindTorchsBack(pl.Callback):
    """After each step, as some averaging does; nothing counts it."""

    def on_train_batch_end(self, trainer, pl_module, *_):
        pl_module.rnn.weight_hh_l0.data += 1


@pytest.mark.parametrize("weights_only", [True, False])
def test_what_is_saved_in_the_middle_of_a_pass_is_masked(tmp_path, weights_only):
    pruning = PruningCallback("hard", sparsity=0.9, prune_itr=2)
    each = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_weights_only=weights_only)
    module = Copying()
    trainer(tmp_path, pruning, WritesBehindTorchsBack(), each, max_epochs=1).fit(module, data())
    saved = sorted(tmp_path.glob("*.ckpt"), key=lambda path: int(path.stem.partition("=")[2]))
    masks = pruning.pruner.masks()
    for path in saved[3:]:
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert not any(weights[name][~mask].any() for name, mask in masks.items()), path.name
    assert len(saved) > 4
    assert not module._state_dict_pre_hooks, "the module is left as it was"


def test_keys_of_states_are_those_of_the_settings():
    one, other = nn.GRU(4, 8), nn.GRU(4, 9)
    made = [
        PruningCallback("cubic"),
        PruningCallback("cubic", sparsity=0.5),
        PruningCallback("gradual"),
        PruningCallback("none"),
        PruningCallback("cubic", model=one),
        PruningCallback("cubic", model=other),
    ]
    keys = [callback.state_key for callback in made]
    assert len(set(keys)) == len(keys)
    assert PruningCallback({"name": "cubic"}, model=nn.GRU(4, 8)).state_key == keys[4], "in any process"
    assert not any(" at 0x" in key for key in keys)
    with pytest.raises(RuntimeError, match="more than one stateful callback of type `PruningCallback`"):
        pl.Trainer(callbacks=[PruningCallback("cubic"), PruningCallback("cubic")], accelerator="cpu", logger=False)


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_a_dense_checkpoint_is_pruned_from_its_step_on(tmp_path):
    pruning, file = PruningCallback("cubic", sparsity=0.75), ModelCheckpoint(tmp_path, filename="dense")
    trainer(tmp_path, file, max_epochs=1, accumulate_grad_batches=4).fit(Copying(), data())

    class Beside(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            assert pruning.pruner.itr == trainer.global_step, "steps, not batches; with those before"

    runner = trainer(tmp_path, pruning, Beside(), accumulate_grad_batches=4)
    runner.fit(Copying(), data(), ckpt_path=tmp_path / "dense.ckpt", weights_only=True)
    assert pruning.pruner.itr == 6 * 4
    assert pruning.pruner.reached()


def test_a_second_fit_goes_on(tmp_path):
    module, pruning = Copying(), PruningCallback("cubic", sparsity=0.75)
    runner = trainer(tmp_path, pruning)
    runner.fit(module, data())
    before = zeros(module)
    runner.fit_loop.max_epochs = 8
    runner.fit(module, data())
    assert pruning.pruner.itr == 8 * 15
    assert all(torch.equal(zeros(module)[name], gone) for name, gone in before.items())


def test_data_without_a_length(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.randn(5, 4)

    pruning = PruningCallback("cubic", sparsity=0.75)
    loader = torch.utils.data.DataLoader(Stream(), batch_size=4)
    with pytest.raises(UserError, match="set max_steps, because the data have no length, in the Trainer"):
        trainer(tmp_path, PruningCallback("cubic")).fit(Copying(), loader)
    trainer(tmp_path, pruning, max_epochs=-1, max_steps=60).fit(Copying(), loader)
    assert (pruning.pruner.run.total_steps, pruning.pruner.run.epochs) == (60, 20)
    assert pruning.pruner.reached()


@pytest.mark.parametrize("options", [
    {"method": "gradual"}, {"method": "hard", "prune_itr": 5000}, {"method": "cubic", "end_itr": "30 epochs"},
    {"method": "rigl", "freq": 500}, {"method": "block", "structure": "4x4"}, {"method": "random"}, {"method": "none"},
])  # fmt: skip
@pytest.mark.parametrize("fast", [True, 3])
@pytest.mark.parametrize("module", [Copying, TwoOptimizers])
def test_fast_dev_run_runs_and_says_that_the_schedule_did_not(tmp_path, module, options, fast):
    module = module()
    pruning = PruningCallback(**options)
    with pytest.warns(UserWarning, match="fast_dev_run") as said:
        trainer(tmp_path, pruning, fast_dev_run=fast).fit(module, data())
    assert not any("pruning ended" in str(one.message) for one in said)
    assert 1 <= pruning.pruner.itr <= fast
    if options["method"] == "rigl":
        assert pruning.pruner.reached(), "it is sparse from the first step"
    slip = trainer(tmp_path, PruningCallback("cubic", scope={"out.wieght": {"sparsity": 0.5}}), fast_dev_run=fast)
    with pytest.warns(UserWarning, match="fast_dev_run"), pytest.raises(UserError, match="wieght"):
        slip.fit(module, data())


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_what_was_only_scored_is_not_gone_on_with(tmp_path):
    class Scored(Copying):
        def validation_step(self, batch, _):
            self.log("loss", self.training_step(batch, 0))

    trainer(tmp_path, PruningCallback("cubic"), kept := ModelCheckpoint(tmp_path)).fit(Copying(), data())
    pruning = PruningCallback("cubic")
    runner = trainer(tmp_path, pruning)
    runner.validate(Scored(), data(), ckpt_path=kept.best_model_path, verbose=False, weights_only=True)
    other = Copying()
    starts = []
    other.on_train_batch_start = lambda *_: starts.append((pruning.pruner.itr, pruning.pruner.sparsity))
    runner.fit(other, data())
    assert starts[0] == (0, 0.0)
    assert pruning.pruner.itr == runner.global_step == 90
