"""A run that is killed at any moment can be resumed to the same network, or is whole; and it leaves no litter."""

import shutil
import signal
import time

import pytest

from srnn.config.composing import compose_settings
from srnn.run_folder import RunFolder
from tests.conftest import QUIET
from tests.forking import Forked
from tests.fuzz.common import FACTOR, generators

KILLS = 15
ENVIRONMENT = {"OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The config of a run, the folder of the run that nobody killed, and the seconds it took."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "text.txt").write_text("It was the best of times, it was the worst of times.\n" * 60)
    chosen = [*QUIET, "model.hidden_size=8", "dataset=text", f"dataset.path={folder}/text.txt",
              "dataset.eval_streams=2", "dataset.batch_size=2", "srnn.plugins=off"]  # fmt: skip
    settings = compose_settings(chosen)
    took = []
    for _ in range(2):  # the first one fills caches
        shutil.rmtree(folder / "run", ignore_errors=True)
        began = time.monotonic()
        code, said = Forked(settings, folder, ENVIRONMENT).end()
        assert code == 0, said
        took.append(time.monotonic() - began)
    return settings, folder / "run", took[-1]


def litter(folder):
    """Files that no run leaves."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob(".*"))


def killed(arguments, folder, rng, seconds):
    """Start a command and kill it at some moment; it may have ended before."""
    process = Forked(arguments, folder, ENVIRONMENT)
    time.sleep(rng.uniform(0, seconds))
    number = rng.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
    if process.process.is_alive():
        process.send(number)
    code, said = process.end()
    assert "Traceback" not in said, (number, said)
    assert code in (0, 130, -number), (number, code, said)
    return code


@pytest.mark.slow
def test_a_run_killed_at_any_moment(tmp_path, whole):
    settings, reference, seconds = whole
    outcomes = {"finished": 0, "resumed": 0, "started again": 0}
    for number, rng in enumerate(generators("kills", KILLS)):
        folder = tmp_path / str(number)
        folder.mkdir()
        run = RunFolder(folder / "run")
        arguments, left, ended = settings, rng.choice([1, 1, 2]), 1
        how = "finished"
        while ended != 0:
            if left:
                left, ended = left - 1, killed(arguments, folder, rng, 1.05 * seconds)
            else:
                ended, said = Forked(arguments, folder, ENVIRONMENT).end()
                assert ended == 0, said
            if run.finished:
                break
            # Killed before anything was written it is refused in a sentence; it may always be started again then.
            again = not run.config.is_file() or (not run.begun and rng.random() < 0.5)
            if not run.config.is_file():
                code, said = Forked(["resume=run"], folder, ENVIRONMENT).end()
                assert (code, "no run is there" in said) == (2, True), said
            arguments, how = (settings, "started again") if again else (["resume=run"], "resumed")
        outcomes[how] += 1
        print(number, how, flush=True)
        code, said = Forked(["resume=run"], folder, ENVIRONMENT).end()
        assert (code, "this run is finished" in said) == (2, True), said
        assert litter(folder) == []
        for name in ("model.safetensors", "metrics.csv"):
            assert (run.path / name).read_bytes() == (reference / name).read_bytes(), (number, name)
        assert {path.name for path in run.path.iterdir()} == {path.name for path in reference.iterdir()}
        shutil.rmtree(folder)
    assert sum(outcomes.values()) == KILLS * FACTOR
    print(outcomes)
