"""The C file of a network in integers: what ``integers`` computes, for chips without a floating-point unit.

``NAME`` stands for the network's name.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from srnn.cells import Cell
from srnn.exporting.c.arithmetic import lookup_of, used_functions
from srnn.exporting.c.arrays import StoredForm
from srnn.exporting.c.calls import Calls, Stage
from srnn.exporting.c.integers import TANH_TABLE, IntegerLayer, IntegerMatrix, IntegerNetwork
from srnn.exporting.c.layer_code import SUMS, Code, chunk_of, sum_variable
from srnn.exporting.c.program import Program, finished

_SCALED = """\
/* A sum times its row's factor, rounded. */
static inline int32_t NAME_scaled(int32_t sum, int32_t factor, int shift)
{
    return (int32_t)(((int64_t)sum * factor + ((int64_t)1 << (shift - 1))) >> shift);
}
"""

_TANH = """\
/* tanh of x / 4096, times 32768: between two entries of the table. */
static inline int32_t NAME_tanh(int32_t x)
{
    x = x > 32767 ? 32767 : x < -32768 ? -32768 : x;
    const int32_t place = x + 32768, at = place >> 8;
    const int32_t low = NAME_table[at], high = NAME_table[at + 1];
    return low + (((high - low) * (place & 255) + 128) >> 8);
}
"""

_SIGMOID = """\
static inline int32_t NAME_sigmoid(int32_t x)
{
    return (32768 + NAME_tanh(x >> 1)) >> 1;
}
"""

_NARROW = """\
/* 8 of 16 bits, rounded. */
static inline int8_t NAME_narrow(int32_t x)
{
    x = (x + 128) >> 8;
    return (int8_t)(x > 127 ? 127 : x);
}
"""

# The functions above by the word that calls them, each behind those that call it.
_USED = {"NAME_narrow(": _NARROW, "NAME_sigmoid(": _SIGMOID, "NAME_tanh(": _TANH, "NAME_scaled(": _SCALED}

_ELEMENTS = """\
/* y += W x for the next rows of a matrix that is stored element by element. */
static void NAME_multiply_FORM(NAME_FORM *w, const int8_t *restrict x, int32_t *restrict y, int rows)
{
    const uint8_t *gaps = w->gaps;
    const int8_t *values = w->values;
    for (int row = 0; row < rows; row++) {
        int32_t left = (int32_t)*w->counts++, sum = 0;
        const int8_t *at = x;
        for (; left >= 4; left -= 4) {
            const int8_t *at0 = at + gaps[0], *at1 = at0 + gaps[1], *at2 = at1 + gaps[2];
            at = at2 + gaps[3];
            sum += (int32_t)values[0] * *at0 + (int32_t)values[1] * *at1 + (int32_t)values[2] * *at2
                + (int32_t)values[3] * *at;
            gaps += 4;
            values += 4;
        }
        for (; left > 0; left--) {
            at += *gaps++;
            sum += (int32_t)*values++ * *at;
        }
        y[row] += NAME_scaled(sum, *w->factors++, w->shift);
    }
    w->gaps = gaps;
    w->values = values;
}
"""

_BLOCKS = """\
/* y += W x for the next rows of a matrix of HEIGHT rows a group. */
static void NAME_multiply_FORM(NAME_FORM *w, const int8_t *restrict x, int32_t *restrict y, int rows)
{
    const int8_t *values = w->values;
BEGIN    for (int row = 0; row < rows; row += HEIGHT) {
        const int lanes = rows - row < HEIGHT ? rows - row : HEIGHT;
        const int32_t group = *w->factors++;
        int32_t sums[HEIGHT] = {0};
        int at = 0;
        for (int32_t left = (int32_t)COUNT; left > 0; left--) {
            const int32_t factor = FACTOR;
            for (int lane = 0; lane < HEIGHT; lane++)
                sums[lane] += values[lane] * factor;
            values += HEIGHT;
        }
        for (int lane = 0; lane < lanes; lane++)
            y[row + lane] += NAME_scaled(sums[lane], group, w->shift);
    }
    w->values = values;
END}
"""

_ARGMAX = """\
int NAME_argmax(const int32_t *output)
{
    int best = 0;
    for (int i = 1; i < OUTPUTS; i++)
        if (output[i] > output[best])
            best = i;
    return best;
}
"""

# From the sums of unit i of a chunk to its next state; LAYER is the layer's number.
_GATES: dict[Cell, tuple[str, ...]] = {
    "gru": (
        "const int32_t reset = NAME_sigmoid(r[i]), update = NAME_sigmoid(z[i]);",
        "const int32_t candidate = NAME_tanh(u[i] + (int32_t)(((int64_t)reset * v[i] + 16384) >> 15));",
        "const int32_t kept = update * (state->hLAYER[unit + i] - candidate);",
        "state->next[unit + i] = (int16_t)(candidate + ((kept + 16384) >> 15));",
    ),
    "lstm": (
        "const int32_t kept = NAME_sigmoid(f[i]) * state->cLAYER[unit + i];",
        "const int32_t added = (NAME_sigmoid(i_[i]) * NAME_tanh(g[i]) + 8) >> 4;",
        "int32_t cell = (kept + added + 16384) >> 15;",
        "cell = cell > 32767 ? 32767 : cell < -32768 ? -32768 : cell;",
        "state->cLAYER[unit + i] = (int16_t)cell;",
        "state->next[unit + i] = (int16_t)((NAME_sigmoid(o[i]) * NAME_tanh(2 * cell) + 16384) >> 15);",
    ),
    "tanh": ("state->next[unit + i] = (int16_t)NAME_tanh(a[i]);",),
    "relu": (
        "const int32_t positive = a[i] < 0 ? 0 : MOST;",
        "const int32_t after = SHIFTED;",
        "state->next[unit + i] = (int16_t)(after > 32767 ? 32767 : after);",
    ),
}


def integer_program(network: IntegerNetwork, name: str, stem: str, characters: Sequence[str] = ()) -> Program:
    """Write a network in integers as C; as ``c_program``."""
    code = Code(name)
    stages: list[Stage] = []
    if network.embedding is not None:
        stages.append(_embedding(code, network.embedding))
    for number, layer in enumerate(network.layers):
        is_final = number == len(network.layers) - 1 and network.decoder is None
        parts = [_recurrent(code, f"{number}{end}", one) for end, one in zip(("", "r"), layer, strict=False)]
        shown = tuple(f"{'h' if is_final else 'q'}{number}{end}" for end in ("", "r")[: len(layer)])
        inputs, units = layer[0].w_ih.packed.shape[1], layer[0].w_hh.packed.shape[1]
        stages.append(Stage("recurrent", inputs, units * len(layer), tuple(parts), shown))
    if network.last_only:
        width = stages[-1].width
        if len(stages[-1].members) > 1:
            code.member("last", width, "int16_t" if network.decoder is None else "int8_t")
        stages.append(Stage("last", width, width))
    if network.decoder is not None:
        stages.append(_linear(code, network.decoder, network.decoder_bias))
    scale = 1.0 if network.embedding is not None else network.input_scale
    calls = Calls(name, tuple(stages), False, "int8_t", "int32_t", scale, 2.0**-network.output_bits)
    products = [_walk_type(form, name) + "\n" + _multiply(form, name) for form in _multiplied(code)]
    shared = "\n".join(products)
    used = used_functions("\n".join([shared, *code.functions]), name, _USED)
    if f"{name}_table[" in used:
        code.array(f"{name}_table", TANH_TABLE)
    shared = used + "\n" + shared
    return finished(code, calls, stem, shared, _ARGMAX, characters)


def _multiplied(code: Code) -> list[StoredForm]:
    text = "\n".join(code.functions)
    return [form for form in code.forms.values() if f"{code.name}_multiply_{form.name}(" in text]


def _recurrent(code: Code, number: str, layer: IntegerLayer) -> str:
    """Add a step of a direction of a recurrent layer, as ``recurrent_code``."""
    units, name = layer.w_hh.packed.shape[1], code.name
    chunk = chunk_of(units, max(layer.w_ih.packed.height, layer.w_hh.packed.height))
    sums, by_input, by_state = SUMS[layer.cell]
    for member in (f"h{number}", *([f"c{number}"] if layer.cell == "lstm" else []), "next"):
        code.member(member, max(code.state.get(member, 0), units), "int16_t")
    code.member(f"q{number}", units, "int8_t")
    code.array(f"{name}_b{number}", layer.bias.astype(np.int32))
    begin = {s: f"{name}_b{number}[{gate * units} + unit + i]" for gate, s in enumerate(by_input)}
    if "v" in sums:
        code.array(f"{name}_b{number}_new", layer.new_bias.astype(np.int32))
        begin["v"] = f"{name}_b{number}_new[unit + i]"
    input_walk, input_multiply = _walk(code, f"w{number}_ih", layer.w_ih, chunk, "input")
    state_walk, state_multiply = _walk(code, f"w{number}_hh", layer.w_hh, chunk, "recurrent")
    code.layer_stack = max(code.layer_stack, 4 * chunk * len(sums))
    count = chunk if units % chunk == 0 else f"{units} - unit < {chunk} ? {units} - unit : {chunk}"
    lines = [
        f"static void {name}_layer{number}({name}_state *state, const int8_t *x)",
        "{",
        f"    {input_walk}",
        f"    {state_walk}",
        f"    for (int unit = 0; unit < {units}; unit += {chunk}) {{",
        f"        const int n = {count};",
        f"        int32_t {', '.join(f'{sum_variable(s)}[{chunk}]' for s in sums)};",
        "        for (int i = 0; i < n; i++) {",
        *(f"            {sum_variable(s)}[i] = {begin[s]};" for s in sums),
        "        }",
        *(f"        {input_multiply}(&input, x, {sum_variable(s)}, n);" for s in by_input),
        *(f"        {state_multiply}(&recurrent, state->q{number}, {sum_variable(s)}, n);" for s in by_state),
        "        for (int i = 0; i < n; i++) {",
        *(f"            {line.replace('NAME', name).replace('LAYER', number)}" for line in _gates(layer)),
        "        }",
        "    }",
        f"    for (int i = 0; i < {units}; i++) {{",
        f"        state->h{number}[i] = state->next[i];",
        f"        state->q{number}[i] = {name}_narrow(state->next[i]);",
        "    }",
        "}",
    ]
    code.functions.append("\n".join(lines) + "\n")
    return f"{name}_layer{number}"


def _gates(layer: IntegerLayer) -> list[str]:
    """From sums to the next state; a ReLU's sums are shifted to the bits that its states have behind the point."""
    bits = 3 - layer.doublings
    most = f"a[i] > {32768 >> bits} ? {32768 >> bits} : a[i]" if bits > 0 else "a[i]"
    shifted = f"positive * {1 << bits}" if bits >= 0 else f"(positive + {1 << (-bits - 1)}) >> {-bits}"
    return [line.replace("MOST", most).replace("SHIFTED", shifted) for line in _GATES[layer.cell]]


