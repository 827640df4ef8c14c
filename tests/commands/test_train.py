"""Real runs through the command line, small."""

import csv
import json
import re
import signal
import time

import pytest
import torch

from srnn.__main__ import main
from srnn.inference.packed_file import read
from srnn.inference.weights import read_weights
from srnn.kernels.cpu.announcing import MESSAGE
from tests.conftest import SMALL, train
from tests.forking import Forked

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_run_leaves_everything_in_its_folder(tmp_path, srnn_command, capsys):
    home = tmp_path / "home"
    home.mkdir()
    run = tmp_path / "run"
    whole = "trainer.limit_eval_batches=null"  # as `evaluate` scores
    done = srnn_command(*SMALL, whole, f"hydra.run.dir={run}", HOME=str(home), XDG_CONFIG_HOME="", XDG_CACHE_HOME="")
    assert done.returncode == 0, done.stderr
    assert done.stderr.replace(f"{MESSAGE}\n", "") == ""
    assert done.stdout.startswith(f"This run is in {run}\n"), "said before it trains"
    for words in (
        "What will be pruned",
        "rnn.weight_hh_l0",
        "Forecast: 40 steps",
        "epoch 5/5",
        "inside pruning",
        str(run),
    ):
        assert words in done.stdout
    assert f"wandb sync {run}/wandb/offline-run-" in done.stdout.replace("\n", "")
    assert len(re.findall(r"^epoch \d/5, step \d+: valid loss", done.stdout, re.MULTILINE)) == 5
    assert "\nstep " not in done.stdout
    names = {path.name for path in run.iterdir()}
    assert names == {
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "model.safetensors",
        "plots",
        "report.json",
        "wandb",
    }
    assert {p.name for p in (run / "checkpoints").iterdir()} == {"best.ckpt", "best-dense.ckpt", "last.ckpt"}
    plots = list((run / "plots").iterdir())
    assert {p.stem for p in plots} == {"loss_and_sparsity", "thresholds", "sparsity_per_layer", "mask"}
    assert all(p.read_bytes().startswith(PNG) for p in plots)
    (tracked,) = run.glob("wandb/offline-run-*/run-*.wandb")
    for key in (b"sparsity/rnn.weight_hh_l0", b"threshold/recurrent", b"valid_loss", b"layers", b"mask", b"-packed"):
        assert key in tracked.read_bytes(), key
    assert not list(home.rglob("*wandb*")), "W&B wrote into the user's home"

    report = json.loads((run / "report.json").read_text())
    check_report(report, run)
    assert main(["evaluate", f"run={run}"]) == 0
    scored = capsys.readouterr().out
    assert f"{report['scores']['test_packed']['bits_per_character']:.4f}" in scored
    assert "own report" not in scored, "it is of the same data"
    assert main(["generate", "--run", str(run), "--prompt", "def f(x):", "--length", "30"]) == 0
    written = capsys.readouterr().out
    assert written.startswith("def f(x):")
    assert len(written) == 9 + 30 + 1


def check_report(report, run):
    """The report says what the files hold."""
    state = read(run / "model.safetensors").state_dict()
    zeros = sum(int((w == 0).sum()) for w in state.values() if w.ndim == 2)
    size = sum(w.numel() for w in state.values() if w.ndim == 2)
    assert report["sparsity"]["reached"] == pytest.approx(zeros / size)
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.001)
    assert report["size"]["packed_bytes"] == (run / "model.safetensors").stat().st_size
    assert report["size"]["bytes_per_nonzero"] <= 4.05
    assert report["size"]["parameters"] == sum(w.numel() for w in state.values())
    for layer in report["layers"]:
        assert layer["nonzeros"] == int((state[layer["parameter"]] != 0).sum())
    scores = report["scores"]
    assert scores["pruning_started"]["step"] == scores["best_dense"]["step"] == 8
    assert scores["best"]["step"] > report["phases"]["end_itr"]
    assert scores["test"]["bits_per_character"] == pytest.approx(scores["test_packed"]["bits_per_character"], abs=0.01)
    dense, best = (read_weights(run / "checkpoints" / name) for name in ("best-dense.ckpt", "best.ckpt"))
    assert (dense["rnn.weight_hh_l0"] != 0).all(), "the dense best is kept apart"
    kept = best["rnn.weight_hh_l0"]
    assert torch.equal(kept.half().float(), state["rnn.weight_hh_l0"])
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    updates = [row for row in rows if row["sparsity/total"]]
    shares = [float(row["sparsity/total"]) for row in updates]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.9, abs=0.001)
    assert all(row["threshold/recurrent"] and row["sparsity/rnn.weight_hh_l0"] for row in updates)
    assert len([row for row in rows if row["valid_bits_per_character"]]) == 5


