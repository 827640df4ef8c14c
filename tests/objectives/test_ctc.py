"""CTC: its loss, greedy decoding, error rates, and runs on generated speech."""

import filecmp
import io
import json
import os
import signal
import sys

import jiwer
import numpy as np
import pytest
import soundfile
import torch
from torch.nn import functional as F

import srnn
from srnn.__main__ import main
from srnn.config.composing import compose_settings
from srnn.datasets import Manifest
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from srnn.models import Recurring, deepspeech2, gru
from srnn.models.decoding import greedy
from srnn.objectives import Classification, Ctc
from srnn.objectives.ctc import CtcScore, ctc_losses, impossible
from srnn.objectives.teacher import Teacher, softened_cross_entropy
from srnn.pruning.callback import PruningCallback
from srnn.recording.console import print_report
from srnn.training.preparing import prepare
from srnn.training.teaching import _check_steps
from srnn.vocabulary import Characters
from tests.speech_files import TEXTS, write_speech

CHOSEN = ["model=deepspeech2_small", "model.hidden_size=32", "model.num_layers=1", "model.channels=4"]
CHOSEN += ["dataset=manifest", "dataset.features=mel", "dataset.normalise=running", "dataset.batch_size=8"]
CHOSEN += ["pruning.sparsity=0.6"]


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"), [*TEXTS, "ccb", "ac", "bcb", "ca b"])


def data_of(path, batch_size=16, **options):
    data = Manifest(str(path), str(path), str(path), batch_size=batch_size, features="mel", **options)
    data.setup()
    return data


def small(data, **options):
    torch.manual_seed(0)
    return deepspeech2("rnn", 32, 1, channels=4, **options, **data.sizes)


def test_the_loss_is_that_of_all_alignments():
    """Against the sum over every path of 4 steps."""
    logits_BTV = torch.randn(1, 4, 3)
    probabilities_TV = logits_BTV[0].softmax(-1)
    total = 0.0
    for path in torch.cartesian_prod(*[torch.arange(3)] * 4):
        if greedy(F.one_hot(path, 3)[None].float(), torch.tensor([4])) == [[1, 1]]:
            total += probabilities_TV[torch.arange(4), path].prod()
    losses_B = ctc_losses(logits_BTV, torch.tensor([4]), torch.tensor([[1, 1, IGNORED]]))
    assert losses_B.item() == pytest.approx(-total.log().item(), rel=1e-5)


def test_what_pads_counts_for_nothing():
    logits_BTV, targets_BU = torch.randn(2, 6, 4), torch.tensor([[1, 2], [3, IGNORED]])
    losses_B = ctc_losses(logits_BTV, torch.tensor([6, 3]), targets_BU)
    alone = ctc_losses(logits_BTV[1:, :3], torch.tensor([3]), torch.tensor([[3]]))
    assert losses_B[1].item() == pytest.approx(alone.item(), rel=1e-5)
    half = ctc_losses(logits_BTV.bfloat16(), torch.tensor([6, 3]), targets_BU)
    assert half.dtype == torch.float32


def test_transcripts_longer_than_their_steps_are_counted_and_teach_nothing():
    logits_BTV = torch.randn(3, 3, 4, requires_grad=True)
    targets_BU, lengths_B = torch.tensor([[1, 1, 2], [1, 2, 3], [1, 1, IGNORED]]), torch.tensor([3, 3, 2])
    assert impossible(lengths_B, targets_BU) == 2
    losses_B = ctc_losses(logits_BTV, lengths_B, targets_BU)
    assert (losses_B == 0).tolist() == [True, False, True]
    losses_B.sum().backward()
    assert logits_BTV.grad.isfinite().all()
    assert (logits_BTV.grad[[0, 2]] == 0).all()


def test_error_rates_are_jiwer_s():
    vocabulary = Characters([" ", "a", "b"])
    said = ["ab a", "b", "aa bb ab"]
    heard = ["ab b", "", "a bb ab a"]
    score = CtcScore(vocabulary)
    for each, other in zip(said, heard, strict=True):
        target_BU = torch.from_numpy(vocabulary.encode(each))[None]
        tokens = torch.from_numpy(vocabulary.encode(other))
        steps = torch.stack([tokens, torch.zeros_like(tokens)], 1).flatten()  # a blank after each character
        steps = torch.cat([steps, torch.zeros(20 - len(steps), dtype=torch.long)])
        score.update(10 * F.one_hot(steps, 4)[None].float(), torch.tensor([20]), target_BU)
    found = score.compute()
    assert found["cer"].item() == pytest.approx(jiwer.cer(said, heard))
    assert found["wer"].item() == pytest.approx(jiwer.wer(said, heard))


def test_a_few_transcripts_are_kept_from_the_shortest_to_the_longest():
    vocabulary = Characters(["a"])
    score = CtcScore(vocabulary)
    assert score.examples() == []
    for count in range(1, 9):
        steps = torch.tensor([1, 0] * count)
        target_BU = torch.ones(2, count, dtype=torch.long)
        score.update(F.one_hot(steps, 2)[None].float().repeat(2, 1, 1), torch.tensor([2 * count] * 2), target_BU)
    assert score.examples() == [{"said": "a" * n, "heard": "a" * n} for n in (1, 3, 6, 8)]


