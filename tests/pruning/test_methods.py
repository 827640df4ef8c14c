"""Each method against its own definition, on weights that change at random."""

import math
import warnings

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Block, Cubic, Gradual, Hard, Pruner, Random, RigL, RunLength
from srnn.pruning.methods.rigl import allocate, densities
from srnn.registry import register
from srnn.registry.plugins import plugin_folders

RUN = RunLength(400, 20)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(13, 8)
        self.rnn = nn.GRU(8, 12)
        self.out = nn.Linear(12, 13)


def walk(method, steps=RUN.total_steps, model=None, each=lambda pruner: None, gradients=False, run=RUN):
    """Weights that drift at random, under a pruner."""
    torch.manual_seed(4)
    model = model or Net()
    pruner = Pruner(model, method, run)
    for _ in range(steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
                if gradients:
                    parameter.grad = torch.randn_like(parameter)
        pruner.step()
        each(pruner)
    return pruner


@pytest.mark.parametrize("structure", ["element", "4x1"])
@pytest.mark.parametrize("share", ["layer_type", "matrix", "global"])
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_cubic_has_the_sparsity_of_its_formula_at_all_steps(structure, share):
    method = Cubic(
        sparsity=0.9, initial_sparsity=0.2, start_itr=20, end_itr=300, freq=5, structure=structure, share=share
    )

    def check(pruner):
        for group in pruner.groups:
            itr = pruner.itr
            if itr < 20:
                assert group.pruned == 0
                continue
            update = min(20 + (itr - 20) // 5 * 5, 300)
            wanted = 0.9 - 0.7 * (1 - (update - 20) / 280) ** 3
            assert abs(group.pruned - wanted * group.size) <= group.tolerance + 0.5
            assert all(torch.equal(part.parameter == 0, ~part.mask) for part in group.parts)

    pruner = walk(method, each=check)
    assert pruner.reached()
    assert (method.dense_until, method.done_from) == (19, 300)


def test_cubic_prunes_the_smallest_of_what_is_left():
    seen = []

    def check(pruner):
        (group,) = pruner.groups
        seen.append({part.name: part.mask.clone() for part in group.parts})
        if len(seen) > 1:
            assert all(not (mask & ~seen[-2][name]).any() for name, mask in seen[-1].items()), "none comes back"
        if pruner.method.is_update(pruner.itr) and group.pruned:
            kept = torch.cat([p.parameter.detach()[p.mask].abs() for p in group.parts])
            assert float(kept.min()) == pytest.approx(group.epsilon)

    walk(Cubic(sparsity=0.9, share="global"), each=check)


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_hard_and_random_reach_the_count():
    for method in (Hard(sparsity=0.75), Random(sparsity=0.75), Random(sparsity=0.75, structure="4x4")):
        pruner = walk(method)
        assert pruner.reached(), method
        for group in pruner.groups:
            assert abs(group.pruned - 0.75 * group.size) <= group.tolerance + 0.5


@pytest.mark.parametrize("structure", ["element", "4x1", "2:4"])
@pytest.mark.parametrize("name", ["cubic", "gradual", "block", "hard", "random", "lottery"])
def test_the_forecast_ends_where_the_pruning_does(name, structure):
    register.load_plugins(plugin_folders())
    model = nn.Sequential(nn.Embedding(11, 6), nn.GRU(6, 8))  # 6 columns: of the last 2, 2:4 keeps both
    pruner = walk({"name": name, "structure": structure, "sparsity": 0.5}, model=model)
    for group in pruner.groups:
        forecast = pruner.method.expected(RUN.total_steps, group)
        assert forecast == group.target / group.size
        assert abs(forecast * group.size - group.pruned) <= group.tolerance


def test_random_goes_by_lot_and_its_seed():
    one, again, other = (walk(Random(seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(mask, again.masks()[name]) for name, mask in one.masks().items())
    assert not torch.equal(one.masks()["rnn.weight_hh_l0"], other.masks()["rnn.weight_hh_l0"])
    by_size = walk(Cubic())
    overlap = (one.masks()["rnn.weight_hh_l0"] & by_size.masks()["rnn.weight_hh_l0"]).sum() / (432 * 0.1)
    assert overlap < 0.4, "the control does not follow magnitudes"


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_block_scales_theta_by_the_fourth_root_and_takes_the_largest_weight_of_each_block():
    method = Block(q=0.3, structure="4x4", start_itr=20, ramp_itr=80, end_itr=160, freq=2)

    def check(pruner):
        itr = pruner.itr
        if not (20 < itr < 160 and itr % 2 == 0):
            return
        theta = 2 * (0.3 * 16**0.25) * 2 / (2 * 60 + 3 * 80)
        epsilon = theta * (itr - 20 + 1) / 2 if itr < 80 else (theta * 61 + 1.5 * theta * (itr - 80 + 1)) / 2
        group = pruner.groups[0]
        assert group.epsilon == pytest.approx(epsilon)
        for part in group.parts:
            blocks = part.of(part.parameter.detach().abs()).unflatten(2, (-1, 4)).unflatten(1, (-1, 4)).amax((2, 4))
            masks = part.of(part.mask).unflatten(2, (-1, 4)).unflatten(1, (-1, 4))
            assert torch.equal(masks.any(4).any(2), blocks >= epsilon)
            assert torch.equal(masks.all(4).all(2), blocks >= epsilon)

    pruner = walk(method, each=check)
    assert 0.05 < pruner.sparsity < 1


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_block_ends_at_40_percent_and_meets_the_sparsity_with_auto():
    pruner = walk(Block(sparsity=0.8, structure="4x4"))
    assert (pruner.method.schedule.start_itr, pruner.method.schedule.ramp_itr) == (20, 80)
    assert pruner.method.done_from == 160
    assert pruner.reached()
    for group in pruner.groups:
        assert abs(group.pruned - group.target) <= group.tolerance


def test_q_of_a_reference_is_of_single_weights_for_block_and_of_blocks_for_gradual():
    reference = {name: torch.randn_like(p) for name, p in Net().named_parameters()}
    weights = torch.cat([reference[n].abs().flatten() for n in ("rnn.weight_ih_l0", "rnn.weight_hh_l0")])
    q = sorted(weights.tolist())[round(0.8 * len(weights)) - 1]
    block = Block(q="dense.ckpt", sparsity=0.8, structure="4x4")
    Pruner(Net(), block, RUN, reference=reference)
    assert block.fixed_q["recurrent"] == pytest.approx(q * 16**0.25)
    gradual = Gradual(q="dense.ckpt", sparsity=0.8, structure="4x4")
    Pruner(Net(), gradual, RUN, reference=reference)
    maxima = [
        reference[n].view(3, -1, 4, reference[n].shape[1] // 4, 4).abs().amax((2, 4)).flatten()
        for n in ("rnn.weight_ih_l0", "rnn.weight_hh_l0")
    ]
    blocks = sorted(torch.cat(maxima).tolist())
    assert gradual.fixed_q["recurrent"] == pytest.approx(blocks[round(0.8 * len(blocks)) - 1])


def test_group_lasso_is_the_proximal_step_and_finds_sparse_solutions():
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = Pruner(model, Block(group_lasso=2.0, structure="4x1", sparsity=0.5), 100, optimizer)
    before = model.weight.detach().clone()
    pruner.step()
    norms = before.view(2, 4, 8).square().sum(1).sqrt()
    factor = (1 - 0.1 * 2.0 / norms).clamp(min=0).repeat_interleave(4, 0).view(8, 8)
    assert torch.allclose(model.weight, before * factor)

    # min |w - a|^2 / 2 + strength |w|: the solution is known, block by block.
    target = torch.zeros(8, 8)
    target[:4] = torch.randn(4, 8)
    target[4:] = 0.1 * torch.randn(4, 8)
    model = nn.Linear(8, 8, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    method = Block(group_lasso=0.5, structure="4x1", sparsity=0.5, start_itr=1000, ramp_itr=1500, end_itr=2000)
    pruner = Pruner(model, method, 2000, optimizer)
    for _ in range(400):
        optimizer.zero_grad()
        ((model.weight - target).square().sum() / 2).backward()
        optimizer.step()
        pruner.step()
    norms = target.view(2, 4, 8).square().sum(1, keepdim=True).sqrt()
    solution = (target.view(2, 4, 8) * (1 - 0.5 / norms).clamp(min=0)).view(8, 8)
    assert torch.allclose(model.weight, solution, atol=1e-5)
    assert (model.weight[4:] == 0).all(), "whole blocks at exactly zero"
    without = Pruner(nn.Linear(8, 8), Block(group_lasso=0.5, structure="4x1", sparsity=0.5), 100)
    with pytest.raises(UserError, match="group_lasso needs the optimiser"):
        without.step()


@pytest.mark.parametrize("grow", ["gradient", "random"])
@pytest.mark.parametrize("structure", ["element", "4x1"])
@pytest.mark.parametrize("density", ["uniform", "er", "erk"])
def test_rigl_is_sparse_from_the_first_step_and_keeps_its_number_of_weights(grow, structure, density):
    method = RigL(sparsity=0.8, grow=grow, structure=structure, density=density)
    model = Net()
    counts = {}
    changed = set()
    last = {}

    def check(pruner):
        for group in pruner.groups:
            (part,) = group.parts
            count = counts.setdefault(part.name, int(part.mask.sum()))
            assert structure != "element" or count == int(part.mask.sum())
            assert abs(group.pruned - group.target) <= group.tolerance  # blocks of 13 rows are not all of one size
            if part.name in last and not torch.equal(last[part.name], part.mask):
                changed.add(pruner.itr)
            last[part.name] = part.mask.clone()
            assert (part.parameter[~part.mask] == 0).all()

    pruner = walk(method, model=model, each=check, gradients=True)
    assert pruner.reached()
    assert changed <= set(method.updates)
    assert len(changed) > 0.6 * len(method.updates)
    assert sum(row.revived for row in pruner.report()) > 0
    total = sum(group.size for group in pruner.groups)
    if structure == "element":
        assert sum(counts.values()) == round(0.2 * total), "to the weight"
    assert pruner.sparsity == pytest.approx(0.8, abs=0.02)


def test_rigl_drops_the_smallest_and_grows_the_largest_gradients():
    model = nn.Linear(20, 10, bias=False)
    pruner = Pruner(model, RigL(sparsity=0.5, freq=1, end_itr=100, drop_fraction=0.4), 200)
    before = pruner.masks()["weight"].clone()
    assert torch.equal(model.weight == 0, ~before), "sparse before the first step"
    with torch.no_grad():
        model.weight.copy_(torch.randn(10, 20) * before)
    model.weight.grad = torch.randn(10, 20)
    weight = model.weight.detach().clone()
    pruner.step()
    after = pruner.masks()["weight"]
    drop = math.floor(0.4 / 2 * (1 + math.cos(math.pi / 100)) * 100)
    kept = weight.abs().masked_fill(~before, -1).flatten().argsort(descending=True)[: 100 - drop]
    survivors = torch.zeros(200, dtype=torch.bool)
    survivors[kept] = True
    grown = model.weight.grad.abs().flatten().masked_fill(survivors, -1).argsort(descending=True)[:drop]
    expected = survivors.clone()
    expected[grown] = True
    assert torch.equal(after.flatten(), expected)
    new = after & ~before
    assert new.any()
    assert (model.weight[new] == 0).all(), "what grows starts from zero"
    assert torch.equal(model.weight[after & before], weight[after & before])


def test_rigl_keeps_its_number_where_gradients_overflowed():
    model = nn.Linear(20, 10, bias=False)
    pruner = Pruner(model, RigL(sparsity=0.5, freq=1, end_itr=100), 200)
    for bad in (float("nan"), float("inf")):
        model.weight.grad = torch.randn(10, 20)
        model.weight.grad[3:6] = bad
        pruner.step()
        assert int(pruner.masks()["weight"].sum()) == 100


def test_phases_are_those_of_the_schedule():
    model = nn.Linear(20, 10)
    late = {"start_itr": 10, "end_itr": 60}
    assert Pruner(model, RigL(freq=1, end_itr=60), 100).method.phases == {"start_itr": 0, "end_itr": 60}
    assert Pruner(model, "cubic", 100, **late, freq=1, initial_sparsity=0.2).method.phases == late
    assert Pruner(model, "gradual", 100, **late, ramp_itr=20, freq=1).method.phases == late | {"ramp_itr": 20}


def test_rigl_needs_gradients_and_says_what_to_do():
    with pytest.raises(UserError, match=r"before optimizer\.zero_grad\(\), or choose pruning\.grow=random"):
        walk(RigL())
    model = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8))
    pruner = Pruner(model, RigL(freq=1, end_itr=100, scope={"0.weight": {"sparsity": 0.5}}), 200)
    model(torch.randn(2, 8)).sum().backward()
    frozen = r"0\.weight has none: it is frozen; leave it out: scope=.*, on the .* pruning\.scope='\{0\.weight: "
    with pytest.raises(UserError, match=frozen):
        pruner.step()


matrices = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)) | st.tuples(*[st.integers(1, 8)] * 4),
                    min_size=1, max_size=8)  # fmt: skip


@given(matrices, st.floats(0.01, 0.99), st.sampled_from(["uniform", "er", "erk"]))
@settings(deadline=None)
def test_densities_sum_to_the_budget(shapes, density, kind):
    sizes = [math.prod(shape) for shape in shapes]
    found = densities(shapes, sizes, density, kind)
    assert all(0 < d <= 1 for d in found)
    assert sum(d * n for d, n in zip(found, sizes, strict=True)) == pytest.approx(density * sum(sizes))
    free = [(d, shape) for d, shape in zip(found, shapes, strict=True) if d < 1]
    if kind != "uniform" and len(free) > 1:
        used = [(d, shape if kind == "erk" else shape[:2]) for d, shape in free]
        scales = [d * math.prod(shape) / sum(shape) for d, shape in used]
        assert scales == pytest.approx([scales[0]] * len(scales)), "in proportion to the formula"
    counts = allocate(shapes, sizes, density, kind)
    assert all(1 <= count <= n for count, n in zip(counts, sizes, strict=True))
    assert sum(counts) == max(len(shapes), round(density * sum(sizes)))
    assert all(abs(c - d * n) <= len(shapes) for c, d, n in zip(counts, found, sizes, strict=True))


def test_a_density_of_its_own_stays_out_of_the_budget():
    method = RigL(sparsity=0.9, scope={"rnn.weight_hh_l0": {"sparsity": 0.5}})
    pruner = Pruner(Net(), method, RUN)
    groups = {group.name: group for group in pruner.groups}
    own = next(group for name, group in groups.items() if name.startswith("rnn.weight_hh"))
    assert own.pruned == own.size // 2
    others = [group for group in pruner.groups if group is not own]
    left = sum(group.size - group.pruned for group in others)
    assert left == round(0.1 * sum(group.size for group in others))


METHODS = {"gradual": Gradual, "block": Block, "cubic": Cubic, "hard": Hard, "random": Random, "rigl": RigL}


@given(
    name=st.sampled_from(sorted(METHODS)), hidden=st.integers(4, 24), inputs=st.integers(1, 12),
    sparsity=st.floats(0.3, 0.98), structure=st.sampled_from(["element", "2x1", "2x2"]),
    density=st.sampled_from(["uniform", "er", "erk"]), grow=st.sampled_from(["gradient", "random"]),
    network=st.sampled_from([nn.RNN, nn.GRU, nn.LSTM]),
)  # fmt: skip
@settings(deadline=None, max_examples=40, derandomize=True)
@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_every_method_keeps_the_diagonal(name, hidden, inputs, sparsity, structure, density, grow, network):
    torch.manual_seed(0)
    own = {"density": density, "grow": grow, "freq": 1, "end_itr": 40} if name == "rigl" else {}
    model = network(inputs, hidden)
    try:
        pruner = Pruner(model, METHODS[name](sparsity=sparsity, structure=structure, keep_diagonal=True, **own), 50)
    except UserError as error:
        assume("keep_diagonal=true keeps so much" not in str(error))
        raise

    def check(pruner):
        mask = pruner.masks()["weight_hh_l0"].view(-1, hidden, hidden)
        assert mask.diagonal(dim1=1, dim2=2).all(), f"step {pruner.itr}"

    check(pruner)
    for _ in range(50):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
                parameter.grad = torch.randn_like(parameter)
        pruner.step()
        check(pruner)
    assert pruner.reached()


def test_rigl_keeps_the_diagonal_beyond_the_budget_of_a_matrix():
    pruner = Pruner(nn.GRU(8, 64), "rigl", 1000, sparsity=0.98, keep_diagonal=True)
    mask = pruner.masks()["weight_hh_l0"].view(3, 64, 64)
    assert int(mask.diagonal(dim1=1, dim2=2).sum()) == 192
    assert sum(int(mask.sum()) for mask in pruner.masks().values()) == round(0.02 * 3 * 64 * 72)
    with pytest.raises(UserError, match=r"keeps so much of weight_hh_l0 .* at most 0\.9844 can be pruned"):
        Pruner(nn.GRU(8, 64), "rigl", 1000, sparsity=0.99, keep_diagonal=True)


@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_what_rigl_grows_starts_at_zero_with_its_state(grow):
    torch.manual_seed(0)
    model = nn.Linear(20, 10, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = Pruner(model, RigL(sparsity=0.5, freq=2, end_itr=100, grow=grow), 200, optimizer)
    grown = 0
    for _ in range(30):
        before = pruner.masks()["weight"].clone()
        model(torch.randn(8, 20)).square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
        new = pruner.masks()["weight"] & ~before
        grown += int(new.sum())
        assert (model.weight[new] == 0).all()
        assert all((state[new] == 0).all() for state in pruner.state_of(model.weight))
    assert grown > 50


def test_the_lottery_plugin_cuts_and_goes_back():
    register.load_plugins(plugin_folders())
    method = {"name": "lottery", "sparsity": 0.875, "at": [0.25, 0.5, 0.75], "rewind_itr": 40}
    early = {}

    def check(pruner):
        if pruner.itr == 40:
            early.update({part.name: part.parameter.detach().clone() for part in pruner.parts})
        if pruner.itr in (100, 200, 300):
            share = 1 - 0.5 ** (pruner.itr / 100)
            for group in pruner.groups:
                assert abs(group.pruned - share * group.size) <= 0.5
                for part in group.parts:
                    assert torch.equal(part.parameter, early[part.name] * part.mask)

    pruner = walk(method, each=check)
    assert pruner.reached()
    assert pruner.state_dict()["method"] == {"early": {}}, "no copies of weights once they are not needed"
    with pytest.raises(UserError, match=r"rewind_itr=0\.5 \(step 200\) must come before the first cut, at step 80"):
        Pruner(Net(), "lottery", RUN, rewind_itr=0.5)


def test_a_target_that_is_missed_warns_with_both_numbers():
    pruner = walk(Cubic(sparsity=0.9, share="global"), steps=150)
    with pytest.warns(UserWarning, match=r"ended before step 200 with 8\d\.\d\d % of all weights .* 90\.\d\d % were"):
        pruner.finalize()
    walk(Cubic(sparsity=0.9)).finalize()


@pytest.mark.filterwarnings("ignore:pruning left no weight of .* at step")
def test_matrices_and_gates_of_which_nothing_is_left_are_named():
    model = nn.Sequential(nn.GRU(4, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[0].weight_hh_l0[8:16] *= 1e-6
        model[1].weight *= 1e-6
    pruner = Pruner(model, Cubic(sparsity=0.6, share="global"), 100)
    for _ in range(100):
        pruner.step()
    with pytest.warns(UserWarning, match=r"no weight of 0\.weight_hh_l0\[z\], 1\.weight: .*pruning\.scope=") as caught:
        pruner.finalize()
    assert len(caught) == 1
    own = {"0.weight_hh_l0[z]": {"sparsity": 0.5}, "1.weight": {"sparsity": 0.5}}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        model[0].weight_hh_l0[8:16] *= 1e-6
        model[1].weight *= 1e-6
    pruner = Pruner(model, Cubic(sparsity=0.6, share="global", scope=own), 100)
    for _ in range(100):
        pruner.step()
    pruner.finalize()  # what the message tells to do helps


def test_what_is_emptied_is_warned_of_when_it_is():
    torch.manual_seed(0)
    model = nn.ModuleList([nn.GRU(8, 16), nn.Linear(16, 20)])
    with torch.no_grad():
        model[1].weight.mul_(1e-3)  # under one threshold with much larger ones
    pruner = Pruner(model, {"name": "cubic", "share": "global", "sparsity": 0.8}, 100)
    told = []
    for step in range(1, 101):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.step()
        told += [(step, str(warning.message)) for warning in caught]
    ((step, text),) = told
    assert step < 50, "long before the end"
    assert f"pruning left no weight of 1.weight at step {step}: nothing passes" in text
    with pytest.warns(UserWarning, match=r"pruning left no weight of 1\.weight: nothing"):
        pruner.finalize()
