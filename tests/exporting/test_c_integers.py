"""C in integers throughout: bit for bit what its numpy model computes, and near the network in floats."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import srnn
from srnn.__main__ import main
from srnn.errors import UserError
from srnn.exporting.c import c_format
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.compiling import find_compiler
from srnn.exporting.c.integer_code import integer_program
from srnn.exporting.c.integers import TANH_TABLE, _sigmoid, _tanh, integer_network
from srnn.exporting.reading import read_chain
from srnn.models import LanguageModel, SequenceModel
from tests.exporting.test_c import STRICT, pruned, run

COMPILER = find_compiler()
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: cc, gcc, clang or ziglang")


def extreme(model):
    """With weights that drive sums beyond the tables and an LSTM's cell state beyond its bits."""
    for parameter in model.parameters():
        parameter.data *= 40
    model.bias_hh_l0.data[: 3 * model.hidden_size] += 300
    return model.eval()


def loud(model):
    """With states of the second layer far above 1."""
    model.weight_ih_l1.data *= 20
    return model.eval()


NETWORKS = {
    "gru element": (lambda: pruned(LanguageModel(nn.GRU, 50, 16, 100, num_layers=2), 0.2), "element", 0.02),
    "gru 16x1": (lambda: pruned(LanguageModel(nn.GRU, 50, 16, 100), 0.2, 16), "16x1", 0.02),
    "lstm tied": (lambda: pruned(LanguageModel(nn.LSTM, 33, 48, 48, tie_embeddings=True), 0.3), "element", 0.1),
    "lstm reads the last state": (lambda: pruned(SequenceModel(nn.LSTM, 4, 16, 40), 0.3, 16), "16x1", 0.02),
    "tanh, dense, no decoder": (lambda: nn.RNN(4, 30).eval(), "auto", 0.02),
    "relu, two layers": (lambda: loud(nn.RNN(4, 30, 2, nonlinearity="relu")), "auto", 0.05),
    "gru, two ways": (lambda: pruned(nn.GRU(4, 20, 2, bidirectional=True), 0.3), "element", 0.02),
    "lstm, two ways, reads the last state": (
        lambda: SequenceModel(nn.LSTM, 4, 12, 20, bidirectional=True).eval(),
        "auto",
        0.02,
    ),
    "relu, tokens": (lambda: pruned(LanguageModel(nn.RNN, 33, 8, 20, nonlinearity="relu"), 0.3), "element", 0.05),
    "gru without biases": (lambda: nn.GRU(4, 13, bias=False).eval(), "auto", 0.02),
    "extreme": (lambda: extreme(nn.LSTM(4, 70, 2)), "auto", 2.0),
}


@needs_compiler
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_bit_is_the_models(kind, tmp_path):
    build, structure, most = NETWORKS[kind]
    options = {"structure": structure, "values": "w8a8", "example": torch.randn(3, 20, 4)}
    report = srnn.export(build(), tmp_path / "net.c", "c", **options)
    assert "every bit as in its numpy model for 10,000 steps" in str(report)
    assert report.difference <= most
    assert not re.search(r"\b(float|double)\b|\d\.\d", (tmp_path / "net.c").read_text())


def test_tables_are_near_tanh_and_sigmoid():
    sums = np.arange(-40000, 40000, 7)
    assert np.abs(_tanh(sums) / 32768 - np.tanh(sums / 4096)).max() < 5e-4
    assert np.abs(_sigmoid(sums) / 32768 - 1 / (1 + np.exp(-sums / 4096))).max() < 4e-4
    assert (np.diff(_tanh(sums)) >= 0).all()
    assert len(TANH_TABLE) == 257


MAIN = """\
#include <stdio.h>
#include "net.h"
int main(void)
{
    static net_state a, b;
    static int32_t once[60 * NET_OUTPUTS], twice[60 * NET_OUTPUTS];
    net_token tokens[60];
    int same = 1;
    for (int i = 0; i < 60; i++)
        tokens[i] = (net_token)(i * 7 % (NET_TOKENS + 2));
    net_reset(&a);
    net_reset(&b);
    net_run(&a, tokens, 60, once);
    net_run(&b, tokens, 30, twice);
    for (int i = 30; i < 60; i++)
        net_step(&b, tokens[i], twice + i * NET_OUTPUTS);
    for (int i = 0; i < 60 * NET_OUTPUTS; i++)
        same &= once[i] == twice[i];
    printf("%d %d %d\\n", same, (int)sizeof a, net_argmax(once + 59 * NET_OUTPUTS));
    for (int i = 0; i < 60 * NET_OUTPUTS; i++)
        printf("%ld ", (long)once[i]);
    return 0;
}
"""


