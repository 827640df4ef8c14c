"""A second reader of the packed file, written from docs/packed_format.md alone: numpy, json and struct, no srnn.

It reads a file, checks it and runs the network. What srnn wrote has to come out the same.

Shapes: T time, I inputs, H hidden units, V vocabulary.
"""

import hashlib
import json
import struct

import numpy as np
import pytest
import torch

from srnn.inference.packed_file import write
from srnn.inference.packing import pack
from srnn.inference.unpacking import unpack
from srnn.registry import register
from tests.conftest import ROOT

TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "U16": "<u2", "I8": "i1"}
HASHED_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "U16": "uint16", "I8": "int8",
}  # fmt: skip
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


def read_file(path):
    """The header, and every tensor: what safetensors is."""
    data = path.read_bytes()
    (length,) = struct.unpack_from("<Q", data)
    entries = json.loads(data[8 : 8 + length])
    header = json.loads(entries.pop("__metadata__")["srnn"])
    body = data[8 + length :]
    raw = {name: body[slice(*entry["data_offsets"])] for name, entry in entries.items()}
    check(header, entries, raw)
    return header, {name: array(entry, raw[name]) for name, entry in entries.items()}


def check(header, entries, raw):
    """The checksum."""
    told = header.pop("sha256")
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    for name in sorted(entries):
        sizes = ", ".join(map(str, entries[name]["shape"])) + ("," if len(entries[name]["shape"]) == 1 else "")
        digest.update(f"{name} torch.{HASHED_NAMES[entries[name]['dtype']]} ({sizes})".encode())
        digest.update(raw[name])
    assert digest.hexdigest() == told


