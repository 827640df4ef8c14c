"""Calls that are as they always are: what the first one gave, and nothing that is not usual taken for it."""

import pytest
import torch
from torch import nn

import srnn
from srnn.inference import usual_calls


@pytest.fixture
def taken(monkeypatch):
    """Whether each call was taken for a usual one."""
    found = []
    for kind in (usual_calls.UsualSequences, usual_calls.UsualRows):
        monkeypatch.setattr(kind, "__call__", counted(kind.__call__, found))
    return found


def counted(call, found):
    def run(self, *arguments):
        done = call(self, *arguments)
        found.append(done is not None)
        return done

    return run


def made(cell, seed=0):
    torch.manual_seed(seed)
    layer = cell(13, 20, 2, batch_first=True)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.mul_(torch.rand_like(weight) < 0.3)
    return layer.eval().requires_grad_(False)


def near(got, wanted):
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cell", [nn.GRU, nn.LSTM, nn.RNN])
@pytest.mark.parametrize("steps", [1, 5, 40])
def test_the_next_calls_give_what_the_first_one_gave(cell, steps, taken):
    dense = made(cell)
    sparse, x = srnn.sparsify(dense, kernel="cpu"), torch.randn(1, steps, 13)
    first = sparse(x)
    assert taken == []
    torch.testing.assert_close(sparse(x), first, rtol=0, atol=0)
    state = first[1]
    wanted = dense(x, state)
    near(sparse(x, state), wanted)
    near(sparse(x[:, :steps].transpose(1, 2).contiguous().transpose(1, 2), state), wanted)
    with torch.inference_mode():
        near(sparse(x, state), wanted)
    assert taken == [True] * 4


def test_what_is_not_usual_goes_the_long_way(taken):
    dense = made(nn.LSTM)
    sparse, x = srnn.sparsify(dense, kernel="cpu"), torch.randn(1, 5, 13)
    _, state = sparse(x)
    sparse(x)
    assert taken == [True]
    near(sparse(torch.randn(3, 5, 13))[0].shape, (3, 5, 20))
    near(sparse(x[0], tuple(part[:, 0] for part in state)), dense(x[0], tuple(part[:, 0] for part in state)))
    near(sparse(x, list(state)), dense(x, state))
    y, _ = sparse(x.clone().requires_grad_())
    with pytest.raises(RuntimeError, match="do not flow"):
        y.sum().backward()
    with pytest.raises(RuntimeError, match="13 features"):
        sparse(torch.randn(1, 5, 12))
    with pytest.raises(RuntimeError, match="shape"):
        sparse(x, (state[0], state[1][:1]))
    assert not any(taken[1:])


def test_weights_that_were_loaded_or_moved_count(taken):
    sparse, x = srnn.sparsify(made(nn.GRU), kernel="cpu"), torch.randn(1, 5, 13)
    sparse(x)
    other = made(nn.GRU)
    for weight in other.parameters():
        weight.mul_(2)
    sparse.load_state_dict(srnn.sparsify(other, kernel="cpu").state_dict())
    for _ in range(2):
        near(sparse(x), other(x))
    assert taken == [True]


def test_hooks_see_every_call_and_threads_may_change(taken):
    sparse, x, seen = srnn.sparsify(made(nn.GRU), kernel="cpu"), torch.randn(1, 5, 13), []
    sparse.register_forward_hook(lambda *_: seen.append(1))
    before = torch.get_num_threads()
    try:
        for threads in (1, 1, 2, 2):
            torch.set_num_threads(threads)
            sparse(x)
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 4
    assert taken == [True, False, True]


def test_a_graph_holds_none_of_them(taken):
    sparse, x = srnn.sparsify(made(nn.GRU), kernel="cpu"), torch.randn(1, 5, 13)
    wanted = sparse(x)
    sparse(x)
    compiled = torch.compile(lambda x: sparse(x), fullgraph=True, backend="eager")
    near(compiled(x), wanted)
    assert taken == [True]


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (4, 5)])
def test_rows_of_a_linear_layer(shape, taken):
    torch.manual_seed(0)
    dense = nn.Linear(40, 24)
    dense.weight.data *= torch.rand(24, 40) < 0.3
    sparse, x = srnn.sparsify(dense.requires_grad_(False), kernel="cpu"), torch.randn(*shape, 40)
    for _ in range(3):
        near(sparse(x), dense(x))
    near(sparse(x[0]), dense(x[0]))
    assert taken == [True, True, False]
