"""Zero stays zero: optimisers x weight decay x clipping x accumulation x mixed precision x averages x methods."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from srnn.pruning import Pruner

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),  # torch's own
    pytest.mark.filterwarnings("ignore:pruning left no weight of"),  # gates of a few weights
]
OPTIMIZERS = {
    "nesterov": lambda p, decay: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=decay),
    "adam": lambda p, decay: torch.optim.Adam(p, lr=0.01, weight_decay=decay, amsgrad=True),
    "adamw": lambda p, decay: torch.optim.AdamW(p, lr=0.01, weight_decay=decay),
    "rmsprop": lambda p, decay: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True, weight_decay=decay),
    "asgd": lambda p, decay: torch.optim.ASGD(p, lr=0.05, t0=0, weight_decay=decay),
}
METHODS = {
    "gradual": {},
    "cubic": {},
    "cubic 4x1": {"structure": "4x1"},
    "hard": {"prune_itr": 15},
    "block": {"structure": "4x4", "group_lasso": 0.01},
    "random": {},
    "obd": {},
    "rigl": {},
    "rigl random 4x1": {"grow": "random", "structure": "4x1"},
}
STEPS = 40


class Net(nn.Module):
    """Tied embedding, two recurrent kinds, a convolution, a projection."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(12, 8)
        self.gru = nn.GRU(8, 8, bidirectional=True, num_layers=2)
        self.lstm = nn.LSTM(16, 8, proj_size=4)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.decoder = nn.Linear(8, 12)
        self.decoder.weight = self.embedding.weight

    def forward(self, tokens_TB):
        x_TBH = self.lstm(self.gru(self.embedding(tokens_TB))[0])[0]
        return self.decoder(self.conv(x_TBH.movedim(0, 2)).movedim(2, 0))


def train(model, optimizer, pruner, steps, *, clip=None, accumulate=1, amp=False, average=None, after=lambda: None):
    for _ in range(steps):
        for _ in range(accumulate):
            tokens = torch.randint(0, 12, (2, 3))  # two steps: the state of the first reaches the recurrent weights
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten()) / accumulate
            loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        pruner.step()
        optimizer.zero_grad()
        after()


def method_of(name):
    return {"name": name.split()[0], "sparsity": 0.8, **METHODS[name],
            "layer_types": ["recurrent", "linear", "embedding", "convolution"]}  # fmt: skip


cases = given(
    optimizer=st.sampled_from(list(OPTIMIZERS)),
    method=st.sampled_from(list(METHODS)),
    decay=st.sampled_from([0.0, 0.1]),
    clip=st.sampled_from([None, 0.1]),
    accumulate=st.sampled_from([1, 2]),
    amp=st.booleans(),
    ema=st.booleans(),
)


def zeros_checked(model, opt, pruner, average=None):
    """A check for after each step: what is pruned is exactly zero, in weights, averages and the optimiser's state."""
    acting = pruner.masks() if pruner.method.regrows else {}

    def check():
        # The printed Algorithm 1 and `hard` apply the masks of an update at the next step.
        masks = {n: m.clone() for n, m in pruner.masks().items()}
        applied = acting if pruner.method.delayed else masks
        for name, parameter in model.named_parameters():
            if name not in applied:
                continue
            gone = ~applied[name]
            averages = [average.module.get_parameter(name)] if average is not None else []
            state = [v for v in opt.state[parameter].values() if torch.is_tensor(v) and v.shape == parameter.shape]
            assert state, "every optimiser here has a state"
            for tensor in [parameter, *averages, *state]:
                assert not torch.where(gone, tensor, 0).any(), (name, pruner.itr)
            assert parameter[~gone].isfinite().all()
        acting.update(masks)

    return check


def check_that_zero_stays_zero(optimizer, method, decay, clip, accumulate, amp, ema):
    torch.manual_seed(0)
    model = Net()
    identity = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
    keys = list(model.state_dict())
    opt = OPTIMIZERS[optimizer](model.parameters(), decay)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9)) if ema else None
    pruner = Pruner(model, method_of(method), STEPS, opt, average=average)
    check = zeros_checked(model, opt, pruner, average)
    train(model, opt, pruner, STEPS, clip=clip, accumulate=accumulate, amp=amp, average=average, after=check)
    pruner.finalize()
    assert pruner.reached()
    for part in pruner.parts:
        assert (part.of(part.parameter.detach())[~part.of(part.mask)] == 0).all()
    assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == identity
    assert list(model.state_dict()) == keys


@cases
@settings(deadline=None, max_examples=15)
def test_zero_stays_zero(**case):
    check_that_zero_stays_zero(**case)


@pytest.mark.slow
@cases
@settings(deadline=None, max_examples=40)  # two thirds of a second each; of 1280 cases, other ones in every run
def test_zero_stays_zero_in_many_cases(**case):
    check_that_zero_stays_zero(**case)


