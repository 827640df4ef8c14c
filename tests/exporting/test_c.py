"""Networks as C: compiled with whatever compiler is here, and compared with the network they were made of."""

import ctypes
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import srnn
from srnn.__main__ import main
from srnn.errors import UserError
from srnn.exporting.c import c_format
from srnn.exporting.c.arithmetic import used_functions
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.compiling import Stream, compiled, find_compiler
from srnn.exporting.c.program import c_program
from srnn.exporting.c.verification import in_float64, largest_error
from srnn.exporting.chain import Chain, Direction, RecurrentPart
from srnn.exporting.reading import AGREEMENT, ChainNetwork, read_chain
from srnn.formats import block_height
from srnn.inference.packing import matrix_gates
from srnn.models import LanguageModel, SequenceModel
from srnn.sparse import SparseMatrix
from srnn.vocabulary import Vocabulary
from tests.conftest import ROOT

COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: cc, gcc, clang or ziglang")
STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Werror")


def pruned(model, density=0.1, height=1):
    """The network with zeros in all its matrices, in blocks of so many rows of a gate."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            if weight.dim() == 2:
                units = weight.shape[0] // matrix_gates(name, module)
                blocks = torch.rand(weight.shape[0] // units, -(-units // height), weight.shape[1]) < density
                weight.data.mul_(blocks.repeat_interleave(height, 1)[:, :units].reshape(weight.shape))
    return model.eval()


def program_of(model, name="net", **packing):
    return c_program(packed_chain(read_chain(model), **packing), name, name)


class Classifier(nn.Module):
    """Ends in an activation, and has another one inside."""

    def __init__(self, last):
        super().__init__()
        self.rnn, self.middle = nn.LSTM(6, 20, batch_first=True), nn.Linear(20, 9)
        self.squash, self.top, self.last = nn.Sigmoid(), nn.Linear(9, 5), last

    def forward(self, x, state=None):
        y, state = self.rnn(x, state)
        return self.last(self.top(self.squash(self.middle(y)))), state


NETWORKS = {
    "gru element int8": (lambda: pruned(LanguageModel(nn.GRU, 50, 8, 40, num_layers=2)), "int8", "element"),
    "gru 16x1 fp32": (lambda: pruned(LanguageModel(nn.GRU, 50, 16, 100), 0.2, 16), "fp32", "16x1"),
    "lstm tied fp16": (lambda: pruned(LanguageModel(nn.LSTM, 33, 48, 48, tie_embeddings=True)), "fp16", "element"),
    "lstm both ways": (
        lambda: pruned(SequenceModel(nn.LSTM, 5, 7, 37, num_layers=2, bidirectional=True), 0.3),
        "int8",
        "auto",
    ),
    "gru both ways, each step": (lambda: pruned(nn.GRU(7, 20, 2, bidirectional=True), 0.3), "bf16", "auto"),
    "relu": (lambda: pruned(SequenceModel(nn.RNN, 4, 3, 24, nonlinearity="relu")), "fp32", "auto"),
    "tanh, dense": (lambda: nn.RNN(6, 30).eval(), "fp32", "auto"),
    "projected": (lambda: pruned(nn.LSTM(6, 30, proj_size=11), 0.3), "fp32", "auto"),
    "softmax": (lambda: pruned(Classifier(nn.Softmax(-1)), 0.3), "int8", "auto"),
    "log softmax": (lambda: pruned(Classifier(nn.LogSoftmax(-1)), 0.3), "fp32", "auto"),
}


@needs_compiler
@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_program_computes_what_the_network_does(kind, tmp_path):
    build, values, structure = NETWORKS[kind]
    report = srnn.export(build(), tmp_path / "net.c", "c", values=values, structure=structure)
    assert report.difference < 2e-6
    assert "run against the network for 10,000 steps" in str(report)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["net.c", "net.h"]


@needs_compiler
def test_rounding_does_not_pile_up_over_10000_steps(tmp_path):
    model = pruned(LanguageModel(nn.GRU, 50, 16, 64))
    program = program_of(model)
    stream = Stream(program, compiled(program, COMPILER, tmp_path))
    tokens = torch.randint(50, (1, 10_000))
    with torch.inference_mode():
        wanted, _ = ChainNetwork(in_float64(read_chain(model)))(tokens)
    assert np.abs(stream.run(tokens[0].numpy()) - wanted[0].numpy()).max() < 1e-5


@needs_compiler
@pytest.mark.parametrize(("function", "kind"), [("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_every_16_bit_number_is_widened_exactly(function, kind, tmp_path):
    loop = f"void all(const int16_t *x, float *y) {{ for (int i = 0; i < 65536; i++) y[i] = n_{function}(x[i]); }}"
    code = used_functions(f"n_{function}(", "n")
    (tmp_path / "all.c").write_text(f"#include <stdint.h>\nvoid all(const int16_t *x, float *y);\n{code}{loop}\n")
    run(tmp_path, *COMPILER, "-std=c99", *STRICT, "-O2", "-shared", "-fPIC", "-o", "all.so", "all.c")
    bits, found = np.arange(1 << 16).astype(np.uint16).view(np.int16), np.empty(1 << 16, np.float32)
    ctypes.CDLL(str(tmp_path / "all.so")).all(*(ctypes.c_void_p(array.ctypes.data) for array in (bits, found)))
    wanted = torch.from_numpy(bits).view(kind).float()
    finite = wanted.isfinite().numpy()
    assert finite.sum() > 60_000
    np.testing.assert_array_equal(found.view(np.uint32)[finite], wanted.numpy().view(np.uint32)[finite])


def random_matrix(draw, rows, columns, gates, structure, values, width):
    """With some rows that are empty, some full, and gaps of more than 8 bits where there are columns for them."""
    height = block_height(structure)
    units = rows // gates
    shares = torch.tensor(draw(st.lists(st.sampled_from([0.0, 0.004, 0.1, 1.0]), min_size=3, max_size=3)))
    share = shares[torch.arange(-(-units // height)) % 3][None, :, None]
    kept = torch.rand(gates, -(-units // height), columns) < share
    weight = torch.randn(rows, columns) / width
    weight *= kept.repeat_interleave(height, 1)[:, :units].reshape(rows, columns)
    return SparseMatrix.from_dense(weight, structure, values, gates)


@st.composite
def chains(draw):
    """Recurrent layers of any cell, size, structure and values; each matrix its own."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    cell, directions = draw(st.sampled_from(["gru", "lstm", "tanh", "relu"])), draw(st.sampled_from([1, 1, 2]))
    gates = {"gru": 3, "lstm": 4}.get(cell, 1)
    hidden, width = draw(st.integers(1, 130)), draw(st.sampled_from([1, 17, 900]))
    bias = draw(st.booleans())
    layers = []
    for _ in range(draw(st.integers(1, 2))):
        layer = []
        for _ in range(directions):
            matrices = []
            for columns in (width, hidden):
                structure = draw(st.sampled_from(["element", "4x1", "8x1", "16x1", "32x1"]))
                values = draw(st.sampled_from(["fp32", "fp16", "bf16", "int8"]))
                matrices.append(random_matrix(draw, gates * hidden, columns, gates, structure, values, columns))
            biases = [torch.randn(gates * hidden) if bias else None for _ in range(2)]
            layer.append(Direction(*matrices, *biases))
        layers.append(tuple(layer))
        width = hidden * directions
    return Chain((RecurrentPart("rnn", cell, tuple(layers)),), batch_first=True)


