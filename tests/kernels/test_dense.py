"""Dense layers: what they do with biases that torch's own modules cannot leave out."""

import pytest
import torch
from torch import nn

from srnn.kernels.contract import LayerWeights, equal_lengths
from srnn.kernels.csr import Csr
from srnn.kernels.dense import Torch
from srnn.sparse import SparseMatrix


@pytest.mark.parametrize("bias", ["b_ih", "b_hh"])
@pytest.mark.parametrize("both", [False, True])
def test_a_lone_bias_counts(bias, both):
    torch.manual_seed(0)
    gru = nn.GRU(6, 8)
    w_ih, w_hh = (SparseMatrix.from_dense(w, gates=3) for w in (gru.weight_ih_l0, gru.weight_hh_l0))
    given = {"b_ih": None, "b_hh": None} | {bias: torch.randn(24)}
    forward, backward = LayerWeights("gru", w_ih, w_hh, **given), LayerWeights("gru", w_ih, w_hh, reverse=True)
    x, cpu = torch.randn(5 * 2, 6), torch.device("cpu")
    outputs = []
    for kernel in (Torch(), Csr()):
        state = (torch.zeros(2, 2, 8),) if both else (torch.zeros(2, 8),)
        weights = (forward, backward) if both else (forward,)
        layer = (kernel.both if both else kernel.layer)(*weights, cpu, torch.float32)
        outputs.append(layer.run(x, equal_lengths(5, 2), state)[0])
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-6)
