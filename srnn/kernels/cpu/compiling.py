"""Object code of the kernels that ``compiled`` keeps: translated by numba, made by LLVM, with no need of numba left."""

from __future__ import annotations

import importlib
from typing import Any

from srnn.importing import nothing_collected
from srnn.kernels.cpu.compiled import processor_features, processor_name
from srnn.kernels.cpu.keeping import where_it_can_be_kept

_MODULES = {"run_product": "stacks", "run_stack": "stacks", "run_step": "stacks", "fill_windows": "windows"}
# What a process has without numba: C's own library, and what LLVM calls in it.
PROVIDED = {"malloc", "free", "memcpy", "memset", "memmove"}


def object_code(what: tuple[Any, ...], symbol: str) -> bytes:
    """Code that defines one function, and needs nothing but ``PROVIDED``.

    Args:
        what: the function's name, and what of several it is.
        symbol: what it is called in the code.

    Raises:
        RuntimeError: it needs more: a kernel was written that uses numba's runtime.
    """
    with nothing_collected():
        import numba
        from llvmlite import binding

        text = where_it_can_be_kept(lambda: _translated(what, symbol, numba))
    module = binding.parse_assembly(text)
    for one in (*module.functions, *module.global_variables):
        if not one.is_declaration and one.name != symbol:
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
        raise RuntimeError(f"the kernel {what[0]} needs {', '.join(sorted(needed - PROVIDED))} to run")
    code: bytes = machine.emit_object(module)
    return code


def _translated(what: tuple[Any, ...], symbol: str, numba: Any) -> str:
    """LLVM code of a function, and one in front of it that is called as C calls."""
    from llvmlite import ir
    from numba.core.compiler_lock import global_compiler_lock
    from numba.core.registry import cpu_target

    name, *key = what
    if name == "dot":
        functions = importlib.import_module("srnn.kernels.cpu.dot_functions")
        source, count, result = functions.dot_source(*key), 7, numba.types.none
    else:
        source = getattr(importlib.import_module(f"srnn.kernels.cpu.{_MODULES[name]}"), name).py_func
        count, result = 1, numba.types.int64
    arguments = (numba.types.int64,) * count
    made = numba.njit(result(*arguments), error_model="numpy", no_cpython_wrapper=True)(source).overloads[arguments]
    context = cpu_target.target_context
    library = context.codegen().create_library(symbol)
    module = library.create_ir_module(symbol)
    number = ir.IntType(64)
    kind = ir.FunctionType(number, [number] * count)
    function = ir.Function(module, kind, symbol)
    builder = ir.IRBuilder(function.append_basic_block())
    inner = context.declare_function(module, made.fndesc)
    called = context.call_conv.call_function(builder, inner, result, arguments, function.args)
    builder.ret(called[1] if name != "dot" else number(0))
    library.add_ir_module(module)
    library.add_linking_library(made.library)
    with global_compiler_lock:
        library.finalize()
    return str(library.get_llvm_str())
