"""What the sparse modules share: packed weights as buffers, one operator in a compiled graph, no gradients.

Shapes: N rows, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from srnn.errors import UserError
from srnn.inference.given_out import GivenOut
from srnn.inference.operator import call_operator, described, refuse_onnx
from srnn.inference.packed_weight import PackedWeight, Tied
from srnn.kernels.choosing import Auto, about, choices_made, length_class
from srnn.kernels.contract import Kernel, LayerWeights
from srnn.meta_device import without_memory
from srnn.registry import register
from srnn.sparse import SparseMatrix

# By torch's name: a packed matrix, a bias of the module's own, or None for a bias that is not there.
Weights = Mapping[str, SparseMatrix | Tensor | None]
# Called with the name of a matrix and the rows it multiplies; see ``sparsify.record_inputs``.
InputRecorder = Callable[[str, Tensor], None]
# What a choice of kernels is good for: type of device, about how many streams, class of lengths, threads.
Use = tuple[str, int, int, int]
TORCH = "torch"  # of the candidates of ``auto``, the one that runs as torch's own module


# Of a step's other modules these have nothing else that counts in evaluation; to look takes 2 us a module.
_PLAIN = {nn.Embedding, nn.Linear, nn.Dropout}
_SETTINGS = {bool, int, float, str, FunctionType, BuiltinFunctionType}
_LIKE = "like"  # the parameter of a sparse module, never trained
_DENSE_WEIGHTS = (
    "Weights of a dense network do not fit a sparsified one, whose weights are packed: load them into the dense one "
    "(srnn.desparsify gives it), and call srnn.sparsify again."
)
_PACKED = "_packed"  # the end of a packed weight's name as a module; the name itself answers with the dense weight


class SparseModule(nn.Module):
    """What the sparse modules share: packed weights, a kernel, and no gradients.

    A packed weight read as an attribute, as in ``layer.weight``, is a dense copy of it; changing the copy changes
    nothing. ``matrices`` gives the packed ones.

    Attributes:
        kernel: what runs it.
        decided: use -> which candidate of ``kernel`` runs it, decided on the whole network; see ``whole_network``.
        watcher: told of each use and its number of steps before that is decided; torch runs them.
        tied: whoever shares a bias, also with others; None where it shares none.
    """

    def __init__(self, kernel: Kernel, weights: Weights) -> None:
        super().__init__()
        self.kernel = kernel
        self.recorder: InputRecorder | None = None
        self.decided: dict[Use, str] = {}
        self.watcher: Callable[[Use, int], None] | None = None
        self.tied: Tied | None = None
        self._ready: dict[Any, Any] = {}
        for name, weight in weights.items():
            if isinstance(weight, SparseMatrix):
                self.add_module(f"{name}{_PACKED}", PackedWeight(weight))
            else:
                self.register_buffer(name, weight)
        # For code that makes its tensors like ``next(model.parameters())``. It is empty, and part of no file.
        device = next(self.buffers()).device
        self.register_parameter(_LIKE, nn.Parameter(torch.empty(0, device=device).float(), requires_grad=False))
        self.given_out = GivenOut(self)
        self._own()
        self.eval()

    def __getattr__(self, name: str) -> Any:
        """Python asks here for what it did not find: parameters, buffers, modules; packed weights are given dense."""
        packed = self.__dict__.get("_modules", {}).get(f"{name}{_PACKED}")
        if packed is not None:
            return self._dense(name)
        if name in self.__dict__.get("_buffers", ()) or name.endswith(_PACKED):
            self._give_out(for_good=True)
        return super().__getattr__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        """Refuses to replace a packed weight, which the kernel would not see. Raises UserError."""
        if f"{name}{_PACKED}" in self.__dict__.get("_modules", {}):
            raise UserError(
                f"{type(self).__name__}.{name} is packed and cannot be set: change the dense network "
                "(srnn.desparsify) and sparsify it again."
            )
        super().__setattr__(name, value)
        if name in self.__dict__.get("_buffers", ()):
            self.forget()

    def named_modules(self, *arguments: Any, **options: Any) -> Iterator[tuple[str, nn.Module]]:
        """As torch's; all that lists buffers comes here, too."""
        self._give_out()
        return super().named_modules(*arguments, **options)

    def _give_out(self, for_good: bool = False) -> None:
        """Its tensors go to others, who may write to them before the next call of any that shares them."""
        if self.__dict__.get("given_out") is not None and not torch.compiler.is_compiling():
            for one in self._sharing():
                one.given_out.begin(for_good, biases=one is self or one.tied is not None)

    def follow(self) -> None:
        """Forget what was made of its tensors if others have written to them since."""
        if self.given_out.seen and not torch.compiler.is_compiling() and self.given_out.written():
            self.forget()

    def _dense(self, name: str) -> Tensor:
        """A packed weight dense, kept, because a forward that reads it does so at every call."""
        kept: Tensor | None = self._ready.get(("dense", name))
        if kept is not None and not torch.compiler.is_compiling():
            return kept
        dense = self._matrix(name).to_dense()
        if not torch.compiler.is_compiling():
            self._ready["dense", name] = dense
        return dense

    def matrices(self) -> dict[str, SparseMatrix]:
        """Its packed weights by name."""
        return {name: child.matrix for name, child in self._packed().items()}

    def _packed(self) -> dict[str, PackedWeight]:
        found = {name: child for name, child in self._modules.items() if isinstance(child, PackedWeight)}
        return {name.removesuffix(_PACKED): child for name, child in found.items()}

    def _own(self) -> None:
        for child in self._packed().values():
            child.owners.add(self)
        if self.tied is not None:
            self.tied.owners.add(self)

    def watch_shared(self) -> None:
        """Look before each call whether a bias was written to that a dense module has, too, as its parameter."""
        if any(isinstance(bias, nn.Parameter) for bias in self._buffers.values()):
            self.given_out.begin(for_good=True, biases=True)

    def _sharing(self) -> set[SparseModule]:
        """Itself, and those that hold one of its packed weights or biases, too."""
        tied = self.tied.owners if self.tied is not None else ()
        return {self, *tied, *(owner for child in self._packed().values() for owner in child.owners)}

    def construction(self) -> tuple[type[nn.Module], dict[str, Any]]:
        """The class of torch's module that it stands for, and the arguments that make one."""
        raise NotImplementedError

    def original(self) -> nn.Module:
        """Torch's module with these weights, trainable."""
        kind, options = self.construction()
        with without_memory():
            module = kind(**options)
        return filled(module, self)

    def _matrix(self, name: str) -> SparseMatrix:
        child = self._modules[f"{name}{_PACKED}"]
        assert isinstance(child, PackedWeight)
        return child.matrix

    def _decision(self, x: Tensor, streams: int, steps: int) -> str | None:
        """The candidate that was decided for this use on the whole network; None leaves it to the kernel."""
        if not self.decided and self.watcher is None:
            return None
        use = ("cpu" if x.is_cpu else x.device.type, about(streams), length_class(steps), torch.get_num_threads())
        if self.watcher is None:
            return self.decided.get(use)
        self.watcher(use, steps)
        return self.decided.get(use, TORCH)

    def candidates(self) -> Mapping[str, Kernel]:
        """What its kernel chooses among; nothing where it has no choice."""
        return self.kernel.candidates() if isinstance(self.kernel, Auto) and self.weights_to_run() else {}

    def extra_repr(self) -> str:
        """What ``sparsify`` reports of it, and what was chosen for it when it was first run."""
        several = [made if isinstance(made, list) else [made] for made in list(self._ready.values())]
        chosen = [f"{c.layer}, {c.in_short}" for some in several for made in some for c in choices_made(made)]
        return "\n".join(filter(None, (vars(self).get("sparsify_report"), *chosen)))

    def forget(self) -> None:
        """Drop what was made ready for calls, here and where weights are shared; the next ones make it anew."""
        for one in self._sharing():
            one._ready.clear()

    def kernel_named(self, name: str | None) -> Kernel:
        """A candidate of its kernel, or the kernel itself for None."""
        kernel: Any = self.kernel
        found: Kernel = kernel if name is None else kernel.candidates()[name]
        return found

    def weights_to_run(self) -> LayerWeights | SparseMatrix | None:
        """What a backend has to be able to run, of its first layer; None where no backend runs it."""
        return None

    def _check(self, weights: LayerWeights | SparseMatrix, x: Tensor, batch: int) -> None:
        reason = None if x.is_floating_point() else f"inputs are {x.dtype}, and have to be floats"
        reason = reason or self.kernel.supports(weights, x.device, x.dtype, batch)
        if reason is not None:
            advice = ": give it x.float()" if x.dtype in (torch.float64, torch.float16, torch.bfloat16) else ""
            raise UserError(f"{type(self).__name__} cannot run: {reason}{advice}.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseModule:
        """Moves between devices; what values are stored as was decided when they were packed."""
        for module in self.modules():
            for name, buffer in module._buffers.items():
                if buffer is None:
                    continue
                probe = fn(torch.empty(1, device=buffer.device, dtype=torch.float32))
                if probe.dtype not in (torch.float32, buffer.dtype):
                    raise TypeError(
                        f"{type(self).__name__} cannot become {probe.dtype}: choose sparsify(values=...) instead"
                    )
                # fn itself, where it only moves: share_memory shares the tensor it is given.
                moved = fn(buffer)
                moved = moved if moved.dtype == buffer.dtype else buffer.to(probe.device)
                # Of several modules: what torch does to a shared parameter.
                one = self.tied is not None and module is self and not buffer.is_inference()
                if one and torch._has_compatible_shallow_copy_type(buffer, moved):
                    buffer.data = moved
                else:
                    module._buffers[name] = moved
        like = self._parameters.get(_LIKE)
        if like is not None:
            like.data = like.data.to(next(self.buffers()).device)
        self.forget()
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._give_out()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + _LIKE, None)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *arguments: Any) -> None:
        self.forget()
        for name in self._packed():  # as older versions called them
            for part in ("values", "columns", "row_pointers", "scales"):
                if f"{prefix}{name}.{part}" in state:
                    state[f"{prefix}{name}{_PACKED}.{part}"] = state.pop(f"{prefix}{name}.{part}")
        errors = arguments[-1]  # raised together, also if not strict: biases without their weights are another network
        if any(f"{prefix}{name}" in state for name in self._packed()) and _DENSE_WEIGHTS not in errors:
            errors.append(_DENSE_WEIGHTS)
        like = self._parameters.pop(_LIKE, None)  # so that no file has to hold it
        try:
            super()._load_from_state_dict(state, prefix, *arguments)
        finally:
            self._parameters[_LIKE] = like

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_ready": {}, "recorder": None, "watcher": None, "given_out": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({"decided": {}, "watcher": None, "tied": None} | state)  # older versions had none of them
        self.given_out = GivenOut(self)
        self._own()
        self.watch_shared()
        self.describe()

    def tensors(self) -> list[Tensor]:
        """Its buffers in the order of ``describe``."""
        own = [buffer for buffer in self._buffers.values() if buffer is not None]
        return own + [b for child in self._packed().values() for b in child._buffers.values() if b is not None]

    def describe(self) -> None:
        """Keep as JSON all but its weights, for compiled graphs and exported programs; the last step of making one."""
        kind, options = self.construction()
        kernel = kernel_config(self.kernel)
        self.unregistered = None if kernel else type(self.kernel).__name__
        description = {
            "kind": kind.__name__,
            "options": options,
            "kernel": kernel,
            "biases": {name: buffer is not None for name, buffer in self._buffers.items()},
            "matrices": {
                name: [list(child.shape), child.gates, child._buffers["scales"] is not None]
                for name, child in self._packed().items()
            },
        }
        self.description = described(self, description)

    def __prepare_scriptable__(self) -> None:
        raise UserError("torch.jit.script does not see sparse kernels: use torch.export or torch.compile.")

    def compute(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Outputs, of plain tensors: what is one operator in a compiled graph."""
        raise NotImplementedError

    def shapes(self, inputs: list[Tensor]) -> list[Tensor]:
        """Empty tensors like the outputs."""
        raise NotImplementedError

    def _outputs(self, inputs: list[Tensor]) -> Sequence[Tensor]:
        if torch.compiler.is_compiling():
            if self.unregistered and torch.compiler.is_exporting():
                raise UserError(
                    f"{type(self).__name__} cannot be exported: its kernel {self.unregistered} is not registered, so "
                    "that another process could not find it (srnn.register.kernel)."
                )
            return call_operator(inputs, self.tensors(), self.description)
        return self.compute(inputs)


def marks_of(network: nn.Module) -> list[Any] | None:
    """What tells whether a recording of a network's calls still holds.

    Other after weights have moved, or were loaded, and after a module's setting has changed, as an activation's slope.
    None where a call must not be recorded: in training, with hooks on a module, and where gradients are asked for.
    """
    marks: list[Any] = []
    asked = torch.is_grad_enabled()
    waiting = [network]  # ``modules()`` would take more time than all else, and look into sparse modules
    for module in waiting:
        if module.training or module._forward_hooks or module._forward_pre_hooks:
            return None
        if isinstance(module, SparseModule):
            if module.recorder is not None or module.watcher is not None:
                return None
            module.follow()
            marks.append(module._ready.setdefault("mark", object()))
        else:
            if type(module) not in _PLAIN:
                marks += (type(module), *[value for value in vars(module).values() if type(value) in _SETTINGS])
            waiting += [child for child in module._modules.values() if child is not None]
            for tensor in (*module._parameters.values(), *module._buffers.values()):
                if tensor is not None:
                    if asked and tensor.requires_grad:
                        return None
                    marks.append((tensor.data_ptr(), tensor.dtype))
    return marks


def refuse_tracing() -> None:
    """Raises UserError inside ``torch.jit.trace``, before anything of the trace is kept in the module."""
    if torch.jit.is_tracing() and not torch.compiler.is_compiling():
        refuse_onnx()
        raise UserError("torch.jit.trace does not see sparse kernels: use torch.export or torch.compile.")


def kernel_config(kernel: Kernel) -> dict[str, Any] | None:
    """The config that makes a backend again, or None if it is not a registered one."""
    for (kind, name), component in register.components.items():
        if kind == "kernel" and component.factory is type(kernel):
            return {"name": name} | {key: getattr(kernel, key) for key in component.options if hasattr(kernel, key)}
    return None


def no_grad() -> AbstractContextManager[None]:
    """``torch.no_grad()``, which costs a step of a stream 5 us, only where it changes anything."""
    return torch.no_grad() if torch.is_grad_enabled() else nullcontext()


class _NoBackward(torch.autograd.Function):
    """Passes values on; asking for gradients through it raises."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, *sources: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError("gradients do not flow through sparse kernels: train the dense module (srnn.desparsify)")


def without_gradient(y: Tensor, *sources: Tensor) -> Tensor:
    """The output ``y``; backward through it raises where a source asks for a gradient."""
    asked = torch.is_grad_enabled() and any(source.requires_grad for source in sources)
    return _NoBackward.apply(y, *sources) if asked else y


def filled(module: nn.Module, sparse: SparseModule) -> nn.Module:
    """Torch's ``module`` with the weights of a sparse one, trainable, in eval mode."""
    tensors: dict[str, Tensor] = {name: b.clone() for name, b in sparse._buffers.items() if b is not None}
    tensors |= {name: matrix.to_dense() for name, matrix in sparse.matrices().items()}
    module.load_state_dict(tensors, assign=True)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    if isinstance(module, nn.RNNBase):
        module.flatten_parameters()
    return module.eval()
