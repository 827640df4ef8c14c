"""Two processes: the same masks and weights on both, those of one process on the joined batch, and divergence named."""

import os

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from srnn.distributed import digest
from srnn.errors import UserError
from srnn.pruning import Pruner

STEPS = 40
METHODS = {
    "gradual": {"sparsity": 0.8},
    "block": {"sparsity": 0.8, "structure": "4x1", "group_lasso": 0.001},
    "cubic": {"sparsity": 0.5, "structure": "2:4"},
    "rigl": {"sparsity": 0.8, "freq": 5, "end_itr": 250, "drop_fraction": 0.3},
    "random": {"sparsity": 0.8},
}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(16, 8)
        self.rnn = nn.GRU(8, 12)
        self.out = nn.Linear(12, 16)

    def forward(self, tokens_TB):
        return self.out(self.rnn(self.embedding(tokens_TB))[0])


def batches(steps):
    generator = torch.Generator().manual_seed(9)
    return [torch.randint(0, 16, (5, 8), generator=generator) for _ in range(steps)]


def train(model, method, options, steps, part=slice(None), after=lambda itr: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    total = 300 if method == "rigl" else steps
    pruner = Pruner(model, method, total, optimizer, **options)
    for itr, tokens_TB in enumerate(batches(steps), 1):
        tokens = tokens_TB[:, part]
        logits = model(tokens)
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        after(itr)
    return pruner


def worker(rank, folder):
    os.environ.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    half = slice(4 * rank, 4 * rank + 4)
    results = {}
    for method, options in METHODS.items():
        torch.manual_seed(rank)  # different weights at first: DistributedDataParallel takes those of rank 0
        model = DistributedDataParallel(Net())
        pruner = train(model, method, options, STEPS, half)
        results[method] = (model.module.state_dict(), pruner.masks(), pruner.thresholds)
    results["message"] = _diverge(rank, half)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _diverge(rank, half):
    torch.manual_seed(0)
    model = DistributedDataParallel(Net())

    def flip(itr):
        if itr == 10 and rank == 1:
            with torch.no_grad():
                model.module.rnn.weight_hh_l0 += 1e-6

    try:
        train(model, "cubic", {"sparsity": 0.8}, STEPS, half, flip)
    except UserError as error:
        return str(error)
    return None


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1)]


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_are_one_process_on_the_joined_batch(ranks, method):
    (weights, masks, thresholds), (others, other_masks, other_thresholds) = (results[method] for results in ranks)
    assert all(torch.equal(weights[name], others[name]) for name in weights), "bit for bit"
    assert all(torch.equal(masks[name], other_masks[name]) for name in masks)
    assert thresholds == other_thresholds
    torch.manual_seed(0)
    model = Net()
    pruner = train(model, method, METHODS[method], STEPS)
    for name, weight in model.state_dict().items():
        assert torch.allclose(weights[name], weight, atol=1e-4), name
    assert all(torch.equal(masks[name], mask) for name, mask in pruner.masks().items())
    assert pruner.sparsity > 0.4


def test_a_divergence_is_found_while_running_and_named_on_every_rank(ranks):
    for results in ranks:
        assert "the ranks have diverged: after step" in results["message"]
        assert "rnn.weight_hh_l0 of rank 1 is not that of rank 0" in results["message"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.bool])
def test_digests_see_one_bit_and_a_swap(dtype):
    tensor = (torch.randn(60, 50) > 0) if dtype == torch.bool else torch.randn(60, 50).to(dtype)
    tensor[0, 0], tensor[0, 1] = 1, 0
    same, flipped, swapped = tensor.clone(), tensor.clone(), tensor.clone()
    flipped[59, 49] = 0 if flipped[59, 49] else 1
    swapped[0, 0], swapped[0, 1] = 0, 1
    assert torch.equal(digest(tensor), digest(same))
    for other in (flipped, swapped):
        assert not torch.equal(digest(tensor), digest(other))
