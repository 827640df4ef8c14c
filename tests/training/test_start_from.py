"""init_from: pruning and fine-tuning an existing network."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import srnn
from srnn.__main__ import main
from srnn.errors import UserError
from srnn.inference.packed_file import read, write
from srnn.inference.packing import pack
from srnn.inference.weights import read_weights
from srnn.models import gru, rnn
from srnn.training.init_vocabulary import read_tokens
from srnn.training.start_from import check_recurrence, load_weights, read_initial
from tests.conftest import QUIET, train


def test_fine_tuning_a_pruned_network_keeps_its_zeros(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\n" * 300)
    (tmp_path / "b.txt").write_text("ponml kjihgf edcba?\n" * 300)  # other characters, another order
    one, two = tmp_path / "one", tmp_path / "two"
    first = train(one, "dataset=text", f"dataset.path={tmp_path}/a.txt", "kernel=dense", "packed.values=fp32")
    capsys.readouterr()
    report = train(two, "dataset=text", f"dataset.path={tmp_path}/b.txt", f"init_from={one}", "pruning=fixed",
                   "kernel=dense", "packed.values=fp32")  # fmt: skip
    shown = capsys.readouterr().out
    assert "7 weights loaded" in shown
    assert "5.00 % of the training text is read as <unk>, one token for all: its vocabulary lacks '?'." in shown
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
    assert "save the part that is meant alone, or say which by init_map='{encoder.*: rnn.*}'" in str(error.value)


def two_parts(path, **more):
    parts = nn.ModuleDict({"encoder": nn.GRU(4, 5), "translator": nn.GRU(4, 5), "cell": nn.GRUCell(4, 5)} | more)
    torch.save(parts.state_dict(), path)
    return parts, read_initial(str(path))


def test_a_map_says_which_of_several_is_meant(tmp_path):
    ends = {"embedding": nn.Embedding(9, 4), "decoder": nn.Linear(5, 9)}
    parts, initial = two_parts(tmp_path / "two.pt", **ends)
    for init_map, source in (
        ({"encoder.*": "rnn.*"}, parts["encoder"].weight_hh_l0),
        ({"trans*.*": "*.*"}, None),
        ({"translator.*": "rnn.*"}, parts["translator"].weight_hh_l0),
        ({"cell.*": "rnn.*"}, parts["cell"].weight_hh),
        ({"cell.weight_hh": "rnn.weight_hh_l0", "encoder.*ih*": "rnn.*ih*"}, parts["cell"].weight_hh),
    ):
        model = gru(5, 4, vocabulary_size=9)
        if source is None:
            with pytest.raises(UserError, match="the model has no weight lator"):
                load_weights(model, initial, init_map=init_map)
            continue
        match = load_weights(model, initial, init_map=init_map)
        assert torch.equal(model.rnn.weight_hh_l0, source)
        assert torch.equal(model.embedding.weight, parts["embedding"].weight)
        assert match.loaded == ["embedding.weight", "decoder.weight", "decoder.bias"]
    assert match.renamed["rnn.weight_hh_l0"] == "cell.weight_hh"


@pytest.mark.parametrize(
    ("init_map", "words"),
    [
        (
            {"encodr.*": "rnn.*"},
            r"the file has no such weight\. Did you mean 'encoder\.\*'\? It has encoder\.weight_ih",
        ),
        ({"encoder.weight_hh": "rnn.weight_hh_l0"}, r"no such weight\. Did you mean 'encoder\.weight_hh_l0'"),
        ({"encoder.*": "rn.*"}, r"the model has no weight rn\.weight_ih_l0\. Did you mean 'rnn\.\*'"),
        ({"encoder.*": "rnn"}, "both sides must have as many stars"),
        ({"encoder.*": "rnn.*", "cell.*": "rnn.*"}, "both encoder.weight_ih_l0 and cell.weight_ih of the file become"),
        ({"encoder.weight_ih_l0": "rnn.weight_hh_l0"}, r"is 15x4 in the file, and rnn\.weight_hh_l0 15x5 in the model"),
    ],
)
def test_a_map_that_leads_nowhere(tmp_path, init_map, words):
    _, initial = two_parts(tmp_path / "two.pt")
    with pytest.raises(UserError, match=words):
        load_weights(gru(5, 4, vocabulary_size=9), initial, init_map=init_map)


LETTERS = [*"zyx", "\n", *"edcba"]  # an order of somebody else's


def letters(path, tokens=LETTERS):
    path.write_text(json.dumps(tokens))
    return read_tokens(str(path), "characters")


@pytest.mark.parametrize("unknown_row", [None, 0, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_rows_are_taken_by_token(tmp_path, unknown_row, tied):
    tokens = list(LETTERS)
    if unknown_row is not None:
        tokens.insert(unknown_row, "<unk>")
    rows = letters(tmp_path / "tokens.json", tokens)
    sizes = {"hidden_size": 6, "embedding_size": 6, "tie_embeddings": tied}
    theirs = gru(**sizes, vocabulary_size=len(tokens))
    torch.save(theirs.state_dict(), tmp_path / "plain.pt")
    model = gru(**sizes, vocabulary_size=len(rows.vocabulary))
    match = load_weights(model, read_initial(str(tmp_path / "plain.pt")), rows=rows)
    assert match.fresh == match.unused == []
    text = "a\nzebcd"
    given = torch.tensor([[tokens.index(letter) for letter in text]])
    ours = torch.from_numpy(rows.vocabulary.encode(text))[None]
    order = torch.from_numpy(rows.vocabulary.encode("".join(LETTERS)))
    wanted = theirs(given)[0].softmax(-1)[..., [tokens.index(letter) for letter in LETTERS]]
    torch.testing.assert_close(model(ours)[0].softmax(-1)[..., order], wanted)


def test_a_plain_network_on_text_scores_what_it_scored(tmp_path, capsys):
    """Told the order of its tokens, and no other way."""
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\n" * 300)
    text = ["dataset=text", f"dataset.path={tmp_path}/a.txt", "packed.values=fp32"]
    first = train(tmp_path / "one", *text, "pruning=none", "trainer.limit_epochs=2")
    saved = torch.load(tmp_path / "one/checkpoints/best.ckpt", weights_only=True)
    vocabulary = saved["vocabulary"]["tokens"]
    turned = {name.removeprefix("model."): weight for name, weight in saved["state_dict"].items()}
    for name in ("embedding.weight", "decoder.weight", "decoder.bias"):
        turned[name] = turned[name].flip(0)
    torch.save(turned, tmp_path / "plain.pt")
    (tmp_path / "tokens.json").write_text(json.dumps([*vocabulary[::-1], "<unk>"]))
    again = [*text, "pruning=none", "trainer.max_epochs=0", f"init_from={tmp_path}/plain.pt"]
    capsys.readouterr()
    wrong = train(tmp_path / "wrong", *again)
    assert "init_vocabulary=FILE says the order" in capsys.readouterr().out
    right = train(tmp_path / "right", *again, f"init_vocabulary={tmp_path}/tokens.json")
    assert "warning" not in capsys.readouterr().out
    assert right["scores"]["test"]["loss"] == pytest.approx(first["scores"]["test"]["loss"], rel=1e-6)
    assert wrong["scores"]["test"]["loss"] > first["scores"]["test"]["loss"] + 0.1
    kept = read(tmp_path / "right/model.safetensors").vocabulary.to_dict()["tokens"]
    assert kept == vocabulary[::-1]
    # Text with other letters is refused, for this network has no row for them once <unk> is out of the list.
    (tmp_path / "tokens.json").write_text(json.dumps(["?", *vocabulary[::-1]]))
    (tmp_path / "a.txt").write_text("abcdefgh ijklm nop.\nü" * 300)
    known = [f"init_vocabulary={tmp_path}/tokens.json", f"hydra.run.dir={tmp_path}/other"]
    assert main([*QUIET, *again, *known]) == 2
    told = capsys.readouterr().err
    assert "these characters of the text are not in" in told
    assert "tokens.json: 'ü'; and it has no <unk> to read them as" in told


@pytest.mark.parametrize(
    ("content", "level", "words"),
    [
        ('["a", "b", "a"]', "characters", "'a' stand in it more than once"),
        ('["a", "<pad>"]', "characters", "'<pad>': no characters"),
        ('{"a": 0}', "characters", r"must be a JSON list of tokens.*sorted\(mapping, key=mapping\.get\)"),
        ("[1, 2]", "words", "must be a JSON list of tokens"),
        ('["a", ', "words", "is no JSON"),
        (None, "words", "cannot be read"),
        ('["a"]', "bytes", "bytes are their own numbers"),
        ('["a"]', None, "these data are no text"),
    ],
)
def test_what_is_no_list_of_tokens(tmp_path, content, level, words):
    path = tmp_path / "tokens.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=words):
        read_tokens(str(path), level)


def test_tokens_a_line_and_a_list_of_another_length(tmp_path):
    (tmp_path / "tokens.txt").write_text("a\n \nb\n[\n")
    assert read_tokens(str(tmp_path / "tokens.txt"), "characters").tokens == ["a", " ", "b", "["]
    rows = letters(tmp_path / "tokens.json")
    saved_as(dict, tmp_path / "theirs.pt", vocabulary_size=8)
    with pytest.raises(
        UserError, match=r"tokens\.json has 9 tokens, and no embedding or decoder .*embedding\.weight 8x4"
    ):
        load_weights(gru(5, 4, vocabulary_size=10), read_initial(str(tmp_path / "theirs.pt")), rows=rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["init_vocabulary=x.txt"], "init_vocabulary=x.txt is about the network to start from"),
        (["init_map={a: b}"], "is about the network to start from: name it"),
        (["init_map=encoder"], "init_map='encoder' must be"),
        (["init_map={a: 1}"], "init_map={'a': 1} must be"),
    ],
)
def test_options_of_a_start_are_checked(tmp_path, options, words, capsys):
    assert main([*QUIET, *options, f"hydra.run.dir={tmp_path}/run"]) == 2
    assert words in capsys.readouterr().err


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


@pytest.mark.parametrize("kind", ["run", "packed", "saved", "plain"])
def test_weights_of_another_nonlinearity_are_refused(tmp_path, kind):
    theirs, config = rnn(5, 4, vocabulary_size=9, nonlinearity="relu"), {"name": "rnn", "dropout": 0.5}
    path = tmp_path / "of.safetensors"
    if kind in ("run", "plain"):
        path = tmp_path / "checkpoints" / "best.ckpt"
        path.parent.mkdir()
        torch.save({"state_dict": theirs.state_dict()}, path)
        if kind == "run":
            (tmp_path / "config.yaml").write_text("model: {name: rnn, dropout: 0.5, nonlinearity: relu}")
    elif kind == "packed":
        write(path, pack(theirs, config | {"nonlinearity": "relu"}, {"vocabulary_size": 9}))
    else:
        srnn.save(theirs, path)
    initial = read_initial(str(path))
    for ours in ("tanh", "relu"):
        model = rnn(5, 4, vocabulary_size=9, nonlinearity=ours)
        match = load_weights(model, initial)
        chosen = config | {"nonlinearity": ours, "dropout": 0.0}
        if ours == "relu" or kind == "plain":
            check_recurrence(initial, match, model, chosen)
            continue
        with pytest.raises(UserError, match=r"its weights fit, .* something else.*model\.nonlinearity"):
            check_recurrence(initial, match, model, chosen)


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
