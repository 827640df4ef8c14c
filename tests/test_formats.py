"""Structures, scores and ranking against loops over single weights."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Structure, parts, ranking
from srnn.pruning.groups import Group
from srnn.pruning.parts import Part
from srnn.pruning.ranking import Ranking, _kth_by_bits, _kth_on_gpu
from srnn.pruning.scores import random_scores, unit_scores

SPELLINGS = ["element", "4x1", "16x1", "4x4", "3x2", "1x5", "99999x99999"]
shapes = st.tuples(st.sampled_from([1, 3, 4]), st.integers(1, 9), st.integers(1, 9))


def group_of(weight, gates=1, structure="element", sparsity=0.5, name="rnn.weight_hh_l0", **options):
    parameter = nn.Parameter(weight)
    mask = torch.ones_like(weight, dtype=torch.bool)
    part = Part(name, parameter, mask, "recurrent", gates, 0, gates)
    return Group("recurrent", "recurrent", [part], sparsity, Structure.parse(structure), **options)


def blocks(structure, shape):
    """Index sets of the weights of each unit, in order."""
    gates, rows, columns = shape
    for gate, top, left in itertools.product(
        range(gates), range(0, rows, structure.rows), range(0, columns, structure.columns)
    ):
        yield [
            (gate, r, c)
            for r in range(top, min(rows, top + structure.rows))
            for c in range(left, min(columns, left + structure.columns))
        ]


@pytest.mark.parametrize("text", [*SPELLINGS, "2:4", "1:8"])
def test_spellings_are_read_and_written(text):
    assert str(Structure.parse(text)) == text


@pytest.mark.parametrize("text", ["4", "x4", "0x4", "4x0", "4:2", "4:4", "0:4", "row", "", "4x4x4"])
def test_other_spellings_are_refused(text):
    with pytest.raises(UserError, match=r"pruning\.structure='.*' must be element, a block"):
        Structure.parse(text)


@given(shapes, st.sampled_from(SPELLINGS), st.randoms())
@settings(deadline=None, max_examples=60)
def test_scores_and_sizes_are_those_of_the_blocks(shape, text, random):
    structure = Structure.parse(text)
    x_GRC = torch.tensor([random.random() for _ in range(math.prod(shape))]).view(shape)
    members = list(blocks(structure, shape))
    assert structure.units(shape) == len(members)
    assert structure.sizes(shape).tolist() == [len(unit) for unit in members]
    values = [[float(x_GRC[index]) for index in unit] for unit in members]
    for score, of in {
        "max": max,
        "mean": lambda v: sum(v) / len(v),
        "energy": lambda v: math.sqrt(sum(x * x for x in v) / len(v)),
    }.items():
        assert unit_scores(x_GRC, structure, score).tolist() == pytest.approx([of(v) for v in values], rel=1e-5)
    spread = structure.spread(torch.arange(len(members)), shape)
    for number, unit in enumerate(members):
        assert all(int(spread[index]) == number for index in unit)


@given(shapes, st.sampled_from(SPELLINGS), st.floats(0.05, 0.95), st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_blocks_go_whole_smallest_first_to_the_nearest_block(shape, text, sparsity, seed):
    gates, rows, columns = shape
    # Few different values: many ties.
    weight = torch.randint(1, 5, (gates * rows, columns), generator=torch.Generator().manual_seed(seed)).float()
    group = group_of(weight, gates, text, sparsity)
    group.prune_to(group.target)
    mask_GRC = group.parts[0].of(group.parts[0].mask)
    kept, gone, sizes = [], [], []
    scores = unit_scores(weight.view(shape), group.structure, "max").tolist()
    for score, unit in zip(scores, blocks(group.structure, shape), strict=True):
        inside = {bool(mask_GRC[index]) for index in unit}
        assert len(inside) == 1, "a block is whole or zero"
        (kept if inside.pop() else gone).append(score)
        sizes.append(len(unit))
    assert kept, "something is left"
    assert not gone or min(kept) >= max(gone)
    # Adding or removing a block at the boundary would be no closer, unless nothing would be left.
    if len(kept) > 1:
        assert abs(group.pruned - group.target) <= max(sizes) / 2
        assert group.tolerance == max(sizes) // 2
    again = group_of(weight, gates, text, sparsity)
    again.prune_to(again.target)
    assert torch.equal(again.parts[0].mask, group.parts[0].mask)


@given(st.sampled_from([(2, 4), (1, 4), (4, 8), (1, 2)]), st.integers(1, 21), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_n_of_m_keeps_exactly_n_of_every_m(share, columns, seed):
    keep, of = share
    weight = torch.randint(-3, 4, (6, columns), generator=torch.Generator().manual_seed(seed)).float()
    group = group_of(weight, 3, f"{keep}:{of}", 1 - keep / of)
    for part in (0.3, 0.7, 1.0):  # on the way there, and at the end
        group.prune_to(round(part * group.target))
        for row, left in itertools.product(range(6), range(0, columns, of)):
            kept = int(group.parts[0].mask[row, left : left + of].sum())
            assert kept >= min(keep, columns - left)
            if part == 1:
                assert kept == min(keep, columns - left)
                magnitudes = weight[row, left : left + of].abs()
                chosen = group.parts[0].mask[row, left : left + of]
                assert kept == len(chosen) or magnitudes[chosen].min() >= magnitudes[~chosen].max()


def test_n_of_m_wants_its_own_sparsity():
    with pytest.raises(UserError, match=r"structure=2:4 leaves 2 of 4 .* sparsity=0\.9 .* pruning\.sparsity=0\.5"):
        group_of(torch.randn(4, 8), structure="2:4", sparsity=0.9)


@pytest.mark.parametrize("structure", ["element", "4x1", "2x2"])
def test_the_diagonal_stays(structure):
    weight = torch.randn(36, 12)
    weight.view(3, 12, 12)[:, torch.arange(12), torch.arange(12)] = 1e-6
    group = group_of(weight, 3, structure, 0.6, keep_diagonal=True)
    group.prune_to(group.target)
    mask = group.parts[0].of(group.parts[0].mask)
    assert mask[:, torch.arange(12), torch.arange(12)].all()
    assert abs(group.pruned - group.target) <= group.tolerance
    with pytest.raises(UserError, match=r"keep_diagonal=true keeps so much .* at most 0\.\d+ can be pruned"):
        group_of(weight, 3, structure, 0.95, keep_diagonal=True)
    assert not group_of(weight, 3, structure, 0.95, keep_diagonal=True, name="rnn.weight_ih_l0").parts[0].is_square


numbers = st.sampled_from([0.0, -1.0, math.inf, 0.5, 1e-40]) | st.floats(0, 2.0**100, width=32)


@given(st.lists(numbers, min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_the_kth_smallest_by_bits_is_that_of_sorting(values, data):
    k = data.draw(st.integers(1, len(values)))
    halves = [torch.tensor(values[: len(values) // 2]), torch.tensor(values[len(values) // 2 :])]
    wanted = sorted(torch.tensor(values).tolist())[k - 1]
    assert _kth_by_bits(iter(halves), iter(halves), k) == wanted
    assert _kth_on_gpu(lambda: iter(halves), k, len(values)) == wanted


@given(st.lists(numbers, min_size=1, max_size=60), st.data())
@settings(deadline=None)
def test_the_kth_smallest_by_partition_is_that_of_sorting(values, data):
    k = data.draw(st.integers(1, len(values)))
    scores = torch.tensor(values)
    assert ranking._kth_by_partition(scores.numpy(), k) == sorted(scores.tolist())[k - 1]


@pytest.mark.parametrize("structure", ["element", "4x1", "4x4", "2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_weights_are_ranked_in_pieces_alike(monkeypatch, structure, dtype):
    def masks(limit):
        monkeypatch.setattr(parts, "PIECE", limit)
        monkeypatch.setattr(ranking, "PIECE", limit)
        torch.manual_seed(0)
        weight = (torch.randn(51, 40) * 3).round().to(dtype)  # ties
        group = group_of(weight, 3, structure, 0.5)
        assert (len(group.pieces) > 1) == (limit < 1000)
        group.prune_to(group.target)
        ranked = group.ranking()
        return group.parts[0].mask, group.epsilon, ranked.largest(), ranked.quantile(0.7), ranked.count_at_least(2.0)

    (mask, *rest), (mask_in_pieces, *rest_in_pieces) = masks(1 << 22), masks(300)
    assert torch.equal(mask, mask_in_pieces)
    assert rest == rest_in_pieces


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 9, width=32), min_size=1, max_size=40), st.data())
@settings(deadline=None)
def test_keep_largest_keeps_the_count_the_largest_and_the_earlier_of_equals(values, data):
    count = data.draw(st.integers(1, len(values)))
    group = group_of(torch.tensor([values]))
    group.ranking().keep_largest(count)
    kept = group.parts[0].mask.flatten().tolist()
    order = sorted(range(len(values)), key=lambda i: -torch.tensor(values[i]).item())  # stable
    assert {i for i, keep in enumerate(kept) if keep} == set(order[:count])


def test_quantile_is_the_sorted_rank():
    values = torch.randn(501).abs()
    ranked = Ranking(group_of(values[None]).pieces, Structure(), lambda piece: piece.weight.flatten())
    assert ranked.quantile(0.9) == sorted(values.tolist())[round(0.9 * 501) - 1]


def test_a_rank_beyond_16_million_is_exact():
    """Where fp32 cannot count: 2^24 + 1 zeros, then ones."""
    parts = [torch.zeros(1 << 22)] * 4 + [torch.tensor([0.0, 1.0])]
    ranks = (1 << 24) + 1, (1 << 24) + 2
    assert [_kth_by_bits(iter(parts), iter(parts), k) for k in ranks] == [0.0, 1.0]


@pytest.fixture(params=[False, True])
def deterministic(request):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(before)


def test_where_results_have_to_be_deterministic_ranks_are_found_without_histc(monkeypatch, deterministic):
    """Which a GPU refuses then."""
    if deterministic:
        monkeypatch.delattr(torch, "histc")
    scores = torch.cat([torch.tensor([-1.0, 0.0, 1e-40, math.inf]), torch.rand(200)])
    for limit in (ranking._SORTED, -1):
        monkeypatch.setattr(ranking, "_SORTED", limit)
        for k in (1, 2, 3, 4, 100, 204):
            assert _kth_on_gpu(lambda: iter([scores]), k, 204) == float(scores.sort().values[k - 1])


@pytest.mark.gpu
def test_pruned_units_count_in_a_rank_on_a_gpu(deterministic):
    scores = torch.rand(1000, device="cuda")
    order = torch.randperm(1000, device="cuda")
    scores[order[:300]], scores[order[300:700]] = -1, 0
    for k in (1, 300, 301, 700, 701, 950, 1000):
        assert _kth_on_gpu(lambda: iter([scores, scores]), 2 * k, 2000) == float(scores.sort().values[k - 1])


def test_lots_depend_on_their_key_alone():
    device = torch.device("cpu")
    torch.manual_seed(1)
    one = random_scores(100, device, 3, "a")
    torch.manual_seed(2)
    assert torch.equal(one, random_scores(100, device, 3, "a"))
    assert not torch.equal(one, random_scores(100, device, 3, "b"))
    assert ((one >= 0) & (one < 1)).all()


@pytest.mark.gpu
def test_a_threshold_for_100_million_weights_takes_under_a_second_and_no_copy():
    weight = torch.randn(20_000, 5_000, device="cuda")
    group = group_of(weight)
    group.prune_to(group.zeros_for(0.5))  # compile, warm up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began.record()
    group.prune_to(group.zeros_for(0.9))
    ended.record()
    torch.cuda.synchronize()
    assert began.elapsed_time(ended) < 1000
    assert torch.cuda.max_memory_allocated() - before < weight.nbytes / 2
    assert group.pruned == 90_000_000
