"""A stopped run goes on, bit for bit."""

import errno
import filecmp
import json
import os
import signal
import time
from contextlib import suppress

import pytest
import torch

from srnn.__main__ import main
from srnn.pruning.callback import PruningCallback
from srnn.training.checkpoints import LastCheckpoint
from tests.conftest import SMALL
from tests.forking import Forked

# Two layers with dropout: data position, recurrent state and random state all matter.
RUN = [*SMALL, "model.num_layers=2", "model.dropout=0.2", "model.embedding_dropout=0.2", "kernel=dense",
       "tracking.mode=disabled"]  # fmt: skip


def interrupt_after(monkeypatch, *steps):
    """Ctrl-C in the middle of each of these steps."""
    left = list(steps)
    original = PruningCallback.on_train_batch_end

    def hook(self, trainer, *rest):
        original(self, trainer, *rest)
        if left and trainer.global_step == left[0]:
            left.pop(0)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PruningCallback, "on_train_batch_end", hook)


def same(one, two, path=""):
    """Compare checkpoints; what differs, by path."""
    if isinstance(one, torch.Tensor):
        return [] if isinstance(two, torch.Tensor) and torch.equal(one, two) else [path]
    if isinstance(one, dict):
        keys = one.keys() == two.keys()
        return [d for k in one for d in same(one[k], two[k], f"{path}/{k}")] if keys else [path]
    if isinstance(one, list | tuple):
        return [d for i, (u, v) in enumerate(zip(one, two, strict=True)) for d in same(u, v, f"{path}/{i}")]
    return [] if one == two else [path]


def check_same_run(one, two):
    checkpoints = [torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, two)]
    timed = ("seconds", "loop_seconds", "current_score")
    paths = ("best_k_models", "best_model_path", "kth_best_model_path", "last_model_path", "dirpath")
    # Where Lightning counts what it did since it was started.
    counted = ("/loops/", "/recurrent_state")
    different = [
        path for path in same(*checkpoints) if not path.endswith(timed + paths) and not path.startswith(counted)
    ]
    assert different == []
    for name in ("metrics.csv", "model.safetensors"):
        assert filecmp.cmp(one / name, two / name, shallow=False), name
    reports = [json.loads((run / "report.json").read_text()) for run in (one, two)]
    for key in ("scores", "layers", "validations", "sparsity", "phases"):
        assert reports[0][key] == reports[1][key], key


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert main([*RUN, f"hydra.run.dir={folder}"]) == 0
    return folder


