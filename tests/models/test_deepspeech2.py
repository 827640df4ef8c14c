"""Deep Speech 2: the paper's sizes, the recurrence's gradients, padding, and the packed network."""

import pytest
import torch

from srnn.cells import CLIP
from srnn.errors import UserError
from srnn.inference.calibration import record_inputs
from srnn.inference.packing import pack
from srnn.inference.sparsify import desparsify, sparsify
from srnn.inference.unpacking import unpack
from srnn.kernels import Dense
from srnn.models import Recurring, deepspeech2, deepspeech2_gru, deepspeech2_rnn, deepspeech2_small, recur
from srnn.models.deepspeech2 import StepNorm
from srnn.pruning import Pruner
from srnn.pruning.once import prune
from srnn.registry import register

SIZES = {"input_size": 33, "output_size": 7}
SMALL = {"hidden_size": 16, "num_layers": 2, "channels": 2}


def small(cell="rnn", **options):
    torch.manual_seed(0)
    return deepspeech2(cell, **SMALL | options, **SIZES)


def padded(*lengths):
    x_BTI = torch.full((len(lengths), max(lengths), 33), torch.nan)
    for x_TI, length in zip(x_BTI, lengths, strict=True):
        x_TI[:length] = torch.randn(length, 33)
    return x_BTI


def pruned(model, sparsity=0.7, structure="element"):
    prune(model, sparsity=sparsity, structure=structure)
    return model


def counts(module, inside):
    return sum(p.numel() for name, p in module.named_parameters() if name.startswith(inside))


@pytest.mark.parametrize(
    ("hidden_size", "total"), [(704, 11_601_632), (1760, 67_645_664), (2560, 141_284_064), (3072, 202_519_264)]
)
def test_the_paper_s_vanilla_networks(hidden_size, total):
    with torch.device("meta"):
        model = deepspeech2_rnn(hidden_size=hidden_size, input_size=161, output_size=29)
    h = hidden_size
    assert counts(model, "convolutions.0") == 19_616
    assert counts(model, "convolutions.1") == 239_168
    assert counts(model, "layers.0") == 2 * h**2 + 1312 * h + 2 * h
    assert all(counts(model, f"layers.{n}") == 3 * h**2 + 2 * h for n in range(1, 7))
    assert counts(model, "dense") + counts(model, "norm") == h**2 + 2 * h
    assert counts(model, "") - counts(model, "output") == total


def test_the_paper_s_gated_network():
    with torch.device("meta"):
        model = deepspeech2_gru(input_size=161, output_size=29)
    assert [counts(model, f"layers.{n}") for n in range(3)] == [29_752_320, 39_336_960, 39_336_960]
    assert counts(model, "row") == 42 * 2560
    assert counts(model, "") - counts(model, "output") == 115_351_264


@pytest.mark.parametrize("cell", ["clipped_relu", "gru", "lstm"])
def test_gradients_of_the_recurrence(cell):
    gates, parts = {"clipped_relu": 1, "gru": 3, "lstm": 4}[cell], 2 if cell == "lstm" else 1
    u = torch.randn(4, 2, gates * 3, dtype=torch.float64, requires_grad=True)
    w = torch.randn(gates * 3, 3, dtype=torch.float64, requires_grad=True)
    state = tuple(torch.randn(2, 3, dtype=torch.float64, requires_grad=True) for _ in range(parts))
    assert torch.autograd.gradcheck(lambda u, w, *state: recur(u, w, state, cell)[0], (u, w, *state))
    single = recur(u.float(), w.float(), tuple(part.float() for part in state), cell)[0]
    assert torch.allclose(single.double(), recur(u, w, state, cell)[0], atol=1e-5)


@pytest.mark.parametrize(("cell", "layer"), [("gru", torch.nn.GRU), ("lstm", torch.nn.LSTM)])
def test_the_recurrence_is_torch_s(cell, layer):
    torchs = layer(5, 4, bias=False)
    x_TBI = torch.randn(6, 2, 5)
    zero = torch.zeros(2, 4)
    y, state = recur(x_TBI @ torchs.weight_ih_l0.T, torchs.weight_hh_l0, (zero,) * (1 + (cell == "lstm")), cell)
    wanted, end = torchs(x_TBI)
    assert torch.allclose(y, wanted, atol=1e-6)
    assert torch.allclose(state[-1], (end[1] if cell == "lstm" else end)[0], atol=1e-6)


