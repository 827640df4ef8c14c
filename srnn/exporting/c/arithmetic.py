"""The functions of a C file that do not depend on a network's sizes: products, lookups, tanh, sigmoid, softmax.

Loops are plain, and written so that compilers vectorise them: no branches, no calls that are not inlined. ``NAME``
stands for the network's name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from srnn.exporting.c.arrays import INT8_TABLE, WIDE, StoredForm, declaration

# Whether a compiler has vectors.
_VECTORS = " || ".join(
    f"defined({name})" for name in ("__SSE2__", "_M_X64", "__ARM_NEON", "__riscv_vector", "__wasm_simd128__")
)

_TANH = """\
/* x P(x^2) / Q(x^2) up to 9, where tanh is 1 in single precision; at most 4e-7 off. */
static inline float NAME_tanh(float x)
{
    x = x > 9.0f ? 9.0f : x;
    x = x < -9.0f ? -9.0f : x;
    const float s = x * x;
    const float p = 1.0f + s * (1.4099948e-1f + s * (4.426934e-3f + s * (4.229918e-5f
        + s * (1.1132287e-7f + s * 3.6836638e-11f))));
    const float q = 1.0f + s * (4.743328e-1f + s * (2.9204538e-2f + s * (5.010238e-4f
        + s * (2.6062237e-6f + s * 2.9566363e-9f))));
    return x * p / q;
}
"""

_SIGMOID = """\
static inline float NAME_sigmoid(float x)
{
    return 0.5f + 0.5f * NAME_tanh(0.5f * x);
}
"""

_FP16 = """\
/* A half-precision number of these bits. Its sign spreads to the left, and of its copies the first stays. Its exponent
   starts 112 lower, which the product makes good, exactly; so it does for the smallest numbers, whose exponent is 0.
   There are no infinities. */
static inline float NAME_fp16(int16_t bits)
{
    union { uint32_t bits; float value; } wide;
    wide.bits = ((uint32_t)bits << 13) & 0x8fffffffu;
    return wide.value * 5.192296858534828e33f;
}
"""

_BF16 = """\
static inline float NAME_bf16(int16_t bits)
{
    union { uint32_t bits; float value; } wide;
    wide.bits = (uint32_t)bits << 16;
    return wide.value;
}
"""

_ELEMENT = """\
/* y += W x for the next rows of a matrix that is stored element by element. Two sums, because one would wait for each
   addition to end; what eight do not divide goes first, which takes no counting. */
