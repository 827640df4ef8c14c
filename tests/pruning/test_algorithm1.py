"""Algorithm 1 against an independent transcription in plain Python that runs beside the real callback."""

import pytest
import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F

from srnn.pruning import Gradual
from srnn.pruning.callback import PruningCallback

pytestmark = pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights

START, RAMP, END, FREQ, STEPS = 40, 120, 340, 4, 400
RECURRENT = ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
LINEAR = ["out.weight"]


class Copying(pl.LightningModule):
    """A GRU that copies random numbers."""

    def __init__(self):
        super().__init__()
        self.rnn = nn.GRU(5, 7, batch_first=True)
        self.out = nn.Linear(7, 5)

    def training_step(self, batch, _):
        (x,) = batch
        return F.mse_loss(self.out(self.rnn(x)[0]), x)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.3, momentum=0.9, nesterov=True)

    def train_dataloader(self):
        data = torch.utils.data.TensorDataset(torch.randn(40 * 8, 6, 5))
        return torch.utils.data.DataLoader(data, batch_size=8)


class Transcription(pl.Callback):
    """The paper's Algorithm 1, as printed, over lists of floats.

    Sees the weights after the optimiser's step and before the real callback, keeps masks of its own.
    """

    def __init__(self, q):
        self.q = q  # layer type -> number, or None for the estimated form
        self.itr = 0
        self.eps = {"recurrent": 0.0, "linear": 0.0}
        self.masks = None
        self.param = None

    def on_train_batch_end(self, trainer, module, *_):
        self.itr += 1
        itr = self.itr
        named = {n: p.detach().flatten().tolist() for n, p in module.named_parameters()}
        if self.masks is None:
            self.masks = {n: [1] * len(named[n]) for n in RECURRENT + LINEAR}
        self.param = {n: [w * m for w, m in zip(named[n], self.masks[n], strict=True)] for n in self.masks}
        if not (START < itr < END and itr % FREQ == 0):
            return
        for kind, names in (("recurrent", RECURRENT), ("linear", LINEAR)):
            everything = sorted(abs(w) for n in names for w in self.param[n])
            want = int(0.9 * len(everything) + 0.5)
            q = self.q[kind] if self.q else everything[int(0.9 * len(everything) + 0.5) - 1]
            theta = 2 * q * FREQ / (2 * (RAMP - START) + 3 * (END - RAMP))
            phi = 1.5 * theta
            if itr < RAMP:
                eps = theta * (itr - START + 1) / FREQ
            else:
                eps = (theta * (RAMP - START + 1) + phi * (itr - RAMP + 1)) / FREQ
            if not self.q:
                eps = max(eps, self.eps[kind])
                last = itr + FREQ >= END
                if last or sum(w < eps for w in everything) > want:
                    eps = max(self.eps[kind], everything[want])  # magnitudes are distinct but for zeros
                    cut = everything[want]
                    self.eps[kind] = eps
                    for n in names:
                        self.masks[n] = [int(abs(w) >= cut) for w in self.param[n]]
                    continue
            self.eps[kind] = eps
            for n in names:
                self.masks[n] = [int(abs(w) >= eps) for w in self.param[n]]


class Comparison(pl.Callback):
    """After every step: equal weights, masks and thresholds."""

    def __init__(self, transcription, real):
        self.transcription, self.real = transcription, real
        self.steps = 0
        self.epsilons = []

    def on_train_batch_end(self, trainer, module, *_):
        pruner, mine = self.real.pruner, self.transcription
        for name, mask in pruner.masks().items():
            assert mask.flatten().int().tolist() == mine.masks[name], (mine.itr, name)
            weight = dict(module.named_parameters())[name].detach().flatten().tolist()
            assert weight == mine.param[name], (mine.itr, name)
        for kind, epsilon in pruner.thresholds.items():
            assert epsilon == pytest.approx(mine.eps[kind], rel=1e-6), (mine.itr, kind)
        self.epsilons.append(dict(pruner.thresholds))
        self.steps += 1


def train_beside(q, tmp_path, steps=STEPS):
    pl.seed_everything(1, verbose=False)
    transcription = Transcription(q)
    options = {
        "start_itr": START,
        "ramp_itr": RAMP,
        "end_itr": END,
        "freq": FREQ,
        "layer_types": ["recurrent", "linear"],
    }
    real = PruningCallback(Gradual(sparsity=0.9, q=q or "auto", **options))
    comparison = Comparison(transcription, real)
    trainer = pl.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        callbacks=[transcription, real, comparison],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Copying())
    return real.pruner, comparison


@pytest.mark.parametrize("q", [{"recurrent": 0.31, "linear": 0.44}, None], ids=["open-loop", "auto"])
def test_equal_masks_and_thresholds_at_every_step(q, tmp_path):
    pruner, comparison = train_beside(q, tmp_path)
    assert comparison.steps == STEPS
    assert 0.2 < pruner.sparsity < 1, "the comparison is empty unless weights are really pruned"
    kinds = comparison.epsilons[-1]
    assert all(kinds.values())
    for kind in kinds:
        curve = [epsilons[kind] for epsilons in comparison.epsilons]
        assert curve == sorted(curve), "thresholds never fall"
        assert curve[START - 1] == 0
        assert len(set(curve[END:])) == 1


def test_auto_meets_the_count_exactly(tmp_path):
    pruner, _ = train_beside(None, tmp_path)
    for group in pruner.groups:
        assert group.pruned == int(0.9 * group.size + 0.5)
    assert pruner.reached()