def test_none_and_hard(sweep):
    dense = json.loads((sweep / "gru_none_s0/report.json").read_text())
    assert dense["sparsity"] == {"wanted": 0.0, "by_layer_type": {}, "reached": 0.0}
    assert dense["layers"] == []
    assert dense["scores"]["pruning_started"] is None
    assert {p.stem for p in (sweep / "gru_none_s0/plots").iterdir()} == {"loss_and_sparsity"}
    hard = json.loads((sweep / "gru_hard_sparsity-0.5_s0/report.json").read_text())
    assert hard["sparsity"]["reached"] == pytest.approx(0.5, abs=0.001)
    assert hard["phases"] == {"start_itr": 20, "end_itr": 21}
    assert hard["scores"]["pruning_started"]["step"] == 16


def test_q_from_what_a_dense_run_left_in_each_form_it_can_have(sweep, tmp_path):
    thresholds = []
    for number, source in enumerate(("checkpoints/best.ckpt", "model.safetensors")):
        report = train(tmp_path / f"q{number}", f"pruning.q={sweep}/gru_none_s0/{source}", "packed.values=fp32")
        assert 0.5 < report["sparsity"]["reached"] < 1
        thresholds.append([layer["threshold"] for layer in report["layers"]])
    assert thresholds[0] == pytest.approx(thresholds[1], rel=1e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["model=lstm", "dataset=text", "dataset.level=words", "dataset.vocabulary_limit=50"],
        [
            "model=rnn",
            "model.nonlinearity=relu",
            "optimizer=sgd",
            "optimizer.lr=0.1",
            "dataset=text",
            "dataset.level=bytes",
            "packed.values=fp32",
        ],
        ["model.num_layers=2", "model.dropout=0.2", "optimizer=adamw", "pruning.soft=true"],
    ],
    ids=["lstm-words-adam", "rnn-bytes-sgd", "layers-characters-adamw"],
)
def test_models_data_and_optimisers(tmp_path, overrides, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("It was the best of times, it was the worst of times.\n" * 200)
    where = ["dataset.path=text"] if "dataset=text" in overrides else []
    report = train(tmp_path / "run", *overrides, *where)
    monkeypatch.chdir("/")
    assert report["sparsity"]["reached"] == pytest.approx(0.9, abs=0.002)
    assert main(["evaluate", f"run={tmp_path}/run"]) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["pruning=cubic", "pruning.structure=4x1", "pruning.score=mean", "pruning.start_itr=1 epoch"],
        ["pruning=cubic", "pruning.structure=2:4", "pruning.sparsity=0.5"],
        ["pruning=block", "pruning.group_lasso=0.01"],
        ["pruning=rigl", "pruning.density=er"],
        ["pruning=random", "pruning.share=global"],
        [r"pruning.scope={*.weight_hh_l0\[z\]:{sparsity:0.95},decoder.*:{sparsity:0}}"],
    ],
    ids=["cubic-4x1", "cubic-2:4", "block", "rigl", "random", "scope"],
)
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_every_method_trains(tmp_path, overrides):
    report = train(tmp_path / "run", *overrides)
    assert report["sparsity"]["reached"] == pytest.approx(report["sparsity"]["wanted"], abs=0.005)
    assert 0.5 <= report["sparsity"]["wanted"] < 0.95
    assert main(["evaluate", f"run={tmp_path}/run"]) == 0
    if "scope" in overrides[0]:
        sparsities = {row["parameter"]: row["sparsity"] for row in report["layers"]}
        assert sparsities["rnn.weight_hh_l0[z]"] == pytest.approx(0.95, abs=0.002)
        assert "decoder.weight" not in sparsities


