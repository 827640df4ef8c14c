import torch

from srnn.__main__ import main
from srnn.bench import gpu_network
from srnn.bench.gpu_network import network_calls

CPU = torch.device("cpu")


def test_a_whole_network_runs_dense_and_sparse():
    calls = network_calls(CPU, torch.float32, "cpu", size=48, layers=2, vocabulary=30)
    assert set(calls) == {(n, w) for n in ("dense", "90 % element", "90 % 32x1") for w in ("sequence", "step")}
    with torch.inference_mode():
        for (name, what), call in calls.items():
            logits, state = call()
            assert logits.shape == (256 if what == "sequence" else 1, 1, 30), name
            assert state.shape == (2, 1, 48)


def test_rows_keep_their_quotes_and_digits(tmp_path, monkeypatch, capsys):
    """Names of devices and ways hold commas, so files have quoted them from the first on, others not."""
    calls = dict.fromkeys([("dense", "sequence"), ("90 % 32x1", "step, graph")], lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_network, "network_calls", lambda *_: calls)
    monkeypatch.setattr(gpu_network, "interleaved", lambda calls, *_: {key: [2e-3, 1e-3, 4.00004e-3] for key in calls})
    monkeypatch.setattr(gpu_network, "hardware", lambda _: "a GPU")
    assert main(["bench", "bench=network", f"output={tmp_path}"]) == 0
    assert (tmp_path / "network.csv").read_text() == (
        "device,network,what,rounds,median_us,p20_us,p80_us,tokens_per_second\n"
        '"a GPU",dense,"sequence",3,2000.0,1400.0,3200.0,128000\n'
        '"a GPU",90 % 32x1,"step, graph",3,2000.0,1400.0,3200.0,500\n'
    )
    assert "dense, sequence: 2,000.0 us, 128,000 tokens a second" in capsys.readouterr().out
