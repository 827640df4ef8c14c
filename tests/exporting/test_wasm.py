"""Pages with a network in WebAssembly: run by wasmtime, node and a browser, and compared bit for bit with native C."""

import gzip
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import srnn
from srnn.__main__ import main
from srnn.errors import UserError
from srnn.exporting.c.c_format import packed_chain
from srnn.exporting.c.compiling import Stream, compiled, find_compiler
from srnn.exporting.c.program import c_program
from srnn.exporting.reading import read_chain
from srnn.exporting.wasm import wasm_format
from srnn.exporting.wasm.building import WasmStream, can_compile, can_run, webassembly
from srnn.models import LanguageModel, SequenceModel
from srnn.vocabulary import Vocabulary
from tests.exporting.test_c import pruned

COMPILER = find_compiler()
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
needs_zig = pytest.mark.skipif(not (can_compile() and can_run()), reason="no ziglang or wasmtime here")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler here: cc, gcc, clang or ziglang")
needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="no node here")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
EXACT = ("-O2", "-ffp-contract=off")  # without fused multiply-adds and fast-math: one result on all machines
NETWORKS = {
    "language model": (lambda: pruned(LanguageModel(nn.GRU, 50, 16, 96), 0.2, 16), "fp16", "16x1"),
    "reads whole sequences": (
        lambda: pruned(SequenceModel(nn.LSTM, 5, 7, 37, num_layers=2, bidirectional=True), 0.3),
        "int8",
        "element",
    ),
}


def program_of(kind):
    """The network, and its program, of weights that are the same at each call."""
    build, values, structure = NETWORKS[kind]
    torch.manual_seed(0)
    model = build()
    return model, c_program(packed_chain(read_chain(model), values, structure), "net", "net")


def inputs_of(program, steps):
    if program.calls.tokens:
        return np.arange(steps) * 7 % program.calls.tokens
    return np.random.default_rng(0).standard_normal((steps, program.calls.inputs)).astype(np.float32)


def page_of(kind, folder):
    model, _ = program_of(kind)
    _, values, structure = NETWORKS[kind]
    options = {"values": values, "structure": structure, "verify": False}
    srnn.export(model, folder / "net.html", "wasm", about="a <b>network</b> & more", **options)
    return folder / "net.html"


def native_bits(kind, folder, steps=300):
    """Outputs of native C as whole numbers."""
    _, program = program_of(kind)
    stream = Stream(program, compiled(program, COMPILER, folder, EXACT))
    return stream.run(inputs_of(program, steps)).reshape(-1).view(np.uint32).tolist()


SHOW = """
(async () => {
  const network = await Network.load(about), sequence = INPUTS;
  let outputs = Array.from(network.run(sequence));
  if (about.tokens) {  /* half by steps: the stream goes on */
    network.reset();
    outputs = sequence.slice(0, 150).flatMap((token) => Array.from(network.step(token)));
    outputs = outputs.concat(Array.from(network.run(sequence.slice(150))));
  }
  const bits = JSON.stringify(Array.from(new Uint32Array(Float32Array.from(outputs).buffer)));
  DONE
})();
"""


def script(kind, done):
    _, program = program_of(kind)
    return SHOW.replace("INPUTS", json.dumps(inputs_of(program, 300).tolist())).replace("DONE", done)


@needs_zig
@needs_compiler
@pytest.mark.parametrize("kind", NETWORKS)
def test_webassembly_computes_bit_for_bit_what_native_c_does(kind, tmp_path):
    _, program = program_of(kind)
    stream = WasmStream(program, webassembly(program, tmp_path))
    given = inputs_of(program, 300)
    assert stream.run(given).reshape(-1).view(np.uint32).tolist() == native_bits(kind, tmp_path)
    if program.calls.can_step:
        stream.reset()
        native = Stream(program, tmp_path / "net.so")
        for one in given[:20]:
            assert stream.step(one).tobytes() == native.step(one).tobytes()
            assert stream.memory.tobytes() == native.memory.tobytes()


@needs_zig
def test_a_page_is_run_against_its_network_and_asks_for_nothing_else(tmp_path):
    model = pruned(LanguageModel(nn.GRU, 4, 8, 24))
    model.vocabulary = Vocabulary.build("words", "é </script> &")
    told = []
    report = srnn.export(model, tmp_path / "net.html", "wasm", about="gru & <data>", tell=told.append)
    assert "run by wasmtime against the network for 10,000 steps" in str(report)
    assert report.difference < 2e-6
    assert "flash:" in told[0]
    page = (tmp_path / "net.html").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["net.html"]
    assert not re.search(r"https?://|\bsrc=|\bimport\b|fetch\(|<link", page)
    assert "default-src 'none'" in page
    assert html.escape("gru & <data>") in page
    assert page.count("<script") == page.count("</script>") == 2
    data = json.loads(re.search(r"const about = (\{.*\});", page)[1])
    assert data["vocabulary"] == model.vocabulary.to_dict()
    assert data["facts"]["sparsity"] == f"{100 * zeros(model):.1f} %"


