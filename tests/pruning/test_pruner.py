import copy
import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import srnn
from srnn.errors import UserError
from srnn.pruning import Gradual, Hard, NoPruning, Pruner, RunLength

OPTIMIZERS = {
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.01),
}


class Net(nn.Module):
    def __init__(self, wide=9):
        super().__init__()
        self.embedding = nn.Embedding(13, 6)
        self.rnn = nn.GRU(6, wide, num_layers=2, bidirectional=True)
        self.norm = nn.LayerNorm(2 * wide)
        self.conv = nn.Conv1d(2 * wide, 2 * wide, 1)
        self.out = nn.Linear(2 * wide, 13)

    def forward(self, tokens):
        y = self.norm(self.rnn(self.embedding(tokens))[0])
        return self.out(self.conv(y.movedim(2, 1)).movedim(1, 2))


def steps(model, optimizer, pruner, count, after=lambda: None):
    for _ in range(count):
        tokens = torch.randint(0, 13, (4, 5))
        nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
        pruner.step()
        after()


def make(method, optimizer="adam", total=60, model=None):
    model = model or Net()
    opt = OPTIMIZERS[optimizer](model.parameters())
    return model, opt, Pruner(model, method, RunLength(total, 10), opt)


@pytest.mark.filterwarnings("ignore:pruning left no weight of")  # gates of a few weights
def test_parameters_keep_identity_names_and_memory():
    model, optimizer, pruner = make(Gradual())
    before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    steps(model, optimizer, pruner, 60)
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
    assert list(model.state_dict()) == keys
    copied = copy.deepcopy(model)
    assert all(torch.equal(a, b) for a, b in zip(copied.parameters(), model.parameters(), strict=True))


def test_a_model_without_prunable_weights_is_refused():
    with pytest.raises(UserError, match="no weights of these types"):
        Pruner(nn.Conv1d(2, 2, 1), Gradual(), RunLength(100, 10))


def test_soft_lets_weights_come_back_and_ends_exact():
    torch.manual_seed(3)
    model, optimizer, pruner = make(Gradual(sparsity=0.8, soft=True), total=100)
    optimizer.param_groups[0]["lr"] = 0.05  # steps that can cross the threshold
    masks, revived = {}, []

    def check():
        for name, mask in pruner.masks().items():
            revived.append(bool((mask & ~masks.get(name, mask)).any()))
            masks[name] = mask.clone()

    steps(model, optimizer, pruner, 100, check)
    assert any(revived)
    assert pruner.reached()
    for group in pruner.groups:
        zeros = sum(int((part.parameter == 0).sum()) for part in group.parts)
        assert zeros == group.pruned == group.target == int(0.8 * group.size + 0.5)


def test_none_leaves_everything_alone():
    model, optimizer, pruner = make(NoPruning())
    steps(model, optimizer, pruner, 30)
    assert pruner.sparsity == 0
    assert pruner.masks() == {}
    assert all((p != 0).any() for p in model.parameters())


def test_state_of_another_model_is_refused():
    *_, pruner = make(Gradual())
    *_, other = make(Gradual(), model=nn.Sequential(nn.Linear(3, 3)))
    with pytest.raises(UserError, match="another model"):
        other.load_state_dict(pruner.state_dict())
    *_, wider = make(Gradual(), model=Net(wide=10))
    with pytest.raises(UserError, match=r"its masks of rnn\.weight_ih_l0, .*out\.weight.* are of other sizes"):
        wider.load_state_dict(pruner.state_dict())
    assert wider.itr == 0, "nothing is taken over"


def test_state_of_other_settings_or_versions_is_refused():
    *_, pruner = make(Gradual())
    state = pruner.state_dict()
    with pytest.raises(UserError, match="its thresholds are of all, and these of recurrent, linear, embedding"):
        pruner.load_state_dict(make(Gradual(share="global"))[2].state_dict())
    del state["revived"]
    with pytest.raises(UserError, match="another version of srnn: it has no revived"):
        pruner.load_state_dict(state)


def test_a_schedule_that_would_prune_everything_is_refused_with_the_number():
    model, optimizer, pruner = make(Gradual(q=1000.0))
    with pytest.raises(UserError, match=r"step \d+ the recurrent threshold reaches [\d.]+ \(q=1000.*largest is [\d.]+"):
        steps(model, optimizer, pruner, 60)
    assert all((p != 0).any() for p in model.parameters())


