"""What the documentation says is tried: links, commands, code blocks, presets."""

import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch

import srnn
from srnn.__main__ import COMMANDS, main
from srnn.config.command_line import check_command_line
from srnn.config.composing import conf_folder, presets
from srnn.datasets import PennTreebank
from srnn.inference.weights import read_weights
from srnn.registry import KINDS, register
from srnn.registry.plugins import plugin_folders
from tests.conftest import QUIET, ROOT, SMALL

FILES = ["README.md", "CONTRIBUTING.md", "SECURITY.md"]
FILES += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))


def commands():
    """Every command line of srnn's in the documents and at the head of the presets, without its comment."""
    found = []
    for file in FILES:
        for block in re.findall(r"```bash\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL):
            found += [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("srnn ")]
    for path in (conf_folder() / "experiment").glob("*.yaml"):
        found += [shlex.split(c) for c in re.findall(r"srnn (experiment=[^(\n]*)", path.read_text())]
    return sorted({" ".join(map(shlex.quote, words if words[0] != "srnn" else words[1:])) for words in found})


def is_train(words):
    return words[0] not in COMMANDS and not words[0].startswith("resume")


def runs_here(words):
    """Sweeps are long; presets are run below, resumed runs and those of several processes in tests/training, speech in
    tests/objectives."""
    of_speech = words[0] == "transcribe" or any(word.startswith("model=deepspeech2") for word in words)
    return not (words[0].startswith(("-m", "resume", "experiment=")) or "trainer=ddp" in words or of_speech)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, text_run):
    """A folder with all that the documents' commands name."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "pyproject.toml").write_text(f'[tool.srnn]\nplugins = "{ROOT}/plugins"\n')
    (folder / "books").mkdir()
    text = "".join(f"It was the {word} of times.\n" for word in ("best", "worst", "age", "epoch")) * 200
    (folder / "books/a.txt").write_text(text)
    (folder / "book.txt").write_text(text)
    (folder / "ptb").mkdir()
    for source in PennTreebank.sources.values():
        (folder / "ptb" / source.name).write_text(text)
    for name in ("RUN", "SWEEP/gru_gradual_s0", "teacher"):
        shutil.copytree(text_run, folder / "outputs" / name)
    best = folder / "outputs/RUN/checkpoints/best.ckpt"
    (folder / "theirs.pt").write_bytes(best.read_bytes())
    torch.save(read_weights(best), folder / "weights.pt")  # without a vocabulary
    vocabulary = torch.load(best, weights_only=True)["vocabulary"]
    (folder / "tokens.json").write_text(json.dumps(["<unk>", *vocabulary["tokens"]]))
    return folder


@pytest.mark.parametrize("file", FILES)
def test_links_lead_somewhere(file):
    text = (ROOT / file).read_text()
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text):
        there = (ROOT / file).parent / target if target else ROOT / file
        assert there.exists(), f"{file}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            heads = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in heads, f"{file}: {target}#{anchor}"


@pytest.mark.parametrize("command", [c for c in commands() if is_train(shlex.split(c))])
def test_commands_compose(command):
    register.load_plugins(plugin_folders())
    check_command_line(shlex.split(command))


def own_components():
    """The components that srnn registers itself, without those of plug-ins."""
    names = [(kind, name) for kind in KINDS for name in register.names(kind)]
    return [c for c in map(register.components.get, names) if c.origin.startswith("srnn.")]


def test_every_name_is_on_the_page_of_the_configuration():
    page = (ROOT / "docs/configuration.md").read_text()
    names = {c.name for c in own_components() if c.kind != "objective"} | {*presets("experiment")}
    assert not {name for name in names if f"`{name}`" not in page}


def test_every_data_set_method_and_kernel_is_in_the_reference():
    page = (ROOT / "docs/reference/components.md").read_text()
    members = set(re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*?)\]", page))))
    wanted = {c.factory.__name__ for c in own_components() if c.kind in ("dataset", "pruning", "kernel")}
    assert not wanted - members


def test_a_run_is_named_as_the_commands_help_names_it():
    """``srnn export RUN``, not the longer ``srnn export run=RUN``, ``srnn export --run RUN`` or ``srnn resume=RUN``."""
    files = [*(ROOT / file for file in FILES), *ROOT.glob("srnn/**/*.py")]
    longer = re.compile(r"srnn \w+ (?:run=|--run\b)|(?m:^srnn resume=)")
    assert not {str(path): found for path in files if (found := longer.findall(path.read_text()))}


# Networks are made so small here that nothing may be left of a gate, which srnn warns of.
few_weights = pytest.mark.filterwarnings("ignore:pruning left no weight of")


@pytest.mark.slow
@few_weights
@pytest.mark.parametrize("command", [c for c in commands() if runs_here(shlex.split(c))])
def test_commands_run(command, folder, monkeypatch, tmp_path, capsys):
    words = shlex.split(command)
    monkeypatch.chdir(folder)
    if is_train(words):
        ours = [o for o in QUIET if "init_from" not in command or not o.startswith("model")]
        if {"dataset=adding", "dataset=digits", "dataset=sine"} & {*words}:
            ours = [o for o in ours if not o.startswith(("dataset.sequence", "model.embedding"))]
        words = [w for w in words if "model.hidden_size" not in w] + ours + [f"hydra.run.dir={tmp_path}/run"]
        words += ["model.hidden_size=24", "model.embedding_size=8"] if "init_from" in command else []
        words = [w for w in words if w != "model=lstm" or "theirs.pt" not in command]
    elif "bench=network" in words:
        pytest.skip("needs a GPU; its parts are tried on small networks")
    elif "bench=training" in words:
        words = ["bench", "bench=training", f"output={tmp_path}", f"config={' '.join(SMALL)}"]
    elif "bench=pruning" in words:
        words = ["bench", "bench=pruning", "shapes=gru:16", f"output={tmp_path}"]
    elif "bench=stream" in words:
        words += ["steps=20", f"output={tmp_path}"]
    elif words[0] == "bench":  # its options, on a small layer
        small = ["threads=1", f"output={tmp_path}", "shapes=gru:64"]
        words += ["limit=2", *([] if "outputs/RUN" in " ".join(words) else small)]
        words += ["device=cpu"] if "bench=gpu" in words else []
    elif words[0] == "prune":  # the network here has 90 % zeros already
        words = [re.sub(r"^pruning\.sparsity=0\.[5-9].*", "pruning.sparsity=0.95,0.97", w) for w in words]
        words = words if "-m" in words else [w.removesuffix(",0.97") for w in words]
    elif words[0] == "export":  # the network here is not pruned in blocks
        words = [w for w in words if not w.startswith("structure")]
    assert main(words) == 0, capsys.readouterr().err


@pytest.mark.parametrize("name", presets("experiment"))
@few_weights
def test_every_preset_runs_fast(name, folder, tmp_path):
    small = ["model.hidden_size=20", "model.embedding_size=20", "tracking.mode=disabled", "kernel=dense"]
    fewer = ["dataset.batch_size=8", "pruning.sparsity=0.9", "seed=0"]  # jobs of a sweep
    data = [f"dataset.folder={folder}/ptb"] if name.startswith("ptb") else fewer
    chosen = [f"experiment={name}", "trainer=fast", *data, *small]
    if name.endswith(("_sparse", "_blocks")):  # it learns from a dense one
        drop = ["~pruning.structure", "~pruning.scope"] if name.endswith("_blocks") else []
        dense = [*chosen, "pruning=none", "distill.teacher=null", *drop]
        assert main([*dense, f"hydra.run.dir={tmp_path}/dense"]) == 0
        chosen.append(f"distill.teacher={tmp_path}/dense")
    assert main([*chosen, f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}"]) == 0
    assert list(tmp_path.glob("*/report.json"))


@pytest.mark.parametrize("file", [f for f in FILES if "```python" in (ROOT / f).read_text()])
@few_weights
def test_python_runs(file, folder, monkeypatch, capsys):
    assert all(register.names(kind) for kind in KINDS)  # all of srnn's own are in what is restored
    before = dict(register.components)
    monkeypatch.chdir(folder)
    try:
        for block in re.findall(r"```python\n(.*?)```", (ROOT / file).read_text(), flags=re.DOTALL):
            exec(compile(block, file, "exec"), {"__name__": "block"})
    finally:
        register.components = before


@pytest.mark.slow
def test_the_site_builds_without_a_warning_and_needs_no_network(tmp_path):
    pytest.importorskip("properdocs", reason="the site is built with what pip install -e '.[docs]' brings")
    build = [sys.executable, "-m", "properdocs", "build", "--strict", "-f", "mkdocs.yml", "-d", str(tmp_path)]
    done = subprocess.run(build, cwd=ROOT, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text() for path in tmp_path.rglob("*.html")}
    for name in {*srnn.__all__} - {"__version__"}:
        assert f'id="srnn.{name}"' in pages["reference/index.html"], f"{name} is not in the reference"
    for page, text in pages.items():
        fetched = re.findall(r'<(?:script|img|link)[^>]* (?:src|href)="(?:https?:)?//[^"]*"', text)
        assert not fetched, f"{page} fetches {fetched}"
        assert "<blockquote" not in text, f"{page}: an example of a docstring is not shown as code"


def test_the_picture_of_speed_is_drawn_from_what_was_measured(tmp_path):
    script = runpy.run_path(str(ROOT / "docs/results/speed_over_sparsity.py"))
    script["draw"](ROOT / "docs/results/cpu_layers.csv", tmp_path / "speed.png")
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")


def test_the_picture_of_spoken_digits_is_drawn_from_what_was_measured(tmp_path):
    script, results = runpy.run_path(str(ROOT / "docs/results/speech_digits.py")), ROOT / "docs/results"
    csvs = (results / "speech_digits_curves_h200.csv", results / "speech_digits_h200.csv")
    script["draw"](*csvs, tmp_path / "digits.png")
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
