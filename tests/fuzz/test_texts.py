"""Any bytes may be a text file: they are read as the text they are, or refused in a sentence."""

import pytest

from srnn.datasets import Text
from srnn.datasets.text import read_text
from srnn.errors import UserError
from tests.fuzz.common import Answers, generators

ALPHABETS = ["ab \n", "abc def\n", "äöü é\n", "日本語。\n", "😀🎉 x\n", "\r\n\t a", "\u2028\u2029\x85\x0b\x0c\x1c a",
             "\u200b\ufeff\u202e a", "aá\u0301 \n", "\x01\x1b\x7f a\n", "<unk> ", "'\"\\{}$", "\0a"]  # fmt: skip
ENCODINGS = ["utf-8", "utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252",
             "cp037", "shift_jis", "utf-7"]  # fmt: skip
ENDS = ["\n", "\r\n", "\r", "\n\r", "\x85"]


def content(rng):
    """A text and its bytes in some encoding, perhaps damaged."""
    alphabet = rng.choice(ALPHABETS) + rng.choice(["", "xyz ", "\n"])
    text = "".join(rng.choice(alphabet) for _ in range(rng.choice([0, 1, 2, 20, 300, 2000])))
    text = text.replace("\n", rng.choice(ENDS)) if rng.random() < 0.5 else text
    data = text.encode(rng.choice(ENCODINGS), errors="replace")
    draw = rng.random()
    if draw < 0.1:
        data = "\ud800".encode("utf-8", "surrogatepass") + data
    elif draw < 0.2:
        data = b"\xef\xbb\xbf" + data
    elif draw < 0.3 and data:
        data = data[: rng.randrange(len(data))]
    elif draw < 0.4:
        place = rng.randrange(len(data) + 1)
        data = data[:place] + rng.randbytes(rng.choice([1, 2, 8])) + data[place:]
    return data


def meant(data):
    """The text of bytes, found another way: byte by byte; None if they are none in UTF-8."""
    data = data[3:] if data[:3] == b"\xef\xbb\xbf" else data
    try:
        text = str(data, "utf-8")
    except UnicodeDecodeError:
        return None
    return None if "\0" in text else "\n".join("\n".join(text.split("\r\n")).split("\r"))


@pytest.mark.parametrize("level", ["characters", "bytes", "words"])
def test_bytes_of_a_text(tmp_path, level):
    answers, path = Answers(), tmp_path / "text"
    for rng in generators(level, 150):
        data = content(rng)
        path.write_bytes(data)
        wanted = meant(data)
        with answers.measured(data):
            try:
                text = read_text(path)
            except UserError:
                text = None
            assert text == wanted
            try:
                module = Text(str(path), level=level, valid_share=0.2, test_share=0.2, batch_size=2, eval_streams=2)
                module.setup()
            except UserError as error:
                answers.refused(error, data)
                words = ["too few", "is empty"] if wanted is not None else ["not UTF-8", "is binary"]
                said = str(error)
                assert any(word in said for word in words), said
                continue
        answers.counts["read"] += 1
        assert wanted is not None
        vocabulary, texts = module.vocabulary, module.texts()
        again = vocabulary.decode(vocabulary.encode(texts.train).tolist())
        if level == "words":
            assert [line.split() for line in again.split("\n")] == [line.split() for line in texts.train.split("\n")]
        else:
            assert again == texts.train
        for split in ("train", "valid", "test"):
            inputs, targets = next(iter(module.batches(split)))
            assert int(inputs.min()) >= 0
            assert max(int(inputs.max()), int(targets.max())) < len(vocabulary)
    print(answers)


def test_a_folder_of_texts_of_all_kinds(tmp_path):
    """Files in a folder are read one by one; the first that is no text is named."""
    for number, rng in enumerate(generators("folder", 30)):
        folder, wanted = tmp_path / str(number), []
        folder.mkdir()
        for index in range(rng.randint(1, 3)):
            data = content(rng)
            (folder / f"{index}.txt").write_bytes(data)
            wanted.append((f"{index}.txt", meant(data)))
        bad = [name for name, text in wanted if text is None]
        whole = "".join(text or "" for _, text in wanted)
        try:
            texts = Text(str(folder), valid_share=0.1, test_share=0.1).texts()
        except UserError as error:
            said = str(error)
            assert bad[0] in said if bad else not whole.strip(), said
        else:
            assert texts.train + texts.valid + texts.test == whole
            assert not bad
