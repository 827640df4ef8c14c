"""Several devices: processes that are one process on the joined batch, and write one run."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from srnn import distributed
from srnn.__main__ import main
from srnn.datasets import Adding, PythonSource
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from srnn.inference.weights import read_weights
from srnn.objectives.next_token import mean_of_losses
from srnn.pruning.callback import PruningCallback
from srnn.training import processes as starting
from tests.conftest import QUIET
from tests.forking import SERVER, fork_ranks
from tests.training.test_resume import RUN, check_same_run, interrupt_after

TWO = "trainer.devices=2"


def made(data):
    data.setup()
    return data


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    "make",
    [
        lambda: made(PythonSource(batch_size=8, sequence_length=16)),
        lambda: made(Adding(sequence_length=5, train_sequences=50, eval_sequences=3, batch_size=8)),
    ],
    ids=["text", "sequences"],
)
def test_ranks_share_every_training_batch(make, ranks):
    whole, shares = make(), [make() for _ in range(ranks)]
    for rank, data in enumerate(shares):
        data.share(rank, ranks)
        assert len(data.train_dataloader()) == len(whole.train_dataloader())
        assert torch.equal(next(iter(data.val_dataloader()))[0], next(iter(whole.val_dataloader()))[0]), "all of it"
    for _, wanted, *parts in zip(
        range(20), whole.train_dataloader(), *(data.train_dataloader() for data in shares), strict=False
    ):
        for place in (0, 1):
            assert torch.equal(torch.cat([part[place] for part in parts]), wanted[place])
    assert shares[0].state_dict() == shares[-1].state_dict()


def test_the_order_of_sequences_is_that_of_the_seed_whatever_is_drawn_later():
    data = made(Adding(sequence_length=5, train_sequences=50, eval_sequences=3, batch_size=8))
    batches = data.batches("train")
    before = batches.fetch(1, 2)
    torch.manual_seed(17)
    assert torch.equal(batches.fetch(1, 2)[0], before[0])


def test_mean_over_ranks_of_losses_is_the_loss_of_the_joined_batch(monkeypatch):
    logits_BTV, targets_BT = torch.randn(4, 3, 7, requires_grad=True), torch.randint(7, (4, 3))
    targets_BT[2:] = IGNORED  # padding: all that the second rank has
    targets_BT[1, 2] = IGNORED
    whole = mean_of_losses(logits_BTV, targets_BT)
    (wanted,) = torch.autograd.grad(whole, logits_BTV)
    monkeypatch.setattr(distributed, "ranks", lambda: 2)
    monkeypatch.setattr(distributed, "mean_over_ranks", lambda count: torch.tensor(2.5))
    losses = [mean_of_losses(logits_BTV[rows], targets_BT[rows]) for rows in (slice(0, 2), slice(2, 4))]
    shared = sum(losses) / 2
    assert torch.allclose(shared, whole)
    assert torch.allclose(torch.autograd.grad(shared, logits_BTV)[0], wanted)


def test_one_process_is_its_own_rank():
    state = (torch.ones(2), {"a": 1})
    assert distributed.own(distributed.gather(state)) == state
    assert distributed.any_rank(True, False) == [True, False]
    with pytest.raises(
        UserError, match=r"run with trainer\.devices=2, which cannot be resumed with trainer\.devices=1"
    ):
        distributed.own([1, 2])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trainer.cuda_graph=true"], "trainer.cuda_graph=true works on one device only"),
        (["dataset.batch_size=7"], "dataset.batch_size=7 cannot be shared equally by trainer.devices=2"),
        (["trainer.accelerator=gpu"], "trainer.accelerator=gpu trainer.devices=2 cannot be used here"),
    ],
)
def test_what_cannot_be_shared_is_refused(tmp_path, capsys, overrides, words):
    if "trainer.accelerator=gpu" in overrides and torch.cuda.device_count() > 1:
        pytest.skip("there are GPUs")
    assert main([*QUIET, TWO, *overrides, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert words in capsys.readouterr().err


def test_a_process_of_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([*QUIET, TWO, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert "start srnn once, without torchrun" in capsys.readouterr().err


def start_instead(monkeypatch, code):
    def start(folder, place, resumes, errors):
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=errors)

    monkeypatch.setattr(starting, "_start", start)


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("import sys; sys.exit('no memory here')", "rank 1 of trainer.devices=2 failed: no memory here"),
        ("import os; os.kill(os.getpid(), 9)", "rank 1 of trainer.devices=2 was killed by SIGKILL"),
    ],
    ids=["failed", "killed"],
)
def test_a_rank_that_ends_before_training_ends_the_run(tmp_path, capsys, monkeypatch, code, words):
    start_instead(monkeypatch, code)
    assert main([*QUIET, TWO, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert words in capsys.readouterr().err
    assert not dist.is_initialized()


def test_ranks_leave_their_group_before_they_wait_for_one_another(tmp_path, monkeypatch):
    """NCCL's leave together: one that waited first would wait in vain."""
    start_instead(monkeypatch, "import os; os.write(1, b'ready')")
    calls = []
    monkeypatch.setattr(starting, "_leave", lambda alone=False: calls.append("alone" if alone else "together"))
    monkeypatch.setattr(starting, "_wait", lambda processes: calls.append("waited"))
    with starting.all_ranks(tmp_path, starting.Place(0, 2), resumes=False):
        calls.append("trained")
    assert calls == ["trained", "together", "waited", "alone"]


