import importlib.util

import pytest
import torch

from srnn.exporting import onnx_graph
from srnn.exporting.dense_networks import RUNTIMES, dense_networks
from srnn.exporting.onnx_session import OnnxNetwork
from srnn.inference.packing import pack
from srnn.registry import register

TOKENS_BT = torch.randint(5, (1, 9))


@pytest.fixture(scope="module")
def packed():
    config = {"name": "lstm", "hidden_size": 8, "embedding_size": 4, "num_layers": 2, "dropout": 0.0}
    supplied = {"vocabulary_size": 5}
    return pack(register.build("model", config, **supplied), config, supplied, "fp16")


def test_each_is_the_same_network(packed):
    networks = dense_networks(packed, TOKENS_BT.int())
    assert list(networks) == list(RUNTIMES)
    tokens_BT = TOKENS_BT
    with torch.inference_mode():
        wanted, *others = (network(tokens_BT)[0] for network in networks.values())
    for got in others:
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_onnxruntime_is_left_out_where_it_is_not_installed(packed, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else find(name))
    assert list(dense_networks(packed, TOKENS_BT)) == ["torch", "dense"]


def test_a_trained_run_is_not_lost_where_onnxruntime_fails(packed, monkeypatch):
    def fail(chain):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(onnx_graph, "onnx_model", fail)
    with pytest.warns(match="nothing is compared with onnxruntime, which failed: no such operator"):
        assert list(dense_networks(packed, TOKENS_BT)) == ["torch", "dense"]


@pytest.mark.parametrize("method", ["run", "step"])
def test_nor_where_it_fails_once_it_runs(packed, monkeypatch, method):
    def fail(*_):
        raise ValueError("no such input")

    monkeypatch.setattr(OnnxNetwork, method, fail)
    with pytest.warns(match="nothing is compared with onnxruntime, which failed: no such input"):
        assert list(dense_networks(packed, TOKENS_BT)) == ["torch", "dense"]


def test_another_network_is_no_baseline(packed, monkeypatch):
    run = OnnxNetwork.run
    monkeypatch.setattr(OnnxNetwork, "run", lambda *given: (run(*given)[0] * 1.01, run(*given)[1]))
    with pytest.warns(match="which failed: its outputs are 0.01 away from torch's"):
        assert list(dense_networks(packed, TOKENS_BT)) == ["torch", "dense"]
