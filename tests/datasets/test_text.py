import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srnn.datasets import PythonSource, Text
from srnn.datasets.corpora import Shakespeare
from srnn.datasets.text import IGNORED, Texts, stream_batches, streams
from srnn.errors import UserError
from srnn.vocabulary import Vocabulary

POEM = "Tyger Tyger, burning bright,\nIn the forests of the night;\n" * 40


@pytest.fixture
def poem(tmp_path):
    path = tmp_path / "poem.txt"
    path.write_text(POEM)
    return path


def test_a_pipe_is_no_text(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="is no file: a pipe is read once only"):
        Text(str(tmp_path / "pipe")).setup()


@given(count=st.integers(2, 300), rows=st.integers(1, 8), length=st.integers(1, 20))
@settings(deadline=None)
def test_every_token_but_the_first_is_a_target_once(count, rows, length):
    tokens = np.arange(count)
    batches = list(stream_batches(*streams(tokens, rows), length))
    targets = torch.cat([t.flatten() for _, t in batches])
    assert sorted(targets[targets != IGNORED].tolist()) == list(range(1, count))
    for inputs, wanted in batches:
        real = wanted != IGNORED
        assert torch.equal(inputs[real] + 1, wanted[real])


def test_a_row_goes_on_in_the_next_batch():
    batches = stream_batches(*streams(np.arange(101), 4), 10)
    rows = torch.cat([inputs for inputs, _ in batches], dim=1)
    assert rows.tolist() == [list(range(25 * row, 25 * row + 25)) for row in range(4)]


@pytest.mark.parametrize("level", ["characters", "bytes", "words"])
def test_levels_there_and_back(poem, level):
    data = Text(str(poem), level=level, batch_size=2, eval_streams=2)
    data.setup()
    text = "the forests\nTyger"
    assert data.vocabulary.decode(data.vocabulary.encode(text)) == text
    again = Vocabulary.from_dict(data.vocabulary.to_dict())
    assert (again.encode(POEM) == data.vocabulary.encode(POEM)).all()
    assert len(again) == len(data.vocabulary)


def test_unknown_tokens():
    assert Vocabulary.build("characters", "ab").encode("aXb").tolist() == [1, 0, 2]
    words = Vocabulary.build("words", "a a a b b c", limit=3)
    assert len(words) == 3
    assert words.encode("a b c d").tolist() == [1, 2, 0, 0]
    assert words.unknown("d a\nc d <unk>") == ["d", "\n", "c"]
    assert Vocabulary.build("characters", "ab").unknown("Xa∂X") == ["X", "∂"]
    assert Vocabulary.build("bytes", "").unknown("∂") == []


def test_parts_are_the_text(poem):
    texts = Text(str(poem), valid_share=0.1, test_share=0.2).texts()
    assert texts.train + texts.valid + texts.test == POEM
    assert len(texts.test) == pytest.approx(0.2 * len(POEM), abs=1)


@given(text=st.text("ab \n", min_size=1), shares=st.sampled_from([(0.05, 0.05), (0.3, 0.3), (0.1, 0.8)]))
@settings(deadline=None)
def test_no_word_is_cut_between_parts(text, shares):
    texts = Texts.split(text, *shares, "words")
    parts = [texts.train, texts.valid, texts.test]
    assert "".join(parts) == text
    assert [word for part in parts for word in part.split()] == text.split()
    plain = Texts.split(text, *shares)
    for moved, part in ((texts.train, plain.train), (texts.train + texts.valid, plain.train + plain.valid)):
        assert not moved.removeprefix(part).strip("ab"), "further than the end of a word"


@pytest.mark.parametrize(
    ("level", "sums"), [("characters", ["cdd3a617313a", "58db5d56413c"]), ("bytes", ["3a7167794cdf", "1bdf8fd87e23"])]
)
def test_characters_are_what_they_always_were(poem, level, sums):
    """Runs that were stopped before find their data again."""
    data = Text(str(poem), level, eval_streams=4)
    data.setup()
    assert [data.checksum(split)[:12] for split in ("train", "valid")] == sums


