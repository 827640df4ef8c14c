"""Averages of the weights beside pruning: what is zero stays zero, and the average is what counts."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from srnn.__main__ import main
from srnn.config.composing import compose_settings
from srnn.config.settings import Settings
from srnn.inference.packed_file import read
from srnn.inference.weights import read_checkpoint
from srnn.objectives import NextToken
from srnn.pruning.callback import PruningCallback
from srnn.training.preparing import prepare
from srnn.training.running_averages import RunningAverage, TriggeredAverage
from tests.conftest import QUIET, train
from tests.training.test_resume import RUN, check_same_run, interrupt_after


class Net(pl.LightningModule):
    """Trained to give back its inputs."""

    def __init__(self):
        super().__init__()
        self.model = nn.GRU(8, 8, batch_first=True)

    def training_step(self, x_BTI, _):
        return (self.model(x_BTI)[0] - x_BTI).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.9)


class Watch(pl.Callback):
    """Averages by hand, beside the callback that it watches."""

    def __init__(self, averaging, pruning):
        self.averaging, self.pruning, self.wanted, self.count = averaging, pruning, None, 0

    def on_train_batch_end(self, trainer, pl_module, *_):
        weights = {name: p.detach().clone() for name, p in pl_module.model.named_parameters()}
        if not self.averaging.begun(trainer.global_step):
            self.count = 0
        if self.count == 0:
            self.wanted = weights
        else:
            kept = self.averaging.kept(self.count)
            self.wanted = {n: kept * self.wanted[n] + (1 - kept) * w for n, w in weights.items()}
        self.count += 1
        for name, mask in self.pruning.pruner.masks().items():
            # Masks found at this step act from the next on, as in the weights themselves.
            pruned = ~mask & (weights[name] == 0)
            self.wanted[name][pruned] = 0
        got = dict(self.averaging.average.module["model"].named_parameters())
        for name, weight in self.wanted.items():
            assert torch.allclose(got[name], weight, atol=1e-6), name
            assert (got[name][weights[name] == 0] == 0).all(), "what is zero now is zero in the average now"


@pytest.mark.parametrize("method", ["gradual", "rigl"])
@pytest.mark.parametrize("start", [0, 13])
def test_the_average_is_its_formula_and_is_masked_at_once(start, method):
    module = Net()
    averaging, pruning = RunningAverage(start, decay=0.8), PruningCallback(method, module.model, sparsity=0.8)
    watch = Watch(averaging, pruning)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_epochs=6, callbacks=[averaging, pruning, watch], enable_model_summary=False, **options)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(64, 5, 8), batch_size=8))
    assert watch.count == 48 - max(0, start - 1), "the copy of the step before is the first"
    assert averaging.kept(0) == 0.1
    assert averaging.kept(1000) == 0.8
    for name, weight in module.model.named_parameters():
        assert torch.allclose(weight, watch.wanted[name], atol=1e-6), "training ends with the average"
    zeros = [w for n, w in module.model.named_parameters() if "weight" in n]
    assert sum(int((w == 0).sum()) for w in zeros) / sum(w.numel() for w in zeros) == pytest.approx(0.8, abs=0.03)


def test_the_trigger_is_that_of_nt_asgd():
    averaging = TriggeredAverage(start=0, patience=2)
    for loss, triggered in ((5.0, False), (4.0, False), (4.5, False), (3.0, False), (4.1, True), (1.0, True)):
        averaging.look(loss)
        assert averaging.begun(1) is triggered
    assert [averaging.kept(n) for n in (0, 1, 3)] == [0, 0.5, 0.75], "a mean"
    again = TriggeredAverage(start=0, patience=2)
    again.load_state_dict(averaging.state_dict())
    assert again.begun(1)
    assert again.losses == averaging.losses


def test_the_average_is_validated_kept_packed_and_scored(tmp_path):
    chosen = ["kernel=dense", "averaging=ema", "averaging.decay=0.9", "packed.values=fp32"]
    report = train(tmp_path / "run", *chosen)
    best, last = (read_checkpoint(tmp_path / f"run/checkpoints/{name}.ckpt") for name in ("best", "last"))
    average = {name.removeprefix("model."): weight for name, weight in best["state_dict"].items()}
    assert not torch.equal(
        last["state_dict"]["model.rnn.weight_hh_l0"], last["current_model_state"]["model.rnn.weight_hh_l0"]
    )
    packed = read(tmp_path / "run/model.safetensors").state_dict()
    assert all(torch.equal(packed[name], weight) for name, weight in average.items())
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.002)
    zeros = average["rnn.weight_hh_l0"] == 0
    assert (best["current_model_state"]["model.rnn.weight_hh_l0"] == 0).equal(zeros)
    run = prepare(compose_settings([*QUIET, *chosen]))
    run.model.load_state_dict(average)
    scored = NextToken.score(run.model, run.data, "valid")["loss"]
    losses = [v["scores"]["valid_loss"] for v in report["validations"] if v["finished"]]
    assert scored == pytest.approx(min(losses), rel=1e-5)


def test_a_config_of_before_averages_nothing():
    config = compose_settings(QUIET).as_dict()
    del config["averaging"]
    assert prepare(Settings.check(config)).averaging is None


# At 99 % a gate may end without a weight: the text is that of Python's own version.
@pytest.mark.filterwarnings("ignore:pruning left no weight")
@pytest.mark.parametrize("averaging", ["ema", "asgd"])
def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, averaging):
    chosen = [*RUN, f"averaging={averaging}", "averaging.start=6"]
    chosen += ["averaging.patience=1", "optimizer.lr=0.02", "pruning.sparsity=0.99"] if averaging == "asgd" else []
    assert main([*chosen, f"hydra.run.dir={tmp_path}/one"]) == 0
    last = read_checkpoint(tmp_path / "one/checkpoints/last.ckpt")
    assert int(last["averaging_state"]["n_averaged"]) > 1, "it did average"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13, 32)
        assert main([*chosen, f"hydra.run.dir={tmp_path}/two"]) == 130
        assert main([f"resume={tmp_path}/two"]) == 130
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")
