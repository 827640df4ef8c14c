import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import srnn
from srnn.errors import UserError
from srnn.inference.packed_file import _checksum, _describe, load, read, write
from srnn.inference.packing import PackedModel, pack
from srnn.inference.unpacking import unpack
from srnn.inference.weights import read_packed_or_plain, read_weights
from srnn.kernels import Dense
from srnn.models import gru
from srnn.registry import register
from srnn.sparse import DTYPES
from srnn.vocabulary import Vocabulary

CONFIG = {"name": "gru", "hidden_size": 17, "embedding_size": 5, "num_layers": 2, "dropout": 0.1}


def sparse_model(density=0.1, height=1, config=CONFIG, vocabulary_size=11):
    model = register.build("model", config, vocabulary_size=vocabulary_size).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gates = 3 if "rnn" in name else 1
                units = parameter.shape[0] // gates
                kept = torch.rand(gates, -(-units // height), parameter.shape[1]) < density
                kept[:, 0, 0] = True  # something is left
                mask = kept.repeat_interleave(height, dim=1)[:, :units].reshape(parameter.shape)
                parameter.mul_(mask)
    return model


def packed_model(model, values="fp32", structure="auto"):
    vocabulary = Vocabulary.build("characters", "abcdefghij")
    about = {"note": 1}
    packed = pack(model, CONFIG, {"vocabulary_size": 11}, values, structure)
    return replace(packed, vocabulary=vocabulary, about=about)


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "model.safetensors", packed_model(sparse_model(), structure="element"))
    return tmp_path / "model.safetensors"


def test_a_folder_may_be_named_in_any_bytes(tmp_path, file):
    folder = tmp_path / "b\udcff"  # as Python spells a byte that is no UTF-8
    folder.mkdir()
    moved = file.rename(folder / "model.safetensors")
    assert read_packed_or_plain(moved)[0].keys() == read(moved).state_dict().keys()


def test_there_and_back(tmp_path):
    model = sparse_model()
    path = tmp_path / "model.safetensors"
    write(path, packed_model(model, structure="element"))
    packed = read(path)
    state = packed.state_dict()
    assert all(torch.equal(state[name], weight) for name, weight in model.state_dict().items())
    tokens = torch.randint(0, 11, (3, 9))
    with torch.no_grad():
        assert torch.equal(unpack(packed)(tokens)[0], model(tokens)[0])
        rebuilt = srnn.load(path)
        torch.testing.assert_close(rebuilt(tokens)[0], model(tokens)[0], rtol=1e-5, atol=1e-6)
    assert not rebuilt.training
    assert packed.matrices["rnn.weight_hh_l0"].gates == 3
    assert packed.vocabulary.decode(packed.vocabulary.encode("abcz")) == "abc�"
    assert packed.nonzeros == {n: int((model.state_dict()[n] != 0).sum()) for n in packed.matrices}


@pytest.mark.parametrize("structure", ["auto", "element", "4x1", "8x1", "16x1", "32x1"])
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16", "int8"])
def test_values_are_rounded_and_nothing_else(tmp_path, values, structure):
    config, supplied = CONFIG | {"hidden_size": 64, "embedding_size": 32}, {"vocabulary_size": 64}
    model = sparse_model(0.3, 32, config, 64)
    packed = pack(model, config, supplied, values, structure)
    write(tmp_path / "m.safetensors", packed)
    back = read(tmp_path / "m.safetensors")
    assert {m.values_name for m in back.matrices.values()} == {values}
    if structure != "auto":
        assert {m.structure for m in back.matrices.values()} == {structure}
    state, wanted = back.state_dict(), packed.state_dict()
    for name, weight in model.state_dict().items():
        assert torch.equal(state[name], wanted[name])
        if weight.ndim != 2:
            assert torch.equal(state[name], weight)
        elif values != "int8":
            assert torch.equal(state[name], weight.to(DTYPES[values]).float())
    tokens = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(
            srnn.load(tmp_path / "m.safetensors", "cpu")(tokens)[0], unpack(back)(tokens)[0], rtol=1e-5, atol=1e-6
        )


def test_tensors_stay_mapped_to_the_file(file):
    read_before = read(file)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not tell what is mapped")
    address = read_before.matrices["rnn.weight_hh_l0"].values.data_ptr()
    for line in maps.read_text().splitlines():
        first, last = (int(part, 16) for part in line.split()[0].split("-"))
        if first <= address < last:
            assert str(file) in line
            return
    raise AssertionError("not mapped at all")


def test_dense_matrices_stay_dense(tmp_path):
    model = sparse_model(density=1.1)
    packed = packed_model(model)
    assert packed.matrices == {}
    write(tmp_path / "m.safetensors", packed)
    assert torch.equal(read(tmp_path / "m.safetensors").state_dict()["decoder.weight"], model.decoder.weight)


def test_eight_times_smaller_at_90_percent(tmp_path):
    config = CONFIG | {"hidden_size": 256, "embedding_size": 64}
    model = register.build("model", config, vocabulary_size=99)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) < 0.1)
    write(tmp_path / "m", pack(model, config, {"vocabulary_size": 99}, "fp16"))
    dense = sum(4 * w.numel() for w in model.parameters())
    assert dense / (tmp_path / "m").stat().st_size > 8


