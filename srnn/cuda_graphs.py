"""Recording CUDA graphs so that nothing else ends the recording, and one that fails leaves torch as it was.

CUDA ends a recording when another graph is let go meanwhile, and Python's garbage collector lets go whatever it finds.
After a recording that CUDA ended, torch would go on taking memory for it, and its random numbers would raise "Offset
increment outside graph capture".
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_let_go: list[Any] = []  # graphs that wait until nothing is recorded
_now: dict[object, bool] = {}  # recordings of all threads -> whether the garbage collector runs after the last one
_lock = threading.Lock()


class Graph(torch.cuda.CUDAGraph):
    """A CUDA graph that may be let go at any time: while something is recorded, it stays until the next recording."""

    def __del__(self) -> None:
        try:
            if torch.cuda.is_current_stream_capturing():
                _let_go.append(self)
        except Exception:  # CUDA has failed, or Python ends and torch is gone: a destructor can tell nobody
            return


@contextmanager
def undisturbed(device: torch.device, pool: Any) -> Iterator[None]:
    """Around a recording: while there is one, in any thread, the garbage collector rests.

    Args:
        device: whose work is recorded.
        pool: the memory that it is recorded with, of ``torch.cuda.graph_pool_handle`` or another graph.
    """
    _let_go.clear()
    one = object()
    try:  # all is inside: a Ctrl-C may come between any two lines
        with _lock:
            _now[one] = next(iter(_now.values()), gc.isenabled())
            gc.disable()
        yield
    except BaseException:
        _clean_up(device, pool)
        raise
    finally:
        with _lock:
            if one in _now:
                collects = _now[one]
                del _now[one]
                if collects and not _now:
                    gc.enable()


@contextmanager
def recorded(graph: Any, device: torch.device, pool: Any = None, stream: Any = None) -> Iterator[None]:
    """What is launched inside is recorded, not run. Other threads may go on with what they do.

    Args:
        graph: a new ``torch.cuda.CUDAGraph``.
        device: all of what it does runs there.
        pool: memory of graphs that are never replayed at the same time as this one; None for memory of its own.
        stream: to record on; None for a new one.

    Raises:
        RuntimeError: what is launched cannot be recorded.
    """
    pool = torch.cuda.graph_pool_handle() if pool is None else pool
    # torch's default is one stream for all devices: of work on another it would record nothing.
    stream = torch.cuda.Stream(device) if stream is None else stream
    # cuBLAS keeps its workspaces for good: one that was made before would be shared with other graphs, which may run at
    # the same time, and one that was made inside would keep the graph's memory.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        with (
            undisturbed(device, pool),
            torch.cuda.stream(torch.cuda.current_stream(device)),  # given back also if the recording fails
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            yield
    finally:
        torch._C._cuda_clearCublasWorkspaces()


def _clean_up(device: torch.device, pool: Any) -> None:
    """Do what torch does at the end of a recording, and leaves out where CUDA has ended it."""
    index = torch.cuda.current_device() if device.index is None else device.index
    with suppress(RuntimeError):  # it was ended well, before or after something else failed
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)
    with suppress(RuntimeError), torch.cuda.device(index):
        number = torch.zeros(1, device=device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(torch.cuda.Stream(device)):  # a recording that ends well gives random numbers back
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                number.add_(1)
            finally:
                graph.capture_end()
