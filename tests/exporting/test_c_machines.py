"""C programs on other machines, emulated by qemu: every bit is that of this machine, or of the numpy model."""

import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from torch import nn

from srnn.__main__ import main
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.compiling import Stream, compiled
from srnn.exporting.c.integer_code import integer_program
from srnn.exporting.c.integers import integer_network
from srnn.exporting.c.program import c_program
from srnn.exporting.reading import read_chain
from srnn.files import csv_bytes
from srnn.models import LanguageModel, SequenceModel
from tests.conftest import ROOT
from tests.exporting.machines import ARM, CORTEX_M4, CORTEX_M4_SOFT, HERE, RISC_V
from tests.exporting.test_c import STRICT, pruned
from tests.exporting.test_c_integers import loud

pytestmark = pytest.mark.tools

STEPS = 200
NETWORKS = {
    "gru element": (lambda: pruned(LanguageModel(nn.GRU, 50, 16, 96), 0.2), "element"),
    "lstm 16x1": (lambda: pruned(LanguageModel(nn.LSTM, 48, 16, 80), 0.2, 16), "16x1"),
    "relu element": (lambda: pruned(loud(nn.RNN(5, 40, 2, nonlinearity="relu")), 0.3), "element"),
    "gru both ways": (lambda: pruned(nn.GRU(5, 24, 2, bidirectional=True), 0.3), "element"),
    "lstm both ways, reads the last state": (
        lambda: pruned(SequenceModel(nn.LSTM, 5, 7, 48, num_layers=2, bidirectional=True), 0.3, 16),
        "auto",
    ),
}
SAY = """\
#include <stdint.h>
#include <string.h>
#include "net.h"
#include "board.h"
/* The numbers' bits, folded together. */
static uint32_t folded(uint32_t so_far, const void *numbers, int count)
{
    for (int i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, (const char *)numbers + 4 * i, 4);
        so_far = (so_far ^ bits) * 16777619u;
    }
    return so_far;
}
int main(void)
{
    static net_state state;
    static GIVEN inputs[COUNT];
    static TYPE outputs[OUTPUTS];
    for (int i = 0; i < COUNT; i++)
        inputs[i] = (GIVEN)(i * 37 % RANGE - FIRST) / UNIT;
    net_reset(&state);
    CALL
    const uint32_t fold = folded(2166136261u, outputs, OUTPUTS);
    char text[9] = {0};
    for (int i = 0; i < 8; i++)
        text[i] = "0123456789abcdef"[fold >> (28 - 4 * i) & 15];
    say(text);
    return 0;
}
"""


def needs(machine):
    if machine.missing:
        pytest.skip(f"{machine.missing} is not here: {machine.name}")


def folded(numbers):
    fold = 2166136261
    for bits in np.ascontiguousarray(numbers).view(np.uint32).reshape(-1).tolist():
        fold = (fold ^ bits) * 16777619 % 2**32
    return f"{fold:08x}"


def chain_of(kind, values):
    build, structure = NETWORKS[kind]
    torch.manual_seed(0)
    return packed_chain(read_chain(build()), values, structure)


def inputs_of(program):
    """What ``SAY`` gives a program: all its tokens in turns, or numbers of either sign."""
    calls, steps = program.calls, np.arange(STEPS * max(1, program.calls.inputs))
    if calls.tokens:
        return steps * 37 % calls.tokens
    numbers = (steps * 37 % 255 - 127).reshape(STEPS, calls.inputs)
    return numbers if calls.in_integers else numbers.astype(np.float32) / 64


def written(folder, program):
    calls = program.calls
    (folder / "net.c").write_text(program.source)
    (folder / "net.h").write_text(program.header)
    lent = f", ({calls.in_type}[{STEPS * calls.scratch}]){{0}}" if calls.scratch else ""
    words = {
        "GIVEN": "net_token" if calls.tokens else calls.in_type,
        "TYPE": calls.out_type,
        "COUNT": STEPS * max(1, calls.inputs),
        "OUTPUTS": calls.outputs if calls.reads_last else STEPS * calls.outputs,
        "RANGE": calls.tokens or 255,
        "FIRST": 0 if calls.tokens else 127,
        "UNIT": 1 if calls.tokens or calls.in_integers else 64,
        "CALL": f"net_run(&state, inputs, {STEPS}, outputs{lent});",
    }
    (folder / "main.c").write_text(re.sub(r"\b(" + "|".join(words) + r")\b", lambda word: str(words[word[0]]), SAY))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("machine", [HERE, ARM, RISC_V, CORTEX_M4_SOFT], ids=lambda machine: machine.name)
