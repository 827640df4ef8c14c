"""W&B's own ways of going wrong, and its agent."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb
import yaml
from wandb.sdk.launch.sweeps import utils as sweeps

from srnn.__main__ import main
from srnn.config.command_line import check_command_line
from srnn.config.composing import conf_folder
from srnn.config.settings import TrackingConfig
from srnn.recording import wandb as wandb_module
from srnn.recording.wandb import wandb_run
from tests.conftest import SMALL
from tests.forking import Forked
from tests.recording.offline import read_offline

LONG = [*SMALL, "kernel=dense", "trainer.max_epochs=30", "trainer.limit_epochs=30"]


@pytest.mark.slow
def test_when_wandb_dies_a_run_goes_on_and_the_next_one_is_tracked(tmp_path):
    command = ["-m", *LONG, "pruning=hard", "seed=0,1", "hydra.sweep.dir=sweep"]
    first, second = (tmp_path / f"sweep/gru_hard_s{seed}" for seed in (0, 1))
    # Without what W&B of this process left for its children, which would share its service.
    process = Forked(command, tmp_path, {name: None for name in os.environ if name.startswith("WANDB_")})
    deadline = time.monotonic() + 120
    while not (first / "checkpoints/last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    while not (killed := kill_wandb_of(process.process.pid)) and process.process.is_alive():
        time.sleep(0.02)
    code, said = process.end()
    assert killed, said
    assert code == 0
    assert said.count("srnn: W&B did not take a row, and will get no more") == 1
    assert "Traceback" not in said
    assert all((job / "report.json").exists() for job in (first, second))
    assert (first / "metrics.csv").read_text().count("\n") > 60
    assert read_offline(second).exit_code == 0


def kill_wandb_of(parent):
    """Kill W&B's own process, as a machine short of memory does; returns the processes it was."""
    killed = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except OSError:  # it has ended
            continue
        if name.startswith("wandb") and int(rest.split()[1]) == parent:
            os.kill(int(folder.name), signal.SIGKILL)
            killed.append(folder.name)
    return killed


@pytest.mark.slow
def test_a_full_folder_of_wandb_costs_no_results(tmp_path):
    (tmp_path / "run/wandb").mkdir(parents=True)
    mounted = "mount -t tmpfs -o size=60k none run/wandb"
    if subprocess.run(
        ["unshare", "-rm", "sh", "-c", mounted], cwd=tmp_path, capture_output=True, check=False
    ).returncode:
        pytest.skip("no folder of a fixed size can be made here")
    command = f"{mounted} && exec {sys.executable} -m srnn {' '.join(LONG)} hydra.run.dir=run"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "W&B did not take the results: " in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "run/report.json").exists()
    assert (tmp_path / "run/metrics.csv").read_text().count("\n") > 60


def test_the_agents_sweep(tmp_path, monkeypatch):
    """The command line that W&B's agent makes of the YAML, by its own code, for the ends of every range; one is run."""
    config = yaml.safe_load((conf_folder() / "wandb_sweep.yaml").read_text())
    ranges = {name: r.get("values") or [r["min"], r["max"]] for name, r in config["parameters"].items()}
    for pick in (0, -1):
        arguments = {"args": {name: {"value": values[pick]} for name, values in ranges.items()}}
        made = sweeps.create_sweep_command_args(arguments)
        words = sweeps.create_sweep_command(list(config["command"]))
        assert words[:4] == ["${env}", "${interpreter}", "-m", "srnn"]
        words = [w for word in words[4:] for w in (made[word[2:-1]] if word.startswith("${") else [word])]
        assert "tracking.mode=online" in words
        assert check_command_line(words).sweep is None
    monkeypatch.setenv("WANDB_RUN_ID", "agents1")
    monkeypatch.setenv("WANDB_SWEEP_ID", "abcdefgh")
    wandb.teardown()  # the agent starts a process for each run, which reads these anew
    small = [option for option in SMALL if not option.startswith("model.hidden")]
    ours = ["tracking.mode=offline", "kernel=dense", "model.hidden_size=24"]  # what comes last wins
    assert main([*words, *small, *ours, f"hydra.run.dir={tmp_path}/run"]) == 0
    wandb.teardown()
    run = read_offline(tmp_path / "run")
    assert run.id == "agents1"
    assert run.summary[config["metric"]["name"]] > 0


def test_the_environments_run_id_makes_no_one_run_of_two(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(wandb_module, "_said", set())
    monkeypatch.setenv("WANDB_RUN_ID", "abc123")
    monkeypatch.setenv("WANDB_RESUME", "must")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    ids = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with wandb_run(TrackingConfig(mode="offline"), tmp_path / name, {}, "train") as run:
            ids.append(run.id)
            assert run.project == "srnn"
    assert len({*ids, "abc123"}) == 3
    said = capsys.readouterr().err
    assert said.count("WANDB_PROJECT=mine is passed over: tracking.project decides.") == 1


@pytest.mark.parametrize(("name", "value"), [("WANDB_MODE", "disabled"), ("WANDB_DISABLED", "true")])
def test_the_environment_may_switch_wandb_off(tmp_path, monkeypatch, capsys, name, value):
    monkeypatch.setattr(wandb_module, "_said", set())
    monkeypatch.setenv(name, value)
    with wandb_run(TrackingConfig(mode="online"), tmp_path, {}, "train") as run:
        assert run is None
    assert f"{name}={value}: no W&B run is kept." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