static void NAME_multiply_FORM(NAME_FORM *w, const float *restrict x, float *restrict y, int rows)
{
    const COUNTS *counts = w->counts;
    const uint8_t *gaps = w->gaps;
    const TYPE *values = w->values;
SCALES_BEGIN    for (int row = 0; row < rows; row++) {
        const int count = (int)counts[row];
        const float *at = x;
        float a = 0.0f, b = 0.0f;
PARTS
        y[row] += SUM(a + b);
    }
    w->counts = counts + rows;
    w->gaps = gaps;
    w->values = values;
SCALES_END}
"""

_LONG_ELEMENT = """\
/* The same for long rows: four sums, four elements at a time, then what is over. */
static void NAME_multiply_FORM(NAME_FORM *w, const float *restrict x, float *restrict y, int rows)
{
    const COUNTS *counts = w->counts;
    const uint8_t *gaps = w->gaps;
    const TYPE *values = w->values;
SCALES_BEGIN    for (int row = 0; row < rows; row++) {
        int left = (int)counts[row], at = 0;
        float a = 0.0f, b = 0.0f, c = 0.0f, d = 0.0f;
        for (; left >= 4; left -= 4) {
            const int at0 = at + gaps[0], at1 = at0 + gaps[1], at2 = at1 + gaps[2];
            at = at2 + gaps[3];
            a += VALUE(values[0]) * x[at0];
            b += VALUE(values[1]) * x[at1];
            c += VALUE(values[2]) * x[at2];
            d += VALUE(values[3]) * x[at];
            gaps += 4;
            values += 4;
        }
        for (; left > 0; left--) {
            at += *gaps++;
            a += VALUE(*values) * x[at];
            values++;
        }
        y[row] += SUM((a + b) + (c + d));
    }
    w->counts = counts + rows;
    w->gaps = gaps;
    w->values = values;
SCALES_END}
"""

_ELEMENT_ALL = """\
/* y += W x for the next rows of a matrix that stores every column. */
static void NAME_multiply_FORM(NAME_FORM *w, const float *restrict x, float *restrict y, int rows)
{
    for (int row = 0; row < rows; row++) {
        float sum = 0.0f;
        for (int column = 0; column < w->columns; column++)
            sum += VALUE(w->values[column]) * x[column];
        w->values += w->columns;
        y[row] += SCALE(sum);
    }
}
"""

_BLOCKS = """\
/* y += W x for the next rows of a matrix of HEIGHT rows a group. */
static void NAME_multiply_FORM(NAME_FORM *w, const float *restrict x, float *restrict y, int rows)
{
    const TYPE *values = w->values;
BEGIN    for (int row = 0; row < rows; row += HEIGHT) {
        const int lanes = rows - row < HEIGHT ? rows - row : HEIGHT;
        float sums[HEIGHT] = {0.0f};
        int at = 0;
INNER
        PREPAREfor (int lane = 0; lane < lanes; lane++)
            y[row + lane] += SCALED(sums[lane]);
    }
    w->values = values;
END}
"""

_BLOCK_BY_BLOCK = """\
        for (int left = COUNT; left > 0; left--) {
            const float factor = FACTOR;
            for (int lane = 0; lane < HEIGHT; lane++)
                sums[lane] += values[lane] * factor;
            values += HEIGHT;
        }"""

# Widened in a loop of its own: compilers vectorise this one and the next, and not one that does both.
_WIDENED = """\
        for (int left = COUNT; left > 0; left -= MANY) {
            const int blocks = left < MANY ? left : MANY;
            float wide[MANY * HEIGHT];
            for (int i = 0; i < blocks * HEIGHT; i++)
                wide[i] = VALUE(values[i]);
            for (int block = 0; block < blocks; block++) {
                const float factor = FACTOR;
                for (int lane = 0; lane < HEIGHT; lane++)
                    sums[lane] += wide[block * HEIGHT + lane] * factor;
            }
            values += blocks * HEIGHT;
        }"""
# Vectors want many values to be widened at a time; a chip without them keeps those of a block in registers.
_BLOCKS_AT_A_TIME = f"""\
#if {_VECTORS}
#define NAME_BLOCKS(height) ({WIDE} / (height))
#else
#define NAME_BLOCKS(height) 1
#endif
"""

_INT8 = f"""\
/* An int8 as a float: vectors convert fast, chips without a floating-point unit slowly. */
#if {_VECTORS}
static inline float NAME_widened(int8_t x)
{{
    return (float)x;
}}
#else
{declaration("NAME_int8_table", INT8_TABLE)}
static inline float NAME_widened(int8_t x)
{{
    return NAME_int8_table[(uint8_t)x];
}}
#endif
"""

_EXP = """\
/* e to the x for x of 0 and less: 2 to a whole number times a polynomial of what is left. */
static float NAME_exp(float x)
{
    union { uint32_t bits; float value; } power;
    x = x < -87.0f ? -87.0f : x;
    const int whole = (int)(x * 1.44269504f - 0.5f);
    const float r = x - (float)whole * 6.93145752e-1f - (float)whole * 1.42860677e-6f;
    power.bits = (uint32_t)(whole + 127) << 23;
    return power.value * (1.0f + r * (1.0f + r * (0.5f + r * (1.6666667e-1f + r * (4.1666668e-2f
        + r * (8.3333338e-3f + r * 1.3888889e-3f))))));
}
"""

_PROBABILITIES = """\
static void NAME_probabilities(float *values, int count)
{
    float largest = values[0], sum = 0.0f;
    for (int i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    for (int i = 0; i < count; i++) {
        values[i] = NAME_exp(values[i] - largest);
        sum += values[i];
    }
    for (int i = 0; i < count; i++)
        values[i] /= sum;
}
"""

_LOG_PROBABILITIES = """\
static void NAME_log_probabilities(float *values, int count)
{
    float largest = values[0], sum = 0.0f, log = 0.0f;
    for (int i = 1; i < count; i++)
        largest = values[i] > largest ? values[i] : largest;
    for (int i = 0; i < count; i++)
        sum += NAME_exp(values[i] - largest);
    /* The logarithm of the sum, 1 and more: first of a power of 2 below it, then five steps of Newton's. */
    for (float power = 2.0f; power <= sum; power *= 2.0f)
        log += 6.9314718e-1f;
    for (int i = 0; i < 5; i++)
        log += sum * NAME_exp(-log) - 1.0f;
    for (int i = 0; i < count; i++)
        values[i] -= largest + log;
}
"""

ARGMAX_AND_SOFTMAX = """\
int NAME_argmax(const float *output)
{
    int best = 0;
    for (int i = 1; i < OUTPUTS; i++)
        if (output[i] > output[best])
            best = i;
    return best;
}

void NAME_softmax(float *output)
{
    NAME_probabilities(output, OUTPUTS);
}
"""

# The functions above by the word that calls them, each behind those that call it.
_USED = {
    "NAME_probabilities(": _PROBABILITIES,
    "NAME_log_probabilities(": _LOG_PROBABILITIES,
    "NAME_exp(": _EXP,
    "NAME_sigmoid(": _SIGMOID,
    "NAME_tanh(": _TANH,
    "NAME_fp16(": _FP16,
    "NAME_bf16(": _BF16,
    "NAME_BLOCKS(": _BLOCKS_AT_A_TIME,
    "NAME_widened(": _INT8,
}


def used_functions(code: str, name: str, functions: Mapping[str, str] = _USED) -> str:
    """The small functions that some code calls, each before the one that calls it.

    Args:
        code: of the network's layers and products.
        name: of the network.
        functions: by the word that calls them, each behind those that call it; those of floats.
    """
    found: list[str] = []
    for word, function in functions.items():
        if word.replace("NAME", name) in "\n".join([code, *found]):
            found.insert(0, function.replace("NAME", name))
    return "\n".join(found)


def walk_type(form: StoredForm, name: str) -> str:
    """The struct that says how far a layer has read a matrix."""
    members = ["const uint8_t *gaps;", f"const {form.counts} *counts;"] if form.counts else ["int columns;"]
    members.insert(0, f"const {form.c_type} *values;")
    members += ["const float *scales;"] if form.values == "int8" else []
    return f"typedef struct {{ {' '.join(members)} }} {name}_{form.name};\n"


def walk(variable: str, form: StoredForm, array: str, columns: int, name: str) -> str:
    """A variable of that struct, at the beginning of a matrix."""
    members = [f"{array}_values"] + ([f"{array}_gaps", f"{array}_counts"] if form.counts else [str(columns)])
    members += [f"{array}_scales"] if form.values == "int8" else []
    return f"{name}_{form.name} {variable} = {{{', '.join(members)}}};"


def multiply_function(form: StoredForm, name: str) -> str:
    """The product of a matrix of this form with a vector."""
    text = _BLOCKS if form.height > 1 else _ELEMENT_ALL
    if form.height == 1 and form.counts:
        text = _LONG_ELEMENT if form.long_rows else _ELEMENT
    scaled = form.values == "int8"
    text = text.replace("PARTS", _element_parts())
    text = text.replace("INNER", _BLOCK_BY_BLOCK if form.values == "fp32" else _WIDENED)
    text = re.sub(r"VALUE\(([^()]*)\)", _widened(form), text)
    for word, by in {
        "SCALES_BEGIN": "    const float *scales = w->scales;\n" if scaled else "",
        "SCALES_END": "    w->scales = scales + rows;\n" if scaled else "",
        "COUNTS": form.counts or "",
        "COUNT": "(int)*w->counts++" if form.counts else "w->columns",
        "FACTOR": "x[at += *gaps++]" if form.counts else "x[at++]",
        "BEGIN": "    const uint8_t *gaps = w->gaps;\n" if form.counts else "",
        "END": "    w->gaps = gaps;\n" if form.counts else "",
        "MANY": f"NAME_BLOCKS({form.height})",
        "PREPARE": "const float scale = *w->scales++;\n        " if scaled else "",
        "SCALED(sums[lane])": "scale * sums[lane]" if scaled else "sums[lane]",
        "SUM(": "scales[row] * (" if scaled else "(",
        "SCALE(sum)": "*w->scales++ * sum" if scaled else "sum",
        "FORM": form.name,
        "TYPE": form.c_type,
        "HEIGHT": str(form.height),
        "NAME": name,
    }.items():
        text = text.replace(word, by)
    return text


def _element_parts() -> str:
    """The elements of a row, each added to one of two sums: one, two and four if so many are over, then eights."""

    def elements(number: int, indent: str) -> list[str]:
        lines = []
        for i in range(number):
            total = "ab"[i % 2]
            lines += [f"{indent}at += gaps[{i}];", f"{indent}{total} += VALUE(values[{i}]) * *at;"]
        return [*lines, f"{indent}gaps += {number};", f"{indent}values += {number};"]

    lines = []
    for number in (1, 2, 4):
        lines += [f"        if (count & {number}) {{", *elements(number, " " * 12), "        }"]
    loop = "        for (const uint8_t *const end = gaps + (count & ~7); gaps != end;) {"
    return "\n".join([*lines, loop, *elements(8, " " * 12), "        }"])


def _widened(form: StoredForm) -> str:
    """The matched value as a float."""
    if form.by_table:
        return r"NAME_int8[(uint8_t)\1]"
    return {"fp32": r"\1", "int8": r"NAME_widened(\1)", "fp16": r"NAME_fp16(\1)", "bf16": r"NAME_bf16(\1)"}[form.values]


def row_code(form: StoredForm, array: str, columns: int, name: str) -> str:
    """The body of an embedding's function, which writes row ``token`` to ``y``."""
    value = {"fp32": "", "int8": "(float)", "fp16": f"{name}_fp16", "bf16": f"{name}_bf16"}[form.values]
    scale = f"{array}_scales[group] * " if form.values == "int8" else ""
    lines = lookup_of(form, array, columns, f"{scale}{value}({array}_values[AT])", "0.0f")
    return "\n".join(f"    {line}" for line in lines)


def lookup_of(form: StoredForm, array: str, columns: int, value: str, zero: str) -> list[str]:
    """Lines that write row ``token`` to ``y``: ``value`` for each number that is stored, AT being its place."""
    if form.height == 1:
        lines, at = ["const uint32_t group = token;"], "block"
    else:
        lines = [f"const uint32_t group = token / {form.height}u;", f"const uint32_t lane = token % {form.height}u;"]
        at = f"block * {form.height}u + lane"
    value = value.replace("AT", at)
    if form.counts is None:
        return [
            *lines,
            f"uint32_t block = group * {columns}u;",
            f"for (int column = 0; column < {columns}; column++, block++)",
            f"    y[column] = {value};",
        ]
    return [
        *lines,
        "int column = 0;",
        f"for (int i = 0; i < {columns}; i++)",
        f"    y[i] = {zero};",
        f"for (uint32_t block = {array}_starts[group]; block < {array}_starts[group + 1]; block++) {{",
        f"    column += {array}_gaps[block];",
        f"    y[column] = {value};",
        "}",
    ]
