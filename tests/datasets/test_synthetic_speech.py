"""Speech from sentences: which voice says what, the cache, and one real synthesiser where it is installed."""

import csv
import sys

import pytest
import soundfile
import torch

from srnn.datasets import Manifest, SyntheticSpeech
from srnn.datasets.synthetic_speech import Espeak
from srnn.errors import UserError
from tests.speech_files import spoken

VOICES = {"voices": ["en", "en+f2"], "valid_voices": ["en-us"], "test_voices": ["en-us+f2"], "speeds": [100, 200]}


class Fake:
    """Says tones, at 22,050 samples a second as eSpeak NG does, and how often it was asked."""

    def __init__(self, version="1"):
        self.version, self.said = version, []

    def names(self):
        return {"en", "en-us"}, {"f2"}

    def speak(self, jobs):
        self.said.append([job[1:] for job in jobs])
        for path, text, _, speed in jobs:
            soundfile.write(path, spoken(text, 22_050 * 200 // speed), 22_050)


@pytest.fixture
def fake(monkeypatch, tmp_path):
    made = Fake()
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Espeak, "installed", lambda: made)
    return made


def built(sentences, **options):
    data = SyntheticSpeech(sentences, **{"batch_size": 2} | VOICES | options)
    data.setup()
    return data


def test_each_sentence_by_each_voice_at_each_speed(fake, tmp_path):
    data = built(["ab", "a  cab", "ab"])
    assert data.counts == {"train": 8, "valid": 4, "test": 4}
    assert len(fake.said) == 1
    assert fake.said[0][:2] == [("ab", "en", 100), ("a cab", "en", 100)]
    heard = {split: {u.name.split(" by ")[1].split(" at ")[0] for u in part.utterances}
             for split, part in data._parts.items()}  # fmt: skip
    assert heard == {"train": {"en", "en+f2"}, "valid": {"en-us"}, "test": {"en-us+f2"}}
    x_BTI, _ = data.batches("test").fetch(0, 0)
    shortest = data._parts["test"].utterances[0]
    wanted = data.audio(shortest.samples())  # of 16 kHz, whatever the synthesiser's rate
    assert len(shortest.samples()) == pytest.approx(16_000 * shortest.seconds(), abs=1)
    torch.testing.assert_close(x_BTI[0, : len(wanted)], wanted)
    (listed,) = (tmp_path / "cache").rglob("list.csv")
    assert len(list(csv.DictReader(listed.read_text().splitlines()))) == 16
    assert Manifest(str(listed), str(listed), str(listed)).utterances()["train"][0].text == "ab"


def test_what_was_spoken_is_kept_by_all_options(fake, tmp_path):
    first = built(["ab", "ba"]).checksum("train")
    assert built(["ab", "ba"]).checksum("train") == first
    assert len(fake.said) == 1
    for other in ({"speeds": [100]}, {"voices": ["en"]}, {"test_voices": ["en-us+f2", "en+f2"], "voices": ["en"]}):
        built(["ab", "ba"], **other)
    built(["ba", "ab"])
    fake.version = "2"
    built(["ab", "ba"])
    assert len(fake.said) == 6
    built(["ab", "ba"], features="mel", band_masks=1)  # of the same samples
    assert len(fake.said) == 6


def test_a_try_that_was_stopped_leaves_nothing(fake, tmp_path):
    def stopped(jobs):
        Fake.speak(fake, jobs[:1])
        raise UserError("stopped")

    fake.speak = stopped
    with pytest.raises(UserError, match="stopped"):
        built(["ab", "ba"])
    del fake.speak
    assert built(["ab", "ba"]).counts["train"] == 8


def test_sentences_from_a_file(fake, tmp_path, monkeypatch):
    (tmp_path / "commands.txt").write_text("ab\n\n ba \n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    data = built("commands.txt")
    assert {text for text, _, _ in fake.said[0]} == {"ab", "ba"}
    assert data.located({"sentences": "commands.txt"}) == {"sentences": str(tmp_path / "commands.txt")}
    with pytest.raises(UserError, match=r"dataset.sentences=.*none.txt cannot be read: No such file.*lights on"):
        built("none.txt")
    (tmp_path / "commands.txt").write_text("\n")
    with pytest.raises(UserError, match="has no sentences"):
        built("commands.txt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"voices": ["xx"]}, r"dataset\.voices: eSpeak NG has no language 'xx'; of English it has: en, en-us"),
        ({"test_voices": ["en+f9"]}, r"dataset\.test_voices: eSpeak NG has no variant 'f9'; it has: f2"),
        ({"valid_voices": ["en+f2"]}, r"have en\+f2 twice.*training does not hear"),
        ({"speeds": []}, r"dataset\.speeds=\[\] must have a speed"),
    ],
)
def test_voices_that_cannot_be(fake, options, message):
    with pytest.raises(UserError, match=message):
        built(["ab"], **options)
    assert not fake.said


def test_where_it_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(UserError, match=r"pip install 'srnn\[synthetic\]'"):
        built(["ab"])


def test_espeak_says_the_same_each_time(monkeypatch, tmp_path):
    pytest.importorskip("espeakng_loader")
    sentences, voices = ["lights on", "naïve & <b>"], {"voices": ["en-us", "en-gb-scotland+f3"], "speeds": [175]}
    sums = []
    for cache in ("a", "b"):
        monkeypatch.setenv("SRNN_CACHE", str(tmp_path / cache))
        data = SyntheticSpeech(sentences, **voices, batch_size=2)
        data.setup()
        sums.append(data.checksum("train"))
    assert sums[0] == sums[1]
    assert data.counts == {"train": 4, "valid": 4, "test": 4}
    for utterance in data._parts["train"].utterances:
        assert 0.4 < utterance.seconds() < 3
        assert utterance.samples().std() > 0.02
    slow = SyntheticSpeech(sentences, **voices | {"speeds": [90]}, batch_size=2)
    slow.setup()
    assert min(slow._parts["train"].frames) > 1.3 * min(data._parts["train"].frames)
    espeak = Espeak.installed()
    with pytest.raises(UserError, match="eSpeak NG failed: RuntimeError: eSpeak NG has no voice xx"):
        espeak.speak([(str(tmp_path / "a.wav"), "ab", "xx", 100)])


def test_every_default_voice_is_there():
    pytest.importorskip("espeakng_loader")
    languages, variants = Espeak.installed().names()
    data = SyntheticSpeech(["a"])
    for voice in [*data.voices, *data.valid_voices, *data.test_voices]:
        language, _, variant = voice.partition("+")
        assert language in languages
        assert not variant or variant in variants
