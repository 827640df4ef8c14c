"""Building modules whose weights are replaced at once, within what is allowed."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from srnn.errors import UserError

# Of a container: as version 2 of Linux's control groups has it, and version 1.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))

_Module = TypeVar("_Module", bound=nn.Module)
_FACTORIES = {"empty", "zeros", "ones", "full", "rand", "randn", "randint", "randperm", "arange", "linspace", "eye"}


class TooMuchError(UserError):
    """A network that asks for more than it may."""


class _NothingInPlace(TorchFunctionMode):
    """Skips initialisers. On the meta device they do nothing, but some import torch's compiler, which takes seconds."""

    def __init__(self, calls: float = math.inf) -> None:
        super().__init__()
        self.left = calls

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise TooMuchError("a network asks for far more tensors than its file holds.")
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name.endswith("_") and not name.endswith("__") and name != "requires_grad_":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


class _Bounded(TorchFunctionMode):
    """Looks at the size of a tensor before it is made."""

    def __init__(self, calls: float, nbytes: float) -> None:
        super().__init__()
        self.calls, self.nbytes = calls, nbytes

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls -= 1
        if getattr(func, "__name__", "") in _FACTORIES:
            options = {key: value for key, value in (kwargs or {}).items() if key not in ("generator", "pin_memory")}
            size = func(*args, **options | {"device": "meta"})
            self.nbytes -= size.numel() * size.element_size()
        if self.calls < 0 or self.nbytes < 0:
            raise TooMuchError("a network asks for far more memory than its file holds.")
        return func(*args, **kwargs or {})


@contextmanager
def without_memory(calls: float = math.inf) -> Iterator[None]:
    """Modules made inside take no memory and no time for their weights: load them with ``assign=True``.

    Args:
        calls: to torch that are allowed.

    Raises:
        UserError: there were more calls.
    """
    with torch.device("meta"), _NothingInPlace(calls):
        yield


def weightless(build: Callable[[], _Module], check: Callable[[_Module], None], calls: float, nbytes: float) -> _Module:
    """A module whose weights are replaced at once: its buffers and other tensors are real.

    Its parameters take no memory where it has parameters alone, as torch's own layers do.

    Args:
        build: makes the module.
        check: sees the module before anything real is made for it; raises where it does not fit.
        calls: to torch that ``build`` may make.
        nbytes: that it may take where it has tensors that are no parameters.

    Raises:
        UserError: it needs more; also whatever ``build`` and ``check`` raise.
    """
    try:
        with without_memory(calls):
            module = build()
    except TooMuchError:
        raise
    except UserError:
        # It may need real numbers while it is built, such as a list of rates out of ``linspace``.
        module = _real(build, calls, nbytes)
        check(module)
        return module
    check(module)
    unreal = (tensor.is_meta and not isinstance(tensor, nn.Parameter) for tensor in kept_tensors(module))
    return _real(build, calls, nbytes) if any(unreal) else module


def _real(build: Callable[[], _Module], calls: float, nbytes: float) -> _Module:
    # The caller's random numbers go on as if nothing had been built.
    with torch.random.fork_rng(devices=[]), _Bounded(calls, nbytes):
        return build()


def memory_here() -> int:
    """Bytes that this process may use: the machine's memory, or less where a container is given less."""
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # there is none, or it is called "max"
            there = min(there, int(limit.read_text()))
    return there


def within_memory(nbytes: float) -> TorchFunctionMode:
    """Modules made inside raise ``TooMuchError`` before a tensor is made that takes them beyond so many bytes in all.

    The system gives a process more memory than there is, and kills it where it is written to.
    """
    return _Bounded(math.inf, nbytes)


def kept_tensors(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module keeps, parameters, buffers and attributes, also inside containers; each once."""
    seen: set[int] = set()
    waiting: list[Any] = [module]
    while waiting:
        part = waiting.pop()
        if id(part) in seen or isinstance(part, type):
            continue
        seen.add(id(part))
        if isinstance(part, Tensor):
            yield part
        elif isinstance(part, Mapping):
            waiting.extend(part.values())
        elif isinstance(part, list | tuple | set | frozenset):
            waiting.extend(part)
        elif hasattr(part, "__dict__") and (isinstance(part, nn.Module) or not callable(part)):
            waiting.extend(vars(part).values())