def test_clipping():
    y, _ = recur(torch.full((3, 1, 2), 15.0), torch.eye(2), (torch.zeros(1, 2),))
    assert y[:, 0, 0].tolist() == [15, CLIP, CLIP]


@pytest.mark.parametrize("cell", ["clipped_relu", "lstm"])
def test_both_directions_end_where_their_sequence_does(cell):
    layer, gates = Recurring(cell, 4, bidirectional=True), 4 if cell == "lstm" else 1
    u_BTG = torch.randn(2, 6, 4 * gates)
    y_BTH, _ = layer(u_BTG, torch.tensor([6, 4]))
    alone, _ = layer(u_BTG[1:, :4], torch.tensor([4]))
    assert torch.allclose(y_BTH[1, :4], alone[0], atol=1e-6)
    zero = (torch.zeros(1, 4),) * (1 + (cell == "lstm"))
    back = recur(u_BTG[1:, :4].transpose(0, 1).flip(0), layer.weight_hh_reverse, zero, cell)[0].flip(0)
    there = recur(u_BTG[1:, :4].transpose(0, 1), layer.weight_hh, zero, cell)[0]
    assert torch.allclose(alone[0], (there + back)[:, 0], atol=1e-6)


def test_norms_look_at_real_steps_only():
    norm, x_BTH = StepNorm(3), torch.randn(2, 5, 3)
    real_BT1 = torch.tensor([[1] * 5, [1] * 2 + [0] * 3], dtype=torch.bool)[:, :, None]
    y = norm(x_BTH, real_BT1)
    real = x_BTH[real_BT1[..., 0]]
    wanted = (real - real.mean(0)) / (real.var(0, correction=0) + 1e-5).sqrt()
    assert torch.allclose(y[real_BT1[..., 0]], wanted, atol=1e-5)
    assert torch.allclose(norm.running_mean, 0.1 * real.mean(0))
    assert torch.allclose(norm.running_var, 0.9 + 0.1 * real.var(0))
    assert torch.equal(y, StepNorm(3)(x_BTH.masked_fill(~real_BT1, 99.0), real_BT1).where(real_BT1, y))


@pytest.mark.parametrize(
    "options", [{}, {"cell": "lstm"}, {"cell": "gru", "bidirectional": False, "row_taps": 4, "future": 1}]
)
def test_padding_never_changes_an_utterance(options):
    model = small(**options)
    model(padded(40, 30))  # norms have seen something
    model.eval()
    x_BTI = padded(41, 20, 1)
    logits_BTV, lengths_B = model(x_BTI)
    assert lengths_B.tolist() == [21, 10, 1]
    for n, frames in enumerate((41, 20, 1)):
        alone, _ = model(x_BTI[n : n + 1, :frames])
        assert torch.allclose(logits_BTV[n, : lengths_B[n]], alone[0], atol=1e-5)
        assert (logits_BTV[n, lengths_B[n] :] == 0).all()


def test_the_small_network_waits_for_at_most_120_milliseconds():
    with torch.device("meta"):
        model = deepspeech2_small(input_size=161, output_size=17)
    assert model.look_ahead + 20 <= 120  # and its window
    assert counts(model, "") < 600_000


def test_what_a_forward_network_sees_ahead():
    model = small("gru", bidirectional=False, row_taps=4, future=1).eval()
    assert model.look_ahead == 90
    x_BTI = padded(60)
    changed = x_BTI.clone()
    changed[:, 40:] += 1
    same = (model(x_BTI)[0] == model(changed)[0]).all(-1)[0]
    # Step 15 is frame 30: it sees 9 frames ahead, which are 90 ms.
    assert same[:16].all()
    assert not same[16:].any()


