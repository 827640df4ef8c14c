"""The C functions of layers: a recurrent layer's step, a linear layer, an embedding's lookup.

Shapes: H hidden units, G gates * H.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from srnn.cells import CLIP, GATES, Cell
from srnn.exporting.c.arithmetic import multiply_function, row_code, walk, walk_type
from srnn.exporting.c.arrays import INT8_TABLE, StoredForm, StoredMatrix, declaration, stored_matrix
from srnn.exporting.chain import ActivationKind
from srnn.kernels.contract import LayerWeights
from srnn.sparse import SparseMatrix

_CHUNKS = range(64, 15, -1)  # units that a layer takes at a time, if these divide its units
_USUAL_CHUNK = 32  # a multiple of the height of all blocks

# Of each cell: the sums it needs, those that its input adds to, and those that its state adds to; gate after gate.
SUMS: dict[Cell, tuple[str, str, str]] = {
    "gru": ("rzuv", "rzu", "rzv"),
    "lstm": ("ifgo", "ifgo", "ifgo"),
    "tanh": ("a", "a", "a"),
    "relu": ("a", "a", "a"),
    "clipped_relu": ("a", "a", "a"),
}
# From the sums of unit i of a chunk to its next state; LAYER is the layer's number.
_GATES: dict[Cell, tuple[str, ...]] = {
    "gru": (
        "const float reset = NAME_sigmoid(r[i]), update = NAME_sigmoid(z[i]);",
        "const float candidate = NAME_tanh(u[i] + reset * v[i]);",
        "state->next[unit + i] = candidate + update * (state->hLAYER[unit + i] - candidate);",
    ),
    "lstm": (
        "const float kept = NAME_sigmoid(f[i]) * state->cLAYER[unit + i];",
        "const float cell = kept + NAME_sigmoid(i_[i]) * NAME_tanh(g[i]);",
        "state->cLAYER[unit + i] = cell;",
        "state->next[unit + i] = NAME_sigmoid(o[i]) * NAME_tanh(cell);",
    ),
    "tanh": ("state->next[unit + i] = NAME_tanh(a[i]);",),
    "relu": ("state->next[unit + i] = a[i] > 0.0f ? a[i] : 0.0f;",),
    "clipped_relu": (
        "const float positive = a[i] > 0.0f ? a[i] : 0.0f;",
        f"state->next[unit + i] = positive < {CLIP}f ? positive : {CLIP}f;",
    ),
}

_ACTIVATIONS: dict[ActivationKind, str] = {
    "relu": "x[i] > 0.0f ? x[i] : 0.0f",
    "tanh": "NAME_tanh(x[i])",
    "sigmoid": "NAME_sigmoid(x[i])",
    "softmax": "x[i]",
    "log_softmax": "x[i]",
}


@dataclass
class Code:
    """What the layers of a network add to its C file.

    Attributes:
        name: of the network; all names of the file begin with it.
        arrays: declarations of constant arrays.
        functions: in the order in which they are defined.
        forms: those of the matrices, each once.
        flash: bytes of the arrays.
        multiply_adds: of a step.
        state: members of the state's struct -> numbers.
        types: of those that are no floats.
        layer_stack: bytes of a layer's sums; of the layer that takes most.
        product_stack: bytes that a product takes beside them; of the product that takes most.
    """

    name: str
    arrays: list[str] = field(default_factory=list)
    functions: list[str] = field(default_factory=list)
    forms: dict[str, StoredForm] = field(default_factory=dict)
    flash: int = 0
    multiply_adds: int = 0
    state: dict[str, int] = field(default_factory=dict)
    types: dict[str, str] = field(default_factory=dict)
    layer_stack: int = 0
    product_stack: int = 0
    _declared: set[str] = field(default_factory=set)
    _stored: dict[object, tuple[str, StoredMatrix]] = field(default_factory=dict)
    _kept: list[SparseMatrix] = field(default_factory=list)

    def array(self, name: str, numbers: np.ndarray) -> None:
        """Add a constant array, if there is none of this name."""
        if name not in self._declared:
            self._declared.add(name)
            self.arrays.append(declaration(name, numbers))
            self.flash += max(1, numbers.size) * numbers.itemsize

    def member(self, name: str, count: int, c_type: str) -> None:
        """Add a member to the state's struct."""
        self.state[name], self.types[name] = count, c_type

    def matrix(self, name: str, weight: SparseMatrix, chunk: int) -> tuple[str, StoredMatrix]:
        """Store a matrix, once: what two layers share is stored once. Returns its name in C and its arrays."""
        key = (weight.values.data_ptr(), weight.shape, chunk if weight.gates > 1 else 0)
        if key not in self._stored:
            self._kept.append(weight)  # so that no other one lies at its address
            stored = stored_matrix(weight, chunk)
            self.forms.setdefault(stored.form.name, stored.form)
            self._stored[key] = (f"{self.name}_{name}", stored)
        return self._stored[key]

    def multiply(self, name: str, weight: SparseMatrix, chunk: int, variable: str) -> tuple[str, str]:
        """Add a matrix that is multiplied with: the declaration of its walk, and the function to call."""
        array, stored = self.matrix(name, weight, chunk)
        for part, numbers in stored.arrays.items():
            self.array(f"{array}_{part}", numbers)
        if stored.form.by_table:
            self.array(f"{self.name}_int8", INT8_TABLE)
        elif stored.form.values == "int8" and "of blocks" not in self._declared:
            self._declared.add("of blocks")  # a table that only chips without vectors have
            self.flash += INT8_TABLE.nbytes
        self.multiply_adds += stored.multiply_adds
        self.product_stack = max(self.product_stack, stored.form.stack)
        start = walk(variable, stored.form, array, stored.columns, self.name)
        return start, f"{self.name}_multiply_{stored.form.name}"

    def shared_functions(self) -> list[str]:
        """The walks and products of all forms that are multiplied with."""
        text = "\n".join(self.functions)
        used = [form for form in self.forms.values() if f"{self.name}_multiply_{form.name}(" in text]
        return [f"{walk_type(form, self.name)}\n{multiply_function(form, self.name)}" for form in used]


