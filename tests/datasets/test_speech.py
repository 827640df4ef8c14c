"""Speech data sets: batches, what is left out, and the three places that speech comes from."""

import json
import zipfile

import numpy as np
import pytest
import soundfile
import torch

from srnn.datasets import LibriSpeech, Manifest, SpokenDigits
from srnn.datasets.text import IGNORED
from srnn.errors import UserError
from tests.speech_files import TEXTS, spoken, write_speech


def manifest(path, **options):
    options = {"batch_size": 4} | options
    data = Manifest(str(path), str(path), str(path), **options)
    data.setup()
    return data


@pytest.fixture(scope="module")
def listed(tmp_path_factory):
    return write_speech(tmp_path_factory.mktemp("speech"))


def texts_of(data, targets_BU):
    return [data.vocabulary.decode([t for t in row if t != IGNORED]) for row in targets_BU.tolist()]


def lengths(x_BTI):
    return (~x_BTI[:, :, 0].isnan()).sum(1).tolist()


def test_batches_hold_each_utterance_once_with_its_transcript(listed):
    data = manifest(listed)
    assert data.sizes == {"input_size": 161, "output_size": 1 + len(" abc")}
    assert data.counts == {"train": 12, "valid": 12, "test": 12}
    seen = [
        (n, text) for x, y in data.train_dataloader() for n, text in zip(lengths(x), texts_of(data, y), strict=True)
    ]
    assert sorted(text for _, text in seen) == sorted(TEXTS)
    for frames, text in seen:
        assert frames == 1 + (480 + len(text) * (1280 + 480) - 320) // 160


def test_passes_differ_and_can_be_repeated(listed):
    data = manifest(listed, buckets=1, band_masks=2, time_masks=1)
    first, again = (data.batches("train").fetch(1, 0) for _ in range(2))
    assert torch.equal(first[0].nan_to_num(9), again[0].nan_to_num(9))
    other = data.batches("train").fetch(2, 0)
    assert texts_of(data, first[1]) != texts_of(data, other[1])
    assert len({x.shape for x, _ in data.train_dataloader()}) == 1
    assert all((x[0][: lengths(x)[0]] == 0).any() for x, _ in data.train_dataloader())
    assert not any((x[0] == 0).any() for x, _ in data.val_dataloader())


def test_masks_leave_what_is_kept_alone(listed):
    data = manifest(listed, band_masks=3)
    before = data.features_of("train", 0).clone()
    list(data.train_dataloader())
    assert torch.equal(data.features_of("train", 0), before)


def test_copies_at_other_speeds_are_for_training_alone(listed, tmp_path):
    data = manifest(listed, speed_copies=[0.8, 1.25])
    assert data.counts == {"train": 36, "valid": 12, "test": 12}
    part = data._parts["train"]
    assert part.frames == sorted(part.frames)
    seconds = {u.name.partition(" at speed ")[2]: u.seconds() for u in part.utterances if u.text == "abba"}
    assert seconds["0.8"] == pytest.approx(seconds[""] / 0.8)
    loudest = {}
    for utterance, frames in zip(part.utterances, part.frames, strict=True):
        if utterance.text == "c":  # a tone of 1,600 Hz
            x_N = utterance.samples()
            assert abs(frames - len(data.audio(x_N))) <= 1
            loudest[utterance.name.partition(" at speed ")[2]] = int(torch.fft.rfft(x_N, 16_000).abs().argmax())
    assert loudest == {"": 1600, "0.8": 1280, "1.25": 2000}
    packed = write_speech(tmp_path)
    with packed.open("a") as file:
        file.write("0.wav,abcabcabc\n")  # 9 characters in 12 steps: a copy of 6 steps is no fault of the recording
    assert manifest(packed, speed_copies=[2]).counts["train"] == 13 + 12


def test_evaluation_has_all_utterances_the_shortest_first(listed):
    data = manifest(listed, batch_size=5)
    batches = list(data.val_dataloader())
    assert [len(x) for x, _ in batches] == [5, 5, 2]
    found = [n for x, _ in batches for n in lengths(x)]
    assert found == sorted(found)
    assert data.checksum("valid") != manifest(listed, features="mel").checksum("valid")


def test_utterances_that_cannot_be_used_are_named_and_counted(tmp_path, capsys):
    path = write_speech(tmp_path, [*TEXTS, "", "a" * 40])
    soundfile.write(tmp_path / "13.wav", spoken("ab"), 16_000)  # far too short for its text
    with path.open("a") as file:
        file.write("missing.wav,ab\n")
    (tmp_path / "broken.wav").write_bytes(b"no audio")
    with path.open("a") as file:
        file.write("broken.wav,ab\n")
    with pytest.raises(UserError, match=r"12 utterances cannot be used.*dataset.unusable=skip"):
        manifest(path)
    data = manifest(path, unusable="skip")
    assert data.left_out == {
        "empty transcript": 3,
        "transcript longer than its frames": 3,
        "cannot be read": 6,
    }
    assert data.counts["train"] == len(TEXTS)
    assert "12 utterances cannot be used" in capsys.readouterr().out