def test_it_learns_from_a_teacher_step_by_step(listed):
    """Steps that pad an utterance count for nothing."""
    data = data_of(listed)
    objective = Ctc(small(data), {}, data)
    teacher = deepspeech2("gru", 8, 1, channels=2, **data.sizes).eval()
    x_BTI, targets_BU = data.batches("train").fetch(0, 0)
    objective.model.eval()
    hard = objective.training_step((x_BTI, targets_BU), 0).detach()
    objective.teacher = Teacher(teacher, objective.carried, temperature=2.0, weight=0.3)
    loss = objective.training_step((x_BTI, targets_BU), 0)
    logits_BTV, lengths_B = objective.model(x_BTI)
    theirs_BTV, _ = teacher(x_BTI)
    real = [(n, slice(0, int(length))) for n, length in enumerate(lengths_B)]
    mine, truth = (torch.cat([part[n, steps] for n, steps in real]) for part in (logits_BTV, theirs_BTV))
    assert len(mine) < logits_BTV[..., 0].numel()
    soft = softened_cross_entropy(mine, truth, 2.0).mean()
    torch.testing.assert_close(loss, 0.7 * hard + 0.3 * soft)
    assert objective.train_loss == hard


def test_networks_and_data_that_do_not_go_together(listed):
    data = data_of(listed)
    with pytest.raises(UserError, match=r"SequenceModel gives one answer.*choose model=deepspeech2"):
        Ctc(gru(8, **data.sizes), {}, data)
    with pytest.raises(UserError, match=r"DeepSpeech2 writes speech down.*choose model=gru"):
        Classification(small(data), {}, data)