def test_open_loop_says_what_resulted(tmp_path, capsys):
    report = train(tmp_path / "run", "pruning.q=0.12", "srnn.plugins=off")
    assert report["sparsity"]["reached"] != pytest.approx(0.9, abs=0.001)
    shown = capsys.readouterr().out
    assert "q is fixed" in shown
    assert f"The sparsity is {100 * report['sparsity']['reached']:.2f} %, not 90 %" in shown
    assert main([*SMALL, f"hydra.run.dir={tmp_path}/run"]) == 2, "a run is not overwritten"
    assert "holds a run already" in capsys.readouterr().err


def test_a_long_pass_is_not_silent_where_there_is_no_terminal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("srnn.recording.console.SILENCE", 0.0)
    train(tmp_path / "slow", "kernel=dense")
    shown = capsys.readouterr().out
    steps = re.findall(r"^step (\d+)/40: loss \d+\.\d{3}  sparsity ", shown, re.MULTILINE)
    assert list(map(int, steps)) == list(range(1, 41))


def test_configs_print_without_running(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["--cfg", "job", "model=lstm"]) == 0
    assert "name: lstm" in capsys.readouterr().out
    assert not (tmp_path / "outputs").exists()


@pytest.mark.slow
def test_a_run_cut_short_by_ctrl_c_leaves_whole_files(tmp_path):
    arguments = [*SMALL, "kernel=dense", "trainer.max_epochs=500", "trainer.limit_epochs=500", "hydra.run.dir=run"]
    process = Forked(arguments, tmp_path)
    last = tmp_path / "run/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.5)
    process.send(signal.SIGINT)
    code, said = process.end()
    assert code == 130
    assert "interrupted" in said
    assert "Traceback" not in said
    assert read_weights(last)
    assert (tmp_path / "run/config.yaml").exists()


@pytest.mark.slow
def test_plugins_of_the_working_folder(srnn_command, tmp_path):
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins/breaks.py").write_text("1 / 0")
    (tmp_path / "plugins/narrow.py").write_text(
        "from srnn.models import gru\n"
        "from srnn.registry import register\n"
        "@register.model('narrow')\n"
        "def narrow(width: int = 8, *, vocabulary_size: int):\n"
        "    'A thin GRU.'\n"
        "    return gru(width, 4, vocabulary_size=vocabulary_size)\n"
    )
    chosen = ["trainer=fast", "model=narrow", "model.width=12", "kernel=dense", "tracking.mode=disabled"]
    chosen.append("hydra.run.dir=run")
    code, said = Forked(chosen, tmp_path).end()
    assert code == 2
    assert f"the plug-ins in {tmp_path}/plugins are passed over: add srnn.plugins=on" in said
    assert "ZeroDivisionError" not in said
    done = srnn_command(*chosen, "srnn.plugins=on")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert f"plugins: {tmp_path}/plugins" in (tmp_path / "run/config.yaml").read_text()
    (tmp_path / "elsewhere").mkdir()
    code, said = Forked(["evaluate", f"run={tmp_path}/run"], tmp_path / "elsewhere").end()
    assert code == 2
    assert f"uses model=narrow of the plug-in {tmp_path}/plugins/narrow.py, which is not loaded" in said
    named = f"srnn.plugins={tmp_path}/plugins"
    assert named in said
    code, said = Forked(["evaluate", "run=../run", "kernel=dense", named], tmp_path / "elsewhere").end()
    assert code == 0, said
    (tmp_path / "pyproject.toml").write_text('[tool.srnn]\nplugins = "plugins"\n')
    code, said = Forked(["evaluate", "run=run", "kernel=dense"], tmp_path).end()
    assert code == 0, said
    assert "breaks.py is left out: ZeroDivisionError" in done.stderr
    assert read(tmp_path / "run/model.safetensors").model == {"name": "narrow", "width": 12}


@pytest.mark.slow
def test_a_dead_network_costs_a_sweep_seconds_once_and_no_results(tmp_path):
    # Port 9 of this machine: nobody answers.
    dead = {"WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "a" * 40}
    began = time.monotonic()
    command = ["-m", *SMALL, "kernel=dense", "seed=0,1", "tracking.mode=online", "hydra.sweep.dir=sweep"]
    code, said = Forked(command, tmp_path, dead).end()
    assert time.monotonic() - began < 100
    assert code == 0, said
    assert said.count("W&B does not start online") == 1
    assert "wandb sync" in said
    assert len(list(tmp_path.glob("sweep/*/report.json"))) == 2
    assert len(list(tmp_path.glob("sweep/*/wandb/offline-run-*"))) == 2
