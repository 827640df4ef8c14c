"""The clock of the training loop, and what a run says in the end."""

import time

import torch
from torch import nn

import srnn
from srnn.datasets import Text
from srnn.recording.console import print_ways_on
from srnn.recording.recorder import Recorder
from srnn.recording.report import recurrent_matrix
from srnn.run_folder import RunFolder


class Trainer:
    global_step = 3


def test_a_checkpoint_in_the_middle_of_a_pass_has_the_time_until_then():
    recorder = Recorder(None, 1)
    recorder.on_train_start(Trainer(), None)
    time.sleep(0.05)
    saved = recorder.state_dict()["loop_seconds"]
    assert 0.05 <= saved < 1
    recorder.on_validation_start(Trainer(), None)
    stopped = recorder.state_dict()["loop_seconds"]
    time.sleep(0.02)
    assert recorder.state_dict()["loop_seconds"] == stopped, "validation does not count"
    resumed = Recorder(None, 1)
    resumed.load_state_dict({"validations": [], "loop_seconds": saved})
    assert resumed.state_dict()["loop_seconds"] == saved


def test_the_matrix_to_show_is_one_that_was_pruned():
    model = nn.Sequential(nn.GRU(4, 8), nn.LSTM(8, 8))
    scope = {"0.weight_*": {"sparsity": 0}}
    pruner = srnn.Pruner(model, "cubic", 100, sparsity=0.5, scope=scope)
    name, weight = recurrent_matrix(model, pruner)
    assert name == "1.weight_hh_l0"
    assert torch.equal(weight, model[1].weight_hh_l0)
    assert recurrent_matrix(model, srnn.Pruner(model, "none", 100)) is None


def test_a_prompt_is_of_the_data_and_quoted_for_a_shell(tmp_path, capsys):
    (tmp_path / "text").write_text("Καλημέρα κόσμε, it's a fine day\n" * 200)
    data = Text(str(tmp_path / "text"), batch_size=4, sequence_length=40)
    data.setup()
    print_ways_on(RunFolder(tmp_path / "my run's"), data)
    said = capsys.readouterr().out
    assert f"""srnn generate --run '{tmp_path}/my run'"'"'s' --prompt 'Καλημέρα""" in said.replace("\n", "")
