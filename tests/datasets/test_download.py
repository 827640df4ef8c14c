"""Downloads, from a server in this process."""

import hashlib
import io
import tarfile
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import soundfile

from srnn.__main__ import main
from srnn.datasets import LibriSpeech, PennTreebank, Shakespeare, WikiText2, speech_corpora
from srnn.datasets.corpora import Source
from srnn.datasets.download import fetch
from srnn.errors import UserError
from srnn.files import cache_folder
from srnn.training.preparing import build_data
from tests.speech_files import spoken

CONTENT = b"".join(b"line %d of a text\n" % n for n in range(5000))
SHA = "sha256:" + hashlib.sha256(CONTENT).hexdigest()


@contextmanager
def serving(content=CONTENT, cut=None, status=None, ranges=True):
    """A server of one file, and the ranges it was asked for. ``cut``: it breaks off after so many bytes."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            wanted = self.headers.get("Range")
            asked.append(wanted)
            start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
            if status or start >= len(content):
                self.send_response(status or 416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.end_headers()
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            self.wfile.write(content[start : cut or len(content)])

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_fetched_once_and_checked_each_time(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with serving() as (url, asked):
        for _ in range(2):
            assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT
        assert asked == [None]
        path.write_bytes(CONTENT[:-9] + b"changed.\n")  # a corrupted cache is fetched anew
        assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT
        path.with_name("file.txt.sha256").unlink()
        assert fetch(f"{url}/file.txt", path).read_bytes() == CONTENT
    assert fetch("http://127.0.0.1:9/file.txt", path).read_bytes() == CONTENT, "no network is needed"
    assert not list(path.parent.glob("*.part"))


def test_a_killed_download_goes_on(tmp_path):
    path = tmp_path / "file.txt"
    with serving(cut=20_000) as (url, _), pytest.raises(UserError, match=r"run again,? and it goes on from there"):
        fetch(f"{url}/file.txt", path, SHA)
    assert not path.exists()
    kept = path.with_name("file.txt.part").read_bytes()
    assert 10_000 < len(kept) <= 20_000
    assert kept == CONTENT[: len(kept)]
    with serving() as (url, asked):
        assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT
    assert asked == [f"bytes={len(kept)}-"]


def test_a_server_without_ranges_starts_over(tmp_path):
    path = tmp_path / "file.txt"
    path.with_name("file.txt.part").write_bytes(b"of another file")
    with serving(ranges=False) as (url, _):
        assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT


def test_all_of_it_was_there_already(tmp_path):
    path = tmp_path / "file.txt"
    path.with_name("file.txt.part").write_bytes(CONTENT)
    with serving() as (url, _):
        assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT
    path.unlink()
    path.with_name("file.txt.part").write_bytes(CONTENT + b"more")
    with serving() as (url, _), pytest.raises(UserError, match="has changed since its download began"):
        fetch(f"{url}/file.txt", path, SHA)
    assert not path.with_name("file.txt.part").exists()


def test_what_goes_wrong_is_one_sentence(tmp_path):
    path = tmp_path / "file.txt"
    with serving(b"an error page") as (url, _), pytest.raises(UserError, match="is not the file that was expected"):
        fetch(f"{url}/file.txt", path, SHA)
    with serving(status=404) as (url, _), pytest.raises(UserError, match="the server answers 404"):
        fetch(f"{url}/file.txt", path, SHA)
    with pytest.raises(UserError, match=r"cannot be downloaded: no connection\.$"):
        fetch("http://127.0.0.1:9/file.txt", path)
    assert not path.exists()
    (tmp_path / "taken").write_text("")
    with pytest.raises(UserError, match="set SRNN_CACHE"):
        fetch("http://127.0.0.1:9/file.txt", tmp_path / "taken" / "file.txt")


def test_a_full_disk_keeps_what_arrived(tmp_path, monkeypatch):
    def full(chunks, file, url, total):
        file.write(next(iter(chunks))[:1000])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("srnn.datasets.download._write", full)
        with serving() as (url, _), pytest.raises(UserError, match=r"No space left on device; set SRNN_CACHE"):
            fetch(f"{url}/file.txt", tmp_path / "file.txt", SHA)
    with serving() as (url, asked):
        assert fetch(f"{url}/file.txt", tmp_path / "file.txt", SHA).read_bytes() == CONTENT
    assert asked == ["bytes=1000-"]


def test_corpora_from_a_folder_the_cache_and_a_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "cache"))
    text = CONTENT.decode()
    for made, name in ((PennTreebank, "ptb"), (WikiText2, "wikitext2")):
        folder = tmp_path / name
        folder.mkdir()
        for source in made.sources.values():
            (folder / source.name).write_text(f" {source.name} <unk>\n{text}")
        data = made(folder=str(folder))
        data.setup()
        assert data.texts().valid.startswith(f" {made.sources['valid'].name} <unk>\n")
        assert data.sizes["vocabulary_size"] == len({w for w in data.texts().train.split() if w != "<unk>"}) + 2
        assert data.located({"folder": name})["folder"] == str(folder)
        (folder / made.sources["test"].name).unlink()
        with pytest.raises(UserError, match=f"has no {made.sources['test'].name}: it must hold"):
            made(folder=str(folder)).texts()
    with pytest.raises(UserError, match=r"dataset=ptb: .* no connection\. Or put ptb.train.txt, .* dataset.folder="):
        PennTreebank(mirror="http://127.0.0.1:9").texts()
    monkeypatch.setattr(Shakespeare, "sources", {"all": Source("tinyshakespeare.txt", "http://127.0.0.1:9", SHA)})
    with serving() as (url, _):
        assert Shakespeare(mirror=url).texts().train == text[: round(0.9 * len(text))]
    assert Shakespeare().texts().test, "from the cache"


def test_a_mirror_decides_nothing_but_its_own_runs(tmp_path, monkeypatch):
    """A file without a known checksum is kept apart for each place that gave it."""
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "cache"))
    with serving(b"of the mirror " * 9) as (mirror, _), serving(b"of the source " * 9) as (source, _):
        names = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
        sources = {split: Source(name, f"{source}/{name}") for split, name in names.items()}
        monkeypatch.setattr(WikiText2, "sources", sources)
        assert WikiText2(mirror=mirror).texts().test.startswith("of the mirror")
        assert WikiText2().texts().test.startswith("of the source")
        assert WikiText2(mirror=mirror).texts().test.startswith("of the mirror")
    assert WikiText2().texts().test.startswith("of the source"), "from the cache"


def test_a_packed_file_never_says_where_to_download_from(tmp_path, monkeypatch):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "cache"))
    config = {"name": "wikitext2", "batch_size": 2, "eval_streams": 2}
    with serving(b"of the mirror " * 9) as (mirror, asked), serving(b"of the source " * 9) as (source, _):
        names = {"train": "train.txt", "valid": "valid.txt", "test": "test.txt"}
        sources = {split: Source(name, f"{source}/{name}") for split, name in names.items()}
        monkeypatch.setattr(WikiText2, "sources", sources)
        data = build_data(config | {"mirror": mirror}, from_file=True)
        assert not asked
        assert data.texts().test.startswith("of the source")
        build_data(config | {"mirror": mirror})  # the user's own word
        assert len(asked) == 3
        assert build_data(config | {"mirror": mirror}, from_file=True).texts().test.startswith("of the mirror")


def test_a_cached_file_has_its_checksum(tmp_path):
    path = tmp_path / "file.txt"
    with serving(b"another file") as (url, _):
        fetch(f"{url}/file.txt", path)
    with serving() as (url, _):
        assert fetch(f"{url}/file.txt", path, SHA).read_bytes() == CONTENT


def test_the_command_line_says_it_too(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "cache"))
    run = [f"hydra.run.dir={tmp_path}/run", "tracking.mode=disabled"]
    assert main(["dataset=wikitext2", "dataset.mirror=http://127.0.0.1:9", *run]) == 2
    error = capsys.readouterr().err
    url = "http://127.0.0.1:9/train.txt"
    assert error.startswith(f"srnn: dataset=wikitext2: {url} cannot be downloaded: no connection.")
    assert error.count("\n") == 1


def test_without_srnn_cache_it_is_the_users_cache_folder(monkeypatch):
    monkeypatch.delenv("SRNN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/caches")
    assert cache_folder() == Path("/some/caches/srnn")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/srnn")


def test_librispeech_is_downloaded_and_unpacked_once(tmp_path, monkeypatch):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, data in (
            ("84-1.trans.txt", b"84-1-0 AB\n84-1-1 BA\n"),
            ("84-1-0.flac", wave()),
            ("84-1-1.flac", wave()),
        ):
            entry = tarfile.TarInfo(f"LibriSpeech/dev-clean/84/1/{name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    every = {split: ["dev-clean"] for split in ("train", "valid", "test")}
    with serving(packed.getvalue()) as (url, asked):
        monkeypatch.setattr(speech_corpora, "_ARCHIVES", url)
        with pytest.raises(UserError, match=r"is not the file that was expected.*dataset.folder=FOLDER"):
            LibriSpeech(batch_size=2, **every).setup()
        monkeypatch.setitem(speech_corpora._MD5, "dev-clean", hashlib.md5(packed.getvalue()).hexdigest())
        for _ in range(2):
            data = LibriSpeech(batch_size=2, **every)
            data.setup()
            assert data.counts == {"train": 2, "valid": 2, "test": 2}
        assert len(asked) == 2
    names = {path.name for path in (tmp_path / "librispeech").iterdir()}
    assert {name for name in names if not name.endswith(".lock")} == {"dev-clean", "dev-clean.tar.gz.sha256"}
    with pytest.raises(UserError, match="there is no subset dev-dirty; there are: dev-clean"):
        LibriSpeech(valid=["dev-dirty"]).utterances()


def wave():
    made = io.BytesIO()
    soundfile.write(made, spoken("ab"), 16_000, format="FLAC")
    return made.getvalue()
