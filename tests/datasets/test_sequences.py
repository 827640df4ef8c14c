import pytest
import torch

from srnn.datasets import Adding, Digits
from srnn.datasets.base import Batches
from srnn.errors import UserError


def test_digits_are_scikit_learns():
    datasets = pytest.importorskip("sklearn.datasets")
    data = Digits(batch_size=50)
    data.setup()
    assert data.sizes == {"input_size": 8, "output_size": 10}
    assert data.counts == {"train": 1257, "valid": 270, "test": 270}
    images = torch.cat([x for x, _ in data.test_dataloader()])
    assert torch.equal(images * 16, torch.from_numpy(datasets.load_digits().images[-270:]).float())


def test_digits_say_what_they_need(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"needs scikit-learn: pip install 'srnn\[digits\]'"):
        Digits().setup()


@pytest.mark.parametrize("steps", [2, 3, 50])
def test_the_sum_of_the_marked_numbers(steps):
    data = Adding(sequence_length=steps, train_sequences=64, eval_sequences=20)
    data.setup()
    for part in ("train", "valid", "test"):
        for x, y in data.batches(part):
            assert (x[:, :, 1].sum(1) == 2).all()
            assert (x[:, : steps // 2, 1].sum(1) == 1).all()
            torch.testing.assert_close((x[:, :, 0] * x[:, :, 1]).sum(1, keepdim=True), y)
    again = Adding(sequence_length=steps, train_sequences=64, eval_sequences=20)
    again.setup()
    assert torch.equal(next(iter(data.test_dataloader()))[0], next(iter(again.test_dataloader()))[0])


def test_each_pass_has_its_own_order_and_every_sequence():
    data = Adding(sequence_length=4, train_sequences=64, batch_size=16)
    data.setup()
    batches = data.train_dataloader()
    passes = [torch.cat([y for _, y in batches]).flatten() for _ in range(3)]
    assert not torch.equal(passes[0], passes[1])
    assert all(torch.equal(one.sort().values, passes[0].sort().values) for one in passes)


def test_an_order_is_drawn_once_a_pass(monkeypatch):
    data = Adding(sequence_length=4, train_sequences=64, batch_size=16)
    data.setup()
    draw, drawn = torch.randperm, []
    monkeypatch.setattr(torch, "randperm", lambda *args, **options: drawn.append(args) or draw(*args, **options))
    batches = data.train_dataloader()
    passes = [torch.cat([x for x, _ in batches]) for _ in range(2)]
    assert len(drawn) == 2
    x_NTI = torch.cat([batches.fetch(0, index)[0] for index in range(4)])
    assert torch.equal(x_NTI, passes[0]), "an earlier pass again"
    order = draw(64, generator=torch.Generator().manual_seed(torch.initial_seed() + 1))
    assert torch.equal(passes[1], data.sequences()["train"][0][order]), "of the seed and the pass alone"


@pytest.mark.parametrize("stop", range(8))
def test_batches_go_on_where_they_were(stop):
    def made():
        return Batches(lambda epoch, index: (epoch, index), 3)

    def some(batches, count):
        """As a training loop takes them: a pass after the other."""
        taken = []
        while len(taken) < count:
            for batch in batches:
                taken.append(batch)
                if len(taken) == count:
                    break
        return taken

    whole = [(epoch, index) for epoch in range(3) for index in range(3)]
    first, second = made(), made()
    assert some(first, stop) == whole[:stop]
    second.load_state_dict(first.state_dict())
    assert some(second, 9 - stop) == whole[stop:]


def test_too_few_sequences():
    with pytest.raises(UserError, match=r"dataset\.batch_size=32 is more than the 10 training sequences"):
        Adding(train_sequences=10).setup()