@needs_compiler
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(chains())
def test_any_sizes_and_formats(chain):
    # The bound that files are refused by: rounding of an LSTM that forgets little adds up over the steps of a piece.
    assert largest_error(c_program(chain, "net", "net"), chain, COMPILER) <= AGREEMENT


MAIN = """\
#include <stdio.h>
#include <string.h>
#include "lm.h"
#include "two_ways.h"
#include "lm.h"

static lm_token tokens[64];
static float numbers[64 * TWO_WAYS_INPUTS], once[64 * LM_OUTPUTS], twice[64 * LM_OUTPUTS];
static float scratch[TWO_WAYS_SCRATCH(64)], answer[TWO_WAYS_OUTPUTS];

int main(void)
{
    lm_state a, b;
    two_ways_state c;
    for (int i = 0; i < 64; i++)
        tokens[i] = (lm_token)(i * 7 % (LM_TOKENS + 3));
    for (int i = 0; i < 64 * TWO_WAYS_INPUTS; i++)
        numbers[i] = (float)(i % 11 - 5);
    lm_reset(&a);
    lm_reset(&b);
    lm_run(&a, tokens, 64, once);
    lm_run(&b, tokens, 32, twice);
    lm_run(&b, tokens + 32, 31, twice + 32 * LM_OUTPUTS);
    lm_step(&b, tokens[63], twice + 63 * LM_OUTPUTS);
    two_ways_reset(&c);
    two_ways_run(&c, numbers, 0, answer, scratch);
    two_ways_run(&c, numbers, 64, answer, scratch);
    printf("%d %d %d\\n", (int)sizeof a, (int)sizeof c, memcmp(once, twice, sizeof once));
    printf("%d\\n", lm_argmax(once));
    lm_softmax(once);
    for (int i = 0; i < LM_OUTPUTS; i++)
        printf("%.9g ", (double)once[i]);
    printf("\\n%u\\n", (unsigned)LM_CHARACTER);
    return 0;
}
"""