@needs_compiler
def test_it_is_clean_c_and_goes_on_from_its_state(tmp_path):
    """Without a warning or what sanitisers find; n + n steps are 2 n, bit for bit."""
    model = pruned(LanguageModel(nn.LSTM, 20, 9, 41), 0.3)
    network = integer_network(packed_chain(read_chain(model), "int8", "element"))
    program = integer_program(network, "net", "net")
    srnn.export(model, tmp_path / "net.c", "c", values="w8a8", structure="element", verify=False)
    (tmp_path / "main.c").write_text(MAIN)
    sanitisers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    run(tmp_path, *COMPILER, "-std=c99", *STRICT, *sanitisers, "-o", "main", "main.c", "net.c")
    first, outputs = run(tmp_path, "./main").splitlines()
    tokens = np.array([[t if t < 20 else 0 for t in (i * 7 % 22 for i in range(60))]])
    wanted, _ = network.run(tokens, [np.zeros((1, size), np.int64) for _, size in network.members])
    assert first.split() == ["1", str(program.ram), str(wanted[0, -1].argmax())]
    assert [int(number) for number in outputs.split()] == wanted.reshape(-1).tolist()


@needs_compiler
def test_a_program_that_differs_is_not_written(tmp_path, monkeypatch):
    def wrong(*arguments):
        program = integer_program(*arguments)
        return replace(program, source=program.source.replace("* (place & 255) + 128", "* (place & 255) + 127"))

    monkeypatch.setattr(c_format, "integer_program", wrong)
    with pytest.raises(UserError, match=r"net\.c is not written: [\d,]+ of the compiled program's numbers are not"):
        srnn.export(nn.GRU(4, 8), tmp_path / "net.c", "c", values="w8a8", example=torch.randn(1, 5, 4))
    assert not list(tmp_path.iterdir())


class Between(nn.Module):
    """A layer between recurrent ones."""

    def __init__(self, middle):
        super().__init__()
        self.a, self.middle, self.b = nn.GRU(4, 4, batch_first=True), middle, nn.GRU(4, 4, batch_first=True)

    def forward(self, x):
        return self.b(self.middle(self.a(x)[0]))[0]


def grown(model):
    """With states that leave their bits too few behind the point."""
    model.weight_hh_l0.data.zero_()
    model.bias_hh_l0.data += 3000
    return model


NUMBERS = torch.randn(2, 5, 4)
REFUSED = [
    (grown(nn.RNN(4, 4, nonlinearity="relu")), {"example": NUMBERS}, "the states of rnn, a ReLU layer, grow to"),
    (nn.LSTM(4, 4, proj_size=2), {"example": NUMBERS}, "lstm is projected"),
    (Between(nn.Linear(4, 4)), {"example": NUMBERS}, "middle is a layer between or before recurrent ones"),
    (Between(nn.ReLU()), {"example": NUMBERS}, "middle is relu: there are an embedding"),
    (nn.GRU(4, 4), {}, "give example=, inputs as they will come, 4 numbers a step"),
]


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize(("model", "options", "message"), REFUSED)
def test_what_there_is_not_in_integers_is_named(model, options, message, tmp_path):
    with pytest.raises(UserError, match=re.escape(message)):
        srnn.export(model, tmp_path / "net.c", "c", **{"values": "w8a8"} | options)
    assert not list(tmp_path.iterdir())


def test_numbers_come_in_at_the_scale_of_the_example(tmp_path):
    srnn.export(nn.GRU(4, 4), tmp_path / "net.c", "c", values="w8a8", example=2.54 * torch.ones(1, 3, 4), verify=False)
    header = (tmp_path / "net.h").read_text()
    assert float(re.search(r"NET_INPUT_SCALE (.*)f", header)[1]) == pytest.approx(0.02)
    assert float(re.search(r"NET_OUTPUT_SCALE (.*)f", header)[1]) == 2.0**-15
    assert "void net_step(net_state *state, const int8_t *input, int32_t *output);" in header


def test_the_command_says_what_integers_cost(text_run, tmp_path, capsys):
    target = tmp_path / "net.c"
    command = ["export", f"run={text_run}", "format=c", "values=w8a8", "verify=false", f"output={target}"]
    assert main(command) == 0
    out = capsys.readouterr().out
    told, cost = re.search(
        r"test: (\d\.\d{4} bits/char).*; costs ([+-]\d\.\d{4}) bits per character over", out
    ).groups()
    assert abs(float(cost)) < 0.05
    assert told in (tmp_path / "net.h").read_text()
    assert main(["export", f"run={text_run}", "format=onnx", "values=w8a8"]) == 2
    assert "--values=w8a8 is for format=c" in capsys.readouterr().err
