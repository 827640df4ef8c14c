"""The folder of a run: names of files, and its lock."""

import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from srnn.errors import UserError
from srnn.run_folder import RunFolder

HOLD = """
import sys, time
from pathlib import Path
from srnn.run_folder import RunFolder
with RunFolder(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_folder_is_locked_by_one_process_at_a_time(tmp_path):
    folder = RunFolder(tmp_path / "run")
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process trains in this folder now"), folder.locked():
            pass
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        with folder.locked():  # a lock ends with its process, however that ended
            assert folder.path.is_dir()
    finally:
        holder.kill()
        holder.communicate()
    assert not list(folder.path.iterdir()), "no file of the lock is left"


def test_one_of_many_that_come_and_go_holds_the_lock(tmp_path):
    folder, inside, refused = RunFolder(tmp_path / "run"), [], []

    def come_and_go(_):
        try:
            with folder.locked():  # of each opening of a file, not of the process: threads exclude one another too
                inside.append(1)
                assert len(inside) == 1
                inside.pop()
        except UserError as error:
            refused.append(error)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(come_and_go, range(2000)))
    assert 0 < len(refused) < 2000
    assert not list(folder.path.iterdir())


def test_runs_below_a_folder(tmp_path):
    for name in ("b", "a", "deep/er/c"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("")
    (tmp_path / "no_run").mkdir()
    assert [str(run.path.relative_to(tmp_path)) for run in RunFolder.below(tmp_path)] == ["a", "b", "deep/er/c"]
    assert [run.path.name for run in RunFolder.below(tmp_path, "*")] == ["a", "b"]


def test_a_folder_that_was_made_is_taken_back(tmp_path):
    folder = RunFolder(tmp_path / "new/run")
    folder.path.mkdir(parents=True)
    for path in (folder.config, folder.environment):
        path.write_text("")
    folder.take_back(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_folder_with_other_files_stays(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    for path in (folder.config, folder.path / "notes"):
        path.write_text("")
    folder.take_back(tmp_path)
    assert folder.config.exists()


def test_what_is_begun_and_finished(tmp_path):
    folder = RunFolder(tmp_path)
    assert not folder.begun
    assert not folder.finished
    folder.checkpoints.mkdir()
    folder.report.write_text('{"seed": 1}')
    assert folder.begun
    assert folder.finished
    assert folder.read_report() == {"seed": 1}