@needs_compiler
@pytest.mark.parametrize("values", ["int8", "fp16"])
def test_several_networks_in_one_program_of_c_and_cpp(values, tmp_path):
    """Without a warning or what sanitisers find, and n + n steps are 2 n steps, bit for bit."""
    model = pruned(LanguageModel(nn.GRU, 20, 8, 100), 0.3)
    model.vocabulary = Vocabulary.build("characters", "abcdefghijklmnopqrs")
    both = pruned(SequenceModel(nn.LSTM, 5, 7, 20, bidirectional=True, num_layers=2), 0.3)
    for name, network in {"lm": model, "two_ways": both}.items():
        options = {"values": values, "structure": "element", "verify": False}
        srnn.export(network, tmp_path / f"{name}.c", "c", about="a /* b */ c ??/ \\\nä", **options)
    with torch.inference_mode():
        tokens = [t if t < 20 else 0 for t in (i * 7 % 23 for i in range(64))]
        network = ChainNetwork(packed_chain(read_chain(model), values, "element"))
        first = network(torch.tensor([tokens]))[0][0, 0]
    cpp = [shutil.which("g++")] if shutil.which("g++") else []
    for language in ("c", *(["cpp"] if cpp else [])):
        (tmp_path / f"main.{language}").write_text(MAIN.replace("LM_CHARACTER", "lm_characters[3]"))
        sanitisers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"] if language == "c" else []
        for source in ("lm.c", "two_ways.c"):
            run(tmp_path, *COMPILER, "-std=c99", *STRICT, *sanitisers, "-O1", "-c", source)
        standard = [*COMPILER, "-std=c99"] if language == "c" else [*cpp, "-std=c++11"]
        run(tmp_path, *standard, *STRICT, *sanitisers, "-o", "main", f"main.{language}", "lm.o", "two_ways.o")
        sizes, best, shares, character = run(tmp_path, "./main").splitlines()
        ram = [program_of(network, values=values, structure="element").ram for network in (model, both)]
        assert sizes.split() == [*map(str, ram), "0"]
        assert int(best) == int(first.argmax())
        np.testing.assert_allclose([float(n) for n in shares.split()], first.softmax(0).numpy(), rtol=1e-5)
        assert int(character) == ord("c")


def run(folder, *command):
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


