"""The last line of a bench."""

from dataclasses import fields

import pytest

from srnn.bench.gpu_network import NetworkRow
from srnn.bench.layers import LayerRow
from srnn.bench.packed_network import PackedRow
from srnn.bench.stream import StreamRow
from srnn.bench.verdict import layers_verdict, network_verdict, packed_verdict, stream_verdict


def of(kind, **given):
    """A row of which only some fields matter."""
    return kind(**{field.name: None for field in fields(kind)} | given)


def layer(backend, structure, over_dense):
    return of(LayerRow, backend=backend, structure=structure, values="fp32", over_dense=over_dense)


def test_one_case():
    rows = [
        layer("torch", "dense", 1.0),
        layer("cpu", "element", 2.0),
        layer("cpu", "16x1", 4.9),
        layer("csr", "element", None),
    ]
    assert layers_verdict(rows) == "Use cpu, 16x1 fp32: 4.9x the best dense."


def test_several_cases_count_by_their_geometric_mean():
    rows = [
        layer("cpu", "16x1", 2.0),
        layer("cpu", "16x1", 8.0),
        layer("cpu", "element", 3.0),
        layer("cpu", "element", 3.0),
    ]
    rows.append(layer("csr", "element", 9.0))  # in one case only
    told = "Use cpu, 16x1 fp32: 4.0x the best dense, on the mean of 2 cases: 2.0x to 8.0x."
    assert layers_verdict(rows) == told


def test_dense_may_win():
    assert layers_verdict([layer("cpu", "element", 0.5)]) == (
        "Stay dense: the best sparse, cpu, element fp32, is 0.50x as fast."
    )
    assert layers_verdict([layer("torch", "dense", 1.0)]) is None


def test_a_packed_network():
    times = {"sequence": {"dense": 4.0, "cpu": 1.0, "csr": 2.0}, "step": {"dense": 1.0, "cpu": 2.0}}
    rows = [
        PackedRow(what, name, s, several["dense"] / s) for what, several in times.items() for name, s in several.items()
    ]
    assert packed_verdict(rows) == "Use: for sequences kernel=cpu, 4.0x the best dense; for single steps stay dense."


def test_onnxruntime_is_no_kernel():
    """Its graph of the network in fp32 is one of the dense ones; in int8 it is another network."""
    times = {
        "sequence": {"dense": 4.0, "cpu": 2.5, "onnxruntime": 2.4, "onnxruntime int8": 1.0},
        "step": {"dense": 3.0, "cpu": 1.2, "auto": 1.0, "onnxruntime": 2.0, "onnxruntime int8": 0.5},
    }
    rows = [
        PackedRow(what, name, s, min(several["dense"], several["onnxruntime"]) / s)
        for what, several in times.items()
        for name, s in several.items()
    ]
    stay = "stay dense, as an ONNX file in onnxruntime (srnn export format=onnx)"
    assert packed_verdict(rows) == f"Use: for sequences {stay}; for single steps kernel=auto, 2.0x the best dense."


@pytest.mark.parametrize(
    ("us", "told"),
    [
        (100.0, "Use cpu 16x1 fp16 with 2 threads: 3.0x the best dense."),
        (900.0, "Stay dense: no sparse one is faster."),
    ],
)
def test_a_stream(us, told):
    rows = [("nn.GRU", 1, 400.0), ("best dense", 2, 300.0), ("cpu 16x1 fp32", 1, 950.0), ("cpu 16x1 fp16", 2, us)]
    assert stream_verdict([of(StreamRow, network=n, threads=t, p50_us=p50) for n, t, p50 in rows]) == told


def test_there_is_no_verdict_without_both():
    assert stream_verdict([of(StreamRow, network="best dense", threads=1, p50_us=1.0)]) is None
    assert network_verdict([of(NetworkRow, network="90 % 32x1", what="sequence", median_us=1.0)]) is None


def test_a_network_on_a_gpu():
    rows = [
        ("dense", "sequence", 90.0),
        ("dense", "sequence, graph", 60.0),
        ("90 % 32x1", "sequence, graph", 20.0),
        ("90 % 32x1", "step", 1.0),
    ]
    told = network_verdict([of(NetworkRow, network=n, what=w, median_us=us) for n, w, us in rows])
    assert told == "Use 90 % 32x1, sequence, graph: 3.0x the best dense."