def files(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [[], ["dataset=digits"]], ids=["text", "digits"])
def test_two_processes_are_one_on_the_joined_batch(tmp_path, capfd, monkeypatch, text_run, overrides):
    chosen = [o for o in QUIET if not overrides or not o.startswith(("dataset.sequence_length", "model.embedding"))]
    before = dict(os.environ)
    one, two, where = text_run, tmp_path / "gru_gradual_s0", ["-m", f"hydra.sweep.dir={tmp_path}"]  # a job of a sweep
    if overrides:  # that on text starts its other rank as a user's does
        fork_ranks(monkeypatch)
        one, where = tmp_path / "one", [f"hydra.run.dir={two}"]
        assert main([*chosen, *overrides, f"hydra.run.dir={one}"]) == 0
        capfd.readouterr()
    assert main([*chosen, *overrides, TWO, *where]) == 0
    printed = capfd.readouterr()
    told = printed.out if overrides else (two / "log.txt").read_text()
    assert len([line for line in told.splitlines() if line.startswith("epoch ")]) == 5
    assert "rank" not in (told + printed.out + printed.err).lower(), "only the run speaks"
    assert files(two) == files(one) | (set() if overrides else {"log.txt"})
    assert not dist.is_initialized()
    assert {k: v for k, v in os.environ.items() if "MASTER" in k or "RANK" in k or "OMP" in k} == {
        k: v for k, v in before.items() if "MASTER" in k or "RANK" in k or "OMP" in k
    }
    wanted, got = (read_weights(folder / "checkpoints/best.ckpt") for folder in (one, two))
    for name, weight in wanted.items():
        assert torch.equal(got[name] != 0, weight != 0), name
        assert torch.allclose(got[name], weight, atol=1e-4), name
    scores = [json.loads((folder / "report.json").read_text())["scores"] for folder in (one, two)]
    assert scores[1]["test_packed"]["loss"] == pytest.approx(scores[0]["test_packed"]["loss"], rel=1e-3)
    rows = [(folder / "metrics.csv").read_text().splitlines() for folder in (one, two)]
    assert len(rows[0]) == len(rows[1])


def signal_rank_1(monkeypatch, step, number):
    """Send a signal to the other rank after a step."""
    processes, start, hook = [], starting._start, PruningCallback.on_train_batch_end

    def noted(*arguments):
        processes.append(start(*arguments))
        return processes[-1]

    def send(self, trainer, *rest):
        hook(self, trainer, *rest)
        if trainer.global_step == step:
            processes[0].send_signal(number)

    monkeypatch.setattr(starting, "_start", noted)
    monkeypatch.setattr(PruningCallback, "on_train_batch_end", send)


@pytest.mark.slow
def test_stopped_or_killed_and_resumed_with_two_processes(tmp_path, monkeypatch, capsys):
    """With dropout, each rank's recurrent state and random numbers matter. Any rank may be asked to stop, or killed."""
    fork_ranks(monkeypatch)
    assert main([*RUN, TWO, f"hydra.run.dir={tmp_path}/one"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        assert main([*RUN, TWO, f"hydra.run.dir={tmp_path}/two"]) == 130
    with monkeypatch.context() as patch:
        signal_rank_1(patch, 18, signal.SIGTERM)
        assert main([f"resume={tmp_path}/two"]) == 130
    with monkeypatch.context() as patch:
        signal_rank_1(patch, 28, signal.SIGKILL)
        assert main([f"resume={tmp_path}/two"]) == 2
    assert "rank 1 of trainer.devices=2 was killed by SIGKILL" in capsys.readouterr().err
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")


def be_killed_beside_a_rank(life):
    """In a process of its own: be killed while another rank computes by itself, as in a long evaluation."""
    heard, said = os.pipe()
    if os.fork() == 0:
        starting._channel = said
        with starting.all_ranks(Path(), starting.Place(1, 2), resumes=False):
            time.sleep(20)
        os._exit(0)
    assert os.read(heard, 5) == b"ready"
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_no_rank_outlives_a_killed_run():
    """One that waits for the others hears from gloo that they are gone; one that computes does not."""
    end, life = multiprocessing.Pipe(duplex=False)  # closed when nobody holds it
    run = SERVER.Process(target=be_killed_beside_a_rank, args=(life,))
    run.start()
    life.close()
    run.join(60)
    assert run.exitcode == -signal.SIGKILL
    assert end.poll(10)
    with pytest.raises(EOFError):
        end.recv()