class Compiled(nn.Module):
    """A language model's C program as a network: a stream each row of a batch, its memory is the state."""

    def __init__(self, program, library):
        super().__init__()
        self.stream = Stream(program, library)

    def forward(self, tokens_BT, state=None):
        outputs, after = [], []
        for row, tokens in enumerate(tokens_BT.numpy()):
            self.stream.memory[:] = 0 if state is None else state[row].numpy()
            outputs.append(self.stream.run(tokens))
            after.append(self.stream.memory.copy())
        return torch.from_numpy(np.stack(outputs)), torch.from_numpy(np.stack(after))


@needs_compiler
def test_the_program_scores_as_the_command_says_and_as_evaluate_does(text_run, tmp_path, capsys):
    from srnn.training.preparing import read_back

    target = tmp_path / "net.c"
    assert main(["export", f"run={text_run}/model.safetensors", "format=c", f"output={target}"]) == 0
    out = capsys.readouterr().out
    told = float(re.search(r"test: (\d\.\d{4}) bits/char", out)[1])
    assert f"test: {told:.4f} bits/char" in (tmp_path / "net.h").read_text()
    for cost in ("flash: [\\d,]+ bytes", "RAM: [\\d,]+ bytes", "[\\d,]+ multiply-adds a step"):
        assert re.search(cost, out)
    assert main(["evaluate", f"run={text_run}", "kernel=dense"]) == 0
    evaluated = float(re.findall(r"\d\.\d{4}(?= │\n)", capsys.readouterr().out)[-1])
    of_run = read_back(text_run / "model.safetensors")
    chain = packed_chain(read_chain(srnn.load(text_run / "model.safetensors", kernel="csr")), "fp32")
    program = c_program(chain, "net", "net")
    network = Compiled(program, compiled(program, COMPILER, tmp_path))
    scored = of_run.objective.score(network, of_run.data, "test")["bits_per_character"]
    assert scored == pytest.approx(evaluated, abs=1e-4)
    assert scored == pytest.approx(told, abs=1e-4)


@needs_compiler
def test_the_documents_program_writes_what_generate_does(text_run, tmp_path, capsys):
    command = ["export", f"run={text_run}/model.safetensors", "format=c", "verify=false"]
    assert main([*command, f"output={tmp_path}/model.c"]) == 0
    prompt = "def f(x):\n"
    written = ["--kernel=dense", f"--prompt={prompt}", "--length=40", "--temperature=0"]
    capsys.readouterr()
    assert main(["generate", f"run={text_run}", *written]) == 0
    wanted = capsys.readouterr().out
    (program,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs/export.md").read_text(), flags=re.DOTALL)
    (tmp_path / "main.c").write_text(program)
    run(tmp_path, *COMPILER, "-std=c99", *STRICT, "-O1", "-o", "writer", "main.c", "model.c")
    letters = run(tmp_path, "./writer")
    assert len(letters) == 40
    assert letters in wanted


def test_the_command_packs_the_trained_weights_again(text_run, tmp_path, capsys):
    command = ["export", f"run={text_run}", "format=c", "values=int8", "verify=false", "name=tiny"]
    assert main([*command, f"output={tmp_path}/net.c"]) == 0
    out = capsys.readouterr().out
    cost = float(re.search(r"costs ([+-]\d\.\d{4}) bits per character over 'pruned, not packed, fp32'", out)[1])
    assert abs(cost) < 0.05
    assert "not compiled (verify=false)" in out
    header = (tmp_path / "net.h").read_text()
    assert "void tiny_step(tiny_state *state" in header
    assert re.search("Weights: .*int8", header)
    assert main(["export", f"run={text_run}", "name=tiny"]) == 2
    assert "name and verify are for format=c" in capsys.readouterr().err


@pytest.mark.parametrize(("structure", "most"), [("element", 80_000), ("16x1", 50_000)])
def test_the_flash_and_ram_of_the_usual_network(structure, most):
    """A GRU of 256 units on characters, 90 % pruned: the state of 256 floats, 4 KB at most beside it."""
    model = pruned(LanguageModel(nn.GRU, 100, 64, 256), 0.1, block_height(structure))
    program = program_of(model, values="int8", structure=structure)
    sizes = {"uint8_t": 1, "int8_t": 1, "uint16_t": 2, "uint32_t": 4, "float": 4}
    arrays = re.findall(r"static const (\w+) \w+\[(\d+)\]", program.source)
    assert program.flash == sum(sizes[kind] * int(count) for kind, count in arrays)
    assert program.flash < most
    assert program.ram + program.stack <= 4 * 256 + 4096


@needs_compiler
def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    def wrong(*arguments):
        program = c_program(*arguments)
        return replace(program, source=program.source.replace("0.5f + 0.5f", "0.4f + 0.5f"))

    monkeypatch.setattr(c_format, "c_program", wrong)
    (tmp_path / "net.c").write_text("older")
    with pytest.raises(UserError, match=r"net\.c is not written: the compiled program's outputs differ by \d"):
        srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("net.c", "older")]


