"""Decoding, and writing speech down in pieces and as a whole."""

import copy
import itertools
import math

import pytest
import torch

from srnn.audio import Features
from srnn.errors import UserError
from srnn.inference.sparsify import sparsify
from srnn.models import Transcriber, deepspeech2
from srnn.models.decoding import Phrases, WordSequences, beam_search, greedy
from srnn.pruning.once import prune
from srnn.vocabulary import Characters
from tests.speech_files import spoken


def enumerated(logits_TV):
    """Text -> probability, over all paths."""
    found, steps = {}, logits_TV.softmax(-1)
    for path in itertools.product(range(logits_TV.shape[1]), repeat=len(logits_TV)):
        text = tuple(token for token, _ in itertools.groupby(path) if token)
        found[text] = found.get(text, 0.0) + math.prod(float(steps[t, token]) for t, token in enumerate(path))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_a_wide_beam_finds_the_likeliest_text(seed):
    torch.manual_seed(seed)
    logits_TV = 2 * torch.randn(5, 3)
    wanted = enumerated(logits_TV)
    assert sum(wanted.values()) == pytest.approx(1, abs=1e-5)
    best = max(wanted, key=wanted.get)
    assert tuple(beam_search(logits_TV, 1000)) == best
    assert wanted[tuple(beam_search(logits_TV, 4))] >= 0.5 * wanted[best]


@pytest.mark.parametrize("seed", range(10))
def test_the_likeliest_of_some_phrases(seed):
    """With doubled characters, and phrases that begin others; against the sum over all paths."""
    torch.manual_seed(seed)
    logits_TV = 2 * torch.randn(5, 3)
    phrases = [(1, 1), (1,), (2, 1, 1), (2, 2), (1, 2, 1, 2), (1, 1, 1, 1)]  # the last one has no path
    truth = enumerated(logits_TV)
    wanted = max(phrases, key=lambda phrase: truth.get(phrase, 0.0))
    assert tuple(Phrases(phrases)(logits_TV)) == wanted
    assert Phrases([wanted])(logits_TV) == list(wanted)
    with pytest.raises(ValueError, match="none of them empty"):
        Phrases([(1,), ()])


@pytest.mark.parametrize("seed", range(10))
def test_the_likeliest_sequence_of_words(seed):
    """Words that begin others and that have doubled letters, in any order; against the sum over all paths."""
    torch.manual_seed(seed)
    logits_TV = 2 * torch.randn(5, 4)
    logits_TV[:, 1] += 1  # a space
    words = {(2,), (2, 3), (3, 3), (3, 2, 2)}

    def allowed(text):
        parts = [tuple(part) for space, part in itertools.groupby(text, lambda token: token == 1) if not space]
        spaces = sum(token == 1 for token in text)
        return not text or (set(parts) <= words and spaces == len(parts) - 1 and 1 not in (text[0], text[-1]))

    truth = {text: p for text, p in enumerated(logits_TV).items() if allowed(text)}
    assert {(), (2,), (2, 1, 2), (2, 3, 1, 2), (3, 2, 2)} <= truth.keys()
    assert not {(1,), (3,), (2, 1), (2, 2), (2, 1, 3)} & truth.keys()
    best = max(truth, key=truth.get)
    assert tuple(beam_search(logits_TV, 1000, WordSequences(words, space=1))) == best
    for width in (1, 2, 3):
        assert allowed(tuple(beam_search(logits_TV, width, WordSequences(words, space=1))))
    single = {text: p for text, p in truth.items() if 1 not in text}
    assert tuple(beam_search(logits_TV, 1000, WordSequences(words, space=None))) == max(single, key=single.get)


def test_a_word_that_is_not_finished_is_left_out():
    logits_TV = torch.arange(4) == torch.tensor([[2, 3, 1, 2]]).T  # "ab a" where "a" alone is no word
    assert beam_search(9.0 * logits_TV, 1, WordSequences([(2, 3)], space=1)) == [2, 3]
    assert beam_search(9.0 * logits_TV, 1) == [2, 3, 1, 2]
    with pytest.raises(ValueError, match="none of them empty"):
        WordSequences([(1,), ()], space=None)


