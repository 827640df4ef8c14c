"""What surrounds a run changes nothing in it: the allocation it runs in, the folder it is resumed from, its data."""

import json
import math
import shutil

import pytest
from pytorch_lightning.utilities import rank_zero_only

from srnn.__main__ import main
from srnn.commands.rerun import agreement
from srnn.errors import UserError
from srnn.training.processes import _await_ready
from tests.conftest import SMALL
from tests.training.test_resume import interrupt_after

QUIET = ["tracking.mode=disabled", "kernel=dense"]
RANKS = [
    {"RANK": "1"},
    {"LOCAL_RANK": "1"},
    {"SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "x", "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4",
     "SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "n1"},
    {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29555"},
    {"PL_TRAINER_MAX_STEPS": "3", "PL_TRAINER_LIMIT_VAL_BATCHES": "0", "PL_TRAINER_FAST_DEV_RUN": "1"},
    {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMI_RANK": "1", "JSM_NAMESPACE_RANK": "1"},
]  # fmt: skip


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("It was the best of times, it was the worst of times.\n" * 200)
    return path


@pytest.mark.parametrize("environment", RANKS, ids=lambda e: next(iter(e)))
def test_an_allocation_changes_nothing(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    # Lightning reads it when it is imported, as it is in a process that starts there.
    monkeypatch.setattr(rank_zero_only, "rank", int(environment.get("RANK", "1")), raising=False)
    assert main([*SMALL, *QUIET, f"hydra.run.dir={tmp_path}/run"]) == 0
    assert len((tmp_path / "run/metrics.csv").read_text().splitlines()) > 50
    assert json.loads((tmp_path / "run/report.json").read_text())["sparsity"]["reached"] > 0.89


def test_a_run_is_resumed_and_repeated_from_elsewhere(tmp_path, text, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    chosen = [*SMALL, *QUIET, "dataset=text", "dataset.path=a.txt"]
    assert main([*chosen, "hydra.job.chdir=true", "hydra.run.dir=one"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        assert main([*chosen, "hydra.run.dir=two"]) == 130
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    assert main(["resume=../two"]) == 0
    capsys.readouterr()
    assert main(["rerun", "../one"]) == 0
    said = capsys.readouterr().out
    assert "are the same, bit for bit" in said
    assert "Code, packages, hardware and data are the same." in said
    packed = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert packed[0] == packed[1]


def test_other_data_under_the_same_name_are_told(tmp_path, text, capsys):
    assert main([*SMALL, *QUIET, "dataset=text", f"dataset.path={text}", f"hydra.run.dir={tmp_path}/run"]) == 0
    shutil.copy(text, tmp_path / "before")
    text.write_text("It was the age of wisdom, it was the age of foolishness.\n" * 200)
    capsys.readouterr()
    for command in (["evaluate"], ["export", "values=fp32"]):
        assert main([*command, f"run={tmp_path}/run"]) == 0
        assert "These are not the data of the run: train was SHA-256" in capsys.readouterr().out
    shutil.copy(tmp_path / "before", text)
    assert main(["evaluate", f"run={tmp_path}/run"]) == 0
    assert "not the data" not in capsys.readouterr().out


def test_a_dense_run_that_diverges_says_so(tmp_path, capsys):
    diverging = ["model=rnn", "model.nonlinearity=relu", "optimizer=sgd", "optimizer.lr=1000000"]
    chosen = [*SMALL, *QUIET, "pruning=none", *diverging, "trainer.gradient_clip_val=null"]
    assert main([*chosen, f"hydra.run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "the training has diverged: the validation loss is nan after step 8; lower optimizer.lr" in error
    assert not (tmp_path / "run/model.safetensors").exists()


def test_nan_agrees_with_nan_alone():
    def report(loss):
        return {
            "scores": {"test": {"loss": loss}},
            "validations": [],
            "layers": [],
            "sparsity": {},
            "size": {},
            "steps": 1,
        }

    assert agreement(report(math.nan), report(math.nan), 0.0)[1]
    for one, two in ((1.0, math.nan), (math.nan, 1.0), (1.0, math.inf)):
        assert not agreement(report(one), report(two), 1e9)[1]


def test_a_rank_that_hangs_is_named(monkeypatch):
    import subprocess
    import sys
    import time

    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    try:
        with pytest.raises(UserError, match="rank 3 was not ready to train within"):
            _await_ready(3, process, time.monotonic() + 0.2)
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_plugin_that_prints_disturbs_no_rank(tmp_path, monkeypatch):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/loud.py").write_text("print('I was imported', flush=True)\n")
    monkeypatch.chdir(tmp_path)
    two = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "trainer.limit_epochs=5"]
    chosen = [o for o in SMALL if o != "trainer=fast"]
    limits = ["trainer.limit_train_batches=8", "trainer.limit_eval_batches=8"]
    assert main([*chosen, *two, *limits, *QUIET, "srnn.plugins=on", "hydra.run.dir=run"]) == 0
    assert (tmp_path / "run/report.json").is_file()
