"""Distillation: the formula, the teacher's state, and who may teach."""

import json
import shutil

import pytest
import torch
from torch.nn import functional as F

from srnn.__main__ import main
from srnn.config.composing import compose_settings
from srnn.config.settings import Settings, teachers_of
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from srnn.inference.weights import read_weights
from srnn.models import gru, lstm
from srnn.models.recurrent import detach
from srnn.objectives import Objective
from srnn.objectives.teacher import Several, Teacher, softened_cross_entropy
from srnn.recording.report import run_beside
from srnn.run_folder import RunFolder
from srnn.training.cuda_graph import Graphed
from srnn.training.preparing import prepare
from srnn.training.start_from import read_initial
from srnn.training.teaching import OwnTeacher, _each
from tests.conftest import QUIET
from tests.forking import fork_ranks
from tests.training.test_resume import RUN, check_same_run, interrupt_after

SEQUENCES = [o for o in QUIET if not o.startswith(("dataset.sequence_length", "model.embedding"))]


def test_softened_cross_entropy_is_hintons():
    logits, teachers = torch.randn(5, 7, requires_grad=True), torch.randn(5, 7)
    found = softened_cross_entropy(logits, teachers, 3.0)
    p, log_p = (f(teachers / 3, -1) for f in (torch.softmax, torch.log_softmax))
    # Up to the teacher's own entropy it is the divergence of the two.
    divergence = F.kl_div(torch.log_softmax(logits / 3, -1), p, reduction="none").sum(-1)
    torch.testing.assert_close(found, 9 * (divergence - (p * log_p).sum(-1)))
    (slope,) = torch.autograd.grad(found.sum(), logits)
    torch.testing.assert_close(slope, 3 * (torch.softmax(logits.detach() / 3, -1) - p))


def loss_of(objective, batch):
    """Of a training step, and what the hard loss is."""
    objective.model.eval()
    return objective.training_step(batch, 0), objective.train_loss


def test_next_tokens_by_hand_over_two_batches():
    objective = prepare(compose_settings(QUIET)).objective
    size = objective.data.sizes["vocabulary_size"]
    teacher = lstm(7, 5, num_layers=2, vocabulary_size=size).eval()
    objective.teacher = Teacher(teacher, objective.carried, temperature=2.0, weight=0.3)
    tokens, targets = torch.randint(0, size, (4, 12)), torch.randint(0, size, (4, 12))
    targets[2:, 9:] = IGNORED
    teachers = teacher(tokens)[0].detach()
    for part in (slice(0, 5), slice(5, 12)):
        loss, hard = loss_of(objective, (tokens[:, part], targets[:, part]))
        counted = targets[:, part] != IGNORED
        logits = objective.model(tokens)[0][:, part].detach()
        soft = softened_cross_entropy(logits[counted], teachers[:, part][counted], 2.0).mean()
        torch.testing.assert_close(hard, F.cross_entropy(logits[counted], targets[:, part][counted]))
        torch.testing.assert_close(loss.detach(), 0.7 * hard + 0.3 * soft)
    objective.on_train_epoch_start()
    assert objective.teacher.state is None, "a pass starts from the beginning of the text"


def test_a_teacher_is_moved_once(monkeypatch):
    """Moving a module that is there already lays out its recurrent weights anew, at each step."""
    teacher = Teacher(gru(7, 5, vocabulary_size=9), lambda state: state, temperature=2.0, weight=0.3)
    moved = []
    monkeypatch.setattr(teacher.model, "to", moved.append)
    for _ in range(3):
        teacher(torch.randint(0, 9, (2, 4)))
    assert moved == [torch.device("cpu")]


@pytest.mark.gpu
def test_a_teacher_replayed_from_a_graph_says_the_same():
    model = lstm(24, 8, num_layers=2, vocabulary_size=30).cuda()
    batches = [torch.randint(0, 30, (5, steps), device="cuda") for steps in (12, 12, 7, 12, 12)]
    found = []
    for call in (None, Graphed(model, batches[0].cpu())):
        teacher = Teacher(model, detach, 2.0, 0.3, call)
        found.append([teacher(batch).clone() for batch in batches])
        teacher.state = None
        found.append([teacher(batches[3]).clone()])
    for plain, graphed in zip(found[0] + found[1], found[2] + found[3], strict=True):
        torch.testing.assert_close(graphed, plain)


@pytest.mark.parametrize("dataset", ["digits", "adding"])
def test_whole_sequences_by_hand(dataset):
    if dataset == "digits":
        pytest.importorskip("sklearn")
    objective = prepare(compose_settings([*SEQUENCES, f"dataset={dataset}"])).objective
    teacher = gru(7, **objective.data.sizes).eval()
    inputs, targets = next(iter(objective.data.train_dataloader()))
    objective.teacher = Teacher(teacher, objective.carried, temperature=2.0, weight=0.3)
    for _ in range(2):  # each sequence from a zero state
        loss, hard = loss_of(objective, (inputs, targets))
        outputs, teachers = objective.model(inputs)[0].detach(), teacher(inputs)[0].detach()
        if dataset == "digits":
            soft = softened_cross_entropy(outputs, teachers, 2.0).mean()
        else:
            soft = (outputs - teachers).square().mean()
        torch.testing.assert_close(loss.detach(), 0.7 * hard + 0.3 * soft)