def test_what_it_costs_is_told_before_anything_is_compiled(tmp_path, monkeypatch):
    told = []

    def looked_for():
        assert len(told) == 1
        assert re.fullmatch(r"flash: .*\nRAM: .*\nwork: 288 multiply-adds a step\.", told[0])

    monkeypatch.setattr(c_format, "find_compiler", looked_for)
    assert "flash:" not in str(srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c", tell=told.append))
    assert "flash:" in str(srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c"))
    assert "flash: " in (tmp_path / "net.h").read_text()


@needs_compiler
def test_a_program_that_forgets_its_state_is_not_written(tmp_path, monkeypatch):
    def wrong(*arguments):
        program = c_program(*arguments)
        source = program.source.replace("    for (int unit", "    net_reset(state);\n    for (int unit")
        return replace(program, source=source)

    monkeypatch.setattr(c_format, "c_program", wrong)
    with pytest.raises(UserError, match="differ by"):
        srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c")
    assert not list(tmp_path.iterdir())


def test_it_says_so_where_there_is_no_compiler(tmp_path, monkeypatch):
    monkeypatch.setattr(c_format, "find_compiler", lambda: None)
    report = srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c")
    assert report.difference is None
    assert "not verified: no C compiler is here (cc, gcc, clang, or pip install ziglang)" in str(report)
    assert (tmp_path / "net.c").exists()


@pytest.mark.parametrize(
    ("file", "options", "message"),
    [
        ("my-net.c", {}, "name='my-net': C needs a name of letters.*set name, as in name=net"),
        ("net.c", {"name": "int x"}, "name='int x': C needs"),
        ("net.c", {"name": "_net"}, "begins with a letter"),
        ("net.c", {"name": "a__b"}, "single underscores"),
        ('n".c', {"name": "net"}, "letters, digits and . _ [+] - only"),
        ("net.c", {"values": "fp8"}, "values='fp8': there are fp32"),
        ("net.c", {"structure": "3x3"}, "structure='3x3': there are auto"),
        (
            "net.c",
            {"speed": 1},
            "format=c takes no speed: its options are values, structure, name, verify",
        ),
        ("net.h", {}, r"must be a file named \*\.c"),
        ("net.onnx", {}, r"For a \*\.onnx file give format=\"onnx\""),
    ],
)
def test_mistakes_are_told(file, options, message, tmp_path):
    with pytest.raises(UserError, match=message):
        srnn.export(nn.GRU(4, 8), tmp_path / file, "c", **options)
    assert not list(tmp_path.iterdir())


def test_a_layer_that_has_no_c_is_named(tmp_path):
    model = nn.Sequential()
    model.rnn, model.norm = nn.GRU(4, 8), nn.LayerNorm(8)
    with pytest.raises(UserError, match="norm"):
        srnn.export(model, tmp_path / "net.c", "c")
    assert not list(tmp_path.iterdir())
