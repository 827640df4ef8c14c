"""A run anyone can rebuild."""

import filecmp
import importlib.metadata
import json
import math
import os
import shlex
import subprocess

import pytest
import torch

from srnn.__main__ import main
from srnn.commands.rerun import agreement
from srnn.config.composing import compose_settings
from srnn.recording.environment import data_checksums, differences, environment, read_environment
from srnn.registry import register
from srnn.run_folder import RunFolder
from tests.conftest import QUIET, ROOT, SMALL


def test_a_folder_says_what_it_was_made_in(text_run):
    made_in = json.loads((text_run / "environment.json").read_text())
    chosen = [*SMALL, "tracking.mode=disabled", f"hydra.run.dir={text_run}", "kernel=dense"]
    assert made_in["command"] == shlex.join(["srnn", *chosen])
    assert made_in["packages"]["torch"] == importlib.metadata.version("torch")
    assert made_in["hardware"]["threads"] == torch.get_num_threads()
    head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:
        assert made_in["git"][str(ROOT)]["commit"] == head.stdout.strip()
    data = register.build("dataset", compose_settings(QUIET).dataset)
    data.setup()
    assert made_in["data"] == data_checksums(data)
    assert len(set(made_in["data"].values())) == 3


def test_rerun_gives_the_same_numbers(text_run, tmp_path, capsys):
    assert main(["rerun", str(text_run), "--output", str(tmp_path / "again")]) == 0
    shown = capsys.readouterr().out
    assert "numbers are the same, bit for bit." in shown
    assert "Code, packages, hardware and data are the same." in shown
    assert read_environment(RunFolder(tmp_path / "again"))["command"] == f"srnn rerun {text_run}"
    networks = [folder / "model.safetensors" for folder in (text_run, tmp_path / "again")]
    assert filecmp.cmp(*networks, shallow=False), "the same network, too"


def test_rerun_tells_what_differs(text_run, tmp_path, capsys):
    changed = tmp_path / "run"
    changed.mkdir()
    for name in ("config.yaml", "report.json", "environment.json"):
        (changed / name).write_text((text_run / name).read_text())
    made_in = read_environment(RunFolder(changed))
    made_in["packages"]["torch"], made_in["data"]["test"] = "1.0", "0" * 64
    (changed / "environment.json").write_text(json.dumps(made_in))
    report = json.loads((changed / "report.json").read_text())
    report["scores"]["test"]["loss"] *= 1.01
    (changed / "report.json").write_text(json.dumps(report))
    assert main(["rerun", f"{changed}", "--output", f"{tmp_path}/again"]) == 1
    shown = capsys.readouterr().out
    assert "differ by more than 0.1 %: 1 of" in shown
    assert "most of all scores.test.loss" in shown
    assert "differs: packages: torch: 1.0 -> " in shown
    assert "differs: data: test: 000" in shown


def test_mistakes(text_run, tmp_path, capsys):
    for arguments, words in (
        ([], "as `srnn rerun outputs/RUN`"),
        ([tmp_path], "no finished run is there"),
        ([text_run, "--output", text_run], "holds a run already"),
        ([text_run, "--tolerance", "much"], "--tolerance"),
        ([text_run, "--tolerance", "nan"], "--tolerance=nan must be at least 0"),
        ([text_run, "--output", text_run / "environment.json" / "x"], "--output="),
    ):
        assert main(["rerun", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text((text_run / "config.yaml").read_text().replace("freq: auto", "freq: 99"))
    (tmp_path / "report.json").write_text((text_run / "report.json").read_text())
    assert main(["rerun", str(tmp_path), "--output", str(tmp_path / "some/run")]) == 2
    assert "freq=99" in capsys.readouterr().err
    assert not (tmp_path / "some").exists()


def test_agreement():
    report = {
        "scores": {"test": {"loss": 2.0}},
        "validations": [],
        "layers": [],
        "sparsity": {},
        "size": {},
        "steps": 4,
    }
    near = report | {"scores": {"test": {"loss": 2.001}}}
    assert agreement(report, report, 0.0) == ("All 2 numbers are the same, bit for bit.", True)
    assert agreement(report, near, 0.001)[1]
    assert not agreement(report, near, 0.0001)[1]
    assert "loss: 2 then, 2.001 now" in agreement(report, near, 0.001)[0]
    nearer = report | {"scores": {"test": {"loss": 2.0000000003}}}
    assert "loss: 2 then, 2.0000000003 now" in agreement(report, nearer, 0.001)[0]
    next_to_it = report | {"scores": {"test": {"loss": math.nextafter(2, 3)}}}
    assert "loss: 2 then, 2.0000000000000004 now" in agreement(report, next_to_it, 0.001)[0]
    assert not agreement(report, report | {"scores": {}}, 1.0)[1]
    assert differences(environment(["srnn"]), environment(["other"])) == []


def test_a_run_does_not_go_on_with_other_data(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text"
    text.write_text("It was the best of times, it was the worst of times.\n" * 200)
    with monkeypatch.context() as patch:
        patch.setattr("srnn.training.run.pack_and_verify", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            main([*QUIET, "dataset=text", "dataset.path=text", "hydra.run.dir=run"])
    text.write_text("It was the best of times, it was the age of wisdom.\n" * 200)
    assert main(["resume=run"]) == 2
    assert "its data have changed since it was started (train and valid and test)" in capsys.readouterr().err


def test_git_is_asked_without_taking_its_lock(tmp_path, monkeypatch):
    """Killed in the middle, it would leave the lock behind, and the user's next commit would be refused."""
    monkeypatch.chdir(tmp_path)
    file, index = tmp_path / "a", tmp_path / ".git/index"
    file.write_text("a")
    for words in (["init", "-q"], ["add", "a"], ["-c", "user.name=a", "-c", "user.email=a", "commit", "-qm", "a"]):
        subprocess.run(["git", *words], check=True)
    os.utime(file, (0, 0))  # git then writes its index anew, unless it must not
    before = index.read_bytes()
    of_git = environment(["srnn"], {"srnn": {"plugins": "off"}})["git"][str(tmp_path)]
    assert (of_git["status"], of_git["patch"]) == ("", "")
    (tmp_path / "b").write_text("not of git")
    file.write_text("b")
    assert "+b" in environment(["srnn"], {"srnn": {"plugins": "off"}})["git"][str(tmp_path)]["patch"]
    assert index.read_bytes() == before