def test_the_same_teacher_from_a_folder_a_checkpoint_and_a_packed_file(text_run):
    tokens = torch.randint(0, 90, (2, 9))
    found = []
    for name in ("", "/model.safetensors", "/checkpoints/best.ckpt", "/checkpoints/best-dense.ckpt"):
        run = prepare(compose_settings([*QUIET, "model.hidden_size=12", f"distill.teacher={text_run}{name}"]))
        assert not any(p.requires_grad for p in run.objective.teacher.model.parameters())
        assert not [key for key in run.objective.state_dict() if "teacher" in key], "no part of checkpoints"
        found.append(run.objective.teacher(tokens))
        start = run.model.state_dict()
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0], found[2], atol=2e-3, rtol=2e-3)  # fp16 in the packed file
    assert not torch.allclose(found[2], found[3], atol=1e-2)
    alone = prepare(compose_settings([*QUIET, "model.hidden_size=12"])).model.state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in alone.items()), "a teacher draws no numbers"


def test_several_teach_what_they_say_on_average(text_run):
    names = [text_run, text_run / "checkpoints/best-dense.ckpt"]
    batches, alone = [torch.randint(0, 90, (2, steps)) for steps in (5, 3)], []
    for name in names:
        teacher = prepare(compose_settings([*QUIET, f"distill.teacher={name}"])).objective.teacher
        alone.append([teacher(batch) for batch in batches])
    both = prepare(compose_settings([*QUIET, f"distill.teacher=[{names[0]},{names[1]}]"])).objective.teacher
    for batch, *one in zip(batches, *alone, strict=True):
        torch.testing.assert_close(both(batch), (one[0] + one[1]) / 2)
    each = [gru(7, 5, vocabulary_size=9) for _ in range(2)]
    whole = Teacher(Several(each), _each(lambda state: None), 2.0, 0.5)  # sequences that are read whole carry nothing
    whole(torch.zeros(2, 4, dtype=torch.long))
    assert whole.state is None