def array(entry, raw):
    """A tensor; bf16 is the upper half of fp32."""
    numbers = np.frombuffer(raw, TYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    return numbers.reshape(entry["shape"])


def matrix(name, entry, tensors):
    """A packed matrix, dense in fp32."""
    (rows, columns), gates = entry["shape"], entry["gates"]
    height = 1 if entry["structure"] == "element" else int(entry["structure"].removesuffix("x1"))
    values, pointers = tensors[f"{name}.values"].astype(np.float32), tensors[f"{name}.row_pointers"]
    groups_a_gate = -(-(rows // gates) // height)
    assert len(pointers) == gates * groups_a_gate + 1
    dense = np.zeros((gates, groups_a_gate * height, columns), np.float32)
    for group in range(gates * groups_a_gate):
        gate, first = group // groups_a_gate, group % groups_a_gate * height
        for block in range(pointers[group], pointers[group + 1]):
            scale = tensors[f"{name}.scales"][group] if entry["values"] == "int8" else np.float32(1)
            dense[gate, first : first + height, tensors[f"{name}.columns"][block]] = values[block] * scale
    return dense[:, : rows // gates].reshape(rows, columns)


def weights_of(header, tensors):
    """Every weight by name, dense."""
    packed = {
        f"{name}.{part}" for name in header["matrices"] for part in ("values", "columns", "row_pointers", "scales")
    }
    weights = {name: tensor for name, tensor in tensors.items() if name not in packed}
    weights |= {name: matrix(name, entry, tensors) for name, entry in header["matrices"].items()}
    return weights | {name: weights[source] for name, source in header.get("tied", {}).items()}


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def step(cell, nonlinearity, u, v, h, c):
    """One step of one layer: u of the input, v of h, each with its own bias."""
    if cell == "gru":
        (ur, uz, un), (vr, vz, vn) = np.split(u, 3), np.split(v, 3)
        r, z = sigmoid(ur + vr), sigmoid(uz + vz)
        return (1 - z) * np.tanh(un + r * vn) + z * h, c
    if cell == "lstm":
        i, f, g, o = np.split(u + v, 4)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        return sigmoid(o) * np.tanh(c), c
    return (np.tanh(u + v) if nonlinearity == "tanh" else np.maximum(u + v, 0)), c


def layer(model, weights, suffix, x_TI):
    """y_TH of one layer and direction, and its last h."""
    w_ih, w_hh = weights[f"rnn.weight_ih{suffix}"], weights[f"rnn.weight_hh{suffix}"]
    b_ih, b_hh = weights[f"rnn.bias_ih{suffix}"], weights[f"rnn.bias_hh{suffix}"]
    h = c = np.zeros(w_hh.shape[1], np.float32)
    y_TH = np.zeros((len(x_TI), len(h)), np.float32)
    times = range(len(x_TI))
    for t in reversed(times) if suffix.endswith("_reverse") else times:
        h, c = step(model["name"], model.get("nonlinearity"), w_ih @ x_TI[t] + b_ih, w_hh @ h + b_hh, h, c)
        y_TH[t] = h
    return y_TH, h


def run(header, weights, inputs):
    """Logits after each token, or the outputs for a whole sequence."""
    model = header["model"]
    text = "vocabulary_size" in header["supplied"]
    y = weights["embedding.weight"][inputs] if text else inputs
    for number in range(model["num_layers"]):
        suffixes = [f"_l{number}"] + [f"_l{number}_reverse"] * model["bidirectional"]
        outputs, ends = zip(*(layer(model, weights, suffix, y) for suffix in suffixes), strict=True)
        y = np.concatenate(outputs, axis=1)
    read = y if text else np.concatenate(ends)
    return read @ weights["decoder.weight"].T + weights["decoder.bias"]


def test_the_file_beside_the_page():
    """Kept as it is: what it says is promised to readers of other makers."""
    folder = ROOT / "docs/packed_example"
    told = json.loads((folder / "logits.json").read_text())
    header, tensors = read_file(folder / "model.safetensors")
    formats = {(entry["structure"], entry["values"]) for entry in header["matrices"].values()}
    assert formats == {("element", "fp16"), ("4x1", "int8")}
    tokens = [header["vocabulary"]["tokens"].index(letter) + 1 for letter in told["text"]]
    logits_TV = run(header, weights_of(header, tensors), np.array(tokens))
    np.testing.assert_allclose(logits_TV, told["logits"], rtol=0, atol=1e-5)


def pruned(config, height, **supplied):
    """A network, pruned in blocks, whose rows do not divide by their height."""
    model = register.build("model", config, **supplied).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                gates = GATES[config["name"]] if name.startswith("rnn") else 1
                units = parameter.shape[0] // gates
                kept = torch.rand(gates, -(-units // height), parameter.shape[1]) < 0.3
                parameter.mul_(kept.repeat_interleave(height, dim=1)[:, :units].reshape(parameter.shape))
    return model


@pytest.mark.parametrize("structure", ["element", "8x1"])
@pytest.mark.parametrize("values", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize(
    "chosen",
    [
        {"name": "gru", "num_layers": 2},
        {"name": "lstm", "tie_embeddings": True, "embedding_size": 21},
        {"name": "rnn", "nonlinearity": "relu"},
        {"name": "gru", "bidirectional": True},
        {"name": "lstm", "num_layers": 2, "bidirectional": True},
    ],
    ids=lambda chosen: "-".join(map(str, chosen.values())),
)
def test_it_reads_and_runs_what_is_written(tmp_path, chosen, values, structure):
    config = register.check("model", {"hidden_size": 21, "embedding_size": 9} | chosen)
    text = not chosen.get("bidirectional")
    supplied = {"vocabulary_size": 30} if text else {"input_size": 7, "output_size": 13}
    packed = pack(pruned(config, 8, **supplied), config, supplied, values, structure)
    write(tmp_path / "model.safetensors", packed)
    header, tensors = read_file(tmp_path / "model.safetensors")
    assert header["matrices"].keys() == packed.matrices.keys() != set()
    inputs = torch.randint(30, (12,)) if text else torch.randn(12, 7)
    with torch.inference_mode():
        wanted = unpack(packed)(inputs[None])[0][0].numpy()
    np.testing.assert_allclose(run(header, weights_of(header, tensors), inputs.numpy()), wanted, rtol=1e-4, atol=1e-5)
