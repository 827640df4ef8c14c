"""Any file may be damaged, or made by anybody: it is read, or refused in a sentence, quickly and in little memory."""

import copy
import io
import json
import pickle
import shutil
from collections import OrderedDict

import matplotlib.pyplot as plt
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import srnn
from srnn.__main__ import main
from srnn.config.composing import parse_override
from srnn.config.settings import SECTIONS, options_of
from srnn.errors import UserError
from srnn.inference.packed_file import _checksum, write
from srnn.models import gru
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.training.preparing import prepare
from srnn.training.start_from import load_weights, read_initial
from tests.conftest import QUIET
from tests.fuzz.choices import PRESETS, within
from tests.fuzz.common import JUNK, Answers, damaged, generators, mutated
from tests.inference.test_files_of_others import header_of
from tests.inference.test_packed_file import packed_model, sparse_model
from tests.training.test_resume import interrupt_after

ODD = [0, 1, -1, 127, -128, 255, 32767, 65535, 2**31 - 1, -(2**31), 1e-45, 65504.0, 3e38, float("nan"), float("inf")]
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.uint8, torch.uint16,
          torch.int32, torch.int64, torch.bool, torch.complex64]  # fmt: skip


def odd_tensor(tensor, rng):
    """Another tensor in its place: of other numbers, size, shape or type."""
    tensor = (torch.zeros(3) if tensor.layout != torch.strided or tensor.is_meta else tensor).clone()
    action = rng.choice(["bits", "bits", "bits", "odd", "odd", "size", "shape", "type", "mix"])
    if action == "bits" and tensor.numel():
        raw = tensor.reshape(-1).view(torch.uint8)
        for _ in range(rng.choice([1, 1, 3, 20])):
            raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    elif action == "odd" and tensor.numel():
        wide = tensor.reshape(-1).to(torch.float64)
        for _ in range(rng.choice([1, 3])):
            wide[rng.randrange(len(wide))] = rng.choice(ODD)
        tensor = wide.nan_to_num(0, 0, 0).to(tensor.dtype).view(tensor.shape) if not tensor.is_floating_point() else (
            wide.to(tensor.dtype).view(tensor.shape))  # fmt: skip
    elif action == "size" and tensor.ndim:
        tensor = tensor[: rng.randrange(len(tensor) + 1)] if rng.random() < 0.5 else torch.cat([tensor, tensor])
    elif action == "shape":
        tensor = rng.choice([tensor[None], tensor.reshape(-1), tensor.reshape(-1, 1), torch.zeros(()), tensor.mT[:0]
                             if tensor.ndim > 1 else tensor[:0]])  # fmt: skip
    elif action == "type":
        tensor = tensor.to(torch.float64).to(rng.choice(DTYPES))
    elif tensor.numel():
        tensor = tensor.reshape(-1)[torch.tensor(rng.sample(range(tensor.numel()), tensor.numel()))].view(tensor.shape)
    return tensor.contiguous()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """Packed files of several formats: path -> header and tensors."""
    folder, files = tmp_path_factory.mktemp("packed"), {}
    for values, structure in (("fp32", "element"), ("int8", "16x1"), ("bf16", "4x1")):
        path = folder / f"{values}.safetensors"
        write(path, packed_model(sparse_model(0.2, int(structure.partition("x")[0]) if "x" in structure else 1),
                                 values, structure))  # fmt: skip
        srnn.load(path, "cpu")(torch.zeros(2, 3, dtype=torch.int64))  # compiled before anything is timed
        files[path] = header_of(path), load_file(path)
    return files


def test_bodies_under_a_fresh_checksum(tmp_path, packed):
    """What is read runs on every kernel without looking where it must not."""
    answers, path = Answers(), tmp_path / "model.safetensors"
    for rng in generators("bodies", 150):
        header, tensors = copy.deepcopy(rng.choice(list(packed.values())))
        for _ in range(rng.choice([1, 1, 2])):
            name = rng.choice(list(tensors))
            draw = rng.random()
            if draw < 0.05:
                del tensors[name]
            elif draw < 0.1:
                tensors[rng.choice([*tensors, "x", "srnn"])] = tensors[name].clone()
            else:
                tensors[name] = odd_tensor(tensors[name], rng)
        if rng.random() < 0.2:
            header = mutated(header, rng)
        header.pop("sha256", None)
        header["sha256"] = _checksum(header, tensors)
        save_file(tensors, path, {"srnn": json.dumps(header)})
        kernel = rng.choice(["csr", "cpu", "dense"])
        with answers.measured((kernel, rng.getstate()[1][:2])):
            try:
                model = srnn.load(path, kernel)
            except UserError as error:
                answers.refused(error, path.name)
                continue
            logits, state = model(torch.arange(6).view(2, 3))
            model.step(logits[:, -1].nan_to_num().argmax(1), state)
        answers.counts["read"] += 1
    assert answers.counts["read"] > 10
    print(answers)