def test_a_diverged_training_is_named():
    model, optimizer, pruner = make(Gradual())
    steps(model, optimizer, pruner, 10)
    with torch.no_grad():
        model.out.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"rnn\.weight_\w+ holds weights that are NaN .*; lower the learning rate"):
        steps(model, optimizer, pruner, 10)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("net", "cubic", 100), r"model='net' must be a torch module"),
        ((nn.Linear(4, 4), 5, 100), r"method=5 must be a method's name, its config, or a method"),
        ((nn.Linear(4, 4), "cubic", "100"), r"run='100' must be a whole number of optimiser steps"),
        ((nn.Linear(4, 4), "cubic", 100, None, [1]), r"reference=list\(\.\.\.\) must be weights by name"),
        ((nn.Linear(4, 4), "cubic", 100, None, None, 5), r"average=5 must be a torch module"),
    ],
)
def test_arguments_of_other_types_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        Pruner(*arguments)


@pytest.mark.parametrize("change", ["replaced", "parametrized", pytest.param("moved", marks=pytest.mark.gpu)])
def test_a_parameter_that_is_no_longer_the_models_is_noticed(change):
    model = nn.GRU(4, 8)
    pruner = Pruner(model, "cubic", 100, start_itr=10, end_itr=50)
    if change == "replaced":
        model.weight_hh_l0 = nn.Parameter(torch.randn(24, 8))
    elif change == "parametrized":
        nn.utils.parametrizations.weight_norm(model, "weight_hh_l0")
    else:
        model.cuda()
    message = r"weight_\w+ is on cuda:0 now, and was on cpu.*move the model first"
    with pytest.raises(UserError, match=message if change == "moved" else r"weight_hh_l0 is no longer the parameter"):
        pruner.step()


def test_a_parameter_exchanged_after_the_last_update_is_noticed_in_the_end():
    model = nn.GRU(4, 8)
    pruner = Pruner(model, "cubic", 10, start_itr=1, end_itr=5)
    for _ in range(9):
        pruner.step()
    model.weight_hh_l0 = nn.Parameter(torch.randn(24, 8))
    pruner.step()
    with pytest.raises(UserError, match=r"weight_hh_l0 is no longer the parameter"):
        pruner.finalize()


def test_a_resumed_pruner_notices_it_at_its_first_step():
    model = nn.GRU(4, 8)
    state = Pruner(model, "cubic", 100).state_dict()
    pruner = Pruner(model, "cubic", 100)
    pruner.load_state_dict(state | {"itr": 7})
    model.weight_hh_l0 = nn.Parameter(torch.randn(24, 8))
    with pytest.raises(UserError, match="weight_hh_l0 is no longer the parameter that"):
        pruner.step()


def test_layers_may_be_wrapped_once_the_pruner_is_built():
    model = nn.Sequential(nn.Linear(8, 8))
    pruner = Pruner(model, "cubic", 60.0, sparsity=0.5)
    model[0] = nn.Sequential(model[0], nn.ReLU())
    for _ in range(60):
        pruner.step()
    assert (model[0][0].weight == 0).float().mean() == 0.5