def test_words_of_texts(listening):
    x_N = torch.from_numpy(spoken("abc ab", seed=3))
    said = listening(x_N, words=listening.words(["ab  c", "ca"]), beam=30)
    assert said
    assert set(said.split(" ")) <= {"ab", "c", "ca"}
    words = listening.words(["ab c ca"])
    assert listening(x_N, words=words) == listening(x_N, 20, words=words)
    with pytest.raises(UserError, match="this network does not write 'd', which is in 'ad'"):
        listening.words(["ab ad"])
    with pytest.raises(UserError, match="a list of words must have some"):
        listening.words([" "])


def test_the_likeliest_text_is_not_that_of_the_likeliest_path():
    logits_TV = torch.tensor([[0.4, 0.35, 0.25]] * 2).log()
    assert greedy(logits_TV[None], torch.tensor([2])) == [[]]
    assert beam_search(logits_TV, 100) == [1]


@pytest.fixture(scope="module")
def listening():
    torch.manual_seed(0)
    sizes = {"input_size": 161, "output_size": 5}
    model = deepspeech2("gru", 24, 2, False, row_taps=4, channels=2, future=1, **sizes)
    for p in model.output.parameters():
        p.data.mul_(20)  # an untrained network says little
    model(torch.randn(2, 60, 161))
    return Transcriber(model.eval(), Characters([" ", "a", "b", "c"]), Features(normalise="running"))


@pytest.mark.parametrize("milliseconds", [40, 130, 640])
def test_a_stream_writes_what_the_whole_says(listening, milliseconds):
    x_N = torch.from_numpy(spoken("abc ab", seed=3))
    whole = listening(x_N)
    assert whole
    stream, size = listening.stream(), 16 * milliseconds
    partial = [stream.hear(piece) for piece in x_N.split(size)]
    assert stream.finish() == whole
    assert all(whole.startswith(text) for text in partial)
    assert all(waiting.shape[1] < 80 for waiting in stream._network._waiting.values())
    assert len(stream._samples) < 480


@pytest.mark.gpu
def test_a_gpu_writes_the_same(listening):
    x_N = torch.from_numpy(spoken("abc ab", seed=3))
    model = copy.deepcopy(listening.model).cuda()
    there = Transcriber(model, listening.vocabulary, listening.audio)
    assert there(x_N) == listening(x_N)
    assert there(x_N.cuda(), beam=3) == listening(x_N, beam=3)
    prune(model, sparsity=0.5)
    for kernel in ("dense", "triton"):
        sparse = Transcriber(sparsify(model, kernel=kernel), listening.vocabulary, listening.audio)
        stream = sparse.stream()
        for piece in x_N.split(1600):
            stream.hear(piece)
        assert stream.finish() == sparse(x_N)


def test_how_long_a_pause_is(listening):
    """Counted in steps without a character, however these come."""
    logits_TV = torch.nn.functional.one_hot(torch.tensor([2, 0, 0, 2, 1, 0, 0, 0, 3, 0, 0, 0, 0]), 5).float()
    stream = listening.stream(0.06)
    assert stream._write(logits_TV) == ""
    assert stream.ended == ["aa", "b"]
    assert listening.stream()._write(logits_TV) == "aa b"
    pieces = listening.stream(0.06)
    assert [pieces._write(part) for part in logits_TV.split(5)] == ["aa ", "b", ""]
    assert pieces.ended == ["aa", "b"]


def test_nothing_said_is_no_text(listening):
    assert listening(torch.zeros(100)) == ""
    stream = listening.stream()
    assert stream.hear(torch.zeros(100)) == stream.finish() == ""


def test_streams_that_cannot_be(listening):
    with pytest.raises(UserError, match=r"trained with dataset.normalise=utterance"):
        Transcriber(listening.model, listening.vocabulary, Features()).stream()
    both = deepspeech2("rnn", 8, 1, channels=2, input_size=161, output_size=5).eval()
    with pytest.raises(UserError, match=r"model.bidirectional=false"):
        Transcriber(both, listening.vocabulary, listening.audio).stream()
    with pytest.raises(UserError, match=r"srnn.load it from the packed file of a run"):
        both.transcriber()