def test_what_is_pruned():
    model = small("gru", bidirectional=False, row_taps=3)
    groups = {group.name: [part.name for part in group.parts] for group in Pruner(model, "cubic", run=100).groups}
    assert groups == {
        "recurrent": [f"layers.{n}.{name}" for n in (0, 1) for name in ("input.weight", "recurrence.weight_hh")],
        "linear": ["dense.weight", "output.weight"],
    }
    part = Pruner(model, "cubic", run=100, scope={"*.weight_hh[z]": {"sparsity": 0.5}}).groups
    assert sum(p.name == "layers.0.recurrence.weight_hh[z]" for group in part for p in group.parts) == 1


def test_one_threshold_takes_as_much_of_each_matrix_of_its_layers():
    torch.manual_seed(0)
    model = deepspeech2_small(input_size=161, output_size=17)
    prune(model, sparsity=0.9, structure="16x1")
    shares = {n: (p == 0).float().mean().item() for n, p in model.layers.named_parameters() if p.dim() == 2}
    assert all(0.85 < share < 0.95 for share in shares.values()), shares


@pytest.mark.parametrize(
    ("kernel", "options"),
    [
        ("dense", {"cell": "lstm"}),
        ("csr", {"cell": "gru", "bidirectional": False, "row_taps": 4}),
        ("dense", {}),
    ],
)
def test_the_packed_network_is_the_trained_one(kernel, options):
    model, x_BTI = small(**options), padded(30, 41, 7)
    pruned(model)
    model(padded(40, 30))
    model.eval()
    wanted, lengths_B = model(x_BTI)
    config = {"name": "deepspeech2", "cell": "rnn", **SMALL, **options}
    packed = unpack(pack(model, config, SIZES), register.rebuild("kernel", {"name": kernel}))
    sparse = sparsify(model, kernel=kernel)
    for network in (packed, sparse, desparsify(sparse)):
        got, steps = network(x_BTI)
        assert torch.equal(steps, lengths_B)
        assert torch.allclose(got, wanted, atol=1e-4)
    assert "layers.0.recurrence (Recurring)" in str(sparse.sparsify_report)


def test_states_go_in_and_out_of_the_packed_recurrence():
    layer = Recurring("lstm", 16)
    pruned(layer, 0.8)
    sparse, u_BTG, full = sparsify(layer, kernel="dense"), torch.randn(3, 6, 64), torch.tensor([6, 6, 6])
    y, end = sparse(u_BTG, full)
    first, state = sparse(u_BTG[:, :2], torch.tensor([2, 2, 2]))
    second, after = sparse(u_BTG[:, 2:], torch.tensor([4, 4, 4]), state)
    assert torch.allclose(torch.cat([first, second], 1), y, atol=1e-6)
    wanted, dense_end = layer(u_BTG, full)
    assert torch.allclose(y, wanted, atol=1e-5)
    for truth, whole, pieces in zip(dense_end, end, after, strict=True):
        assert torch.allclose(truth, whole, atol=1e-5)
        assert torch.allclose(whole, pieces, atol=1e-6)
    with pytest.raises(RuntimeError, match="gradients do not flow"):
        sparse(u_BTG.requires_grad_(), full)[0].sum().backward()


def test_calibration_sees_what_the_recurrences_multiply():
    model = pruned(small())
    model(padded(40, 30))
    seen = record_inputs(model.eval(), lambda network: network(padded(30, 20)))
    assert {"layers.0.recurrence.weight_hh_reverse", "layers.1.input.weight", "dense.weight"} <= seen.keys()
    assert all(energy.isfinite().all() for energy in seen.values())
    pack(model, {"name": "deepspeech2", "cell": "rnn", **SMALL}, SIZES, values="int8", energies=seen)


def test_options_that_contradict_each_other():
    with pytest.raises(UserError, match=r"model.row_taps=3 is for layers that run forward only"):
        small(row_taps=3)


def test_dense_kernels_run_it():
    model = small().eval()
    packed = unpack(pack(model, {"name": "deepspeech2", "cell": "rnn", **SMALL}, SIZES), Dense())
    x_BTI = padded(20)
    assert torch.allclose(packed(x_BTI)[0], model(x_BTI)[0], atol=1e-5)
