import math

import pytest
import torch

from srnn.datasets.text import Streams
from srnn.models import gru, lstm, rnn
from srnn.models.recurrent import detach
from srnn.training.next_token import Score, evaluate

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


@pytest.mark.parametrize("streams", [1, 3, 16])
def test_the_score_is_that_of_the_whole_text(streams):
    model = MODELS["gru"]().double().eval()
    tokens = torch.randint(0, 7, (200,))
    score = evaluate(model, Streams(tokens.numpy(), streams, 13), 100, torch.device("cpu"))
    # The same by hand: each stream from a zero state, each target once.
    width = math.ceil(199 / streams)
    nats = 0.0
    for start in range(0, 199, width):
        part = tokens[start : min(start + width, 199) + 1]
        logits, _ = model(part[None, :-1])
        nats += torch.nn.functional.cross_entropy(logits[0], part[1:], reduction="sum").item()
    assert score.loss == pytest.approx(nats / 199, rel=1e-6)
    assert score.perplexity == pytest.approx(math.exp(nats / 199), rel=1e-6)
    assert score.bits_per_character == pytest.approx(nats / math.log(2) / 100, rel=1e-6)


def test_a_hopeless_score_is_still_a_number():
    assert math.isfinite(Score.of(1e9, 10, 10).perplexity)
