"""Sweeps: which jobs there are, what becomes of them, and going on with the same command."""

import atexit
import json
import re
import signal
import time

import pytest
from filelock import FileLock

from srnn.__main__ import main
from srnn.config.command_line import check_command_line
from srnn.config.composing import compose_settings
from srnn.config.sweeps import Sweep, expand
from srnn.errors import UserError
from srnn.files import PACKAGE
from srnn.registry import Range
from srnn.training import run
from tests.conftest import QUIET
from tests.forking import Forked
from tests.long_sweep import grown, sample_sweep


def jobs(*arguments, **how):
    return [job.overrides for job in expand(arguments, **how)]


def test_an_option_that_a_choice_lacks_is_dropped_and_no_job_comes_twice():
    swept = ["pruning=none,hard,gradual", "pruning.sparsity=0.8,0.9,0.95", "pruning.prune_itr=0.5", "seed=0,1"]
    found = expand(swept)
    assert [job.name for job in found] == [
        *(f"gru_none_s{seed}" for seed in (0, 1)),
        *(
            f"gru_{how}_sparsity-{s}_s{seed}"
            for how in ("hard", "gradual")
            for s in (0.8, 0.9, 0.95)
            for seed in (0, 1)
        ),
    ]
    assert found[0].overrides == ("pruning=none", "seed=0")
    assert found[2].overrides == ("pruning=hard", "pruning.sparsity=0.8", "pruning.prune_itr=0.5", "seed=0")
    assert len({job.identity for job in found}) == 14
    assert len(jobs("pruning.sparsity=0.9,0.90,9e-1")) == 1, "the same value, spelt otherwise"


def test_an_option_that_another_leaves_without_effect_is_dropped():
    assert jobs("trainer=fast,cpu", "trainer.max_epochs=60") == [
        ("trainer=fast",),
        ("trainer=cpu", "trainer.max_epochs=60"),
    ]
    assert len(jobs("distill.teacher=null,x", "distill.weight=0.3,0.8")) == 3


def test_a_glob_is_of_the_names_of_a_group():
    assert jobs("model=glob([gr*,rnn,lstm],exclude=l*)", "seed=0,1") == [
        (f"model={name}", f"seed={seed}") for name in ("gru", "rnn") for seed in (0, 1)
    ]
    for arguments, message in (
        (["model=glob(x*)"], "no value in it"),
        (["seed=glob(1*)"], "a glob is of the names of"),
    ):
        with pytest.raises(UserError, match=message):
            expand(arguments)


