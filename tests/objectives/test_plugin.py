"""An objective that a plug-in brings: trained, scored and compared by its own score."""

import json
from dataclasses import replace
from pathlib import Path

import torch

from srnn.__main__ import main
from srnn.inference.packed_file import read, write
from srnn.objectives import Regression
from srnn.registry import register
from srnn.registry.registry import KINDS
from tests.conftest import SMALL

CHOSEN = [o for o in SMALL if not o.startswith(("dataset.", "model.embedding"))]
FILE = Path("run/model.safetensors")
SEEDED = ["seed=3", "hydra.run.dir=run"]
PLUGIN = '''
import torch
from torch import Tensor
from torch.nn import functional as F

from srnn.datasets import Adding
from srnn.objectives import Regression
from srnn.registry import register


@register.objective("huber")
class Huber(Regression):
    """Tell the numbers of a sequence, by Huber's loss."""

    telling = "mae"
    words = "mean absolute error {mae:.3f}"

    @staticmethod
    def loss(outputs_BO: Tensor, targets: Tensor) -> Tensor:
        return F.huber_loss(outputs_BO, targets)


@register.dataset("adding_huber")
class AddingHuber(Adding):
    """The adding problem, by Huber's loss, drawn anew for each seed of a run."""

    objective = "huber"

    def sequences(self):
        self.data_seed = int(torch.randint(10_000, ()))
        return super().sequences()
'''


def test_a_plugin_brings_an_objective(tmp_path, monkeypatch, capsys):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/huber.py").write_text(PLUGIN)
    monkeypatch.chdir(tmp_path)
    for kind in KINDS:
        register.names(kind)  # srnn's own are all there, and stay
    before = dict(register.components)
    try:
        chosen = [*CHOSEN, "dataset=adding_huber", "dataset.train_sequences=256", "dataset.sequence_length=8"]
        assert main([*chosen, "kernel=dense", "tracking.mode=disabled", "srnn.plugins=on", *SEEDED]) == 0
        assert "mean absolute error" in capsys.readouterr().out
        assert json.loads((tmp_path / "run/report.json").read_text())["objective"] == "huber"
        capsys.readouterr()
        torch.seed()  # a process of its own has another
        assert main(["evaluate", "run=run"]) == 0
        assert "not the data of the run" not in capsys.readouterr().out
        write(FILE, replace(packed := read(FILE), about={"dataset": packed.about["dataset"]}))  # as older srnn wrote it
        torch.seed()
        assert main(["export", "values=fp16", "run=run"]) == 0
        assert "not the data of the run" not in capsys.readouterr().out
        assert main(["compare", "run", "mode=disabled"]) == 0
        assert "mae, test" in capsys.readouterr().out
        assert issubclass(register.get("objective", "huber").factory, Regression)
    finally:
        register.components = before
