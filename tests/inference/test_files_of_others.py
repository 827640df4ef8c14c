"""A file from others cannot ask for more than it holds; a plug-in's buffers come back as they were."""

import copy
import json
import random
import resource
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.inference.packed_file import _checksum, read, write
from srnn.inference.packing import PackedModel, pack
from srnn.inference.unpacking import unpack
from srnn.kernels import Dense
from srnn.kernels.csr import Csr
from srnn.registry import register
from tests.inference.test_packed_file import CONFIG, packed_model, sparse_model


@pytest.fixture
def file(tmp_path):
    write(tmp_path / "model.safetensors", packed_model(sparse_model()))
    return tmp_path / "model.safetensors"


def header_of(path):
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()["srnn"])


def signed(path, header, tensors):
    """A file with a right checksum over whatever the header says."""
    save_file(tensors, path, {"srnn": json.dumps(sealed(header, tensors))})


def sealed(header, tensors):
    header.pop("sha256", None)
    return header | {"sha256": _checksum(header, tensors)}


def refused_or_right(path):
    said, seconds, kilobytes = answer(path)
    if seconds >= 1:  # others may have had the machine for a moment
        said, seconds, _ = answer(path)
    assert seconds < 1, said
    assert kilobytes < 200_000, said
    return said


def answer(path):
    """What is said of a file, the seconds of CPU time and the memory it took."""
    begin, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        srnn.load(path, kernel="csr")
        said = "loaded"
    except UserError as error:
        said = str(error)
        assert len(said) < 2000
    return said, time.process_time() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before


JUNK = [
    None, True, -1, 0, 1, 2, 3, 7, 10**6, 10**9, 2**31, 2**63, 10**30, 0.5, -1.5, 1e308, float("nan"), float("inf"),
    "", "x", "gru", "rnn", "x" * 100_000, [], [1], [[1]], {}, {"a": 1}, [10**9, 10**9], {"name": "gru"},
]  # fmt: skip


def mutated(header, rng):
    """One to three places of a header become something else, go away or come twice."""
    header = copy.deepcopy(header)
    for _ in range(rng.randint(1, 3)):
        part = header
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.75:
                part = part[key]
                continue
            action = rng.random()
            if action < 0.1:
                del part[key]
            elif action < 0.2 and isinstance(part, dict):
                part[rng.choice(["num_layers", "hidden_size", "x", "format"])] = copy.deepcopy(rng.choice(JUNK))
            elif action < 0.4 and isinstance(part[key], int):
                part[key] = part[key] * rng.choice([-1, 2, 1000, 10**6, 10**12]) + rng.randint(-1, 1)
            else:
                part[key] = copy.deepcopy(rng.choice(JUNK))
            break
    return header


@pytest.mark.parametrize("seeds", [range(300), pytest.param(range(300, 4_000), marks=pytest.mark.slow)])
def test_headers_under_a_fresh_checksum(file, seeds):
    header, tensors, whole = header_of(file), load_file(file), file.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8:start])
    for seed in seeds:
        changed = sealed(mutated(header, random.Random(seed)), tensors)
        text = json.dumps(entries | {"__metadata__": {"srnn": json.dumps(changed)}}).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + whole[start:])  # the tensors are as they were
        refused_or_right(file)


@pytest.mark.parametrize("key", ["num_layers", "hidden_size", "embedding_size"])
@pytest.mark.parametrize("value", [10**5, 10**9, 10**18, 10**30, -1, "8", [8], None, 1.5])
def test_options_that_are_too_large_or_no_numbers(file, key, value):
    header = header_of(file)
    header["model"][key] = value
    signed(file, header, load_file(file))
    assert refused_or_right(file) != "loaded"


def test_rows_and_columns_without_entries_are_bounded(file):
    """A matrix of 480 GB in a file of 9.6 MB."""
    rows, columns = 1_200_000, 100_000
    tensors = {
        "decoder.weight.values": torch.zeros(0, 1),
        "decoder.weight.columns": torch.zeros(0, dtype=torch.int32),
        "decoder.weight.row_pointers": torch.zeros(rows + 1, dtype=torch.int32),
    }
    header = header_of(file)
    entry = {"structure": "element", "values": "fp32", "shape": [rows, columns], "gates": 1}
    header["matrices"] = {"decoder.weight": entry}
    signed(file, header, tensors)
    assert "480,000,000,000 bytes, far more than it holds" in refused_or_right(file)


def test_a_weight_tied_to_no_parameter_is_refused(file):
    header, tensors = header_of(file), load_file(file)
    header["tied"] = {"decoder.nothing": "decoder.bias"}
    signed(file, header, tensors)
    assert "do not fit" in refused_or_right(file)


