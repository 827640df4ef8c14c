"""Comparing runs: the same from folders as from W&B, tables, plots, and the W&B run of the comparison."""

import csv
import json
import math
import statistics
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srnn.__main__ import main
from srnn.comparing.comparison import ABOUT_TIMES, Setting, compare, markdown, pareto, rich_table, setting_rows
from srnn.comparing.comparison_plots import aligned
from srnn.comparing.runs import FinishedRun, read_runs
from srnn.comparing.wandb_projects import read_project
from srnn.errors import UserError
from tests.conftest import SMALL
from tests.recording.offline import read_offline

PNG = b"\x89PNG\r\n\x1a\n"


def test_a_sweep_is_one_group_of_wandb_runs(sweep):
    """Read back from the offline files: a run a job, with config, tags, curves, summary, best score and artifacts."""
    jobs = sorted(path.parent for path in sweep.glob("*/report.json"))
    runs = [read_offline(job) for job in jobs]
    assert len(runs) == len({run.id for run in runs}) == 6
    for run, job in zip(runs, jobs, strict=True):
        report = json.loads((job / "report.json").read_text())
        pruning = report["pruning"]
        assert (run.name, run.group, run.job_type, run.exit_code) == (job.name, "sweep", "train", 0)
        assert run.tags == ["gru", "python_source", pruning, "mine"]
        assert {key: run.config[key] for key in report["config"]} == report["config"]
        assert run.summary["test/bits_per_character"] == report["scores"]["test_packed"]["bits_per_character"]
        assert run.summary["final/nonzeros"] == report["size"]["nonzeros"]
        validations = [row["valid_bits_per_character"] for row in run.history if "valid_bits_per_character" in row]
        assert validations == [v["scores"]["valid_bits_per_character"] for v in report["validations"]]
        best = run.metrics["valid_bits_per_character"]
        assert best.step_metric == "trainer/global_step"
        assert best.summary.min
        logged = {name.partition("/")[0] for row in run.history for name in row if name.startswith("sparsity/")}
        assert logged == ({"sparsity"} if pruning == "hard" else set()), "one section for all layers' curves"
        made = {name: about["made_from"] for name, about in run.artifacts.items() if "made_from" in about}
        chain = [None, f"{run.id}-best-dense", f"{run.id}-best", f"{run.id}-packed"]
        chain = [link for link in chain if pruning == "hard" or link != f"{run.id}-best-dense"]
        assert made == dict(zip(chain[1:], chain, strict=False))


def test_a_network_made_from_another_runs_says_so(sweep, tmp_path):
    dense = sweep / "gru_none_s0"
    assert main([*SMALL, "kernel=dense", f"init_from={dense}", f"hydra.run.dir={tmp_path}/run"]) == 0
    run = read_offline(tmp_path / "run")
    assert run.artifacts[f"{run.id}-best-dense"]["made_from"] == f"{read_offline(dense).id}-best"