def test_the_file_holds_no_pickle_and_says_what_it_is(file):
    length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]["srnn"])
    assert header["format"] == 3
    assert header["model"] == CONFIG
    assert header["matrices"]["rnn.weight_hh_l0"] == {
        "structure": "element",
        "values": "fp32",
        "shape": [51, 17],
        "gates": 3,
    }


def test_files_of_format_1_are_still_read(tmp_path):
    """As the first version wrote them: single elements, no gates."""
    model = sparse_model()
    packed = packed_model(model, structure="element")
    tensors = {n: t[:, 0] if n.endswith(".values") else t for n, t in packed.tensors().items()}
    header = {
        "format": 1,
        "model": packed.model,
        "supplied": packed.supplied,
        "matrices": {n: {"structure": "element", "shape": list(m.shape)} for n, m in packed.matrices.items()},
        "vocabulary": packed.vocabulary.to_dict(),
        "about": packed.about,
    }
    header["sha256"] = _checksum(header, tensors)
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "m", {"srnn": json.dumps(header)})
    old = read(tmp_path / "m")
    assert all(torch.equal(old.state_dict()[n], w) for n, w in model.state_dict().items())
    assert old.matrices["rnn.weight_hh_l0"].gates == 3
    tokens = torch.randint(0, 11, (2, 5))
    with torch.no_grad():
        torch.testing.assert_close(srnn.load(tmp_path / "m")(tokens)[0], model(tokens)[0], rtol=1e-5, atol=1e-6)


def exact_or_refused(path, wanted):
    """A clear error, or exactly the right numbers; never a silent wrong answer."""
    try:
        state = unpack(read(path)).state_dict()
    except UserError as error:
        clear = str(path) in str(error) and "deserializ" not in str(error)  # a word of safetensors
        return "refused" if clear else str(error)
    assert all(torch.equal(state[name], weight) for name, weight in wanted.items())
    return "exact"


def test_every_truncation_is_refused(file):
    data = file.read_bytes()
    for keep in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        file.write_bytes(data[:keep])
        cut = rf"{file} is damaged or no packed model: its {keep:,} bytes were cut short or changed, or are .* Take it "
        with pytest.raises(UserError, match=cut):
            read(file)