class Plugged(nn.Module):
    """What a plug-in may keep beside its parameters."""

    def __init__(self, hidden_size: int = 16, *, vocabulary_size: int):
        super().__init__()
        self.rates = torch.linspace(0, 1, 3).tolist()  # needs numbers while it is built
        self.embedding = nn.Embedding(vocabulary_size, hidden_size)
        self.rnn = nn.GRU(hidden_size, hidden_size, batch_first=True)
        self.norm = nn.BatchNorm1d(hidden_size)
        self.decoder = nn.Linear(hidden_size, vocabulary_size)
        self.register_buffer("numbers", torch.arange(3) + 2**40)
        self.register_buffer("small", torch.tensor([1, 2], dtype=torch.int16))
        self.register_buffer("mask", torch.ones(4, 4).tril().bool())
        self.register_buffer("far", torch.tensor([[0.0, -torch.inf], [0.0, 0.0]]))
        self.register_buffer("scale", torch.full((1,), 2.0), persistent=False)
        self.offset = torch.tensor([3.0])
        self.table = {"a": [torch.tensor([5.0])]}

    def forward(self, tokens_BT, state=None):
        y, state = self.rnn(self.embedding(tokens_BT), state)
        y = self.norm(y.transpose(1, 2)).transpose(1, 2)
        return self.decoder(y * self.scale + self.offset + self.table["a"][0]), state


@pytest.fixture
def plugged():
    register.model("plugged_for_test")(Plugged)
    yield {"name": "plugged_for_test", "hidden_size": 16}
    del register.components["model", "plugged_for_test"]


@pytest.mark.parametrize("values", ["fp32", "int8"])
def test_buffers_and_attributes_come_back_as_they_were(tmp_path, plugged, values):
    torch.manual_seed(0)
    model = Plugged(vocabulary_size=40).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(torch.rand_like(weight) < 0.1)
    model.norm.num_batches_tracked.fill_(7)
    write(tmp_path / "a", pack(model, plugged, {"vocabulary_size": 40}, values))
    assert header_of(tmp_path / "a")["format"] == 4, "which older versions refuse, not misread"
    tokens = torch.randint(40, (2, 5))
    before = torch.random.get_rng_state()
    networks = [unpack(read(tmp_path / "a"), kernel) for kernel in (None, Dense(), Csr())]
    assert torch.equal(before, torch.random.get_rng_state())
    for built in networks:
        buffers = dict(built.named_buffers())
        for name, buffer in model.named_buffers():
            assert torch.equal(buffers[name], buffer), name
            assert buffers[name].dtype == buffer.dtype, name
        assert torch.equal(built.offset, model.offset)
        if values == "fp32":
            with torch.no_grad():
                torch.testing.assert_close(built(tokens)[0], model(tokens)[0], rtol=1e-4, atol=1e-5)


def test_what_fp32_holds_stays_readable_by_older_versions(tmp_path, plugged):
    model = Plugged(vocabulary_size=40)
    model.numbers.sub_(2**40)
    write(tmp_path / "a", pack(model, plugged, {"vocabulary_size": 40}))
    assert header_of(tmp_path / "a")["format"] == 3
    assert torch.equal(unpack(read(tmp_path / "a")).numbers, torch.arange(3))


def test_a_plug_in_that_asks_for_too_much_is_refused():
    def greedy(size: int = 8, *, vocabulary_size: int):
        module = nn.Linear(2, 2)
        module.steps = torch.linspace(0, 1, 3).tolist()
        module.table = torch.zeros(size, size)
        return module

    register.model("greedy_for_test")(greedy)
    try:
        dense = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}
        config = {"name": "greedy_for_test"}
        assert unpack(PackedModel(config | {"size": 8}, {"vocabulary_size": 1}, {}, dense)).table.shape == (8, 8)
        with pytest.raises(UserError, match="more memory than its file holds"):
            unpack(PackedModel(config | {"size": 10**6}, {"vocabulary_size": 1}, {}, dense))
    finally:
        del register.components["model", "greedy_for_test"]


def test_extra_state_is_refused_when_packing():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            pass

    with pytest.raises(UserError, match="extra_state is a dict"):
        pack(Extra(2, 2), CONFIG, {})


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.4, 0.5, 0.6, 0.7, 0.9])
def test_narrow_values_never_make_a_file_bigger(tmp_path, zeros):
    config, sizes = CONFIG | {"hidden_size": 64, "embedding_size": 32}, {"vocabulary_size": 50}
    torch.manual_seed(0)
    model = sparse_model(1 - zeros if zeros else 1.1, 1, config, 50)
    size = {}
    for values in ("fp32", "fp16", "bf16", "int8"):
        write(tmp_path / values, pack(model, config, sizes, values))
        size[values] = (tmp_path / values).stat().st_size
        tokens = torch.randint(50, (2, 5))
        with torch.no_grad():
            wanted = unpack(read(tmp_path / values))(tokens)[0]
            torch.testing.assert_close(srnn.load(tmp_path / values, "csr")(tokens)[0], wanted, rtol=1e-4, atol=1e-5)
    assert max(size["fp16"], size["bf16"], size["int8"]) < 0.8 * size["fp32"]
    built = srnn.load(tmp_path / "int8", "csr")
    if not zeros:
        assert type(built.decoder) is nn.Linear, "what has no zeros runs dense"
