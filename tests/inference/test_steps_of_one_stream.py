"""Inputs with a dimension too few or too many: steps of one stream as torch takes sequences, the rest refused."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

from srnn.inference.sparsify import sparsify
from srnn.models import deepspeech2_small, gru, lstm
from srnn.models.recurring import Recurring
from srnn.models.transcribing import Listener, NetworkStream
from tests.inference.test_sparsify import pruned

KERNELS = ("cpu", "csr", "dense")


def together(parts):
    return parts if isinstance(parts, tuple) else (parts,)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_a_step_without_a_dimension_for_streams_is_one_stream(kind, kernel):
    torch.manual_seed(0)
    rnn = pruned(kind(12, 33, num_layers=2, batch_first=True))
    sparse, x_TI, state = sparsify(rnn, kernel=kernel), torch.randn(3, 12), None
    for x_I in x_TI:
        y_P, state = sparse.step(x_I, state)
    wanted, end = rnn(x_TI)
    torch.testing.assert_close(y_P, wanted[-1].detach(), rtol=1e-5, atol=1e-6)
    for part, of_torch in zip(together(state), together(end), strict=True):
        torch.testing.assert_close(part, of_torch.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", [*KERNELS, None])
def test_a_token_without_dimensions_is_one_stream(kernel):
    torch.manual_seed(0)
    dense = pruned(gru(16, 8, vocabulary_size=15)).eval()
    model = dense if kernel is None else sparsify(dense, kernel=kernel)
    with torch.no_grad():
        (_, state), (wanted, _) = model.step(torch.tensor(3)), dense(torch.tensor([[3, 5]]))
        assert state.shape == (1, 16)
        torch.testing.assert_close(model.step(torch.tensor(5), state)[0], wanted[0, -1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kernel", KERNELS)
def test_other_numbers_of_dimensions_are_refused(kernel):
    layer = sparsify(pruned(nn.GRU(12, 33)), kernel=kernel)
    language, sequences = pruned(gru(16, 8, vocabulary_size=15)), pruned(lstm(16, input_size=12, output_size=2))
    for module, x in ((layer, torch.randn(1, 1, 12)), (layer, torch.tensor(1.0)), (language, torch.tensor([[1, 2]]))):
        with pytest.raises(ValueError, match="whole sequences"):
            module.step(x)
    for network in (language, sparsify(language, kernel=kernel), sparsify(sequences, kernel=kernel), layer):
        with pytest.raises(TypeError, match="takes a tensor, not int"):
            network.step(3)
    for state in (torch.zeros(1, 1, 33), torch.zeros(33)):
        with pytest.raises(RuntimeError, match="must have 2 dimensions"):
            layer.step(torch.randn(12), state)
        with pytest.raises(RuntimeError, match="must have 2 dimensions"):
            layer(torch.randn(5, 12), state)


@pytest.mark.parametrize("sizes", [[7], [1, 2], [4, 0], [2, 1]])
def test_packed_rows_that_are_not_those_of_the_steps_are_refused(sizes):
    sparse = sparsify(pruned(nn.GRU(12, 33)), kernel="cpu")
    with pytest.raises(RuntimeError, match="a PackedSequence must hold"):
        sparse(PackedSequence(torch.randn(4, 12), torch.tensor(sizes)))


@pytest.mark.parametrize(
    ("u", "lengths", "state"),
    [((2, 5, 95), (2,), None), ((5, 96), (5,), None), ((2, 5, 96), (1,), None), ((2, 5, 96), (2,), (1, 1, 32))],
)
def test_products_and_states_of_wrong_shape_are_refused_before_a_recurrence(u, lengths, state):
    sparse = sparsify(pruned(Recurring("gru", 32)), kernel="cpu")
    start = None if state is None else (torch.zeros(state),)
    with pytest.raises(RuntimeError, match="must have shape"):
        sparse(torch.randn(u), torch.full(lengths, 5), start)


def test_frames_and_sounds_of_wrong_shape_are_refused():
    model = deepspeech2_small(hidden_size=16, num_layers=1, input_size=40, output_size=5).eval()
    with pytest.raises(ValueError, match="frames"):
        NetworkStream(model).feed(torch.randn(40))
    with pytest.raises(ValueError, match="one channel"):
        Listener(SimpleNamespace(model=model)).hear(torch.randn(2, 400))