def embedding_code(code: Code, number: int, weight: SparseMatrix) -> str:
    """Add an embedding; returns the name of ``void function(uint32_t token, float *y)``."""
    array, stored = code.matrix(f"w{number}", weight, weight.shape[0])
    parts = {part: numbers for part, numbers in stored.arrays.items() if part != "counts"}
    for part, numbers in (parts | ({"starts": stored.starts} if stored.form.counts else {})).items():
        code.array(f"{array}_{part}", numbers)
    body = row_code(stored.form, array, stored.columns, code.name)
    function = f"{code.name}_layer{number}"
    code.functions.append(f"static void {function}(uint32_t token, float *restrict y)\n{{\n{body}\n}}\n")
    return function


def linear_code(code: Code, number: int, weight: SparseMatrix, bias: Tensor | None) -> str:
    """Add a linear layer; returns the name of ``void function(const float *x, float *y)``."""
    outputs = weight.shape[0]
    start, multiply = code.multiply(f"w{number}", weight, outputs, "w")
    begin = "0.0f"
    if bias is not None:
        code.array(f"{code.name}_b{number}", bias.float().numpy())
        begin = f"{code.name}_b{number}[i]"
    function = f"{code.name}_layer{number}"
    code.functions.append(
        f"static void {function}(const float *restrict x, float *restrict y)\n{{\n"
        f"    {start}\n"
        f"    for (int i = 0; i < {outputs}; i++)\n        y[i] = {begin};\n"
        f"    {multiply}(&w, x, y, {outputs});\n}}\n"
    )
    return function


def activation_code(code: Code, number: int, kind: ActivationKind, width: int) -> str:
    """Add an activation; returns the name of ``void function(const float *x, float *y)``."""
    lines = [f"for (int i = 0; i < {width}; i++)", f"    y[i] = {_ACTIVATIONS[kind].replace('NAME', code.name)};"]
    if kind.endswith("softmax"):
        lines.append(f"{code.name}_{'log_' * kind.startswith('log')}probabilities(y, {width});")
    function = f"{code.name}_layer{number}"
    body = "\n".join(f"    {line}" for line in lines)
    code.functions.append(f"static void {function}(const float *x, float *y)\n{{\n{body}\n}}\n")
    return function


