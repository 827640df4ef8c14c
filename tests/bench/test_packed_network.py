from dataclasses import replace

import pytest
import torch

from srnn.__main__ import main
from srnn.bench import packed_network
from srnn.bench.packed_network import measure_packed
from srnn.errors import UserError
from srnn.exporting.dense_networks import RUNTIMES
from srnn.inference.packed_file import write
from srnn.inference.packing import pack
from srnn.registry import register
from srnn.vocabulary import Vocabulary


@pytest.fixture
def packed_file(tmp_path):
    config = {"name": "gru", "hidden_size": 8, "embedding_size": 4, "num_layers": 1, "dropout": 0.0}
    vocabulary = Vocabulary.build("characters", "abcd")
    supplied = {"vocabulary_size": len(vocabulary)}
    model = register.build("model", config, **supplied)
    with torch.no_grad():
        model.rnn.weight_hh_l0 *= torch.rand_like(model.rnn.weight_hh_l0) < 0.1
    path = tmp_path / "model.safetensors"
    write(path, replace(pack(model, config, supplied, "fp16"), vocabulary=vocabulary))
    return path


def test_a_packed_file_is_timed_on_each_backend(packed_file, capsys):
    rows = measure_packed(packed_file, 0.1)
    backends = [row.backend for row in rows if row.what == "sequence"]
    assert backends[:3] == list(RUNTIMES)
    assert {"cpu", "csr", "onnxruntime int8"} < set(backends)
    assert backends == [row.backend for row in rows if row.what == "step"]
    for row in rows:
        here = {other.backend: other.seconds for other in rows if other.what == row.what}
        assert row.over_dense == pytest.approx(min(here[name] for name in RUNTIMES) / row.seconds)
    assert main(["bench", f"run={packed_file}", "limit=0.1"]) == 0
    assert "over dense" in capsys.readouterr().out


def test_a_backend_that_computes_wrong_is_refused(packed_file, monkeypatch):
    class Wrong(torch.nn.Module):
        def forward(self, tokens_BT):
            return torch.zeros(*tokens_BT.shape, 1), None

    unpack = packed_network.unpack
    monkeypatch.setattr(packed_network, "unpack", lambda packed, kernel=None: Wrong() if kernel else unpack(packed))
    with pytest.raises(UserError, match=r"auto computes .* wrong"):
        measure_packed(packed_file, 0.1)