def _linear(code: Code, matrix: IntegerMatrix, bias: np.ndarray) -> Stage:
    outputs, inputs = matrix.packed.shape
    walk, multiply = _walk(code, "out", matrix, outputs, "w")
    code.array(f"{code.name}_out_bias", bias.astype(np.int32))
    function = f"{code.name}_out"
    code.functions.append(
        f"static void {function}(const int8_t *restrict x, int32_t *restrict y)\n{{\n"
        f"    {walk}\n"
        f"    for (int i = 0; i < {outputs}; i++)\n        y[i] = {code.name}_out_bias[i];\n"
        f"    {multiply}(&w, x, y, {outputs});\n}}\n"
    )
    return Stage("plain", inputs, outputs, (function,))


def _embedding(code: Code, matrix: IntegerMatrix) -> Stage:
    """Add an embedding: the row of a token, each number scaled to the 8 bits that all rows share."""
    tokens, width = matrix.packed.shape
    array, stored = code.matrix("in", matrix.packed, tokens)
    parts = {part: numbers for part, numbers in stored.arrays.items() if part not in ("counts", "scales")}
    for part, numbers in (parts | ({"starts": stored.starts} if stored.form.counts else {})).items():
        code.array(f"{array}_{part}", numbers)
    code.array(f"{code.name}_in_factors", matrix.multipliers)
    function = f"{code.name}_in"
    value = f"{function}_number({array}_values[AT], {function}_factors[group])"
    body = "\n".join(f"    {line}" for line in lookup_of(stored.form, array, width, value, "0"))
    code.functions.append(
        f"static inline int8_t {function}_number(int32_t value, int32_t factor)\n{{\n"
        f"    const int32_t x = {code.name}_scaled(value, factor, {matrix.shift});\n"
        "    return (int8_t)(x > 127 ? 127 : x < -127 ? -127 : x);\n}\n\n"
        f"static void {function}(uint32_t token, int8_t *restrict y)\n{{\n{body}\n}}\n"
    )
    code.member("x", width, "int8_t")
    return Stage("embedding", tokens, width, (function,), ("x",))