def recurrent_code(code: Code, label: str, weights: LayerWeights) -> str:
    """Add a step of a recurrent layer; returns the name of ``void function(NAME_state *state, const float *x)``.

    Args:
        code: of the network.
        label: the layer's number, with an ``r`` behind it for the direction that runs backwards.
        weights: of one direction.
    """
    cell, units = weights.cell, weights.hidden_size
    chunk = chunk_of(units, max(weights.w_ih.height, weights.w_hh.height))
    sums, by_input, by_state = SUMS[cell]
    code.state |= {f"h{label}": weights.output_size} | ({f"c{label}": units} if cell == "lstm" else {})
    code.state["next"] = max(code.state.get("next", 0), units)
    begin = _biases(code, label, weights)
    input_walk, input_multiply = code.multiply(f"w{label}_ih", weights.w_ih, chunk, "input")
    state_walk, state_multiply = code.multiply(f"w{label}_hh", weights.w_hh, chunk, "recurrent")
    code.layer_stack = max(code.layer_stack, 4 * chunk * len(sums))
    whole = units % chunk == 0
    lines = [
        f"static void {code.name}_layer{label}({code.name}_state *state, const float *x)",
        "{",
        f"    {input_walk}",
        f"    {state_walk}",
        f"    for (int unit = 0; unit < {units}; unit += {chunk}) {{",
        f"        const int n = {chunk if whole else f'{units} - unit < {chunk} ? {units} - unit : {chunk}'};",
        f"        float {', '.join(f'{sum_variable(s)}[{chunk}]' for s in sums)};",
        "        for (int i = 0; i < n; i++) {",
        *(f"            {sum_variable(s)}[i] = {begin.get(s, '0.0f')};" for s in sums),
        "        }",
        *(f"        {input_multiply}(&input, x, {sum_variable(s)}, n);" for s in by_input),
        *(f"        {state_multiply}(&recurrent, state->h{label}, {sum_variable(s)}, n);" for s in by_state),
        "        for (int i = 0; i < n; i++) {",
        *(f"            {line.replace('NAME', code.name).replace('LAYER', label)}" for line in _GATES[cell]),
        "        }",
        "    }",
        *_handed_over(code, label, weights),
        "}",
    ]
    code.functions.append("\n".join(lines) + "\n")
    return f"{code.name}_layer{label}"


def _handed_over(code: Code, label: str, weights: LayerWeights) -> list[str]:
    """From the next state of all units to h: as it is, or projected."""
    outputs = weights.output_size
    if weights.w_hr is None:
        return [f"    for (int i = 0; i < {outputs}; i++)", f"        state->h{label}[i] = state->next[i];"]
    walk_of, multiply = code.multiply(f"w{label}_hr", weights.w_hr, outputs, "projection")
    return [
        f"    {walk_of}",
        f"    for (int i = 0; i < {outputs}; i++)",
        f"        state->h{label}[i] = 0.0f;",
        f"    {multiply}(&projection, state->next, state->h{label}, {outputs});",
    ]


def sum_variable(sum_name: str) -> str:
    """What the array of a sum is called."""
    return "i_" if sum_name == "i" else sum_name  # i counts units


def _biases(code: Code, label: str, weights: LayerWeights) -> dict[str, str]:
    """Add the biases; returns what each sum begins with, if not with zero."""
    _, by_input, _ = SUMS[weights.cell]
    units, begin = weights.hidden_size, {}
    if weights.input_bias is not None:
        code.array(f"{code.name}_b{label}", weights.input_bias.float().numpy())
        for gate, name in enumerate(by_input[: GATES[weights.cell]]):
            offset = f"{gate * units} + " if gate else ""
            begin[name] = f"{code.name}_b{label}[{offset}unit + i]"
    if weights.new_bias is not None:
        code.array(f"{code.name}_b{label}_new", weights.new_bias.float().numpy())
        begin["v"] = f"{code.name}_b{label}_new[unit + i]"
    return begin


def chunk_of(units: int, height: int) -> int:
    """Units that a recurrent layer takes at a time: all, or a number that divides them, or the usual one.

    Example:
        >>> chunk_of(24, 1), chunk_of(256, 16), chunk_of(200, 1), chunk_of(101, 1)
        (24, 64, 50, 32)
    """
    if units <= _CHUNKS[0]:
        return units
    return next((n for n in _CHUNKS if units % n == 0 and n % height == 0), _USUAL_CHUNK)