def test_characters_that_training_lacks(tmp_path):
    known, other = write_speech(tmp_path / "a"), write_speech(tmp_path / "b", ["abd"])
    data = Manifest(str(known), str(known), str(other), batch_size=4, unusable="skip")
    with pytest.raises(UserError, match="the test split has 0 utterances that can be used, of 1"):
        data.setup()
    data = Manifest(str(known), str(other), str(known), batch_size=4)
    with pytest.raises(UserError, match=r"1 utterances cannot be used: .*0.wav \(unknown character: 'd'\)"):
        data.setup()
    assert manifest(known, characters=" abcd").sizes["output_size"] == 1 + 5
    with pytest.raises(UserError, match=r"unknown character: 'c'"):
        manifest(known, characters="ab ")


def test_lists_may_be_json_lines(tmp_path, listed):
    lines = [
        json.dumps({"path": str(listed.parent / f"{n}.wav"), "text": text, "speaker": 1})
        for n, text in enumerate(TEXTS)
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines) + "\n")
    assert manifest(tmp_path / "list.jsonl").counts["train"] == len(TEXTS)
    (tmp_path / "bad.jsonl").write_text('{"path": "a.wav"}\n')
    with pytest.raises(UserError, match=r"dataset.train=.*bad.jsonl: entry 1 has no path and text"):
        manifest(tmp_path / "bad.jsonl")
    (tmp_path / "bad.jsonl").write_text("no json\n")
    with pytest.raises(UserError, match=r"dataset.train=.*bad.jsonl cannot be read"):
        manifest(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match=r"dataset.train=.*none.csv cannot be read: No such file"):
        manifest(tmp_path / "none.csv")


def test_librispeech_as_its_archives_are_laid_out(tmp_path):
    for subset in ("train-clean-100", "dev-clean", "test-clean"):
        chapter = tmp_path / "LibriSpeech" / subset / "84" / "121123"
        chapter.mkdir(parents=True)
        (chapter / "84-121123.trans.txt").write_text("84-121123-0000 ABC A\n84-121123-0001 CAB\n")
        for number, text in enumerate(["abc a", "cab"]):
            soundfile.write(chapter / f"84-121123-000{number}.flac", spoken(text), 16_000)
    data = LibriSpeech(str(tmp_path), batch_size=2)
    data.setup()
    assert data.counts == {"train": 2, "valid": 2, "test": 2}
    assert texts_of(data, data.batches("test").fetch(0, 0)[1]) == ["CAB", "ABC A"]
    with pytest.raises(UserError, match=r"has no other/SPEAKER/CHAPTER"):
        LibriSpeech(str(tmp_path), valid=["other"]).setup()


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A zip file laid out as the data set's."""
    path = tmp_path_factory.mktemp("fsdd") / "fsdd.zip"
    wave = tmp_path_factory.mktemp("wave") / "a.wav"
    soundfile.write(wave, spoken("abcabc", 8000), 8000)
    with zipfile.ZipFile(path, "w") as file:
        for speaker in ("ann", "bob", "cid"):
            for digit in range(3):
                for index in range(12):
                    file.write(wave, f"recordings/{digit}_{speaker}_{index}.wav")
    return path


def test_single_digits_by_their_index(digits):
    data = SpokenDigits(str(digits))
    data.setup()
    assert data.counts == {"train": 18, "valid": 45, "test": 45}
    assert set(texts_of(data, data.batches("test").fetch(0, 0)[1])) <= {"zero", "one", "two"}
    data = SpokenDigits(str(digits), held_out=["bob"])
    data.setup()
    assert data.counts == {"train": 42, "valid": 30, "test": 36}
    assert all("_bob_" in u.name for u in data._parts["test"].utterances)
    assert not any("_bob_" in u.name for u in data._parts["train"].utterances + data._parts["valid"].utterances)
    with pytest.raises(UserError, match=r"held_out: no recordings of eve; there are: ann, bob, cid"):
        SpokenDigits(str(digits), held_out=["eve"]).setup()


def test_strings_of_digits_with_noise(digits):
    options = {"digits": 4, "strings": 20, "held_out": ["cid"]}
    data = SpokenDigits(str(digits), **options, noise_db=10.0)
    data.setup()
    assert data.counts == {"train": 20, "valid": 2, "test": 2}
    string = data._parts["train"].utterances[-1]
    assert len(string.text.split()) == 4
    assert len({name.split("_")[1] for name in string.names}) == 1
    clean, noisy = string.samples(), data.samples_of(string)
    assert torch.equal(noisy, data.samples_of(string))
    db = 10 * torch.log10(clean.square().mean() / (noisy - clean).square().mean())
    assert db == pytest.approx(10, abs=0.3)
    again = SpokenDigits(str(digits), **options)
    again.setup()
    assert [u.name for u in again._parts["train"].utterances] == [u.name for u in data._parts["train"].utterances]


def test_a_folder_of_digits(tmp_path):
    with pytest.raises(UserError, match=r"has no DIGIT_SPEAKER_INDEX.wav"):
        SpokenDigits(str(tmp_path)).setup()
    for index in range(12):
        soundfile.write(tmp_path / f"7_ann_{index}.wav", np.tile(spoken("abc"), 2), 16_000)
    data = SpokenDigits(str(tmp_path), batch_size=2)
    data.setup()
    assert data.counts == {"train": 2, "valid": 5, "test": 5}
