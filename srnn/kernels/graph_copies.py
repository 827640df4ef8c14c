"""Copies into and out of a CUDA graph, as nodes of it whose outer address changes from replay to replay.

Launched beside the graph, each copy takes the host 6 to 8 us and the device a start of its own. As a node it takes the
device 1 to 2 us, and the host 2 to 3 where the address is another one than the last time.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

_MEMCPY = 1  # cudaGraphNodeTypeMemcpy
_ON_DEVICE = 3  # cudaMemcpyDeviceToDevice


class _Pointer(ctypes.Structure):
    """cudaPitchedPtr."""

    _fields_ = (
        ("ptr", ctypes.c_void_p),
        ("pitch", ctypes.c_size_t),
        ("xsize", ctypes.c_size_t),
        ("ysize", ctypes.c_size_t),
    )


class _Parameters(ctypes.Structure):
    """cudaMemcpy3DParms."""

    _fields_ = (
        ("src_array", ctypes.c_void_p),
        ("src_pos", ctypes.c_size_t * 3),
        ("src", _Pointer),
        ("dst_array", ctypes.c_void_p),
        ("dst_pos", ctypes.c_size_t * 3),
        ("dst", _Pointer),
        ("extent", ctypes.c_size_t * 3),
        ("kind", ctypes.c_int),
    )


@functools.cache
def _runtime() -> Any:
    """CUDA's runtime library, which torch has loaded."""
    version = torch.version.cuda
    if version is None:
        raise RuntimeError("torch has no CUDA")
    library = ctypes.CDLL(f"libcudart.so.{version.partition('.')[0]}")
    set_copy = library.cudaGraphExecMemcpyNodeSetParams1D
    set_copy.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_size_t, ctypes.c_int]
    library.cudaGraphMemcpyNodeGetParams.argtypes = [ctypes.c_void_p, ctypes.POINTER(_Parameters)]
    library.cudaGraphGetNodes.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.POINTER(ctypes.c_size_t)]
    library.cudaGraphNodeGetType.argtypes = [ctypes.c_void_p, ctypes.POINTER(ctypes.c_int)]
    return library


class GraphRefusedError(RuntimeError):
    """CUDA does not change a graph as it was asked to: of memory of another kind, say."""


def _must(code: int) -> None:
    if code != 0:
        _runtime().cudaGetLastError()  # which forgets it: else torch takes it for one of its next launch
        raise GraphRefusedError(f"CUDA refused to look into, or to change, a graph: error {code}")


def _copies_of(graph: int) -> dict[tuple[int, int], int]:
    """The nodes of a graph that copy memory, by the addresses that they copy from and to."""
    library, count = _runtime(), ctypes.c_size_t()
    _must(library.cudaGraphGetNodes(graph, None, ctypes.byref(count)))
    nodes = (ctypes.c_void_p * count.value)()
    _must(library.cudaGraphGetNodes(graph, nodes, ctypes.byref(count)))
    found = {}
    for node in nodes:
        kind, parameters = ctypes.c_int(), _Parameters()
        _must(library.cudaGraphNodeGetType(node, ctypes.byref(kind)))
        if kind.value == _MEMCPY and node is not None:
            _must(library.cudaGraphMemcpyNodeGetParams(node, ctypes.byref(parameters)))
            ends = [(parameters.src, parameters.src_pos), (parameters.dst, parameters.dst_pos)]
            source, target = (int(pointer.ptr or 0) + place[0] for pointer, place in ends)
            found[source, target] = node
    return found


@dataclass
class _Copies:
    """The copies of a graph's inputs, or those of its outputs.

    Attributes:
        nodes: of each its node, its address in the graph, and its bytes.
        outer: of each the address outside of the graph, for the next replay; 0 where that is not known.
        are_inputs: whether they copy into the graph.
    """

    nodes: list[tuple[int, int, int]]
    outer: list[int]
    are_inputs: bool

    def move_to(self, addresses: list[int], set_copy: Callable[[int, int, int, int], None]) -> None:
        """Let them copy from, or to, these addresses from the next replay on.

        Args:
            addresses: one for each.
            set_copy: called with a node, the addresses to copy to and from, and how many bytes.
        """
        for index, (address, (node, inner, size)) in enumerate(zip(addresses, self.nodes, strict=True)):
            if address != self.outer[index]:
                self.outer[index] = 0  # not known if CUDA refuses
                to, source = (inner, address) if self.are_inputs else (address, inner)
                set_copy(node, to, source, size)
                self.outer[index] = address


class GraphCopies:
    """The copies of a graph's inputs and outputs.

    Args:
        graph: captured with ``keep_graph=True``, and instantiated.
        inputs: of each input the address that was copied from when it was captured, that in the graph, and its bytes.
        outputs: of each output the address in the graph, that it was copied to, and its bytes.
        device: of the graph, as an index.

    Raises:
        GraphRefusedError: see there.
        RuntimeError: the graph has other copies than these, or CUDA's library is not where it is expected.
    """

    def __init__(
        self,
        graph: Any,
        inputs: Sequence[tuple[int, int, int]],
        outputs: Sequence[tuple[int, int, int]],
        device: int,
    ) -> None:
        self._graph = graph  # whose nodes these are
        self._device = device
        try:
            self._set = _runtime().cudaGraphExecMemcpyNodeSetParams1D
        except (OSError, AttributeError) as error:
            raise RuntimeError(f"CUDA's runtime library is not found: {error}") from error
        self._run = graph.raw_cuda_graph_exec()
        nodes = _copies_of(graph.raw_cuda_graph())
        try:
            of_inputs = [(nodes[outer, inner], inner, size) for outer, inner, size in inputs]
            of_outputs = [(nodes[inner, outer], inner, size) for inner, outer, size in outputs]
        except KeyError as error:
            raise RuntimeError(f"no node of the graph copies from and to {error}") from error
        self._inputs = _Copies(of_inputs, [outer for outer, _, _ in inputs], are_inputs=True)
        self._outputs = _Copies(of_outputs, [outer for _, outer, _ in outputs], are_inputs=False)

    @property
    def writes_to(self) -> list[int]:
        """The addresses of the outputs, 0 of one that is not known."""
        return self._outputs.outer

    def read_from(self, addresses: list[int]) -> None:
        """Let the next replays take their inputs from there. Raises GraphRefusedError."""
        self._move(self._inputs, addresses)

    def write_to(self, addresses: list[int]) -> None:
        """Let the next replays leave their outputs there. Raises GraphRefusedError."""
        self._move(self._outputs, addresses)

    def _move(self, copies: _Copies, addresses: list[int]) -> None:
        if addresses != copies.outer:
            with torch.cuda.device(self._device):
                copies.move_to(addresses, self._set_copy)

    def _set_copy(self, node: int, to: int, source: int, size: int) -> None:
        _must(self._set(self._run, node, to, source, size, _ON_DEVICE))