def test_params_and_rows():
    rows = [["pruning=none", "model.hidden_size=50"], ["pruning=gradual"]]
    found = jobs("model=lstm", params={"seed": "0,1", "model": "gru,rnn"}, rows=rows)
    assert found == [
        ("seed=0", "model=lstm", "pruning=none", "model.hidden_size=50"),
        ("seed=1", "model=lstm", "pruning=none", "model.hidden_size=50"),
        ("seed=0", "model=lstm", "pruning=gradual"),
        ("seed=1", "model=lstm", "pruning=gradual"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pruning=none,hard", "pruning.sparcity=0.8"], r"pruning\.sparcity: .* of pruning=hard\. Did you mean 'spars"),
        (["pruning=none", "pruning.sparsity=0.8,0.9"], r"pruning\.sparsity: unknown option of pruning=none"),
        (["pruning=none,hard", "pruning.sparsity=0.8,7"], r"pruning\.sparsity=7 must be above 0 and below 1"),
        (["pruning.sparsity=interval(0.1,0.9)"], r"an interval needs hydra/sweeper=search"),
        (["seed=range(3,0)"], r"seed=range\(3,0\): there is no value in it"),
        (["--cfg", "job", "seed=0,1"], r"--cfg job prints one job's config"),
        (["hydra/launcher=here"], r"hydra/launcher/here"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(UserError, match=message):
        check_command_line(["-m", *arguments])


def test_the_folder_is_the_same_for_the_same_sweep():
    one = check_command_line(["-m", "pruning=none,hard", "seed=0,1", "model.hidden_size=8"])
    two = check_command_line(["-m", "model.hidden_size=8", "seed=0,1", "pruning=none,hard"])
    three = check_command_line(["-m", "model.hidden_size=9", "seed=0,1", "pruning=none,hard"])
    assert one.sweep == two.sweep != three.sweep
    assert one.sweep.name.startswith("sweep_pruning-none-hard_seed-0-1_")
    assert check_command_line(["-m", "seed=0,1", "hydra.sweep.dir=a/b"]).sweep.name == "b"
    assert check_command_line(["seed=0"]).sweep is None


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_flags_may_stand_anywhere(flag):
    words = ["model=lstm", "seed=0,1", "hydra.sweep.dir=a/b"]
    first = check_command_line([flag, *words])
    assert first.argv == [flag, "model=lstm,lstm", "seed=0,1", "hydra.sweep.dir=a/b"]
    for place in range(1, 4):
        assert check_command_line([*words[:place], flag, *words[place:]]) == first
    assert check_command_line(["seed=0", "--cfg", "job", "model=lstm"]).argv == ["--cfg", "job", "seed=0", "model=lstm"]


@pytest.mark.parametrize(
    "option",
    ["trainer.gradient_clip_val=null", "tracking.name='null'", "tracking.name='007'", r"tracking.name='it\'s'"],
)
def test_a_single_value_reaches_the_jobs_as_it_was_typed(option):
    words = check_command_line(["-m", option, "seed=0,1"]).argv
    jobs = expand([word for word in words if word.startswith(("trainer.", "tracking.", "seed="))])
    assert [job.overrides for job in jobs] == [(option, "seed=0"), (option, "seed=1")]


def test_presets_sweep_by_themselves():
    line = check_command_line(["experiment=paper_table", "dataset=text", "dataset.path=x", "seed=0"])
    assert line.sweep.name.startswith("sweep_paper_table_")
    assert check_command_line(["experiment=pareto"]).sweep is not None


def test_two_jobs_never_share_a_folder(tmp_path):
    found = expand(["dataset=text", "dataset.path='a b','a/b'"])
    sweep = Sweep(tmp_path, found)
    assert len({folder.name for folder in sweep.folders.values()}) == 2
    (tmp_path / "gru_gradual_s0").mkdir()
    (tmp_path / "gru_gradual_s0/config.yaml").write_text("[")  # something else is there
    (job,) = expand([])
    assert Sweep(tmp_path, [job]).folders[job].name == f"gru_gradual_s0_{job.identity[:6]}"


def test_a_failed_job_stops_no_other_and_the_same_command_goes_on(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "It was the best of times, it was the worst of times.\n" * 200
    (tmp_path / "there.txt").write_text(text)
    command = ["-m", *QUIET, "dataset=text", "dataset.path=gone.txt,there.txt", "hydra.sweep.dir=sweep"]
    assert main(command) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.out + told.err
    assert "2 jobs: 2 new" in told.out
    assert len(told.out.splitlines()) < 16, "a line a job, and the table"
    assert re.search(
        r"^gru_gradual_path-there.txt_s0: \d\.\d{4} bits per character, 90.\d\d % sparse, \d+ s$", told.out, re.M
    )
    log = (tmp_path / "sweep/gru_gradual_path-there.txt_s0/log.txt").read_text()
    assert "What will be pruned" in log
    assert "epoch 5/5" in log
    assert "\033" not in log
    assert "failed: sweep/gru_gradual_path-gone.txt_s0: dataset.path=" in told.out
    assert "1 of 2 jobs failed" in told.out
    assert "no such file" in (tmp_path / "sweep/gru_gradual_path-gone.txt_s0/error.txt").read_text()
    finished = tmp_path / "sweep/gru_gradual_path-there.txt_s0/report.json"
    first = finished.stat().st_mtime_ns
    (tmp_path / "gone.txt").write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("srnn.recording.console.SILENCE", 0.0)
        assert main([*command, "seed=0,1"]) == 0, "a larger sweep finds the jobs of a smaller one"
    told = capsys.readouterr().out
    assert "4 jobs: 1 finished already, 1 to resume, 2 new" in told
    assert "\ngru_gradual_path-gone.txt_s1: step 3/40: loss " in told, "progress is seen"
    assert not list(tmp_path.glob("sweep/*/error.txt"))
    assert main([*command, "seed=1,0"]) == 0
    again = capsys.readouterr().out
    assert "4 jobs: 4 finished already" in again
    assert "What will be pruned" not in again
    assert finished.stat().st_mtime_ns == first
    assert (tmp_path / "sweep/command.txt").read_text().startswith("srnn -m trainer=fast")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("distill.teacher=gone.safetensors", "gone.safetensors: no such file"),
        ("init_from=gone.ckpt", "init_from=gone.ckpt: no such file"),
        ("pruning.q=gone.ckpt", "pruning.q=gone.ckpt: no such checkpoint"),
        ("dataset.path=gone.txt", "gone.txt: no such file"),
        ("dataset.path=gone.txt,lost.txt", "gone.txt: no such file"),
        ("distill.teacher={run}", "it is of other data"),
    ],
)
def test_what_every_job_would_fail_at_is_told_before_the_first(wrong, message, text_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("It was the best of times, it was the worst of times.\n" * 200)
    text = ["dataset=text", "dataset.path=there.txt"]
    assert main(["-m", *QUIET, *text, wrong.format(run=text_run), "seed=0,1", "hydra.sweep.dir=sweep"]) == 2
    told = capsys.readouterr()
    assert message in told.err
    assert told.out == ""
    assert [path.name for path in tmp_path.iterdir()] == ["there.txt"], "nothing was left behind"


def test_a_job_with_a_teacher_is_known_again(tmp_path, monkeypatch):
    """Its config keeps the teacher's absolute path; the command names it as before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run, "_run", lambda *_: {})
    teachers = "distill.teacher=outputs/dense,self,[outputs/a,outputs/b]"
    for job, folder in Sweep(tmp_path, expand([teachers, "seed=0,1"])).folders.items():
        run.train(compose_settings(job.overrides), folder)
    again = Sweep(tmp_path, expand([teachers, "seed=1,0"]))
    assert sorted(again.folders.values()) == sorted(path.parent for path in tmp_path.glob("*/config.yaml"))
    assert len(again.folders) == 6


def test_what_only_one_job_breaks_at_is_left_to_it(monkeypatch):
    """Such as an error in a plug-in: the others can run, as after any job that fails."""
    asked = []

    def breaks(settings, checkpoint):
        asked.append(settings.seed)
        raise UserError("not there") if len(asked) == 1 else ValueError("of a plug-in")

    monkeypatch.setattr(run, "_prepared", breaks)
    run.refuse_what_none_can_do(compose_settings([f"seed={seed}"]) for seed in range(3))
    assert asked == [0, 1]


def test_runs_and_sweeps_are_not_mixed_in_one_folder(text_run, sweep, capsys):
    before = [sorted(path.name for path in folder.iterdir()) for folder in (text_run, sweep)]
    assert main(["-m", *QUIET, "seed=0,1", f"hydra.sweep.dir={text_run}"]) == 2
    assert f"hydra.sweep.dir={text_run} holds a run" in capsys.readouterr().err
    assert main([*QUIET, f"hydra.run.dir={sweep}"]) == 2
    assert f"hydra.run.dir={sweep} holds a sweep" in capsys.readouterr().err
    assert before == [sorted(path.name for path in folder.iterdir()) for folder in (text_run, sweep)]


def test_a_sweep_runs_once_at_a_time(tmp_path, capsys):
    with FileLock(tmp_path / ".lock"):
        assert main(["-m", *QUIET, "seed=0,1", f"hydra.sweep.dir={tmp_path}"]) == 2
    assert "this sweep is running already" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.yaml"))


def test_an_option_of_a_choice_that_is_not_the_default(sweep):
    """Hydra composes the sweep's own config with what is not swept, where pruning is gradual."""
    reports = [json.loads(path.read_text()) for path in sorted(sweep.glob("*/report.json"))]
    assert [report["pruning"] for report in reports] == ["hard"] * 4 + ["none"] * 2
    for report in reports[:4]:
        assert report["config"]["pruning"]["prune_itr"] == 0.5
        assert {row["parameter"] for row in report["layers"]} == {
            "rnn.weight_ih_l0",
            "rnn.weight_hh_l0",
            "decoder.weight",
        }
    assert {report["config"]["tracking"]["group"] for report in reports} == {sweep.name}


# Long enough to be stopped in the middle of its second job.
LONGER = ["-m", *QUIET, "trainer.max_epochs=12", "trainer.limit_epochs=12",
          "pruning=none,gradual", "pruning.sparsity=0.8,0.9"]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a sweep that was never stopped."""
    folder = tmp_path_factory.mktemp("whole") / "one"
    assert main([*LONGER, f"hydra.sweep.dir={folder}"]) == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_killed_sweep_goes_on_and_ends_as_if_never_stopped(tmp_path, how, whole, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [*LONGER, "hydra.sweep.dir=two"]
    process = Forked(command, tmp_path)
    running = tmp_path / "two/gru_gradual_sparsity-0.8_s0/checkpoints/last.ckpt"
    deadline = time.monotonic() + 120
    while not running.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send(how)
    code, said = process.end()
    assert code == (130 if how == signal.SIGINT else -signal.SIGKILL), said
    assert not (running.parent.parent / "report.json").exists()
    capsys.readouterr()
    assert main(command) == 0
    assert "3 jobs: 1 finished already, 1 to resume, 1 new" in capsys.readouterr().out
    jobs = list(whole.glob("*/metrics.csv"))
    assert len(jobs) == 3
    for job in jobs:
        assert job.read_bytes() == (tmp_path / "two" / job.parent.name / "metrics.csv").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "plugin"),
    [
        ("joblib", "hydra_joblib_launcher"),
        ("submitit_local", "hydra_submitit_launcher"),
        ("ray", "hydra_ray_launcher"),
    ],
)
def test_launchers_run_two_jobs_side_by_side(launcher, plugin, tmp_path):
    """With a plug-in's data set, which every worker has to know, and a job that fails."""
    pytest.importorskip(f"hydra_plugins.{plugin}")
    jobs = ["dataset=brackets", "dataset.train_characters=5000", "model.hidden_size=24,1000000"]
    jobs += [f"srnn.plugins={PACKAGE.parent}/plugins"]
    options = [o for o in QUIET if not o.startswith("model.hidden")]
    many = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    command = ["-m", *options, *jobs, f"hydra/launcher={launcher}", *many, "hydra.sweep.dir=sweep"]
    code, said = Forked(command, tmp_path).end(300)
    assert code == 1, said
    assert "2 jobs: 2 new" in said
    assert "failed: sweep/gru_gradual_hidden_size-1000000_s0: model=gru does not fit into memory" in said
    assert "Warning" not in said
    assert json.loads((tmp_path / "sweep/gru_gradual_hidden_size-24_s0/report.json").read_text())["seed"] == 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The ``declarative_base")  # optuna's own
def test_a_search_finds_a_value(tmp_path, monkeypatch):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    monkeypatch.chdir(tmp_path)
    space = ["optimizer.lr=interval(0.0001,0.1)", "pruning=none", "hydra.sweeper.n_trials=2"]
    assert main(["-m", *QUIET, "hydra/sweeper=search", *space, "hydra.sweep.dir=search"]) == 0
    losses = [json.loads(p.read_text())["scores"]["best"]["loss"] for p in tmp_path.glob("search/trial_*/report.json")]
    assert len(losses) == 2
    assert str(min(losses))[:8] in (tmp_path / "search/optimization_results.yaml").read_text()


def test_what_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("srnn.config.command_line.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"hydra/launcher=slurm needs .*: pip install 'srnn\[launchers\]'"):
        check_command_line(["-m", "hydra/launcher=slurm", "seed=0,1"])
    with pytest.raises(UserError, match=r"hydra/sweeper=search needs"):
        check_command_line(["-m", "hydra/sweeper=search", "seed=0,1"])


def test_the_slurm_preset_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    slurm = check_command_line(["-m", "hydra/launcher=slurm", "hydra.launcher.partition=gpu", "seed=0,1"])
    assert (slurm.sweep is not None, slurm.jobs) == (True, ()), "its files may be on other machines only"
    assert check_command_line(["-m", "hydra/sweeper=search", "optimizer.lr=interval(0.001,0.1)"]).sweep
    with pytest.raises(UserError, match=r"optimizer\.lr=-1\.0 must be above 0"):
        check_command_line(["-m", "hydra/sweeper=search", "optimizer.lr=interval(-1,0.1)"])


@pytest.mark.slow
def test_a_long_sweep_stays_as_it_is(tmp_path):
    """Jobs leave nothing behind that makes later ones slower, but what this test leaves: that is found."""
    kept: list[Range] = []

    def again() -> None:
        pass

    def leave_behind(job: int) -> None:
        kept.append(Range(ge=job))
        atexit.register(again)
        for _ in kept:
            again()

    try:
        samples = sample_sweep(tmp_path / "sweep", 6, leave_behind)[1:]  # the first job imports and compiles
    finally:
        atexit.unregister(again)
    name = f"{again.__code__.co_qualname} ({again.__code__.co_filename}:{again.__code__.co_firstlineno})"
    assert set(grown(samples)) == {"atexit", "srnn.registry.schema.Range", name}
    assert samples[-1].entries["atexit"] - samples[0].entries["atexit"] == len(samples) - 1, "this test's own alone"
