import csv
import io
import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srnn.files import cache_folder, csv_bytes, write_atomically
from srnn.run_folder import RunFolder

TEXTS = st.text(st.sampled_from("ab ,\"'\n;\té"), max_size=4)
CELLS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.lists(TEXTS, max_size=2)
ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b,c", "d e", '"f"']), CELLS, min_size=2), max_size=4)


@given(ROWS, st.sampled_from(["\n", "\r\n"]))
def test_csv_is_what_the_standard_library_writes(rows, line_end):
    text = io.StringIO()
    names = list(dict.fromkeys(name for row in rows for name in row))
    writer = csv.DictWriter(text, names, lineterminator=line_end)
    writer.writeheader()
    writer.writerows(rows)
    assert csv_bytes(rows, line_end=line_end) == text.getvalue().encode()


@dataclass
class Point:
    x: float
    name: str | None = None


def test_csv_of_dataclasses_with_quoted_columns():
    assert csv_bytes([{"run": "b\udcff"}]) == b"run\nb\xff\n", "a folder may be named in any bytes"
    assert csv_bytes([Point(1.0), Point(2.5, 'a "b"')]) == b'x,name\n1.0,\n2.5,"a ""b"""\n'
    assert csv_bytes([Point(1.0, "a"), Point(2.0)], quoted=("name",)) == b'x,name\n1.0,"a"\n2.0,""\n'
    assert csv_bytes([], columns=["x", "name"]) == b"x,name\n"


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_the_umask_decides_who_may_read(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", b"text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path):
    (tmp_path / "runs").mkdir()
    first, latest, to_come = tmp_path / "runs/first", tmp_path / "latest", tmp_path / "to_come"
    first.write_bytes(b"old")
    latest.symlink_to("runs/first")
    to_come.symlink_to("runs/second")
    write_atomically(latest, b"new")
    write_atomically(to_come, b"new")
    assert latest.is_symlink()
    assert to_come.is_symlink()
    assert first.read_bytes() == (tmp_path / "runs/second").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["first", "latest", "runs", "second", "to_come"]


def test_what_is_no_file_is_never_replaced(tmp_path, monkeypatch):
    pipe, link, folder, loop = (tmp_path / name for name in ("pipe", "link", "folder", "loop"))
    os.mkfifo(pipe)
    link.symlink_to("pipe")
    folder.mkdir()
    loop.symlink_to("loop")
    device = tmp_path / "device"
    device.write_bytes(b"stands for one")
    of_device = os.stat_result([stat.S_IFCHR | 0o666, *[0] * 9])
    status = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **how: of_device if path == device else status(path, **how))
    for path in (pipe, link, folder, loop, device):
        with pytest.raises(OSError, match=r"no file, but|symbolic links") as refused:
            write_atomically(path, b"data")
        assert refused.value.filename == str(path)
    monkeypatch.undo()
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert device.read_bytes() == b"stands for one"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device", "folder", "link", "loop", "pipe"]


def test_what_a_killed_process_left_is_swept(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from srnn import files; "
        "files.os.replace = lambda *_: os.kill(os.getpid(), 9); files.write_atomically(Path(sys.argv[1]), b'half')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "last.ckpt")], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".last.ckpt.")
    (tmp_path / ".hidden").write_text("somebody's own")
    with RunFolder(tmp_path).locked():
        assert not left.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".hidden"]


def test_a_user_without_a_home_has_a_cache(monkeypatch):
    for name in ("SRNN_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda _: (_ for _ in ()).throw(KeyError("no account")))
    assert cache_folder() == Path(tempfile.gettempdir()) / f"srnn-{os.getuid()}"
    monkeypatch.setenv("SRNN_CACHE", "~/somewhere")
    assert cache_folder() == Path("~/somewhere")