def test_every_byte_of_the_header_matters(file):
    """Each is flipped in turn: refused, or of no consequence; never a crash or another number."""
    data = file.read_bytes()
    wanted = read(file).state_dict()
    end = 8 + int.from_bytes(data[:8], "little")
    results = []
    for position in range(end):
        damaged = bytearray(data)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(damaged)
        results.append(exact_or_refused(file, wanted))
    assert results.count("refused") > 0.97 * end, "only padding does not count"


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_flipped_bits_of_the_body_are_refused(file, values):
    write(file, packed_model(sparse_model(), values))
    data = file.read_bytes()
    wanted = read(file).state_dict()
    begin = 8 + int.from_bytes(data[:8], "little")
    rng = random.Random(0)
    for _ in range(2000):
        damaged = bytearray(data)
        damaged[rng.randrange(begin, len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        assert exact_or_refused(file, wanted) == "refused"


def test_other_files_are_refused_with_the_reason(tmp_path):
    with pytest.raises(UserError, match="no such packed model file"):
        read(tmp_path / "absent")
    save_file({"a": torch.ones(2)}, tmp_path / "other")
    with pytest.raises(UserError, match="no srnn header"):
        read(tmp_path / "other")
    (tmp_path / "text").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "best.ckpt")
    with pytest.raises(UserError, match=r"a file of torch\.save, such as a checkpoint, .* model\.safetensors"):
        read(tmp_path / "best.ckpt")
    with pytest.raises(UserError, match="damaged or no packed model"):
        read(tmp_path / "text")


def rewritten(file, change):
    """The file with a header that was tampered with and a checksum that was not."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        header = json.loads(opened.metadata()["srnn"])
    change(header)
    save_file(load_file(file), file, {"srnn": json.dumps(header)})


def test_what_a_header_lacks_is_named(file):
    rewritten(file, lambda header: header.pop("sha256"))
    with pytest.raises(UserError, match=r"is damaged: it lacks 'sha256'\. Take it again"):
        read(file)


def test_a_file_that_the_system_does_not_give_is_not_called_damaged(file, monkeypatch):
    def gone(*arguments, **options):
        raise FileNotFoundError(f"No such file or directory: {file}")  # as safetensors has it, whatever the reason

    def refused(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("srnn.inference.packed_file.safe_open", gone)
    monkeypatch.setattr(type(file), "open", refused)
    with pytest.raises(UserError, match=rf"{file} cannot be read: Permission denied\.$"):
        read(file)


def test_files_of_format_2_are_still_read(tmp_path):
    """As the second version wrote them: no tied weights."""
    packed = packed_model(sparse_model())
    header = {
        "format": 2,
        "model": packed.model,
        "supplied": packed.supplied,
        "matrices": {n: _describe(m) for n, m in packed.matrices.items()},
        "vocabulary": packed.vocabulary.to_dict(),
        "about": packed.about,
    }
    header["sha256"] = _checksum(header, packed.tensors())
    save_file(packed.tensors(), tmp_path / "m", {"srnn": json.dumps(header)})
    old = read(tmp_path / "m").state_dict()
    assert all(torch.equal(old[n], w) for n, w in packed.state_dict().items())


@pytest.mark.parametrize("sparse", [True, False])
def test_a_tied_weight_is_stored_once(tmp_path, sparse):
    config = {"name": "gru", "hidden_size": 16, "embedding_size": 16, "tie_embeddings": True}
    model = gru(16, 16, tie_embeddings=True, vocabulary_size=40).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if sparse and weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) < 0.1)
    packed = pack(model, config, {"vocabulary_size": 40})
    write(tmp_path / "m.safetensors", packed)
    back = read(tmp_path / "m.safetensors")
    assert back.tied == {"decoder.weight": "embedding.weight"}
    assert not [name for name in back.tensors() if name.startswith("decoder.weight")]
    built, tokens = unpack(back), torch.randint(0, 40, (2, 9))
    assert built.decoder.weight is built.embedding.weight
    torch.testing.assert_close(built(tokens)[0], model(tokens)[0])
    for kernel in (Dense(), "auto"):
        torch.testing.assert_close(load(tmp_path / "m.safetensors", kernel)(tokens)[0], model(tokens)[0])
    rewritten(tmp_path / "m.safetensors", lambda header: header.update(tied={"decoder.weight": "nothing"}))
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "m.safetensors")


def test_a_newer_format_asks_for_an_upgrade(file):
    rewritten(file, lambda header: header.update(format=5))
    with pytest.raises(UserError, match=r"format 5; this srnn reads 1 to 4: upgrade"):
        read(file)


def test_a_changed_header_is_refused(file):
    rewritten(file, lambda header: header["model"].update(hidden_size=99))
    with pytest.raises(UserError, match="checksum"):
        read(file)


def test_weights_of_another_shape_are_refused():
    packed = packed_model(sparse_model())
    wrong = PackedModel(CONFIG | {"hidden_size": 1_000_000}, packed.supplied, packed.matrices, packed.dense)
    for build in (lambda: unpack(wrong), lambda: unpack(wrong, Dense())):
        with pytest.raises(UserError, match="do not fit"):
            build()


def test_not_finite_weights_say_what_happened():
    model = sparse_model()
    model.decoder.weight.data[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"decoder\.weight .*diverged"):
        packed_model(model)
    model.decoder.weight.data[0, 0] = 1e6
    with pytest.raises(UserError, match="use values=fp32 or bf16"):
        packed_model(model, "fp16")


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
        write(file, packed_model(sparse_model()))
    assert file.read_bytes() == good
    assert [p.name for p in file.parent.iterdir()] == [file.name], "no temporary file stays behind"