def test_who_cannot_teach(tmp_path, text_run, monkeypatch):
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\n" * 300)
    other = [*QUIET, "dataset=text", f"dataset.path={tmp_path}/a.txt"]
    shutil.copy(text_run / "checkpoints/best.ckpt", tmp_path / "alone.ckpt")
    for chosen, teacher, words in (
        (other, text_run, "it is of other data: its sizes are"),
        (other, text_run / "checkpoints/best.ckpt", "its vocabulary is not this run's"),
        ([*SEQUENCES, "dataset=adding"], text_run, "it is of other data"),
        (QUIET, tmp_path / "none", "no such file; give a run's folder"),
        (QUIET, tmp_path, "this folder is no finished run"),
        (QUIET, tmp_path / "alone.ckpt", "a checkpoint alone does not say which network it is of"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(compose_settings([*chosen, f"distill.teacher={teacher}"]))
    shutil.copytree(text_run, unfinished := tmp_path / "unfinished")
    for name in ("report.json", "model.safetensors"):
        (unfinished / name).unlink()
    told = "this run has not ended, so its best checkpoint until now is taken"
    with pytest.warns(UserWarning, match=f"distill.teacher=.*unfinished: {told}"):
        prepare(compose_settings([*QUIET, f"distill.teacher={unfinished}"]))
    with pytest.warns(UserWarning, match=f"init_from=.*unfinished: {told}"):
        read_initial(str(unfinished))
    with pytest.raises(UserError, match="self teaches alone"):
        teachers_of(["self", str(text_run)])
    settings = compose_settings([*QUIET, f"distill.teacher={text_run}"])
    monkeypatch.setattr("srnn.objectives.NextToken.imitation", Objective.imitation)
    with pytest.raises(UserError, match="the objective next_token has no `imitation`"):
        prepare(settings)


def test_the_best_dense_moment_teaches_what_comes_after(tmp_path, monkeypatch):
    """Stopped after it started to teach, and resumed, it is the uninterrupted run."""
    chosen = [*RUN, "distill.teacher=self", "distill.weight=0.8"]
    assert main([*chosen, f"hydra.run.dir={tmp_path}/one"]) == 0
    assert main([*RUN, f"hydra.run.dir={tmp_path}/alone"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 20)
        assert main([*chosen, f"hydra.run.dir={tmp_path}/two"]) == 130
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")
    dense, taught = ([read_weights(tmp_path / name / f"checkpoints/{kind}.ckpt") for name in ("one", "alone")]
                     for kind in ("best-dense", "best"))  # fmt: skip
    assert all(torch.equal(dense[0][name], weight) for name, weight in dense[1].items()), "until then it is alone"
    assert not all(torch.equal(taught[0][name], weight) for name, weight in taught[1].items())


def test_who_cannot_teach_itself():
    for options, words in (
        (["pruning=none"], "this run prunes nothing"),
        (["pruning=rigl"], "nothing is validated before pruning, which starts after step 0"),
        (["pruning.start_itr=1"], "starts after step 1; the first validation is after step"),
    ):
        with pytest.raises(UserError, match=words):
            prepare(compose_settings([*QUIET, "distill.teacher=self", *options]))


def test_its_teacher_is_the_network_of_the_best_dense_checkpoint(tmp_path):
    run = prepare(compose_settings([*QUIET, "distill.teacher=self"]))
    teacher, dense = run.objective.teacher, [True]
    weights = {name: torch.randn_like(weight) for name, weight in run.model.state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "best.ckpt")
    callback = OwnTeacher(teacher, lambda: dense[0], tmp_path / "best.ckpt")
    for _ in range(2):
        callback.on_train_batch_start(None, None)
        assert not teacher.ready
        assert run.objective.taught(torch.tensor(2.0), None, None, None) == 2
    dense[0] = False
    callback.on_train_batch_start(None, None)
    assert teacher.ready
    assert all(torch.equal(teacher.model.state_dict()[name], weight) for name, weight in weights.items())
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_the_run_beside_has_the_same_test_data(tmp_path, text_run):
    own = RunFolder(tmp_path / "own")
    shutil.copytree(text_run, tmp_path / "own", ignore=shutil.ignore_patterns("report.json", "checkpoints"))
    for given in (text_run, text_run / "model.safetensors", text_run / "checkpoints/best.ckpt"):
        assert run_beside(str(given), own)["run"] == text_run.name
    assert run_beside(None, own) is run_beside("self", own) is run_beside(str(tmp_path), own) is None
    made_in = json.loads(own.environment.read_text())
    made_in["data"]["test"] = "another"
    own.environment.write_text(json.dumps(made_in))
    assert run_beside(str(text_run), own) is None
    shutil.copytree(text_run, tmp_path / "damaged")
    (tmp_path / "damaged/report.json").write_text('{"scores": 3')
    assert run_beside(str(tmp_path / "damaged"), own) is None


def test_a_config_of_before_has_no_teacher():
    config = compose_settings(QUIET).as_dict()
    del config["distill"]
    assert prepare(Settings.check(config)).objective.teacher is None
    assert (
        prepare(Settings.check(config | {"distill": {"teacher": ""}})).objective.teacher is None
    )  # `distill.teacher=`


def test_stopped_and_resumed_is_the_uninterrupted_run(tmp_path, monkeypatch, text_run, capsys):
    teachers = f"[{text_run},{text_run}/checkpoints/best-dense.ckpt]"
    chosen = [*RUN, f"distill.teacher={teachers}", "distill.weight=0.8", "averaging=ema", "schedule=cosine"]
    before = read_weights(text_run / "checkpoints/best.ckpt")
    assert main([*chosen, f"hydra.run.dir={tmp_path}/one"]) == 0
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        assert main([*chosen, f"hydra.run.dir={tmp_path}/two"]) == 130
    assert main([f"resume={tmp_path}/two"]) == 0
    check_same_run(tmp_path / "one", tmp_path / "two")
    told = " ".join(capsys.readouterr().out.split())
    report, other = (json.loads((run / "report.json").read_text()) for run in (tmp_path / "two", text_run))
    assert report["beside"]["scores"] == other["scores"]["test_packed"]
    name = "bits_per_character"
    share = 100 * (report["scores"]["test_packed"][name] / other["scores"]["test_packed"][name] - 1)
    assert f"beside it: bits per character │ {share:+.2f} %" in told
    assert f"test, of {text_run.name} (90 % sparse)" in told
    after = read_weights(text_run / "checkpoints/best.ckpt")
    assert all(torch.equal(after[name], weight) for name, weight in before.items())


@pytest.mark.slow
def test_two_processes_with_teacher_schedule_and_average_are_one(tmp_path, monkeypatch, text_run):
    fork_ranks(monkeypatch)
    chosen = [*QUIET, f"distill.teacher={text_run}", "averaging=ema", "schedule=cosine", "schedule.warmup=3"]
    assert main([*chosen, f"hydra.run.dir={tmp_path}/one"]) == 0
    assert main([*chosen, "trainer.devices=2", f"hydra.run.dir={tmp_path}/two"]) == 0
    wanted, got = (read_weights(tmp_path / f"{name}/checkpoints/best.ckpt") for name in ("one", "two"))
    for name, weight in wanted.items():
        assert torch.equal(got[name] != 0, weight != 0), name
        assert torch.allclose(got[name], weight, atol=1e-4), name
    with monkeypatch.context() as patch:
        interrupt_after(patch, 13)
        assert main([*chosen, "trainer.devices=2", f"hydra.run.dir={tmp_path}/stopped"]) == 130
    assert main([f"resume={tmp_path}/stopped"]) == 0
    check_same_run(tmp_path / "two", tmp_path / "stopped")
