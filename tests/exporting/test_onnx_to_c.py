"""Our ONNX files in a reader that is not onnxruntime: emx-onnx-cgen compiles them to dense C."""

import ctypes
import subprocess

import numpy as np
import pytest
import torch
from torch import nn

import srnn
from srnn.exporting.c.compiling import find_compiler

COMPILER = find_compiler()
STEPS = 4  # of a call
LAYERS = {
    "gru, three layers": nn.GRU(3, 7, num_layers=3),
    "lstm, bidirectional": nn.LSTM(5, 6, bidirectional=True),  # of GRU and RNN it reads one direction alone
    "rnn": nn.RNN(4, 8),
}


def dense_library(folder, arguments):
    """The file ``net.onnx`` as a shared library by emx-onnx-cgen and a C compiler."""
    from emx_onnx_cgen import cli

    sizes = ["--input-dim", f"time={STEPS}", "--input-dim", "batch=1"]
    no_files = ["--large-weight-threshold", "0", "--large-temp-threshold", "0"]
    source = folder / "net.c"
    assert not cli.main(["compile", *sizes, *no_files, str(folder / "net.onnx"), str(source)])
    flags = ["-std=c99", "-O2", "-shared", "-fPIC", "-o", "net.so", "net.c", "-lm"]
    subprocess.run([*COMPILER, *flags], cwd=folder, check=True)
    function = ctypes.CDLL(str(folder / "net.so")).model
    function.restype, function.argtypes = None, [ctypes.c_void_p] * arguments
    return function


@pytest.mark.skipif(COMPILER is None, reason="no C compiler here: cc, gcc, clang or ziglang")
@pytest.mark.parametrize("name", LAYERS)
def test_another_reader_computes_the_same_stream(name, tmp_path):
    """1,000 steps in calls of four, each going on from the states of the one before."""
    pytest.importorskip("emx_onnx_cgen", reason="emx-onnx-cgen is not installed: pip install emx-onnx-cgen")
    layer = LAYERS[name].eval()
    srnn.export(layer, tmp_path / "net.onnx")
    letters = ("h", "c") if isinstance(layer, nn.LSTM) else ("h",)
    call = dense_library(tmp_path, 2 + 2 * len(letters))
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    width = layer.hidden_size * (2 if layer.bidirectional else 1)
    states = [np.zeros((count, 1, layer.hidden_size), np.float32) for _ in letters]
    wanted_states, away = None, 0.0
    for _ in range(1000 // STEPS):
        x, y = torch.randn(STEPS, 1, layer.input_size), np.zeros((STEPS, 1, width), np.float32)
        after = [np.zeros_like(state) for state in states]
        call(*(array.ctypes.data for array in (x.numpy(), *states, y, *after)))
        with torch.inference_mode():
            wanted, wanted_states = layer(x, wanted_states)
        if layer.bidirectional:  # emx-onnx-cgen 1.4 leaves the backward half in the order in which it computes it
            y[..., layer.hidden_size :] = y[::-1, :, layer.hidden_size :].copy()
        away, states = max(away, np.abs(y - wanted.numpy()).max()), after
    assert 0 < away < 1e-5
