"""Copies into and out of a CUDA graph, whose library is a stand-in."""

from types import SimpleNamespace

import pytest

from srnn.kernels import graph_copies
from srnn.kernels.graph_copies import GraphRefusedError


def test_what_cuda_refused_is_no_error_of_the_next_launch(monkeypatch):
    class Runtime:
        last = 1

        def cudaGetLastError(self):
            self.last = 0

    runtime = Runtime()
    monkeypatch.setattr(graph_copies, "_runtime", lambda: runtime)
    with pytest.raises(GraphRefusedError, match="error 1"):
        graph_copies._must(runtime.last)
    assert runtime.last == 0


def test_copies_of_a_graph_follow_inputs_and_outputs(monkeypatch):
    """Their nodes are told of other addresses alone, and of one again that CUDA has refused."""
    told, codes = [], []

    def set_copy(run, node, to, source, size, kind):
        told.append((run, node, to, source, size, kind))
        return codes.pop() if codes else 0

    runtime = SimpleNamespace(cudaGraphExecMemcpyNodeSetParams1D=set_copy, cudaGetLastError=lambda: 0)
    monkeypatch.setattr(graph_copies, "_runtime", lambda: runtime)
    monkeypatch.setattr(graph_copies, "_copies_of", lambda graph: {(1, 10): 100, (2, 20): 200, (30, 3): 300})
    graph = SimpleNamespace(raw_cuda_graph_exec=lambda: 7, raw_cuda_graph=lambda: 8)
    with pytest.raises(RuntimeError, match="no node of the graph copies from and to"):
        graph_copies.GraphCopies(graph, [(1, 20, 4)], [], -1)
    copies = graph_copies.GraphCopies(graph, [(1, 10, 4), (2, 20, 8)], [(30, 3, 16)], -1)
    x, h, y = 1000, 2000, 3000
    for _ in range(2):
        copies.read_from([x, h])
        copies.write_to([y])
    device = graph_copies._ON_DEVICE
    assert told == [
        (7, 100, 10, x, 4, device),
        (7, 200, 20, h, 8, device),
        (7, 300, y, 30, 16, device),
    ]
    told.clear()
    codes.append(1)
    with pytest.raises(GraphRefusedError):
        copies.read_from([4000, h])
    copies.read_from([x, h])
    assert told[1:] == [(7, 100, 10, x, 4, device)]
    told.clear()
    other = 5000
    copies.read_from([x, other])
    assert told == [(7, 200, 20, other, 8, device)]