def test_compare(sweep, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["compare", str(sweep), "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "bits per character, test: mean ± standard deviation" in shown
    assert " ".join(shown.split()).count(ABOUT_TIMES) == 1
    assert ABOUT_TIMES in (output / "comparison.md").read_text()
    assert f"wandb sync {output}/wandb/offline-run-" in shown
    reports = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/report.json"))]
    with (output / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["pruning"], row["pruning.sparsity"], row["seeds"]) for row in rows] == sorted(
        [("none", "", "2"), ("hard", "0.5", "2"), ("hard", "0.9", "2")],
        key=lambda row: statistics.fmean(scores(reports, row)),
    )
    for row in rows:
        told = scores(reports, (row["pruning"], row["pruning.sparsity"], "2"))
        assert told[0] != told[1], "another seed gives another network"
        assert float(row["bits_per_character_mean"]) == pytest.approx(statistics.fmean(told))
        assert float(row["bits_per_character_std"]) == pytest.approx(abs(told[0] - told[1]) / math.sqrt(2))
        assert float(row["final/sparsity"]) == pytest.approx(float(row["pruning.sparsity"] or 0), abs=0.001)
        assert float(row["latency/sequence"]) > 0
        score = f"{float(row['bits_per_character_mean']):.4f} ± {float(row['bits_per_character_std']):.4f}"
        assert score in shown
        assert score in (output / "comparison.md").read_text()
        over = float(row["bits_per_character_mean"]) / next(
            float(other["bits_per_character_mean"]) for other in rows if other["pruning"] == "none"
        )
        assert float(row["over_dense"]) == pytest.approx(over - 1)
        assert f"{100 * (over - 1):+.1f} %" in shown
    with (output / "runs.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 6
    plots = {path.stem for path in output.glob("*.png") if path.read_bytes().startswith(PNG)}
    assert plots == {"over_sparsity", "over_weights", "curves"}
    kept = read_offline(output)
    assert (kept.job_type, kept.group) == ("compare", "sweep")
    assert kept.config["compared"] == [str(sweep)]
    assert {"settings", "runs", "over_sparsity"} <= {name.partition(".")[0] for row in kept.history for name in row}


def scores(reports, row):
    pruning, sparsity, _ = row
    return [
        report["scores"]["test_packed"]["bits_per_character"]
        for report in reports
        if (report["pruning"], str(report["config"]["pruning"].get("sparsity", ""))) == (pruning, sparsity)
    ]


class FakeApi:
    """W&B's Api, answering from offline files as the server would after a sync."""

    folders = ()
    asked = None

    def __init__(self, timeout):
        assert timeout <= 60

    def runs(self, path, filters):
        FakeApi.asked = (path, filters)
        if path == "nobody/nothing":
            raise ValueError("Could not find project nothing")
        return iter([read_offline(folder) for folder in self.folders])


def test_wandb_gives_the_same_comparison(sweep, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("wandb.Api", FakeApi)
    monkeypatch.setattr(FakeApi, "folders", [path.parent for path in sorted(sweep.glob("*/report.json"))])
    assert main(["compare", "--wandb", "me/srnn"]) == 2
    assert "needs a W&B API key" in capsys.readouterr().err
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    local, there = compare(read_runs([sweep])[0]), compare(read_project("me/srnn/sweep"))
    assert FakeApi.asked == ("me/srnn", {"jobType": "train", "state": "finished", "group": "sweep"})
    assert setting_rows(there) == setting_rows(local)
    for one, two in zip(local.settings, there.settings, strict=True):
        assert {run.name: run.curves["valid_loss"] for run in one.runs} == {
            run.name: run.curves["valid_loss"] for run in two.runs
        }
    options = ["--output", str(tmp_path / "out"), "--mode", "disabled"]
    assert main(["compare", "--wandb", "me/srnn", *options]) == 0
    assert not (tmp_path / "out/wandb").exists()
    for path, words in (("nobody/nothing", "Could not find project"), ("me", "give entity/project")):
        assert main(["compare", "--wandb", path]) == 2
        assert words in capsys.readouterr().err
    monkeypatch.setattr(FakeApi, "folders", [])
    assert main(["compare", "--wandb", "me/empty"]) == 2
    assert "no finished run of srnn" in capsys.readouterr().err


def test_mistakes(sweep, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun/config.yaml").write_text("seed: 0")
    damaged, cut = tmp_path / "damaged", tmp_path / "cut"
    for folder, text in ((damaged, "{}"), (cut, '{"a')):
        folder.mkdir()
        (folder / "config.yaml").write_text("seed: 0")
        (folder / "report.json").write_text(text)
    for arguments, words in (
        ([], "Give folders, as `srnn compare outputs/SWEEP`"),
        ([sweep, "--wandb", "me/srnn"], "which runs? Give folders"),
        ([tmp_path / "none"], "no run is there"),
        ([tmp_path / "begun"], "none of these runs is finished"),
        ([damaged], "its report or metrics are damaged"),
        ([cut], f"srnn: {cut}/report.json is damaged: Unterminated string"),
        ([sweep, "--metric", "accuracy"], "no such score; they have bits_per_character, loss, perplexity"),
    ):
        assert main(["compare", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err


def run(score, seed=0, name="bits_per_character", objective="next_token", **config):
    summary = {"objective": objective, f"test/{name}": score, "final/sparsity": 0.0, "final/nonzeros": 10}
    return FinishedRun(f"run{seed}", {"seed": seed, "tracking": {"mode": str(seed)}, **config}, summary, {})


def test_settings_are_told_apart_by_what_differs_but_the_seed():
    runs = [
        run(2.0, 0, pruning={"name": "none"}, model={"name": "gru", "sizes": {"a": 1}}),
        run(4.0, 1, pruning={"name": "none"}, model={"name": "gru", "sizes": {"a": 1}}),
        run(1.0, 0, pruning={"name": "hard", "prune_itr": 0.5}, model={"name": "gru", "sizes": {"a": 2}}),
        run(5.0, 0, pruning={"name": "hard", "prune_itr": 9}, model={"name": "gru", "sizes": {"a": 1}}),
    ]
    comparison = compare(runs)
    assert comparison.options == ["pruning", "model.sizes", "pruning.prune_itr"]
    assert [s.mean("test/bits_per_character") for s in comparison.settings] == [1.0, 3.0, 5.0]
    assert [len(s.runs) for s in comparison.settings] == [1, 2, 1]
    assert comparison.settings[1].deviation("test/bits_per_character") == pytest.approx(math.sqrt(2))
    assert comparison.settings[0].deviation("test/bits_per_character") is None
    assert "| hard | {'a': 2} | 0.5 |" in markdown(comparison)
    accurate = [run(s, 0, "accuracy", "classification", seed_=s) for s in (0.1, 0.9, 0.5)]
    assert [s.mean("test/accuracy") for s in compare(accurate).settings] == [0.9, 0.5, 0.1]
    with pytest.raises(UserError, match="learn classification and next_token"):
        compare([*runs, *accurate])


def test_many_options_stand_below_the_table():
    wide = {"optimizer": {"lr": 1, "beta1": 2, "beta2": 3}, "pruning": {"name": "cubic", "end_itr": "auto"}}
    other = {"optimizer": {"lr": 4, "beta1": 5, "beta2": 6}, "pruning": {"name": "hard", "end_itr": 0.3}}
    comparison = compare([run(2.0, 0, **wide), run(1.0, 0, **other)])
    assert comparison.best_dense is None
    table = rich_table(comparison)
    assert [str(column.header) for column in table.columns][:3] == ["setting", "bits per character", "seeds"]
    first, second, *_ = str(table.caption).splitlines()
    assert first == "1: lr=4 beta1=5 beta2=6 pruning=hard end_itr=0.3"
    assert second == "2: lr=1 beta1=2 beta2=3 pruning=cubic end_itr=auto"


def test_a_teacher_that_is_not_there_makes_no_difference():
    alone = [run(2.0, 0, distill={"teacher": None, "weight": w}, optimizer={"lr": w}) for w in (0.5, 0.6)]
    assert compare(alone).options == ["optimizer.lr"]


def test_folders_are_named_by_their_ends():
    table = markdown(compare([run(2.0, distill={"teacher": f"/data/all of them/outputs/{name}"}) for name in "ab"]))
    assert "| outputs/a |" in table
    assert "| outputs/b |" in table
    assert "/data" not in table


def test_scores_on_other_data_are_said_to_rank_nothing():
    def notes(*data, score="bits_per_character"):
        return compare([run(2.0, dataset={"name": "text", **one}, name=score) for one in data], score).notes

    assert notes({"batch_size": 8}, {"batch_size": 16}) == ABOUT_TIMES
    words = notes({"level": "words"}, {"level": "characters"})
    assert "scored on different data (dataset.level): the order of their scores ranks no networks" in words
    assert "flatters words beside characters" in words
    other = notes({"path": "a"}, {"path": "b"}, score="perplexity")
    assert "different data (dataset.path)" in other
    assert "flatters" not in other
    limits = [run(2.0, trainer={"limit_eval_batches": limit}) for limit in (4, None)]
    assert "different data (trainer.limit_eval_batches)" in compare(limits).notes


def test_data_that_changed_between_runs_are_said_to_rank_nothing():
    """The text behind `dataset.path` was edited between two runs, which would be two seeds of one setting."""

    def notes(*checksums, **options):
        made = [run(2.0, seed, dataset={"name": "text", "path": "a.txt"}) for seed in range(len(checksums))]
        made[-1].config.update(options)
        return compare([replace(one, test_data=sum) for one, sum in zip(made, checksums, strict=True)]).notes

    assert notes("x", "x") == notes("x", None) == ABOUT_TIMES
    assert "they were not the same (run0 and run1): a file has changed" in notes("x", "y")
    assert "(run0 and run1)" in notes("x", "y", seed=0), "one of them is left out, and perhaps the wrong one"
    assert notes("x", "y", init_from="outputs/RUN") == ABOUT_TIMES, "tokens of another vocabulary"


def test_a_run_is_read_with_the_checksum_of_its_test_data(text_run, tmp_path):
    (tmp_path / "linked").symlink_to(text_run)
    (found,), _ = read_runs([text_run, tmp_path])
    (again,), _ = read_runs([tmp_path])
    assert again.test_data == found.test_data
    assert found.test_data == json.loads((text_run / "environment.json").read_text())["data"]["test"]


def test_times_that_were_not_taken_alike_are_said_to_rank_nothing():
    def notes(*machines):
        made = [run(2.0, dataset={"name": "text", "batch_size": n}) for n in range(len(machines))]
        for one, machine in zip(made, machines, strict=True):
            one.summary.update({f"machine/{name}": value for name, value in machine.items()})
        return compare(made).notes

    quiet = {"cpus": 2, "threads": 2, "load": 0.4}
    # A long run's own threads are load, too; and earlier versions did not look at it.
    assert notes(quiet, quiet | {"load": 1.1}) == notes(quiet, {"cpus": 2, "threads": 2}) == notes({}) == ABOUT_TIMES
    said = notes(quiet, quiet | {"threads": 1, "load": 2.54})
    assert "not taken alike (threads 1, 2; load 0.4 to 2.5 for each CPU): they rank no networks." in said
    said = notes(quiet | {"dense runtimes": 2}, quiet | {"dense runtimes": 3})
    assert "not taken alike (dense runtimes 2, 3): they rank no networks." in said


def test_a_seed_counts_once():
    comparison = compare([run(2.0, 0), run(3.0, 0), run(4.0, 1)])
    assert [r.summary["test/bits_per_character"] for r in comparison.settings[0].runs] == [2.0, 4.0]
    assert [r.summary["test/bits_per_character"] for r in comparison.repeated] == [3.0]


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=12))
def test_the_pareto_front_is_what_no_other_beats(points):
    settings = [Setting({"x": point}, ()) for point in points]
    front = {s.options["x"] for s in pareto(settings, lambda s: s.options["x"][0], lambda s: s.options["x"][1])}
    beaten = {p for p in points if any(q[0] <= p[0] and q[1] <= p[1] and q != p for q in points)}
    assert front == set(points) - beaten


def test_curves_of_seeds_share_steps():
    steps, values = aligned([([2, 4, 6], [1.0, 2.0, 3.0]), ([2, 6], [0.0, 4.0]), ([2, 4, 6, 8], [5.0] * 4)])
    assert steps.tolist() == [2, 4, 6]
    assert values.tolist() == [[1, 2, 3], [0, 2, 4], [5, 5, 5]]