@pytest.mark.parametrize(
    ("stops", "overrides"),
    [
        ([5, 13, 16, 30, 40], []),  # dense; while pruning; at the end of a pass; after pruning; after the last step
        pytest.param(
            *([4, 9], ["pruning=hard", "trainer.accumulate_grad_batches=3", "model=lstm", "optimizer=sgd"]),
            marks=pytest.mark.slow,
        ),
        pytest.param([3, 18, 33], ["pruning=rigl", "pruning.structure=4x1"], marks=pytest.mark.slow),
        ([7, 12, 30], ["dataset=digits", "optimizer.lr_decay=0.9", "pruning.soft=true"]),
    ],
    ids=["gradual", "hard-accumulated", "rigl", "digits-soft"],
)
def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, capsys, whole, stops, overrides):
    chosen = [o for o in RUN if "dataset=digits" not in overrides or not o.startswith(OF_TEXT)]
    if overrides:
        whole = tmp_path / "one"
        assert main([*chosen, *overrides, f"hydra.run.dir={whole}"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, *stops)
        assert main([*chosen, *overrides, f"hydra.run.dir={tmp_path}/two"]) == 130
        for _ in stops[1:]:
            assert main([f"resume={tmp_path}/two"]) == 130
    assert f"Resume it: srnn resume {tmp_path}/two" in capsys.readouterr().out
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(whole, tmp_path / "two")
    assert main([f"resume={tmp_path}/two"]) == 2
    assert "is finished" in capsys.readouterr().err


OF_TEXT = ("dataset.sequence_length", "model.embedding")


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path, monkeypatch):
    """kill -9 twice, wherever it hits; each resumed run starts from whole files."""
    command = [*RUN, "trainer.max_epochs=40", "trainer.limit_epochs=40"]
    assert main([*command, f"hydra.run.dir={tmp_path}/one"]) == 0
    last = tmp_path / "two/checkpoints/last.ckpt"
    command.append("hydra.run.dir=two")
    for seconds in (1.0, 0.4):
        before = last.stat().st_mtime_ns if last.exists() else 0
        process = Forked(command, tmp_path)
        command = ["resume=two"]
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.02)
        time.sleep(seconds)
        process.send(signal.SIGKILL)
        assert process.end()[0] == -signal.SIGKILL, process.said()
    monkeypatch.chdir(tmp_path)
    assert main(["resume=two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")


def test_what_cannot_be_resumed(tmp_path, capsys, monkeypatch, whole):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        assert main([*RUN, f"hydra.run.dir={run}"]) == 130
    last = run / "checkpoints/last.ckpt"
    saved, config = last.read_bytes(), (run / "config.yaml").read_text()
    for arguments, words in (
        ([f"resume={tmp_path}/none"], "no run is there"),
        ([f"resume={run}", "seed=1"], "seed=1 cannot be given with it"),
        (["-m", f"resume={run}"], "-m cannot be given with it"),
        ([f"resume={run}", f"resume={run}"], "a second one cannot be given"),
        ([f"resume={tmp_path}/it's'"], "it's': no run is there"),
        (["resume"], "which run? Give its folder, as `srnn resume outputs/RUN`."),
        (["resume", tmp_path / "none"], "no run is there"),
        (["resume", f"run={tmp_path}/none"], "no run is there"),
        (["resume", "--run", tmp_path / "none"], "no run is there"),
        (["resume", run, "seed=1"], "seed=1 cannot be given with it"),
        (["resume", run, "model.hidden_size=8"], "model.hidden_size=8 cannot be given with it"),
        (["resume", run, run], "a second one cannot be given"),
    ):
        assert main([*map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
    for damaged in (saved[: len(saved) // 2], b"", b"no checkpoint"):
        last.write_bytes(damaged)
        assert main([f"resume={run}"]) == 2
        assert "last.ckpt is no checkpoint, or damaged" in capsys.readouterr().err
    last.write_bytes(saved)
    for broken, words in (
        ("seed: [", "damaged"),
        ("- 1", "damaged"),
        ("seeds: 1", "config.yaml: seeds: unknown option"),
    ):
        (run / "config.yaml").write_text(broken)
        assert main([f"resume={run}"]) == 2
        assert words in capsys.readouterr().err
    # Stopped before the first checkpoint: from the beginning, the same.
    early = tmp_path / "early"
    early.mkdir()
    (early / "config.yaml").write_text(config)
    assert main(["resume", str(early)]) == 0
    assert "starts from the beginning" in capsys.readouterr().out
    check_same_run(whole, early)


def test_stopped_after_its_last_step_it_is_told_how_to_go_on(tmp_path, capsys, monkeypatch, whole, ctrl_c):
    def stopped(*_):
        """Ctrl-C, once or twice, in compiled code, which makes an exception of its own of it."""
        with suppress(KeyboardInterrupt):
            while True:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.01)
        raise ValueError("Invalid bounding box")

    def read_only(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), ".lock")

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("srnn.training.run.plot_run", stopped)
        assert main([*RUN, f"hydra.run.dir={run}"]) == 130
    assert f"Resume it: srnn resume {run}" in capsys.readouterr().out
    metrics = (run / "metrics.csv").read_bytes()
    with monkeypatch.context() as patch:  # before it has read the checkpoint
        patch.setattr(LastCheckpoint, "on_load_checkpoint", stopped)
        assert main(["resume", str(run)]) == 130
    assert (run / "metrics.csv").read_bytes() == metrics
    with monkeypatch.context() as patch:
        patch.setattr("srnn.run_folder.FileLock.acquire", read_only)
        assert main(["resume", str(run)]) == 2
    assert f"resume: {run}: this folder cannot be written: Permission denied." in capsys.readouterr().err
    assert main(["resume", str(run)]) == 0
    check_same_run(whole, run)


def test_a_full_disk_ends_a_run_and_leaves_it_resumable(tmp_path, capsys, monkeypatch, whole):
    from srnn import files

    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        capsys.readouterr()
        assert main([*RUN, f"hydra.run.dir={tmp_path}/run"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert "Traceback" not in error
    assert not list((tmp_path / "run").rglob(".*")), "nothing half-written is left"
    assert main([f"resume={tmp_path}/run"]) == 0
    check_same_run(whole, tmp_path / "run")


def test_wandb_goes_on_with_the_same_run(tmp_path, monkeypatch, capsys):
    chosen = [o for o in RUN if not o.startswith("tracking")]
    with monkeypatch.context() as patch:
        interrupt_after(patch, 9)
        assert main([*chosen, f"hydra.run.dir={tmp_path}/run"]) == 130
    assert main([f"resume={tmp_path}/run"]) == 0
    parts = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(parts) == 2
    assert len({file.name for part in parts for file in part.glob("run-*.wandb")}) == 1
    assert f"wandb sync {parts[0]} {parts[1]}" in capsys.readouterr().out