def test_q_from_a_reference():
    model = Net()
    reference = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    method = Gradual(q="dense.ckpt")
    Pruner(model, method, RunLength(100, 10), reference=reference)
    linear = sorted(reference["out.weight"].abs().flatten().tolist())
    assert method.fixed_q["linear"] == pytest.approx(linear[round(0.9 * len(linear)) - 1])

    steep = Gradual(q="dense.ckpt", phi_ratio=20.0)
    with pytest.raises(UserError, match=r"would rise to [\d.]+ at step \d+ and prune every weight.*phi_ratio=20"):
        Pruner(model, steep, RunLength(100, 10), reference=reference)
    with pytest.raises(UserError, match=r"pruning\.q=dense\.ckpt names a dense model: give its weights by name as ref"):
        Pruner(model, steep, 100)
    with pytest.raises(UserError, match=r"holds no weights of the kind of .*out\.weight"):
        Pruner(
            model,
            Gradual(q="x"),
            RunLength(100, 10),
            reference={k: v for k, v in reference.items() if "out" not in k},
        )
    sparse = {name: torch.zeros_like(p) for name, p in reference.items()}
    with pytest.raises(UserError, match="dense, trained model"):
        Pruner(model, Gradual(q="x"), RunLength(100, 10), reference=sparse)
    with pytest.raises(UserError, match="no entry for linear"):
        Pruner(model, Gradual(q={"recurrent": 0.1}), RunLength(100, 10))


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 1.0},
        {"sparsity": 0.0},
        {"sparsity": float("nan")},
        {"freq": 0},
        {"q": -1.0},
        {"phi_ratio": 0.5},
    ],
)
def test_bad_arguments_are_refused_in_code_too(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Gradual(**options)


def test_hard_prunes_inside_the_run():
    with pytest.raises(
        UserError, match=r"prune_itr=1\.0 \(step 100\) must lie inside a run of 100 steps .*: from step 1 to 99"
    ):
        make(Hard(prune_itr=1.0), total=100)
    for when in (1, 0.25):
        with pytest.raises(UserError, match=r"must lie inside a run of 1 step: .* srnn\.prune\(.*`srnn prune`"):
            Pruner(nn.GRU(8, 16), Hard(prune_itr=when), 1)


def test_hard_may_prune_before_the_first_step():
    torch.manual_seed(0)
    model = nn.GRU(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    pruner = Pruner(model, "hard", 5, optimizer, prune_itr=0, sparsity=0.9)
    first = {name: mask.clone() for name, mask in pruner.masks().items()}
    for _ in range(5):
        kept = sum(int((weight != 0).sum()) for weight in model.parameters() if weight.ndim == 2)
        assert kept == 48 * 24 - round(0.9 * 48 * 24)
        model(torch.randn(3, 2, 8))[0].square().mean().backward()
        optimizer.step()
        pruner.step()
        optimizer.zero_grad()
    assert pruner.reached()
    assert all(torch.equal(mask, first[name]) for name, mask in pruner.masks().items())


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")  # cuDNN's "not part of single contiguous chunk of memory" above all
@pytest.mark.parametrize("soft", [False, True])
def test_on_a_gpu_masks_are_the_same_and_cudnn_keeps_its_flat_memory(soft):
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(13, 32), nn.GRU(32, 64, num_layers=2)).to(device)
        optimizer = torch.optim.Adam(model.parameters())
        pruner = Pruner(model, Gradual(sparsity=0.9, soft=soft), RunLength(100, 10), optimizer)
        for _ in range(100):
            # Weights of equal value on both devices: rounding must not decide which are pruned.
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            pruner.step()
        if device == "cuda":
            model(torch.randint(0, 13, (7, 3), device=device))[0].sum().backward()
        results.append({name: mask.cpu() for name, mask in pruner.masks().items()})
        assert pruner.reached()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


SPREAD = {
    "gradual": {"share": "global"},
    "cubic": {"share": "global", "structure": "16x1"},
    "obd": {},
    "rigl": {"end_itr": 50, "freq": 10},
}


@pytest.mark.gpu
@pytest.mark.parametrize("homes", [("cpu", "cuda"), ("cuda", "cpu"), ("cuda:0", "cuda:1")])
@pytest.mark.parametrize("method", SPREAD)
def test_weights_on_several_devices_are_ranked_together(method, homes):
    """And an average that is on another device than what it averages, as Lightning's may be, is masked."""
    if "cuda:1" in homes and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    results = []
    for devices in (("cpu", "cpu"), homes):
        torch.manual_seed(1)
        layers = nn.ModuleList([nn.Embedding(40, 32), nn.GRU(32, 32)])
        for layer, device in zip(layers, devices, strict=True):
            layer.to(device)
        average = torch.optim.swa_utils.AveragedModel(layers, device="cpu")
        optimizer = torch.optim.SGD(layers.parameters(), lr=0.1, momentum=0.9)
        pruner = Pruner(layers, method, RunLength(100, 10), optimizer, average=average, sparsity=0.9, **SPREAD[method])
        for _ in range(100):
            for parameter in layers.parameters():
                parameter.grad = torch.randn(parameter.shape).to(parameter.device)
            optimizer.step()
            with torch.no_grad():  # weights of equal value on all devices: rounding must not decide which are pruned
                for parameter in layers.parameters():
                    parameter.copy_(torch.randn(parameter.shape))
            average.update_parameters(layers)
            before = {name: mask.clone() for name, mask in pruner.masks().items()}  # some act after the next step
            pruner.step()
            for name, mask in pruner.masks().items():
                gone = ~(mask | before[name]).cpu()
                for weight in (layers.get_parameter(name), average.module.get_parameter(name)):
                    assert not weight.detach().cpu()[gone].any()
        assert pruner.reached()
        results.append({name: mask.cpu() for name, mask in pruner.masks().items()} | pruner.sparsities())
    for name, one in results[0].items():
        assert torch.equal(torch.as_tensor(one), torch.as_tensor(results[1][name])), name


def test_packed_models_and_states_that_are_none_are_a_sentence():
    model = nn.GRU(16, 32)
    srnn.prune(model)
    sparse = srnn.sparsify(model, kernel="csr")
    for call in (lambda: Pruner(sparse, "cubic", 60), lambda: srnn.prune(sparse)):
        with pytest.raises(UserError, match=r"or packed: srnn\.desparsify\(model\) gives"):
            call()
    with pytest.raises(UserError, match=r"Pruner: state=None must be what state_dict\(\) gave"):
        Pruner(model, "cubic", 60).load_state_dict(None)


def in_turn(*pruners):
    for _ in range(30):
        for pruner in pruners:
            pruner.step()


def test_another_pruner_of_the_same_weights_is_named():
    model = nn.GRU(16, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for sparsity in (0.5, 0.9):  # one after the other
            in_turn(Pruner(model, "cubic", 60, sparsity=sparsity))
    both = [Pruner(model, "cubic", 60, sparsity=s) for s in (0.5, 0.9)]
    with pytest.warns(UserWarning, match="another Pruner or callback masks weight_ih_l0, weight_hh_l0, too") as told:
        in_turn(*both)
    assert len(told) == 2  # once each


def test_a_copied_pruner_takes_the_original_for_no_other():
    model = nn.GRU(8, 16)
    pruner = Pruner(model, "cubic", 200, sparsity=0.5)
    in_turn(pruner)
    kept = io.BytesIO()
    torch.save((model, pruner), kept)
    kept.seek(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _, other in (copy.deepcopy((model, pruner)), torch.load(kept, weights_only=False)):
            in_turn(other)
        in_turn(pruner)


def test_a_state_of_another_schedule_is_named():
    model = nn.GRU(16, 32)
    state = Pruner(model, "cubic", 60).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Pruner(model, "cubic", 60).load_state_dict(state)
    with pytest.warns(UserWarning, match="a schedule that ends at step .* and this one ends at step"):
        Pruner(model, "cubic", 90).load_state_dict(state)


def test_pruners_in_threads_do_not_disturb_each_other():
    def trained(seed):
        generator = torch.Generator().manual_seed(seed)
        model = nn.GRU(8, 24)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0, 0.3, generator=generator)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pruner = Pruner(model, "cubic", 60, optimizer, sparsity=0.8)
        for _ in range(60):
            model(torch.randn(5, 4, 8, generator=generator))[0].square().mean().backward()
            optimizer.step()
            pruner.step()
            optimizer.zero_grad()
        pruner.finalize()
        return model.state_dict()

    alone = [trained(seed) for seed in range(3)]
    with ThreadPoolExecutor(3) as threads:
        together = list(threads.map(trained, range(3)))
    for wanted, found in zip(alone, together, strict=True):
        assert all(torch.equal(weight, found[name]) for name, weight in wanted.items())


def test_a_pruner_shows_its_step_and_groups_in_a_few_lines():
    model = nn.Sequential(nn.Linear(40, 20), nn.GRU(20, 20))
    pruner = Pruner(model, "cubic", 40, sparsity=0.9, structure="4x1", scope={"0.*": {"sparsity": 0.5}})
    start = """Pruner(Cubic, step 0 of 40
  (recurrent): 2,400 weights, 4x1, 0.00 % pruned, 90 % asked for
  (linear 0.5): 800 weights, 4x1, 0.00 % pruned, 50 % asked for
)"""
    assert repr(pruner) == str(pruner) == start
    for _ in range(40):
        pruner.step()
    assert "step 40 of 40\n  (recurrent): 2,400 weights, 4x1, 90.00 % pruned, 90 %" in repr(pruner)
    with pytest.warns(UserWarning, match="already"):
        pruner = Pruner(model, "hard", 1, sparsity=0.3, prune_itr=0)
    assert "30.00 % pruned" in repr(pruner)
    assert repr(Pruner(model, "none", 1)) == "Pruner(NoPruning, step 0 of 1\n  nothing is pruned\n)"


def test_a_pruner_of_many_groups_shows_the_first():
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(30)))
    shown = repr(Pruner(model, "gradual", 100, share="matrix", q=0.1)).splitlines()
    assert len(shown) == 9
    assert shown[1] == "  (0.weight): 64 weights, element, 0.00 % pruned", "with a fixed q the share is no goal"
    assert shown[-2] == "  ... and 24 more groups"