def test_the_optimisers_state_may_be_left_alone():
    model = Net()
    optimizer = OPTIMIZERS["adam"](model.parameters(), 0.0)
    pruner = Pruner(model, "cubic", STEPS, optimizer, zero_state=False)
    train(model, optimizer, pruner, STEPS)
    weight = model.gru.weight_hh_l0
    gone = ~pruner.masks()["gru.weight_hh_l0"]
    assert (weight[gone] == 0).all()
    assert (optimizer.state[weight]["exp_avg"][gone] != 0).any()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_is_not_finite_is_zero_where_it_is_pruned(dtype, device):
    """In a weight, and in the optimiser's state, whose type may be another; a product with zero would be NaN."""
    model = nn.Linear(8, 6, bias=False).to(device, dtype)
    optimizer = torch.optim.Adam(model.parameters())
    pruner = Pruner(model, "hard", 10, optimizer, sparsity=0.5, prune_itr=1)
    for itr in range(3):
        model.weight.grad = torch.randn_like(model.weight)
        optimizer.step()
        state = optimizer.state[model.weight]
        if itr == 2:
            state["exp_avg_sq"] = state["exp_avg_sq"].float()
            for tensor in (model.weight, state["exp_avg"], state["exp_avg_sq"]):
                tensor.detach()[:] = torch.tensor([torch.inf, -torch.inf, torch.nan, -3.0], device=device).repeat(2)
        pruner.step()
    pruned = ~pruner.masks()["weight"]
    assert pruned.sum() == 24
    for tensor in (model.weight.detach(), state["exp_avg"], state["exp_avg_sq"]):
        assert (tensor[pruned] == 0).all()
        assert not tensor[pruned].signbit().any()
        assert (tensor[~pruned] != 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_copies_files_and_the_compiler_see_plain_parameters(method, tmp_path):
    model = Net()
    compiled = torch.compile(model, backend="eager")
    optimizer = OPTIMIZERS["nesterov"](model.parameters(), 0.0)
    pruner = Pruner(compiled, method_of(method), STEPS, optimizer)
    train(compiled, optimizer, pruner, STEPS)
    pruner.finalize()
    assert pruner.reached()
    tokens = torch.randint(0, 12, (5, 2))
    out = compiled(tokens)
    assert torch.allclose(out, model(tokens), atol=1e-6)
    copied = copy.deepcopy(model)
    assert torch.equal(copied(tokens), model(tokens))
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    read = Net()
    read.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(read(tokens), model(tokens))
    assert torch.equal(read.gru.weight_hh_l0 == 0, model.gru.weight_hh_l0 == 0)
    # The copy can be pruned on, from where the first one is.
    again = Pruner(copied, method_of(method), STEPS)
    again.load_state_dict(pruner.state_dict())
    assert again.sparsity == pruner.sparsity


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_zero_stays_zero_where_fp16_overflows(method, fused, device):
    """Steps that the scaler skips are steps of the schedule; a fused optimiser skips them by itself."""
    torch.manual_seed(0)
    model = Net().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=fused)
    pruner = Pruner(model, method_of(method), STEPS, optimizer)
    check = zeros_checked(model, optimizer, pruner)
    scaler = torch.amp.GradScaler(device, init_scale=256.0)
    skipped = 0
    for itr in range(STEPS):
        tokens = torch.randint(0, 12, (4, 3), device=device)
        with torch.autocast(device, torch.float16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        scaler.scale(loss).backward()
        if itr % 7 == 3:  # in the middle of everything, updates of masks among it
            model.gru.weight_hh_l0.grad[::2] = float("inf")
            model.decoder.weight.grad[0, 0] = float("nan")
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before, scale = model.conv.weight.detach().clone(), scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() < scale:
            skipped += 1
            assert torch.equal(model.conv.weight, before)
        pruner.step()
        check()
        optimizer.zero_grad()
    assert skipped >= 5
    assert pruner.itr == STEPS
    pruner.finalize()
    assert pruner.reached()
    for part in pruner.parts:
        assert (part.of(part.parameter.detach())[~part.of(part.mask)] == 0).all()


@pytest.mark.gpu
@pytest.mark.filterwarnings("error")  # cuDNN's "not part of single contiguous chunk of memory" above all
@pytest.mark.parametrize("method", METHODS)
def test_on_a_gpu_cudnns_flat_memory_stays(method):
    model = Net().cuda()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    pruner = Pruner(model, method_of(method), STEPS, optimizer)
    scaler = torch.amp.GradScaler()
    for _ in range(STEPS):
        tokens = torch.randint(0, 12, (4, 3), device="cuda")
        with torch.autocast("cuda", torch.float16):
            loss = F.cross_entropy(model(tokens).flatten(0, 1).float(), tokens.flatten())
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        pruner.step()
        optimizer.zero_grad()
    pruner.finalize()
    assert pruner.reached()
    for part in pruner.parts:
        assert (part.parameter[~part.mask] == 0).all()


def test_the_last_block_may_stay():
    """18 rows in blocks of 16: a matrix of one column has blocks of 16 and 2, and one of them stays, however it is."""
    model = nn.Linear(1, 18, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)[:16] = 2.0
    pruner = Pruner(model, "block", 20, sparsity=0.9)
    for _ in range(20):
        pruner.step()
    assert int((model.weight == 0).sum()) == 2, "16 would be nearest, and the last block is what there is left"
    assert pruner.reached()