def test_bytes_of_a_packed_file(tmp_path, packed, capsys):
    """Without a fresh checksum nothing that differs is read."""
    answers, path = Answers(), tmp_path / "model.safetensors"
    for rng in generators("packed bytes", 150):
        whole = rng.choice(list(packed)).read_bytes()
        path.write_bytes(data := damaged(whole, rng))
        with answers.measured(rng.getstate()[1][:2]):
            try:
                srnn.load(path, "csr")
                assert data == whole
            except UserError:
                answers.counts["refused"] += 1
    print(answers)


# ---- checkpoints


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The folders of a run that was stopped in its last pass, and of the same run that was not."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 60)
    chosen = [*QUIET, "model.hidden_size=8", "dataset=text", f"dataset.path={folder}/text.txt",
              "dataset.eval_streams=2", "dataset.batch_size=2"]  # fmt: skip
    assert main([*chosen, f"hydra.run.dir={folder}/whole"]) == 0
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, 37)
        assert main([*chosen, f"hydra.run.dir={folder}/stopped"]) == 130
    return folder / "stopped", folder / "whole"


@pytest.fixture
def nothing_drawn(monkeypatch):
    """Pictures and times are no part of these tests, and most of a small run's time."""
    monkeypatch.setattr("srnn.training.run.plot_run", lambda *_: [])