def test_it_overfits_sixteen_utterances(listed):
    data = data_of(listed)
    model = small(data)
    objective = Ctc(model, {"name": "adam", "lr": 0.01}, data)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    batches = data.batches("train")
    for step in range(100):
        loss = objective.training_step(batches.fetch(0, 0), step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective.impossible == 0
    scores = Ctc.score(model, data, "test")
    assert scores["cer"] == scores["wer"] == 0
    assert scores["loss"] < 0.1


def train(folder, listed):
    """A network that streams too; returns the exit code."""
    chosen = [*CHOSEN, *(f"dataset.{part}={listed}" for part in ("train", "valid", "test"))]
    chosen += ["trainer.max_epochs=20", "optimizer.lr=0.02", "trainer.accelerator=cpu", "packed.values=fp32"]
    return main([*chosen, "kernel=csr", "tracking.mode=disabled", f"hydra.run.dir={folder}"])


@pytest.fixture(scope="module")
def run(listed, tmp_path_factory):
    """The folder of a run."""
    folder = tmp_path_factory.mktemp("ctc") / "run"
    assert train(folder, listed) == 0
    return folder


def test_a_stopped_run_goes_on_bit_for_bit(run, listed, tmp_path, monkeypatch):
    original = PruningCallback.on_train_batch_end

    def stop_once(self, trainer, *rest):
        original(self, trainer, *rest)
        if trainer.global_step == 15:  # in the middle of a pass
            monkeypatch.setattr(PruningCallback, "on_train_batch_end", original)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(PruningCallback, "on_train_batch_end", stop_once)
    assert train(tmp_path / "run", listed) == 130
    assert main(["resume", str(tmp_path / "run")]) == 0
    for name in ("metrics.csv", "model.safetensors"):
        assert filecmp.cmp(run / name, tmp_path / "run" / name, shallow=False), name


def test_a_run_prunes_packs_and_scores_it(run):
    report = json.loads((run / "report.json").read_text())
    assert report["sparsity"]["reached"] == pytest.approx(0.6, abs=0.001)
    test, packed = report["scores"]["test"], report["scores"]["test_packed"]
    assert packed["cer"] == test["cer"] < 0.2
    assert packed["loss"] == pytest.approx(test["loss"], rel=1e-3)
    assert report["left_out"] == {}
    assert {row["layer_type"] for row in report["layers"]} == {"recurrent", "linear"}


def test_the_report_shows_transcripts(run, capsys):
    report = json.loads((run / "report.json").read_text())
    examples = [v["examples"] for v in report["validations"]]
    assert all(len(each) == 2 and each[0].keys() == {"said", "heard"} for each in examples)
    assert examples[0][0]["said"] == "c", "of the shortest recording"
    print_report(report)
    assert f"said: {examples[-1][0]['said']}" in capsys.readouterr().out


def test_who_may_teach(run, listed):
    chosen = [*CHOSEN, *(f"dataset.{part}={listed}" for part in ("train", "valid", "test")), "model.hidden_size=8"]
    for teacher in (run, run / "checkpoints/best.ckpt"):
        prepared = prepare(compose_settings([*chosen, f"distill.teacher={teacher}"]))
        assert prepared.objective.teacher.model.layers[0].recurrence.hidden_size == 32
        with pytest.raises(UserError, match=r"normalise=running and this run has.*normalise=utterance"):
            prepare(compose_settings([*chosen, "dataset.normalise=utterance", f"distill.teacher={teacher}"]))
    slower = Recurring("gru", 4)
    slower.output_lengths = lambda frames: frames // 4
    with pytest.raises(UserError, match="it gives 25 outputs for 100 frames, this run's network 50"):
        _check_steps("FILE", slower, prepared.model)


def test_commands_take_a_run_of_speech(run, tmp_path, capsys):
    assert main(["evaluate", str(run)]) == 0
    assert "cer" in capsys.readouterr().out
    assert main(["generate", str(run)]) == 2
    assert "is no language model" in capsys.readouterr().err
    assert main(["export", str(run), "format=onnx", f"--output={tmp_path}/onnx"]) == 2
    assert "srnn: " in capsys.readouterr().err


def test_transcribe(run, listed, capsys, monkeypatch):
    folder = listed.parent
    assert main(["transcribe", str(run), "--audio", str(folder)]) == 0
    told = capsys.readouterr()
    lines = dict(line.split("\t") for line in told.out.splitlines())
    assert list(lines) == sorted(str(path) for path in folder.glob("*.wav"))
    said = sum(lines[str(folder / f"{n}.wav")] == text for n, text in enumerate(TEXTS))
    assert said >= len(TEXTS) / 2
    assert "real-time factor" in told.err
    one = folder / "3.wav"
    raw = soundfile.read(one, dtype="int16")[0].tobytes()
    pipe = type("Pipe", (), {"buffer": io.BytesIO(raw)})
    for options in ([str(one)], [str(one), "--stream=true"], ["-", "--stream", "true"]):
        monkeypatch.setattr("sys.stdin", pipe)
        assert main(["transcribe", str(run), "--audio", *options]) == 0
        assert capsys.readouterr().out == lines[str(one)] + "\n"
    assert main(["transcribe", str(run), "--audio", str(one), "--beam", "20"]) == 0
    assert capsys.readouterr().out
    (folder / "phrases.txt").write_text(f"{TEXTS[0]}\n\n{TEXTS[3]}\n")
    assert main(["transcribe", str(run), "--audio", str(one), f"--phrases={folder}/phrases.txt"]) == 0
    assert capsys.readouterr().out == TEXTS[3] + "\n"
    assert main(["transcribe", str(run), "--audio", str(one), f"--words={folder}/phrases.txt"]) == 0
    assert set(capsys.readouterr().out.split()) == {TEXTS[3]}
    quiet = np.zeros(32_000, np.int16).tobytes()
    monkeypatch.setattr("sys.stdin", type("Pipe", (), {"buffer": io.BytesIO(raw + quiet + raw + quiet)}))
    assert main(["transcribe", str(run), "--audio", "-", "--stream=true", "--pause=0.5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert srnn.load(run / "model.safetensors").transcriber()(one) == lines[str(one)]
    few = folder / "few"
    few.mkdir()
    (few / "0.wav").write_bytes(b"RIFF")
    (few / "1.wav").write_bytes(one.read_bytes())
    assert main(["transcribe", str(run), "--audio", str(few)]) == 2
    told = capsys.readouterr()
    assert told.out == f"{few / '1.wav'}\t{lines[str(one)]}\n"
    assert f"1 of 2 recordings are left out: {few / '0.wav'} is no audio" in told.err
    monkeypatch.setitem(sys.modules, "soundfile", None)
    assert main(["transcribe", str(run), "--audio", str(few)]) == 2
    assert capsys.readouterr().err.count("pip install") == 1


def test_transcribe_says_what_is_wrong(run, text_run, tmp_path, capsys):
    (tmp_path / "wrong.txt").write_text("ab\nzab\n")
    (tmp_path / "empty.txt").write_text("\n")
    for words, told in (
        ([str(run), "--audio", str(tmp_path / "gone.wav")], "no such file or folder"),
        ([str(run), "--audio", str(tmp_path)], "this folder has no .wav"),
        ([str(run), "--audio", "-", "--stream=true", "--beam=3"], "looks at whole recordings"),
        ([str(run), "--audio", "-", "--stream=true", "--phrases=X"], "--phrases=X looks at whole recordings"),
        ([str(run), "--audio", "-", "--phrases=X", "--beam=3"], "exact without a beam"),
        ([str(run), "--audio", "-", "--phrases=X", "--words=Y"], "--phrases=X are whole texts"),
        (
            [str(run), "--audio", "-", f"--words={tmp_path}/wrong.txt"],
            "wrong.txt: this network does not write 'z'",
        ),
        ([str(run), "--audio", "-", "--device=moon"], "device='moon' cannot be used"),
        ([str(run), "--audio", "-", f"--phrases={tmp_path}/X"], "No such file"),
        ([str(run), "--audio", "-", f"--phrases={tmp_path}/wrong.txt"], "does not write 'z', which is in 'zab'"),
        ([str(run), "--audio", "-", f"--phrases={tmp_path}/empty.txt"], "must have some"),
        ([str(text_run), "--audio", "-"], "writes no speech down"),
    ):
        assert main(["transcribe", *words]) == 2
        assert told in capsys.readouterr().err
