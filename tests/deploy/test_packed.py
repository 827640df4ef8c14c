import json
import random

import pytest
import torch
from safetensors.torch import load_file, save_file

import srnn
from srnn.deploy.packed import PackedModel, read, read_weights, write
from srnn.errors import UserError
from srnn.registry import register
from srnn.vocabulary import Vocabulary

CONFIG = {"name": "gru", "hidden_size": 17, "embedding_size": 5, "num_layers": 2, "dropout": 0.1}


def sparse_model(density=0.1):
    model = register.build("model", CONFIG, vocabulary_size=11).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(torch.rand_like(parameter) < density)
    return model


def pack(model, values="fp32"):
    vocabulary = Vocabulary.build("characters", "abcdefghij")
    return PackedModel.from_state(model.state_dict(), CONFIG, {"vocabulary_size": 11}, values, vocabulary, {"note": 1})


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "model.safetensors", pack(sparse_model()))
    return tmp_path / "model.safetensors"


def test_there_and_back(tmp_path):
    model = sparse_model()
    path = tmp_path / "model.safetensors"
    write(path, pack(model))
    packed = read(path)
    state = packed.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    tokens = torch.randint(0, 11, (3, 9))
    rebuilt = srnn.load(path)
    assert torch.equal(rebuilt(tokens)[0], model(tokens)[0])
    assert not rebuilt.training
    assert packed.vocabulary.decode(packed.vocabulary.encode("abcz")) == "abc�"
    assert packed.nonzeros == {n: int((model.state_dict()[n] != 0).sum()) for n in packed.matrices}


def test_fp16_rounds_weights_and_nothing_else(tmp_path):
    model = sparse_model()
    write(tmp_path / "m.safetensors", pack(model, "fp16"))
    state = read(tmp_path / "m.safetensors").state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], weight.half().float() if weight.ndim == 2 else weight)


def test_dense_matrices_stay_dense(tmp_path):
    model = sparse_model(density=1.1)
    packed = pack(model)
    assert packed.matrices == {}
    write(tmp_path / "m.safetensors", packed)
    assert torch.equal(read(tmp_path / "m.safetensors").state_dict()["decoder.weight"], model.decoder.weight)


def test_eight_times_smaller_at_90_percent(tmp_path):
    config = CONFIG | {"hidden_size": 256, "embedding_size": 64}
    model = register.build("model", config, vocabulary_size=99)
    state = {n: w * (torch.rand_like(w) < 0.1) if w.ndim == 2 else w for n, w in model.state_dict().items()}
    write(tmp_path / "m", PackedModel.from_state(state, config, {"vocabulary_size": 99}, "fp16"))
    dense = sum(4 * w.numel() for w in state.values())
    assert dense / (tmp_path / "m").stat().st_size > 8


def test_the_file_holds_no_pickle_and_says_what_it_is(file):
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]["srnn"])
    assert header["format"] == 1
    assert header["model"] == CONFIG
    assert header["matrices"]["rnn.weight_hh_l0"] == {"structure": "element", "shape": [51, 17]}


def exact_or_refused(path, wanted):
    """A clear error, or exactly the right numbers; never a silent wrong answer."""
    try:
        state = read(path).build().state_dict()
    except UserError:
        return "refused"
    assert all(torch.equal(state[name], weight) for name, weight in wanted.items())
    return "exact"


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    for keep in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:keep])
        with pytest.raises(UserError, match=str(file)):
            read(file)


def test_flipped_bits_are_refused_or_harmless(file):
    data = file.read_bytes()
    wanted = read(file).state_dict()
    rng = random.Random(0)
    results = []
    for _ in range(400):
        damaged = bytearray(data)
        damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        results.append(exact_or_refused(file, wanted))
    assert results.count("refused") > 390


def test_other_files_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="no such packed model file"):
        read(tmp_path / "absent")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(UserError, match="no srnn header"):
        read(tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(UserError, match="damaged or no packed model"):
        read(tmp_path / "text")


def rewritten(file, change):
    """The file with a header that was tampered with and a checksum that was not."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["srnn"])
    change(header)
    save_file(load_file(file), file, {"srnn": json.dumps(header)})


def test_a_newer_format_asks_for_an_upgrade(file):
    rewritten(file, lambda header: header.update(format=2))
    with pytest.raises(UserError, match=r"format 2; this srnn reads format 1: upgrade"):
        read(file)


def test_a_changed_header_is_refused(file):
    rewritten(file, lambda header: header["model"].update(hidden_size=99))
    with pytest.raises(UserError, match="checksum"):
        read(file)


def test_weights_of_another_shape_are_refused():
    packed = pack(sparse_model())
    wrong = PackedModel(CONFIG | {"hidden_size": 1_000_000}, packed.supplied, packed.matrices, packed.dense)
    with pytest.raises(UserError, match="do not fit"):
        wrong.build()


def test_not_finite_weights_say_what_happened():
    model = sparse_model()
    model.decoder.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"decoder\.weight .*diverged"):
        pack(model)
    model.decoder.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"packed\.values=fp32"):
        pack(model, "fp16")


def test_weights_from_checkpoints(tmp_path, file):
    model = sparse_model()
    torch.save({"state_dict": {f"model.{n}": w for n, w in model.state_dict().items()}}, tmp_path / "a.ckpt")
    torch.save(model.state_dict(), tmp_path / "b.pt")
    for name in ("a.ckpt", "b.pt"):
        weights = read_weights(tmp_path / name)
        assert all(torch.equal(weights[n], w) for n, w in model.state_dict().items())
    assert "decoder.weight" in read_weights(file)
    (tmp_path / "c.pt").write_bytes(b"no checkpoint")
    for bad in ("c.pt", "absent.pt"):
        with pytest.raises(UserError, match=bad):
            read_weights(tmp_path / bad)


def test_a_checkpoint_with_code_in_it_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
    with pytest.raises(UserError, match=r"evil\.ckpt"):
        read_weights(tmp_path / "evil.ckpt")


def test_writing_is_atomic(file, monkeypatch):
    good = file.read_bytes()
    monkeypatch.setattr("srnn.files.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        write(file, pack(sparse_model()))
    assert file.read_bytes() == good
    assert [p.name for p in file.parent.iterdir()] == [file.name], "no temporary file stays behind"