def odd_checkpoint(value, rng):
    """One to three places of nested data become something else."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice([1, 1, 2, 3])):
        part = value
        while True:
            keys = list(part) if isinstance(part, dict) else list(range(len(part)))
            if not keys:
                break
            key = rng.choice(keys)
            if isinstance(part[key], dict | list) and part[key] and rng.random() < 0.9:
                part = part[key]
                continue
            if isinstance(part, tuple):
                break
            if rng.random() < 0.3:
                del part[key]
            elif isinstance(part[key], torch.Tensor) and rng.random() < 0.8:
                part[key] = odd_tensor(part[key], rng)
            else:
                part[key] = rng.choice([None, 0, -1, 10**12, 0.5, float("nan"), "x", [], {}, [1], {"a": 1}, True,
                                        torch.zeros(2), torch.zeros(3).to_sparse(),
                                        torch.empty(2, device="meta")])  # fmt: skip
            break
    return value


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def odd_file(loaded, rng):
    """Bytes of a checkpoint of another content, or of no checkpoint at all."""
    if rng.random() < 0.8:
        return saved(odd_checkpoint(loaded, rng))
    return rng.choice([
        b"", b"x", b"PK\x03\x04", pickle.dumps({"state_dict": 1}), pickle.dumps(print), saved([1]), saved({}),
        saved({"state_dict": {}}), saved({1: torch.zeros(2)}), saved(torch.zeros(3)), saved(OrderedDict(a=1)),
        saved({"state_dict": {"a": torch.zeros(2).to_sparse()}}), rng.randbytes(300),
        pickle.dumps(loaded["epoch"]), b"\x80\x02]" + b"]" * 5000, saved({"state_dict": {"": torch.zeros(2)}}),
    ])  # fmt: skip


def test_checkpoints_through_resume(tmp_path, stopped, nothing_drawn, capsys):
    """It goes on and ends, or stops with a sentence; what only was damaged never gives another network."""
    run, whole = stopped
    good = (run / "checkpoints/last.ckpt").read_bytes()
    loaded = torch.load(io.BytesIO(good), weights_only=True)
    answers, wanted = Answers(seconds=30.0, kilobytes=400_000), (whole / "model.safetensors").read_bytes()
    for rng in generators("resume", 14):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        hurt = rng.random() < 0.4
        data = damaged(good, rng) if hurt else odd_file(loaded, rng)
        (folder / "checkpoints/last.ckpt").write_bytes(data)
        code, _ = answers.to(capsys, [f"resume={folder}"], rng.getstate()[1][:2])
        if code == 0 and hurt:
            assert (folder / "model.safetensors").read_bytes() == wanted
        assert not [path for path in folder.rglob(".*") if path.is_file()], "nothing half-written is left"
        shutil.rmtree(folder)
    print(answers)


def test_checkpoints_through_init_from(tmp_path, stopped):
    run, _ = stopped
    good = (run / "checkpoints/best.ckpt" if (run / "checkpoints/best.ckpt").exists() else
            run / "checkpoints/last.ckpt").read_bytes()  # fmt: skip
    loaded, answers = torch.load(io.BytesIO(good), weights_only=True), Answers()
    loaded = {key: loaded[key] for key in ("state_dict", "vocabulary", "epoch") if key in loaded}
    sizes = {"vocabulary_size": len(loaded["state_dict"]["model.embedding.weight"])}
    for rng in generators("init_from", 150):
        path = tmp_path / rng.choice(["weights.ckpt", "weights.pt", "weights.safetensors"])
        if path.suffix == ".safetensors":
            tensors = {name: odd_tensor(w, rng) for name, w in loaded["state_dict"].items()}
            save_file(tensors, path)
            path.write_bytes(damaged(path.read_bytes(), rng) if rng.random() < 0.5 else path.read_bytes())
        else:
            path.write_bytes(damaged(good, rng) if rng.random() < 0.4 else odd_file(loaded, rng))
        with answers.measured(rng.getstate()[1][:2]):
            try:
                load_weights(gru(8, 8, **sizes), read_initial(str(path)), partly=rng.random() < 0.5)
                answers.counts["read"] += 1
            except UserError as error:
                answers.refused(error, path.name)
    print(answers)


# ---- the other files of a run's folder

TOKENS = [
    "[", "]", "{", "}", ": ", "- ", "'", '"', "&a ", "*a", "!!python/object/apply:os.system [x]", "!!binary x",
    "!!float x",
    "!!int x", "!!timestamp 2001-99-99", "!!set {a}", "2001-01-01", "2001-99-99", "null", "~", "???", "${seed}", "${x",
    "${oc.env:HOME}", "\t", "\0", "\ufeff", "\u2028", "é", "\x07", "\n---\n", "\n...\n", "%YAML 9.9\n", "9" * 5000,
    ".nan",
    "1e999", "0o9", "1:30:00", "yes", "|", ">", "#", "? ", "x: 1\n", "? [a]\n: 1\n", "1: 2\n", "null: 3\n", "<<: *a\n",
    "[" * 3000, "- " * 3000, "{a: " * 3000, "a: &a [x]\nb: &b [*a,*a]\nc: [*b,*b]\n", "x" * 100_000,
]  # fmt: skip


def odd_text(text, rng):
    """Lines and words of a text go away, come twice, change places or become something else."""
    lines = text.splitlines(keepends=True)
    for _ in range(rng.choice([1, 1, 2, 4])):
        if not lines:
            break
        place, action = rng.randrange(len(lines)), rng.random()
        if action < 0.15:
            del lines[place]
        elif action < 0.25:
            lines.insert(place, lines[rng.randrange(len(lines))])
        elif action < 0.6 and ":" in lines[place]:
            lines[place] = lines[place].partition(":")[0] + ": " + rng.choice(TOKENS) + "\n"
        elif action < 0.8:
            column = rng.randrange(len(lines[place]) + 1)
            lines[place] = lines[place][:column] + rng.choice(TOKENS) + lines[place][column:]
        else:
            lines.insert(place, rng.choice(TOKENS))
    return "".join(lines)


def odd_choices(text, rng):
    """A config of other choices: another preset, options of their types and within bounds, and now and then one not."""
    config = yaml.safe_load(text)
    for _ in range(rng.choice([1, 2, 3, 6])):
        part = rng.choice([key for key, value in config.items() if isinstance(value, dict)])
        if part in PRESETS and rng.random() < 0.3:
            config[part] = register.get(part, rng.choice(PRESETS[part])).defaults()
            continue
        options = options_of(SECTIONS[part]) if part in SECTIONS else register.get(part, config[part]["name"]).options
        if options and (value := within(option := rng.choice(list(options.values())), rng)) is not None:
            config[part][option.name] = parse_override(f"x={value}").value()
    if rng.random() < 0.1:
        config[rng.choice(list(config))] = rng.choice(JUNK)
    for name, size in (("hidden_size", 8), ("embedding_size", 8)):  # a preset's own would take long
        if isinstance(config["model"], dict):
            config["model"][name] = min(config["model"].get(name, size), size)
    return yaml.safe_dump(config)


def odd_json(text, rng):
    if rng.random() < 0.7:
        return json.dumps(mutated(json.loads(text), rng)).encode()
    return damaged(text.encode(), rng) if rng.random() < 0.5 else odd_text(text, rng).encode()


@pytest.fixture
def prepared_only(monkeypatch, stopped):
    """``resume`` and ``rerun`` go as far as the first step; the whole run's report is taken for a rerun's."""
    report = RunFolder(stopped[1]).read_report()

    def _run(settings, folder, checkpoint):
        prepare(settings, checkpoint=checkpoint)
        return report

    def train(settings, folder, group=None, command=None):
        prepare(settings)
        return report

    monkeypatch.setattr("srnn.training.run._run", _run)
    monkeypatch.setattr("srnn.training.run.train", train)


def test_config_yaml(tmp_path, stopped, prepared_only, capsys, monkeypatch):
    """A config out of a folder is checked as one from the command line."""
    from srnn.config.sweeps import identity_of

    monkeypatch.chdir(tmp_path)
    answers, text = Answers(), (stopped[1] / "config.yaml").read_text()
    shutil.copytree(stopped[1], tmp_path / "run")
    for rng in generators("config.yaml", 60):
        changed = (odd_choices(text, rng) if rng.random() < 0.7 else odd_text(text, rng)).encode(errors="replace")
        (tmp_path / "run/config.yaml").write_bytes(damaged(changed, rng) if rng.random() < 0.1 else changed)
        report = tmp_path / "run/report.json"
        identity_of(tmp_path / "run/config.yaml")
        if rng.random() < 0.5:
            answers.to(capsys, ["rerun", "run", "--output", "again"], changed[:3000], codes=(0, 1, 2))
        else:
            hidden = report.rename(tmp_path / "report.json")
            answers.to(capsys, ["resume=run"], changed[:3000])
            hidden.rename(report)
    print(answers)


@pytest.mark.parametrize("name", ["report.json", "environment.json", "metrics.csv"])
def test_files_that_say_what_a_run_did(tmp_path, stopped, prepared_only, nothing_drawn, capsys, monkeypatch, name):
    """Damaged, they are named before anything long is done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("srnn.comparing.comparison_plots._save", lambda figure, axes, path: plt.close(figure) or path)
    answers = Answers(seconds=5.0)
    shutil.copytree(stopped[1], tmp_path / "run")
    shutil.copytree(stopped[1], tmp_path / "other")
    text = (tmp_path / "run" / name).read_text()
    commands = {"report.json": ["compare", "evaluate", "rerun"], "environment.json": ["evaluate", "rerun", "export"],
                "metrics.csv": ["compare"]}[name]  # fmt: skip
    for rng in generators(name, 40):
        changed = odd_text(text, rng).encode(errors="replace") if name == "metrics.csv" else odd_json(text, rng)
        (tmp_path / "run" / name).write_bytes(changed)
        command = rng.choice(commands)
        words = {"compare": ["compare", "run", "other", "--mode", "disabled", "--output", "out"],
                 "evaluate": ["evaluate", "run=run", "kernel=dense"], "rerun": ["rerun", "run", "--output", "again"],
                 "export": ["export", "run=run", "--output", "e.safetensors"]}[command]  # fmt: skip
        answers.to(capsys, words, (command, changed[:3000]), codes=(0, 1, 2) if command == "rerun" else (0, 2))
    print(answers)