def test_words_of_a_corpus_in_one_file_are_whole(tmp_path):
    (tmp_path / "tinyshakespeare.txt").write_text("thee " * 407)
    texts = Shakespeare(folder=str(tmp_path), level="words").texts()
    assert {word for part in vars(texts).values() for word in part.split()} == {"thee"}


def test_the_last_word_of_a_file_and_the_first_of_the_next_are_two(tmp_path):
    for name, text in (("a", "to be"), ("b", "or not\n"), ("c", ""), ("d", "to be")):
        (tmp_path / name).write_text(text)
    texts = Text(str(tmp_path), "words", valid_share=0.3, test_share=0.3).texts()
    assert texts.train + texts.valid + texts.test == "to be\nor not\nto be"


def test_files_folders_and_globs(tmp_path):
    (tmp_path / "b.txt").write_text("BBB\r\n")
    (tmp_path / "a.txt").write_text("AAA")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "c.md").write_text("CCC")
    for path, text in (
        (tmp_path, "AAABBB\nCCC"),
        (tmp_path / "*.txt", "AAABBB\n"),
        (tmp_path / "**" / "*.md", "CCC"),
    ):
        parts = Text(str(path), valid_share=0.1, test_share=0.1).texts()
        assert parts.train + parts.valid + parts.test == text


def test_only_what_is_hidden_below_the_folder_is_left_out(tmp_path):
    folder = tmp_path / ".data" / "books"  # as torchtext has it
    (folder / ".git").mkdir(parents=True)
    (folder / ".git" / "config").write_text("no text")
    (folder / ".hidden").write_text("no text either")
    with pytest.raises(UserError, match=r"all files in the folder are hidden .* name them by a pattern"):
        Text(str(folder)).texts()
    (folder / "book.txt").write_text(POEM)
    texts = Text(str(folder)).texts()
    assert texts.train + texts.valid + texts.test == POEM


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_line_ends_of_any_kind_are_one_token(tmp_path, line_end):
    (tmp_path / "poem.txt").write_bytes(POEM.replace("\n", line_end).encode())
    texts = Text(str(tmp_path / "poem.txt")).texts()
    assert texts.train + texts.valid + texts.test == POEM


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_bad_file_of_a_corpus_names_the_option_that_gave_it(tmp_path, encoding):
    path = tmp_path / "tinyshakespeare.txt"
    path.write_bytes((POEM + "\u00e9").encode(encoding))
    with pytest.raises(UserError) as error:
        Shakespeare(folder=str(tmp_path)).texts()
    assert str(error.value).startswith(f"dataset.folder: {path} is ")
    assert "dataset.path" not in str(error.value)
    assert "folder/*.txt" not in str(error.value), "a corpus takes no pattern"
    with pytest.raises(UserError, match=r"^dataset\.path: .* name text files only, as in 'folder/\*\.txt'"):
        Text(str(path)).texts()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, ["no such file or folder"]),
        (b"", ["is empty"]),
        (b" \n\n ", ["is empty"]),
        (b"abc\xff\xfe", ["not UTF-8", "byte 3", "which every dataset.level reads, bytes too"]),
        (b"abc\0def", ["is binary"]),
        (b"tiny", ["too few", "batch_size"]),
    ],
)
def test_bad_files_say_what_is_wrong(tmp_path, content, words):
    path = tmp_path / "given.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        Text(str(path)).setup()
    for word in words:
        assert word in str(error.value)


def test_shares_must_leave_something():
    with pytest.raises(UserError, match="leave nothing to train on"):
        Text("x", valid_share=0.5, test_share=0.5)


def test_python_source_is_cached_checked_and_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path))
    fresh = PythonSource().texts()
    assert 300_000 < sum(map(len, vars(fresh).values())) < 600_000
    (cached,) = tmp_path.iterdir()
    assert PythonSource().texts() == fresh
    good = cached.read_text()
    for damage in (good[:-1000], good.replace("def ", "fed ", 1), "[]", '{"texts": 1}'):
        cached.write_text(damage)
        assert PythonSource().texts() == fresh, "a damaged cache is made anew"
        assert cached.read_text() == good


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "file"))
    assert PythonSource().texts().train
    assert "SRNN_CACHE" in capsys.readouterr().err
