"""init_from: pruning and fine-tuning an existing network."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from srnn.__main__ import main
from srnn.errors import UserError
from srnn.inference.packed_file import read
from srnn.inference.weights import read_weights
from srnn.models import gru
from srnn.training.start_from import load_weights, read_initial
from tests.conftest import QUIET, train


def test_fine_tuning_a_pruned_network_keeps_its_zeros(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\n" * 300)
    (tmp_path / "b.txt").write_text("ponml kjihgf edcba?\n" * 300)  # other characters, another order
    one, two = tmp_path / "one", tmp_path / "two"
    first = train(one, "dataset=text", f"dataset.path={tmp_path}/a.txt", "kernel=dense", "packed.values=fp32")
    capsys.readouterr()
    report = train(two, "dataset=text", f"dataset.path={tmp_path}/b.txt", f"init_from={one}", "pruning=fixed",
                   "kernel=dense", "packed.values=fp32")  # fmt: skip
    assert "7 weights loaded" in capsys.readouterr().out
    assert report["init_from"]["fresh"] == report["init_from"]["unused"] == []
    assert report["sparsity"]["reached"] >= first["sparsity"]["reached"] - 0.001
    assert report["sparsity"]["wanted"] is None
    before, after = (read_weights(run / "checkpoints/best.ckpt") for run in (one, two))
    for name, weight in after.items():
        assert (weight[before[name] == 0] == 0).all() or weight.ndim == 1, name
        assert not torch.equal(weight, before[name]), "it went on learning"
    vocabularies = [read(run / "model.safetensors").vocabulary.to_dict() for run in (one, two)]
    assert vocabularies[0] == vocabularies[1], "a character keeps its number"
    # The checkpoint and the packed file are the same start.
    for source in ("checkpoints/best.ckpt", "model.safetensors"):
        initial = read_initial(f"{one}/{source}")
        assert initial.vocabulary.to_dict() == vocabularies[0]
        assert initial.weights.keys() == before.keys()
        assert all(torch.equal(initial.weights[name], weight) for name, weight in before.items())


def test_a_dense_network_of_anybodys_is_pruned(tmp_path, capsys):
    """A plain state_dict with other names: what is the only one of its kind is found, the rest is listed."""

    class Theirs(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Embedding(50, 8)
            self.gru = nn.GRU(8, 24)
            self.extra = nn.Linear(3, 3)

    theirs = Theirs()
    saved = {f"module.{name}": weight for name, weight in theirs.state_dict().items()}
    torch.save(saved, tmp_path / "theirs.pt")
    save_file(saved, tmp_path / "theirs.safetensors")
    for name in ("theirs.pt", "theirs.safetensors"):
        model = gru(24, 8, vocabulary_size=50)
        match = load_weights(model, read_initial(str(tmp_path / name)))
        assert match.renamed["rnn.weight_hh_l0"] == "gru.weight_hh_l0"
        assert match.renamed["embedding.weight"] == "encoder.weight"
        assert torch.equal(model.rnn.weight_hh_l0, theirs.gru.weight_hh_l0)
        assert match.fresh == ["decoder.weight", "decoder.bias"]
        assert sorted(match.unused) == ["extra.bias", "extra.weight"]
    report = train(tmp_path / "run", f"init_from={tmp_path}/theirs.pt", "kernel=dense")
    shown = capsys.readouterr().out
    assert "rnn.weight_hh_l0: taken from gru.weight_hh_l0" in shown
    assert "decoder.weight: not there, starts anew" in shown
    assert "extra.weight: has no place in this model" in shown
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.001)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "is no checkpoint, or damaged"),
        (b"\x80\x04garbage", "is no checkpoint, or damaged"),
        ([1, 2], "it holds a list, not weights"),
        ({"a": 1}, "it holds no weights by name"),
        ({"a": torch.zeros(3)}, "none of its weights fits the model; it has a 3, and the model embedding.weight 9x4"),
    ],
)
def test_what_cannot_be_started_from(tmp_path, content, words):
    path = tmp_path / "given.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match=words):
        load_weights(gru(5, 4, vocabulary_size=9), read_initial(str(path)))


def test_a_folder_without_a_run_and_a_network_without_zeros(tmp_path, capsys):
    assert main([*QUIET, f"init_from={tmp_path}", f"hydra.run.dir={tmp_path}/run"]) == 2
    assert "this folder is no finished run" in capsys.readouterr().err
    assert main([*QUIET, "pruning=fixed", f"hydra.run.dir={tmp_path}/other"]) == 2
    assert "here is none: give init_from=FILE" in capsys.readouterr().err


class _Evil:
    def __reduce__(self):
        return (print, ("code from a checkpoint ran",))


def test_no_code_in_a_checkpoint_is_run(tmp_path, capsys):
    torch.save({"a": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="is no checkpoint, or damaged"):
        read_initial(str(tmp_path / "evil.pt"))
    assert "ran" not in capsys.readouterr().out
