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
        match = load_weights(model, read_initial(str(tmp_path / name)), partly=True)
        assert match.renamed["rnn.weight_hh_l0"] == "gru.weight_hh_l0"
        assert match.renamed["embedding.weight"] == "encoder.weight"
        assert torch.equal(model.rnn.weight_hh_l0, theirs.gru.weight_hh_l0)
        assert match.fresh == ["decoder.weight", "decoder.bias"]
        assert sorted(match.unused) == ["extra.bias", "extra.weight"]
    report = train(tmp_path / "run", f"init_from={tmp_path}/theirs.pt", "init_partly=true", "kernel=dense")
    shown = capsys.readouterr().out
    assert "rnn.weight_hh_l0: taken from gru.weight_hh_l0" in shown
    assert "decoder.weight: not there, starts anew" in shown
    assert "extra.weight: has no place in this model" in shown
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.001)


def saved_as(wrapped, path, vocabulary_size=9):
    theirs = gru(5, 4, vocabulary_size=vocabulary_size)
    torch.save(wrapped(theirs.state_dict()), path)
    return theirs


@pytest.mark.parametrize(
    "wrapped",
    [
        lambda state: {"epoch": 5, "model_state_dict": state, "loss": 0.4, "optimizer": {"state": {}, "groups": []}},
        lambda state: {"model_state_dict": state, "loss": torch.tensor(0.4), "vocabulary": ["a", "b"]},
        lambda state: {"net": {f"module.{name}": weight for name, weight in state.items()}},
        lambda state: {"ema": state, "state_dict": state},
        lambda state: state | {"rnn._extra_state": {"step": torch.tensor(3)}},
    ],
)
def test_weights_one_level_down_are_found(tmp_path, wrapped):
    theirs = saved_as(wrapped, tmp_path / "theirs.pt")
    model = gru(5, 4, vocabulary_size=9)
    match = load_weights(model, read_initial(str(tmp_path / "theirs.pt")))
    assert len(match.loaded) == len(theirs.state_dict()) == 7
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[name])


def test_several_networks_in_a_file_are_named(tmp_path):
    saved_as(lambda state: {"ema": state, "model": state}, tmp_path / "theirs.pt")
    with pytest.raises(UserError) as error:
        read_initial(str(tmp_path / "theirs.pt"))
    assert "ema (7 weights), model (7 weights)" in str(error.value)
    assert "torch.load('theirs.pt')['ema']" in str(error.value)


def test_a_cells_weights_are_a_layers(tmp_path):
    cell, model = nn.GRUCell(4, 5), gru(5, 4, vocabulary_size=9)
    saved = {f"cell.{name}": weight for name, weight in cell.state_dict().items()}
    ends = {name: weight for name, weight in model.state_dict().items() if "rnn" not in name}
    torch.save(saved | ends, tmp_path / "cell.pt")
    match = load_weights(model, read_initial(str(tmp_path / "cell.pt")))
    assert match.renamed["rnn.weight_ih_l0"] == "cell.weight_ih"
    assert match.fresh == []
    assert torch.equal(model.rnn.weight_hh_l0, cell.weight_hh)


def test_what_almost_fits_is_listed_with_both_shapes(tmp_path):
    saved_as(dict, tmp_path / "theirs.pt", vocabulary_size=10)
    model = gru(5, 4, vocabulary_size=9)
    initial = read_initial(str(tmp_path / "theirs.pt"))
    with pytest.raises(UserError) as error:
        load_weights(model, initial)
    assert "embedding.weight, decoder.weight, decoder.bias would start anew" in str(error.value)
    assert "embedding.weight: 9x4 here, in the file embedding.weight 10x4" in str(error.value)
    assert str(error.value).endswith("Where that is meant, add init_partly=true.")
    match = load_weights(model, initial, partly=True)
    assert len(match.loaded) == 4
    assert "decoder.bias: 9 here, in the file decoder.bias 10, starts anew" in match.lines()


def test_two_recurrent_parts_are_both_listed(tmp_path):
    parts = nn.ModuleDict({"encoder": nn.GRU(4, 5), "translator": nn.GRU(4, 5)})
    torch.save(parts.state_dict(), tmp_path / "two.pt")
    with pytest.raises(UserError) as error:
        load_weights(gru(5, 4, vocabulary_size=9), read_initial(str(tmp_path / "two.pt")))
    assert (
        "rnn.weight_hh_l0: 15x5 here, and more than one could be meant, such as encoder.weight_hh_l0 15x5, "
        "translator.weight_hh_l0 15x5"
    ) in str(error.value)
    assert "save the part that is meant alone" in str(error.value)


def test_text_with_a_file_without_a_vocabulary_is_warned_about(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\n" * 300)
    text = ["dataset=text", f"dataset.path={tmp_path}/a.txt"]
    train(tmp_path / "one", *text)
    torch.save(read_weights(tmp_path / "one/checkpoints/best.ckpt"), tmp_path / "plain.pt")
    for given, level, warned in (("plain.pt", "characters", True), ("one", "characters", False)):
        capsys.readouterr()
        train(tmp_path / f"of_{given}", *text, f"dataset.level={level}", f"init_from={tmp_path}/{given}")
        shown = capsys.readouterr().out
        assert "7 weights loaded" in shown
        assert ("warning: the file has no vocabulary" in shown) is warned


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
