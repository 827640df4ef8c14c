import pytest
import torch

from srnn.bench.cases import LAYER_PLANS, Case, Format, LayerShape, Problem, pruned
from srnn.errors import UserError

CPU = torch.device("cpu")


@pytest.mark.parametrize("structure", ["element", "4x1", "16x1"])
def test_weights_are_as_sparse_as_asked(structure):
    generator = torch.Generator().manual_seed(0)
    weight = pruned(3 * 64, 50, 3, Format(0.9, structure, "fp32"), generator)
    assert float((weight == 0).float().mean()) == pytest.approx(0.9, abs=0.01)


def test_named_plans_are_what_they_are_called():
    shapes = {str(shape) for shape in LAYER_PLANS["paper"].shapes}
    assert shapes == {"gru:2560", "gru:1024", "lstm:1500", "tanh:1760"}
    assert LAYER_PLANS["paper"].sparsities == (0.8, 0.9, 0.95)
    assert len(list(LAYER_PLANS["paper"].cases())) == 4 * 3 * 2
    assert {str(shape) for shape in LAYER_PLANS["deepbench"].shapes} == {"product:7680x2560", "product:10752x3584"}


def test_a_problem_is_the_same_each_time():
    case = Case(LayerShape("lstm", 6, 8), 2, 3, 1)
    one, two = (Problem(case, Format(0.5, "4x1", "fp16"), CPU) for _ in range(2))
    assert torch.equal(one.truth(3), two.truth(3))
    with pytest.raises(UserError):
        LayerShape.parse("gru:12x12")
