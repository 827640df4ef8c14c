"""The C header of a network: what it is, how it is called, and the declarations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from srnn.exporting.c.calls import Calls


def header_text(calls: Calls, state: Mapping[str, int], types: Mapping[str, str], about: Sequence[str]) -> str:
    """The header file.

    Args:
        calls: what a caller has to know.
        state: members of the state's struct -> numbers.
        types: of those that are no floats.
        about: lines for the comment at its head.
    """
    name, upper = calls.name, calls.name.upper()
    lines = [f"/* {name}: a recurrent network as plain C99, written by srnn.", ""]
    lines += [f"   {_in_comment(line)}" if line else "" for line in about]
    lines += ["", "   How to call it:", *(f"       {line}" for line in _usage(calls)), "*/"]
    lines += [f"#ifndef {upper}_H", f"#define {upper}_H", "", "#include <stddef.h>", "#include <stdint.h>", ""]
    lines += ["#ifdef __cplusplus", 'extern "C" {', "#endif", ""]
    if calls.tokens:
        lines += [f"#define {upper}_TOKENS {calls.tokens}", f"typedef {calls.token_type} {name}_token;"]
    else:
        lines += [f"#define {upper}_INPUTS {calls.inputs}"]
    lines += [f"#define {upper}_OUTPUTS {calls.outputs}"]
    if calls.scratch:
        lines += [f"/* Numbers, {calls.in_type}, that {name}_run is lent. */"]
        lines += [f"#define {upper}_SCRATCH(steps) ((size_t)(steps) * {calls.scratch})"]
    if calls.in_integers:
        if not calls.tokens:
            lines += ["/* What 1 of an input stands for; inputs are rounded, from -127 to 127. */"]
            lines += [f"#define {upper}_INPUT_SCALE {calls.input_scale!r}f"]
        lines += ["/* What 1 of an output stands for. */", f"#define {upper}_OUTPUT_SCALE {calls.output_scale!r}f"]
    members = [f"    {types.get(member, 'float')} {member}[{count}];" for member, count in state.items()]
    lines += ["", "/* All that a stream needs; each stream has its own. */", "typedef struct {", *members]
    lines += [f"}} {name}_state;", "", "/* Begin a sequence. */", f"void {name}_reset({name}_state *state);", ""]
    if calls.can_step:
        lines += [*_step_comment(calls), f"{calls.step_declaration};", ""]
    lines += [*_run_comment(calls), f"{calls.run_declaration};", ""]
    lines += ["/* The number of the largest output. */", f"int {name}_argmax(const {calls.out_type} *output);", ""]
    if not calls.in_integers:
        lines += ["/* Turn outputs into probabilities, in place. */", f"void {name}_softmax(float *output);", ""]
    if calls.has_table:
        lines += ["/* The code point of each token; 0 for the unknown one. */"]
        lines += [f"extern const uint32_t {name}_characters[{upper}_TOKENS];", ""]
    lines += ["#ifdef __cplusplus", "}", "#endif", "", f"#endif /* {upper}_H */", ""]
    return "\n".join(lines)


def _step_comment(calls: Calls) -> list[str]:
    what = "outputs as if the sequence ended here" if calls.reads_last else "its outputs"
    given = f"one token, 0 for any of {calls.tokens} and more" if calls.tokens else f"{calls.inputs} numbers"
    return [f"/* One step: {given} -> {what}, {calls.outputs} numbers. */"]


def _run_comment(calls: Calls) -> list[str]:
    upper = calls.name.upper()
    what = f"{calls.outputs} numbers at the end" if calls.reads_last else f"steps * {calls.outputs} numbers"
    lent = f"; scratch holds {upper}_SCRATCH(steps) numbers" if calls.scratch else ""
    return [f"/* A sequence, or a part of one, step after step -> {what}{lent}. */"]


def _usage(calls: Calls) -> list[str]:
    name, upper = calls.name, calls.name.upper()
    size = f"{upper}_OUTPUTS" if calls.can_step or calls.reads_last else f"steps * {upper}_OUTPUTS"
    lines = [f"{name}_state state;", f"{calls.out_type} output[{size}];", f"{name}_reset(&state);"]
    if calls.can_step:
        return [*lines, f"{name}_step(&state, input, output);", f"int best = {name}_argmax(output);"]
    lent = ", scratch" if calls.scratch else ""
    return [*lines, f"{name}_run(&state, inputs, steps, output{lent});"]


def _in_comment(text: str) -> str:
    """Text that cannot end the comment that it stands in, or begin another one."""
    plain = " ".join(text.split()).encode("ascii", "backslashreplace").decode()
    return plain.replace("*/", "* /").replace("/*", "/ *").replace("??", "?")
