"""The clock of the training loop, and the matrix that a run shows."""

import time

import torch
from torch import nn

import srnn
from srnn.recording.recorder import Recorder
from srnn.recording.report import recurrent_matrix


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
