import copy

import pytest
import torch

from srnn.bench.training_loop import LoopRow, bare_loop
from srnn.config.composing import compose_settings
from srnn.files import csv_bytes
from srnn.training.fitting import quiet, trainer_for
from srnn.training.preparing import prepare


@pytest.mark.parametrize(
    "chosen",
    [
        ["dataset=adding", "dataset.train_sequences=64", "dataset.sequence_length=8", "optimizer=sgd"],
        ["dataset=python_source", "dataset.batch_size=8", "dataset.sequence_length=16", "model.embedding_size=4",
         "optimizer=adamw", "optimizer.lr_decay=0.5"],
    ],
    ids=lambda chosen: chosen[0],
)  # fmt: skip
def test_the_bare_loop_trains_as_the_run_does(chosen):
    """The same objective and optimiser: the same weights come out of both loops."""
    small = ["model.hidden_size=8", "trainer=cpu", "trainer.max_epochs=2", "trainer.limit_train_batches=4"]
    settings = compose_settings([*chosen, *small, "trainer.limit_eval_batches=1", "pruning=none"])
    quiet()
    run = prepare(settings)
    before = copy.deepcopy(run.model.state_dict())
    data = run.objective.data
    trainer_for(settings.trainer, []).fit(run.objective, data.train_dataloader(), data.val_dataloader())
    bare = prepare(settings)
    assert len(bare_loop(bare.objective, settings.trainer.gradient_clip_val, 2, torch.device("cpu"))) == 2
    for name, weight in bare.model.state_dict().items():
        torch.testing.assert_close(weight, run.model.state_dict()[name], rtol=1e-4, atol=1e-5)
        assert not torch.equal(weight, before[name])


def test_a_file_has_so_many_digits_and_quotes():
    row = LoopRow("srnn, pruned", 1.23456, 1.0, 8, 0.25, "2 threads", "2.13.0", "model=gru trainer=fast")
    assert csv_bytes([row.rounded()], quoted=("loop", "options")).decode() == (
        "loop,ms_per_step,ratio,steps,pruning_share,device,torch,options\n"
        '"srnn, pruned",1.235,1.000,8,0.2500,2 threads,2.13.0,"model=gru trainer=fast"\n'
    )
