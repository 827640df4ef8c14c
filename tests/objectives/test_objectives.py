import math

import pytest
import torch

from srnn.datasets import Digits, TextStreams
from srnn.datasets.text import streams
from srnn.errors import UserError
from srnn.models import gru, lstm, rnn
from srnn.models.recurrent import detach
from srnn.objectives.classification import Classification
from srnn.objectives.next_token import NextToken, TextScore
from srnn.objectives.regression import Regression

MODELS = {
    "rnn": lambda: rnn(9, 4, nonlinearity="relu", vocabulary_size=7),
    "gru": lambda: gru(9, 4, num_layers=2, vocabulary_size=7),
    "lstm": lambda: lstm(9, 4, vocabulary_size=7),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_state_carries_a_text_over_batches(name):
    model = MODELS[name]().eval()
    tokens = torch.randint(0, 7, (2, 30))
    whole, _ = model(tokens)
    first, state = model(tokens[:, :11])
    second, _ = model(tokens[:, 11:], detach(state))
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


class Fixed(TextStreams):
    """A text of given tokens, of 100 characters."""

    def __init__(self, tokens, count):
        super().__init__()
        self.counts, self.tokens = {"test": 100}, {"test": len(tokens)}
        self._streams = {"test": streams(tokens.numpy(), count)}
        self.sequence_length = 13


@pytest.mark.parametrize("streams_", [1, 3, 16])
def test_the_score_is_that_of_the_whole_text(streams_):
    model = MODELS["gru"]().double().eval()
    tokens = torch.randint(0, 7, (200,))
    data = Fixed(tokens, streams_)
    score = NextToken.score(model, data, "test")
    # The same by hand: each stream from a zero state, each target once.
    width = math.ceil(199 / streams_)
    nats = 0.0
    for start in range(0, 199, width):
        part = tokens[start : min(start + width, 199) + 1]
        logits, _ = model(part[None, :-1])
        nats += torch.nn.functional.cross_entropy(logits[0], part[1:], reduction="sum").item()
    assert score["loss"] == pytest.approx(nats / 199, rel=1e-6)
    assert score["perplexity"] == pytest.approx(math.exp(nats / 199), rel=1e-6)
    assert score["bits_per_character"] == pytest.approx(nats / math.log(2) / 100, rel=1e-6)


def test_a_hopeless_score_is_still_a_number():
    metric = TextScore(1.0)
    metric.update(torch.tensor([[[0.0, 1e9]]]), torch.tensor([[0]]))
    assert all(math.isfinite(value) for value in metric.compute().values())


def test_classes_and_numbers_are_scored_as_scikit_learn_does():
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = torch.randn(50, 4), torch.randint(0, 4, (50,))
    data = Digits()
    data.sizes = {"output_size": 4}
    found = Classification.metrics(data, "test")
    for rows in (slice(0, 20), slice(20, 50)):
        found.update(logits[rows], labels[rows])
    scores = found.compute()
    named = logits.argmax(1)
    assert float(scores["accuracy"]) == pytest.approx(metrics.accuracy_score(labels, named))
    assert float(scores["f1"]) == pytest.approx(metrics.f1_score(labels, named, average="macro"))
    assert float(scores["loss"]) == pytest.approx(metrics.log_loss(labels, logits.double().softmax(1)), rel=1e-5)
    given, wanted = torch.randn(50, 1), torch.randn(50, 1)
    found = Regression.metrics(data, "test")
    found.update(given, wanted)
    scores = found.compute()
    assert float(scores["loss"]) == pytest.approx(metrics.mean_squared_error(wanted, given), rel=1e-5)
    assert float(scores["rmse"]) == pytest.approx(float(scores["loss"]) ** 0.5, rel=1e-6)
    assert float(scores["mae"]) == pytest.approx(metrics.mean_absolute_error(wanted, given), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=["one", "both-ends"])
@pytest.mark.parametrize("make", [rnn, gru, lstm])
def test_a_sequence_is_read_to_its_end(make, options):
    model = make(9, **options, input_size=3, output_size=2).eval()
    x = torch.randn(4, 7, 3)
    whole, _ = model(x)
    y, _ = model.rnn(x)
    last = torch.cat([y[:, -1, :9], y[:, 0, 9:]], 1)
    torch.testing.assert_close(whole, model.decoder(last))
    if options:
        with pytest.raises(RuntimeError, match="cannot step"):
            model.step(x[:, 0])
        return
    state = None
    for t in range(7):
        stepped, state = model.step(x[:, t], state)
    torch.testing.assert_close(stepped, whole)


def test_options_of_networks():
    tied = gru(8, 8, tie_embeddings=True, init_range=0.01, vocabulary_size=20)
    assert tied.decoder.weight is tied.embedding.weight
    assert all(float(p.detach().abs().max()) <= 0.01 for p in tied.parameters())
    assert float(tied.decoder.bias.detach().abs().max()) > 0
    for options, sizes, words in (
        ({"embedding_size": 4, "tie_embeddings": True}, {"vocabulary_size": 9}, "to be model.hidden_size=8"),
        ({"bidirectional": True}, {"vocabulary_size": 9}, "must not see the token"),
        ({"tie_embeddings": True}, {"input_size": 2, "output_size": 2}, "for language models"),
        ({"embedding_dropout": 0.5}, {"input_size": 2, "output_size": 2}, "for language models"),
    ):
        with pytest.raises(UserError, match=words):
            gru(8, **options, **sizes)