def test_metrics_of_a_stopped_run(tmp_path, stopped, nothing_drawn, capsys):
    """They are looked at before the run goes on, and not after it."""
    answers, run = Answers(seconds=30.0, kilobytes=400_000), stopped[0]
    text = (run / "metrics.csv").read_text()
    for rng in generators("metrics", 4):
        folder = tmp_path / "run"
        shutil.copytree(run, folder)
        (folder / "metrics.csv").write_bytes(odd_text(text, rng).encode(errors="replace"))
        answers.to(capsys, [f"resume={folder}"], rng.getstate()[1][:2])
        shutil.rmtree(folder)
    print(answers)


def test_headers_through_evaluate(tmp_path, stopped, capsys):
    """What a packed file says of its data is checked, too."""
    answers, path = Answers(), tmp_path / "model.safetensors"
    header, tensors = header_of(stopped[1] / "model.safetensors"), load_file(stopped[1] / "model.safetensors")
    for rng in generators("evaluate", 60):
        changed = mutated(header, rng)
        if rng.random() < 0.7:
            changed["about"] = mutated(header["about"], rng)
        if rng.random() < 0.3:
            changed["vocabulary"] = mutated(header["vocabulary"], rng)
        changed.pop("sha256", None)
        changed["sha256"] = _checksum(changed, tensors)
        save_file(tensors, path, {"srnn": json.dumps(changed)})
        command = ["evaluate"] if rng.random() < 0.5 else ["generate", "--length", "3", "--prompt", "times was\n"]
        answers.to(capsys, [*command, f"run={path}", "kernel=dense"], str(changed)[:3000])
    print(answers)