def _walk(code: Code, label: str, matrix: IntegerMatrix, chunk: int, variable: str) -> tuple[str, str]:
    """Add a matrix that is multiplied with: the declaration of its walk, and the function to call."""
    array, stored = code.matrix(label, matrix.packed, chunk)
    for part, numbers in stored.arrays.items():
        if part != "scales":
            code.array(f"{array}_{part}", numbers)
    factors = f"{code.name}_{label}_factors"
    code.array(factors, matrix.multipliers[stored.order])
    code.multiply_adds += stored.multiply_adds
    code.product_stack = max(code.product_stack, 4 * stored.form.height)
    members = [f"{array}_values", factors, str(matrix.shift)]
    members += [f"{array}_gaps", f"{array}_counts"] if stored.form.counts else [str(stored.columns)]
    name = stored.form.name
    return f"{code.name}_{name} {variable} = {{{', '.join(members)}}};", f"{code.name}_multiply_{name}"


def _walk_type(form: StoredForm, name: str) -> str:
    members = ["const int8_t *values;", "const int32_t *factors;", "int shift;"]
    members += ["const uint8_t *gaps;", f"const {form.counts} *counts;"] if form.counts else ["int columns;"]
    return f"typedef struct {{ {' '.join(members)} }} {name}_{form.name};\n"


def _multiply(form: StoredForm, name: str) -> str:
    text = _ELEMENTS if form.height == 1 and form.counts else _BLOCKS
    for word, by in {
        "COUNT": "*w->counts++" if form.counts else "w->columns",
        "FACTOR": "x[at += *gaps++]" if form.counts else "x[at++]",
        "BEGIN": "    const uint8_t *gaps = w->gaps;\n" if form.counts else "",
        "END": "    w->gaps = gaps;\n" if form.counts else "",
        "FORM": form.name,
        "HEIGHT": str(form.height),
        "NAME": name,
    }.items():
        text = text.replace(word, by)
    return text
