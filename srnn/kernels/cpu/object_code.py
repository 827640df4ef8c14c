"""Object code of the kernels that ``compiled`` keeps: translated by numba, made by LLVM, with no need of numba left."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from srnn.importing import nothing_collected
from srnn.kernels.cpu.compiled import processor_features, processor_name
from srnn.kernels.cpu.keeping import where_it_can_be_kept

_MODULES = {"run_product": "stacks", "run_stack": "stacks", "run_step": "stacks", "fill_windows": "window_filling"}
# What a process has without numba: C's own library, and what LLVM calls in it.
PROVIDED = {"malloc", "free", "memcpy", "memset", "memmove"}


def made_object_code(symbols: Mapping[tuple[Any, ...], str]) -> bytes:
    """Code that defines functions, and needs nothing but ``PROVIDED``.

    Args:
        symbols: a function's name, and what of several it is -> what it is called in the code.

    Raises:
        RuntimeError: it needs more: a kernel was written that uses numba's runtime.
    """
    with nothing_collected():
        import numba
        from llvmlite import binding

        text = where_it_can_be_kept(lambda: _translated(symbols, numba))
    module = binding.parse_assembly(text)
    for one in (*module.functions, *module.global_variables):
        if not one.is_declaration and one.name not in symbols.values():
            one.linkage = "internal"
    target = binding.Target.from_triple(binding.get_process_triple())
    features = ",".join(f"{'+' if there else '-'}{name}" for name, there in processor_features().items())
    # As numba does: where code goes is known when it is loaded, but on x86 LLVM cannot load what may go anywhere.
    reloc = "static" if target.name.startswith("x86") else "default"
    machine = target.create_target_machine(
        cpu=processor_name(), features=features, opt=3, reloc=reloc, codemodel="jitdefault"
    )
    options = binding.create_pipeline_tuning_options(speed_level=3)
    builder = binding.create_pass_builder(machine, options)
    builder.getModulePassManager().run(module, builder)
    needed = {one.name for one in module.functions if one.is_declaration and not one.name.startswith("llvm.")}
    if needed - PROVIDED:
        raise RuntimeError(f"{', '.join(symbols.values())}: needs {', '.join(sorted(needed - PROVIDED))} to run")
    code: bytes = machine.emit_object(module)
    return code


def _translated(symbols: Mapping[tuple[Any, ...], str], numba: Any) -> str:
    """LLVM code of functions, and one in front of each that is called as C calls."""
    from llvmlite import ir
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    context, number, compiled = cpu_target.target_context, ir.IntType(64), []
    library = context.codegen().create_library("srnn")
    module = library.create_ir_module("srnn")
    for what, symbol in symbols.items():
        source, count, result = _source(what, numba)
        arguments = (numba.types.int64,) * count
        made = numba.njit(result(*arguments), error_model="numpy", no_cpython_wrapper=True)(source).overloads[arguments]
        function = ir.Function(module, ir.FunctionType(number, [number] * count), symbol)
        builder = ir.IRBuilder(function.append_basic_block())
        inner = context.declare_function(module, made.fndesc)
        _, value = context.call_conv.call_function(builder, inner, result, arguments, function.args)
        builder.ret(number(0) if result == numba.types.none else value)
        compiled.append(made.library)
    library.add_ir_module(module)
    for one in compiled:
        library.add_linking_library(one)
    with global_compiler_lock:
        library.finalize()
    return str(library.get_llvm_str())


def _source(what: tuple[Any, ...], numba: Any) -> tuple[Callable[..., Any], int, Any]:
    """A function in Python, how many int64 it takes, and what it gives."""
    name, *key = what
    if name == "dot":
        functions = importlib.import_module("srnn.kernels.cpu.dot_functions")
        return functions.dot_source(*key), 7, numba.types.none
    module = importlib.import_module(f"srnn.kernels.cpu.{_MODULES[name]}")
    return getattr(module, name).py_func, 1, numba.types.int64
