"""Which weights are pruned, under which settings and thresholds."""

from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from srnn.errors import UserError
from srnn.pruning import Cubic, Pruner, RigL, prunable
from srnn.pruning.arguments import build_method


class Many(nn.Module):
    """Every kind of layer that can be pruned, and what cannot."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3)
        self.conv2d = nn.Conv2d(1, 2, 3)
        self.norm = nn.BatchNorm1d(8)
        self.rnn = nn.RNN(8, 8)
        self.gru = nn.GRU(8, 8, num_layers=2, bidirectional=True)
        self.lstm = nn.LSTM(16, 8, proj_size=4)
        self.cell = nn.LSTMCell(4, 8)
        self.own = nn.Parameter(torch.randn(8, 8))
        self.decoder = nn.Linear(8, 11)
        self.decoder.weight = self.embedding.weight


GRU = {f"gru.weight_{part}_l{layer}{d}" for part in ("ih", "hh") for layer in (0, 1) for d in ("", "_reverse")}
RECURRENT = GRU | {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "lstm.weight_ih_l0", "lstm.weight_hh_l0",
                   "lstm.weight_hr_l0", "cell.weight_ih", "cell.weight_hh"}  # fmt: skip


def names(pruner):
    return {part.name for part in pruner.parts}


def pruner_of(model=None, **options):
    return Pruner(model or Many(), "cubic", 100, **options)


def test_what_can_be_pruned():
    found = {weight.names[0]: weight for weight in prunable(Many())}
    assert {name for name, w in found.items() if w.layer_type == "recurrent"} == RECURRENT
    assert found["embedding.weight"].names == ["embedding.weight", "decoder.weight"], "tied: once"
    assert found["conv.weight"].layer_type == found["conv2d.weight"].layer_type == "convolution"
    assert found["own"].layer_type == "other"
    assert not any("bias" in name or "norm" in name for name in found)
    gates = {"rnn.weight_hh_l0": 1, "gru.weight_ih_l1_reverse": 3, "lstm.weight_hh_l0": 4, "lstm.weight_hr_l0": 1,
             "cell.weight_ih": 4, "conv.weight": 1}  # fmt: skip
    assert {name: found[name].gates for name in gates} == gates


@pytest.mark.parametrize(
    ("cell", "gates"), [(nn.RNNCell, 1), (nn.GRUCell, 3), (nn.LSTMCell, 4)], ids=["rnn", "gru", "lstm"]
)
def test_cells(cell, gates):
    assert [(w.names[0], w.gates) for w in prunable(cell(3, 4))] == [("weight_ih", gates), ("weight_hh", gates)]


def test_the_default_leaves_convolutions_and_other_matrices_alone():
    assert names(pruner_of()) == RECURRENT | {"embedding.weight"}
    everything = ["recurrent", "linear", "embedding", "convolution"]
    assert names(pruner_of(layer_types=everything)) == RECURRENT | {"embedding.weight", "conv.weight", "conv2d.weight"}
    assert "own" in names(pruner_of(scope={"own": {"sparsity": 0.5}})), "unless a pattern names them"


@pytest.mark.parametrize("share", ["layer_type", "matrix", "global"])
def test_what_shares_a_threshold(share):
    pruner = pruner_of(share=share)
    expected = {"layer_type": {"recurrent", "embedding"}, "matrix": RECURRENT | {"embedding.weight"}, "global": {"all"}}
    assert set(pruner.thresholds) == expected[share]


def test_settings_by_pattern_and_gate():
    scope = {
        "gru.weight_hh_l0[z]": {"sparsity": 0.95},
        "gru.weight_hh_l0[rn]": {"structure": "4x1"},
        "lstm.*": {"structure": "2:4", "sparsity": 0.5},
        "decoder.weight": {"sparsity": 0},
    }
    pruner = pruner_of(scope=scope)
    groups = {part.name: group for group in pruner.groups for part in group.parts}
    assert groups["gru.weight_hh_l0[z]"].sparsity == 0.95
    assert str(groups["gru.weight_hh_l0[z]"].structure) == "element"
    assert str(groups["gru.weight_hh_l0[r]"].structure) == str(groups["gru.weight_hh_l0[n]"].structure) == "4x1"
    assert groups["lstm.weight_ih_l0"] is groups["lstm.weight_hh_l0"]
    assert groups["gru.weight_hh_l1"].name == "recurrent"
    assert groups["gru.weight_hh_l0[z]"].name == "recurrent 0.95"
    assert "embedding.weight" not in groups, "left dense, by the other name of a shared weight"
    for _ in range(100):
        pruner.step()
    mask = pruner.masks()["gru.weight_hh_l0"]
    assert int((~mask[8:16]).sum()) == round(0.95 * 64)
    assert set(mask[:8].view(2, 4, 8).sum(1).flatten().tolist()) == {0, 4}, "blocks of the gate r are whole or zero"
    rows = {(row.parameter, row.gate): row for row in pruner.report()}
    assert rows["gru.weight_hh_l0", "z"].sparsity == pytest.approx(0.95, abs=0.01)
    assert rows["gru.weight_hh_l0", "r"].structure == "4x1"
    assert rows["lstm.weight_ih_l0", "f"].zeros == 8 * 16 // 2
    assert rows["lstm.weight_hr_l0", ""].weights == 4 * 8


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        ({"*.weigth": {"sparsity": 0.5}}, [r'"\*\.weigth" matches no weight', "gru.weight_hh_l0"]),
        ({"norm.weight": {"sparsity": 0.5}}, ['"norm.weight" matches no weight']),
        ({"rnn.weight_hh_l0[z]": {"sparsity": 0.5}}, ["rnn.weight_hh_l0 has no gate z", "a GRU has r, z, n"]),
        (
            {"gru.*": {"sparsity": 0.5}, "*.weight_hh_l0[z]": {"sparsity": 0.95}},
            [r'"gru\.\*" and "\*\.weight_hh_l0\[z\]" disagree about sparsity of gru.weight_hh_l0\[z\]: 0.5 and 0.95'],
        ),
        ({"gru.*": {"sparcity": 0.5}}, ["sparcity: unknown option", "'sparsity'"]),
        ({"gru.*": {"sparsity": 1.0}}, ["sparsity=1.0", "below 1"]),
        ({"gru.*": {"structure": "4"}}, [r'pruning\.scope\."gru\.\*"\.structure=.4. must be element']),
        ({"gru.*": {}}, ["sets nothing"]),
        ({"*_ih*": {"keep_diagonal": True}}, ["none is a recurrent matrix"]),
        ({"*": {"sparsity": 0.0}}, ["no weights of these types"]),
    ],
)
def test_patterns_that_cannot_be_meant(scope, words):
    for word in words:
        with pytest.raises(UserError, match=word):
            pruner_of(scope=scope)


def test_patterns_may_agree_or_set_different_things():
    pruner = pruner_of(
        scope={"gru.*": {"sparsity": 0.5}, "*.weight_hh_l0": {"structure": "4x1"}, "g*": {"sparsity": 0.5}}
    )
    group = next(g for g in pruner.groups if any(p.name == "gru.weight_hh_l0" for p in g.parts))
    assert (group.sparsity, str(group.structure)) == (0.5, "4x1")


@pytest.mark.parametrize("structure", ["element", "4x1"])
def test_convolutions_tied_weights_and_projections_reach_the_target(structure):
    model = Many().to(memory_format=torch.preserve_format)
    model.conv2d = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)
    types = ["recurrent", "linear", "embedding", "convolution"]
    pruner = Pruner(model, Cubic(sparsity=0.8, layer_types=types, structure=structure), 100)
    for _ in range(100):
        pruner.step()
    assert pruner.reached()
    assert model.decoder.weight is model.embedding.weight
    for part in pruner.parts:
        assert torch.equal(part.parameter == 0, ~part.mask), part.name
    out = model.conv2d.weight.flatten(1)
    if structure == "4x1":
        assert set((out != 0).view(2, 4, -1).sum(1).flatten().tolist()) == {0, 4}, "4 output channels, one input"


def test_blocks_larger_than_all_their_weights_are_named():
    model = nn.GRU(4, 8)
    words = r"structure=4096x1 is larger .* weight_ih_l0 \(8 x 4\), weight_hh_l0 \(8 x 8\)"
    with pytest.warns(UserWarning, match=words):
        pruner = Pruner(model, "cubic", 100, structure="4096x1", sparsity=0.5)
    for _ in range(100):
        pruner.step()
    assert {part.of(part.mask).sum(1).unique().numel() for part in pruner.parts} == {2}, "columns go whole"
    with pytest.warns(UserWarning, match="structure=1:9 is larger"):
        Pruner(model, "cubic", 100, structure="1:9", sparsity=1 - 1 / 9)
    with pytest.warns(UserWarning, match=r"structure=9x1 is larger .* for: weight_ih_l0 \(8 x 4\)\. "):
        Pruner(model, "cubic", 100, scope={"*_ih*": {"structure": "9x1"}})
    pruner_of(nn.Sequential(model, nn.Linear(8, 2)), structure="8x1")  # small weights beside others are no slip


def test_wrapped_models_are_looked_into():
    model = nn.GRU(4, 8)
    average = torch.optim.swa_utils.AveragedModel(model)
    assert set(Pruner(average, "cubic", 100).masks()) == {"weight_ih_l0", "weight_hh_l0"}
    assert set(Pruner(torch.compile(model, backend="eager"), "cubic", 100).masks()) == {"weight_ih_l0", "weight_hh_l0"}
    with pytest.raises(UserError, match="the average has no weight_ih_l0, weight_hh_l0"):
        Pruner(model, "cubic", 100, average=torch.optim.swa_utils.AveragedModel(nn.Linear(2, 2)))


def test_sharded_weights_are_refused():
    model = nn.Linear(4, 4)
    model.weight.device_mesh = object()  # as torch's DTensor has one
    with pytest.raises(UserError, match=r"weight is sharded over devices .* use DistributedDataParallel"):
        Pruner(model, "cubic", 100)


def test_options_are_checked_like_a_config():
    with pytest.raises(UserError, match=r"pruning\.sparcity: unknown option of pruning.* 'sparsity'"):
        pruner_of(sparcity=0.5)
    with pytest.raises(UserError, match=r"no such pruning.*'cubic'"):
        Pruner(Many(), "cubik", 100)
    with pytest.raises(UserError, match="structure: give options with a method's name"):
        Pruner(Many(), Cubic(), 100, structure="4x1")
    with pytest.raises(UserError, match="rigl regrows single weights and blocks"):
        Pruner(Many(), RigL(structure="2:4", sparsity=0.5), 100)
    by_config = Pruner(Many(), {"name": "cubic", "sparsity": 0.5, "structure": "4x1"}, 100)
    assert by_config.method == Cubic(sparsity=0.5, structure="4x1")


def frozen_embedding():
    vectors = torch.randn(11, 8) / 100  # smaller than what is trained: ranked with it, all would go
    parts = {"emb": nn.Embedding.from_pretrained(vectors, freeze=True), "rnn": nn.GRU(8, 16), "out": nn.Linear(16, 11)}
    return nn.ModuleDict(parts)


@pytest.mark.parametrize("share", ["layer_type", "matrix", "global"])
def test_frozen_weights_are_left_alone_unless_a_pattern_names_them(share):
    model = frozen_embedding()
    before = model["emb"].weight.clone()
    with pytest.warns(
        UserWarning,
        match=r"leaves emb\.weight dense.*frozen.*: scope=\{\"emb\.weight\": .*pruning\.scope='\{emb\.weight",
    ):
        pruner = Pruner(model, "cubic", 100, sparsity=0.75, share=share)
    assert set(pruner.masks()) == {"rnn.weight_ih_l0", "rnn.weight_hh_l0", "out.weight"}
    for _ in range(100):
        pruner.step()
    assert torch.equal(model["emb"].weight, before)
    assert pruner.reached()


@pytest.mark.filterwarnings("error")
def test_frozen_weights_that_a_pattern_names_are_ranked_apart():
    model = frozen_embedding()
    pruner = Pruner(model, "cubic", 100, sparsity=0.75, share="global", scope={"emb.*": {"sparsity": 0.75}})
    assert {group.name for group in pruner.groups} == {"all", "all frozen"}
    for _ in range(100):
        pruner.step()
    assert pruner.reached()
    assert int((model["emb"].weight == 0).sum()) == 66
    Pruner(frozen_embedding(), "cubic", 100, scope={"emb.*": {"sparsity": 0}})  # left dense, and no word


def test_a_model_that_is_frozen_as_a_whole_is_refused():
    model = nn.GRU(4, 8).requires_grad_(False)
    words = "or all of them are frozen"
    with pytest.warns(UserWarning, match="weight_ih_l0"), pytest.raises(UserError, match=words):
        Pruner(model, "cubic", 100)
    model.weight_hh_l0.data[0] = 0
    assert set(Pruner(model, "fixed", 100).masks()) == {"weight_ih_l0", "weight_hh_l0"}, "its zeros stay by themselves"


def test_options_may_be_any_sequence_and_mapping():
    options = {"layer_types": ["recurrent", "linear"], "scope": {"gru.*": {"sparsity": 0.5}}, "sparsity": 0.75}
    expected = Pruner(Many(), {"name": "cubic"} | options, 100)
    same = options | {"layer_types": ("recurrent", "linear"), "scope": MappingProxyType(options["scope"])}
    for config in (OmegaConf.create(options), same):
        found = Pruner(Many(), "cubic", 100, **config)
        assert found.method == expected.method == Cubic(**config)
        assert found.method.settings == expected.method.settings
        assert names(found) == names(expected)
    file = Path(__file__).parents[2] / "conf/pruning/cubic.yaml"
    assert Pruner(Many(), OmegaConf.load(file), 100).method == Cubic()
    q = OmegaConf.create({"q": {"recurrent": 0.2, "linear": 0.3, "embedding": 1.1}})
    assert build_method("gradual", q).q == {"recurrent": 0.2, "linear": 0.3, "embedding": 1.1}
    with pytest.raises(UserError, match=r"layer_types=\['recurent'\] must be list of 'recurrent' or"):
        Pruner(Many(), "cubic", 100, layer_types=("recurent",))
    with pytest.raises(UserError, match="layer_types='recurrent' must be list of"):
        Pruner(Many(), "cubic", 100, layer_types="recurrent")