def zeros(model):
    weights = torch.cat([w.flatten() for w in model.parameters() if w.dim() == 2])
    return float((weights == 0).float().mean())


@needs_zig
def test_the_page_of_the_usual_network_is_small(tmp_path):
    """GRU of 256 units on 100 characters, 90 % pruned, in fp16: 150 KB compressed at most."""
    model = pruned(LanguageModel(nn.GRU, 100, 64, 256))
    srnn.export(model, tmp_path / "net.html", "wasm", verify=False)
    assert len(gzip.compress((tmp_path / "net.html").read_bytes())) < 150_000


@needs_zig
def test_a_page_that_differs_is_not_written(tmp_path, monkeypatch):
    def wrong(program, *arguments):
        return webassembly(replace(program, source=program.source.replace("0.5f + 0.5f", "0.4f + 0.5f")), *arguments)

    monkeypatch.setattr(wasm_format, "webassembly", wrong)
    with pytest.raises(UserError, match=r"net\.html is not written: the module's outputs differ by \d"):
        srnn.export(nn.GRU(4, 8), tmp_path / "net.html", "wasm")
    assert not list(tmp_path.iterdir())


def test_without_the_packages_it_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"format=wasm needs ziglang, .*: pip install 'srnn\[wasm\]'"):
        srnn.export(nn.GRU(4, 4), tmp_path / "net.html", "wasm")


@needs_zig
def test_a_run_by_the_command(text_run, tmp_path, capsys):
    target = tmp_path / "net.html"
    assert main(["export", f"run={text_run}", "format=wasm", "verify=false", f"output={target}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"flash: .*\n(.*\n)*.*net\.html: ", out)
    told = re.search(r"test: (\d\.\d{4} bits/char)", out)[1]
    page = target.read_text()
    assert told in page
    assert '"level": "characters"' in page


@pytest.mark.tools
@needs_zig
@needs_compiler
@needs_node
@pytest.mark.parametrize("kind", NETWORKS)
def test_node_runs_the_pages_own_script(kind, tmp_path):
    page = page_of(kind, tmp_path).read_text()
    (code,) = re.findall(r'<script id="network">(.*?)</script>', page, flags=re.DOTALL)
    (tmp_path / "run.js").write_text(code + script(kind, "console.log(bits);"))
    bits = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert json.loads(bits) == native_bits(kind, tmp_path)


@pytest.mark.tools
@needs_zig
@needs_node
@pytest.mark.parametrize("level", ["characters", "words", "bytes"])
def test_the_page_reads_text_as_training_does(level, tmp_path):
    text = "to be, or not\nto be: é \U0001f40d\n"
    vocabulary = Vocabulary.build(level, text)
    model = LanguageModel(nn.RNN, len(vocabulary), 4, 4)
    model.vocabulary = vocabulary
    srnn.export(model, tmp_path / "net.html", "wasm", verify=False)
    (code,) = re.findall(r'<script id="network">(.*?)</script>', (tmp_path / "net.html").read_text(), flags=re.DOTALL)
    text += "zebra"
    code += f"const v = new Vocabulary(about.vocabulary), t = v.encode({json.dumps(text)});\n"
    (tmp_path / "run.js").write_text(code + "console.log(JSON.stringify([t, v.decode(t)]));")
    done = subprocess.run(["node", "run.js"], cwd=tmp_path, capture_output=True, text=True, check=True)
    tokens, written = json.loads(done.stdout)
    assert tokens == vocabulary.encode(text).tolist()
    assert written == vocabulary.decode(tokens)


@pytest.mark.tools
@needs_zig
@needs_compiler
@needs_browser
@pytest.mark.parametrize("kind", NETWORKS)
def test_a_browser_runs_the_page(kind, tmp_path):
    page = page_of(kind, tmp_path)
    done = 'const shown = document.createElement("q"); shown.textContent = bits; document.body.append(shown);'
    page.write_text(page.read_text().replace("</body>", f"<script>{script(kind, done)}</script></body>"))
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--virtual-time-budget=5000",
        f"--user-data-dir={tmp_path}/u",
    ]
    command = [BROWSER, *options, "--dump-dom", page.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    (bits,) = re.findall(r"<q>(.*?)</q>", shown)
    assert json.loads(bits) == native_bits(kind, tmp_path)
    _, program = program_of(kind)
    assert shown.count('class="bar') == min(12, program.calls.outputs)
    assert re.search(r"steps a second here</dt><dd>[\d,]+</dd>", shown)
    assert "a &lt;b&gt;network&lt;/b&gt; &amp; more" in shown
