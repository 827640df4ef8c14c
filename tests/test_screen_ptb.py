"""docs/screen_ptb.py trains many networks at once: each as srnn's own parts train it alone."""

import json
import math

import pytest
import torch
from torch.nn import functional as F

from srnn.config.composing import compose_settings
from srnn.inference.packed_file import read
from srnn.inference.unpacking import unpack
from srnn.objectives.teacher import softened_cross_entropy
from srnn.pruning import Pruner, RunLength
from srnn.registry import register
from srnn.training.preparing import build_data
from tests.conftest import ROOT

SMALL = (
    f"dataset=text dataset.path={ROOT}/CONTRIBUTING.md dataset.level=words dataset.vocabulary_limit=60 "
    "dataset.batch_size=3 dataset.sequence_length=5 dataset.eval_streams=2 model.hidden_size=9 model.embedding_size=9 "
    "model.dropout=0 model.embedding_dropout=0 optimizer.lr=2 trainer.max_epochs=5 trainer.limit_train_batches=12 "
    "trainer.limit_eval_batches=3"
).split()


@pytest.fixture
def screen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import screen_ptb

    with torch.no_grad():
        yield screen_ptb.main


def plain_loop(options, teacher):
    """The perplexities after each epoch, and the pruner."""
    settings = compose_settings(options)
    torch.manual_seed(settings.seed)
    data = build_data(settings.dataset)
    model = register.build("model", settings.model, **data.sizes)
    data.limits = {"train": 12, "valid": 3}
    built = register.build("optimizer", settings.optimizer, parameters=list(model.parameters()), fused=False)
    optimizer, schedule = built["optimizer"], built["lr_scheduler"]
    pruner = Pruner(model, settings.pruning, RunLength(60, 12), optimizer)
    found = []
    for _ in range(5):
        state = teachers = None
        for tokens_BT, targets_BT in data.limited("train"):
            logits, state = model(tokens_BT, state)
            state = tuple(part.detach() for part in state)
            loss = F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
            if teacher is not None:
                with torch.no_grad():
                    taught, teachers = teacher(tokens_BT, teachers)
                part, t = settings.distill.weight, settings.distill.temperature
                losses = softened_cross_entropy(logits.flatten(0, 1), taught.flatten(0, 1), t)
                loss = (1 - part) * loss + part * losses.mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.trainer.gradient_clip_val)
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        schedule.step()
        nats, count, state = 0.0, 0, None
        with torch.no_grad():
            for tokens_BT, targets_BT in data.limited("valid"):
                logits, state = model(tokens_BT, state)
                nats += float(F.cross_entropy(logits.flatten(0, 1), targets_BT.flatten(), reduction="sum"))
                count += targets_BT.numel()
        found.append(math.exp(nats / count))
    return found, pruner


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_a_network_among_others_is_trained_as_alone(screen, tmp_path):
    def scores(recipes):
        (tmp_path / "recipes.json").write_text(json.dumps(recipes))
        screen([str(tmp_path / "recipes.json"), str(tmp_path / "scores.jsonl"), *SMALL])
        return [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]

    file = tmp_path / "dense.safetensors"
    dense = {"name": "dense", "options": "experiment=ptb_medium pruning=none seed=1", "save": str(file)}
    options = [
        f"experiment=ptb_medium_sparse distill.teacher={file} pruning={pruning}"
        for pruning in ("obd distill.temperature=2", "rigl seed=2 optimizer.weight_decay=1e-4")
    ]
    rows = scores([dense]) + scores([{"name": each, "options": each} for each in options])
    teacher = unpack(read(file))
    with torch.enable_grad():
        for row, taught in zip(rows, [None] + [teacher] * 2, strict=True):
            wanted, pruner = plain_loop([*row["options"].split(), *SMALL], taught)
            assert row["valid"] == pytest.approx(wanted, rel=1e-3)
            assert row["sparsity"] == pytest.approx(pruner.sparsity, abs=1e-5)
            assert row["complete"]
            assert math.isfinite(row["test_perplexity"])