def test_integers_are_the_models_on_every_machine(machine, kind, tmp_path):
    needs(machine)
    network = integer_network(chain_of(kind, "int8"), torch.ones(1, 1, 5))
    program = integer_program(network, "net", "net")
    written(tmp_path, program)
    zeros = [np.zeros((1, size), np.int64) for _, size in network.members]
    wanted, _ = network.run(inputs_of(program)[None], zeros)
    assert machine.run(tmp_path, ["main.c", "net.c"]) == [folded(wanted[0].astype(np.int32))]


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("machine", [ARM, RISC_V, CORTEX_M4, CORTEX_M4_SOFT], ids=lambda machine: machine.name)
def test_floats_are_those_of_this_machine(machine, kind, tmp_path):
    """fp32 without fused multiply-adds, the FPU or software."""
    needs(machine)
    needs(HERE)
    program = c_program(chain_of(kind, "fp32"), "net", "net")
    stream = Stream(program, compiled(program, HERE.compiler, tmp_path, ("-O2", "-ffp-contract=off")))
    written(tmp_path, program)
    wanted = folded(stream.run(inputs_of(program)))
    assert machine.run(tmp_path, ["main.c", "net.c"], ("-O2", "-ffp-contract=off")) == [wanted]


def test_the_documents_program_runs_on_a_board(text_run, tmp_path):
    """As docs/howto/microcontroller.md has it, and the same on this machine."""
    needs(CORTEX_M4_SOFT)
    assert main(["export", f"run={text_run}", "format=c", "values=w8a8", f"output={tmp_path}/model.c"]) == 0
    (program,) = re.findall(r"```c\n(.*?)```", (ROOT / "docs/howto/microcontroller.md").read_text(), flags=re.DOTALL)
    (tmp_path / "main.c").write_text(program)
    (written,) = CORTEX_M4_SOFT.run(tmp_path, ["main.c", "model.c"], ("-O3", "-Wall", "-Wextra", "-Werror"))
    assert len(written) == 40
    native = HERE.run(tmp_path, ["main.c", "model.c"])
    assert native == [written]


STRICT_COMPILERS = {"gcc": ["gcc"], "clang": ["clang"], "zig": [sys.executable, "-m", "ziglang", "cc"]}


@pytest.mark.parametrize("compiler", STRICT_COMPILERS)
def test_compilers_have_nothing_to_warn_of(compiler, tmp_path):
    if compiler == "zig":
        pytest.importorskip("ziglang", reason="zig is not here: pip install ziglang")
    elif shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    command, flags = STRICT_COMPILERS[compiler], (*STRICT, "-O1")
    for kind in NETWORKS:
        for values in ("fp32", "fp16", "bf16", "int8"):
            compiled(c_program(chain_of(kind, values), "net", "net"), command, tmp_path, flags)
        network = integer_network(chain_of(kind, "int8"), torch.ones(1, 1, 5))
        compiled(integer_program(network, "net", "net"), command, tmp_path, flags)


def test_a_step_takes_a_fourth_of_the_dense_instructions_at_most():
    """GRU 64 -> 256 at 90 %, against dense C, both at -O3; with the tools of the published table, that table."""
    needs(CORTEX_M4)
    pytest.importorskip("emx_onnx_cgen", reason="emx-onnx-cgen is not installed: pip install emx-onnx-cgen")
    rows = runpy.run_path(str(ROOT / "docs/bench_cortex_m4.py"))["measure"]()
    sparse = [row.fewer_than_dense for row in rows if row.program.startswith("srnn")]
    assert len(sparse) == 12
    assert min(sparse) >= 4, rows
    published = (ROOT / "docs/results/c_cortex_m4.csv").read_text()
    if rows[0].compiler in published and f",{rows[0].program}," in published:
        assert csv_bytes(rows).decode() == published
