"""A chain -> an ONNX graph, opset 17, built node by node.

States are inputs and outputs by name: ``NAME`` comes in, ``NAME_next`` goes out. Time and batch are free. Weights are
dense: ONNX runtimes have no sparse kernels, and unpack sparse initialisers when they load.

Shapes: T steps, B streams, D directions, P outputs of a recurrent layer (H, or an LSTM's projection), L layers times
directions.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from srnn.cells import CLIP, GATES
from srnn.errors import UserError
from srnn.exporting.chain import (
    ActivationPart,
    Chain,
    Direction,
    EmbeddingPart,
    LinearPart,
    RecurrentPart,
    dense_weight,
)

OPSET, IR_VERSION = 17, 8  # of early 2022, so that older runtimes read it too
MOST_BYTES = 2_000_000_000  # bytes of weights: a protobuf message has less than 2 GiB
# Where each of ONNX's gates stands in torch's order: z, r, n of r, z, n; i, o, f, g of i, f, g, o.
_GATE_ORDER = {"gru": (1, 0, 2), "lstm": (0, 3, 1, 2)}
_OPERATORS = {"gru": "GRU", "lstm": "LSTM"}
_ACTIVATIONS = {
    "relu": "Relu",
    "tanh": "Tanh",
    "sigmoid": "Sigmoid",
    "softmax": "Softmax",
    "log_softmax": "LogSoftmax",
}


def onnx_model(chain: Chain) -> onnx.ModelProto:
    """The model of a chain. Its metadata's ``states`` is JSON: name of each state that comes in -> that goes out.

    Raises:
        UserError: the weights are more than such a file holds.
    """
    graph = _Graph()
    streams = ["batch", "time"] if chain.batch_first else ["time", "batch"]
    if chain.vocabulary_size is not None:
        x = graph.input("tokens", TensorProto.INT64, streams)
    else:
        x = graph.input("inputs", TensorProto.FLOAT, [*streams, chain.input_size])
    for name, (layers, size) in chain.states.items():
        graph.input(name, TensorProto.FLOAT, [layers, "batch", size])
    last, turned = next(reversed(chain.recurrent), None), False
    for part in chain.parts:
        if isinstance(part, EmbeddingPart):
            x = graph.node("Gather", [graph.constant(f"{part.name}_weight", part.weight), x])
        elif isinstance(part, LinearPart):
            x = _linear(graph, part.name, x, dense_weight(part.weight), part.bias)
        elif isinstance(part, ActivationPart):
            axis: dict[str, Any] = {"axis": -1} if "softmax" in part.kind else {}
            x = graph.node(_ACTIVATIONS[part.kind], [x], **axis)
        else:
            if chain.batch_first and not turned:  # ONNX's layers are time first
                x, turned = graph.node("Transpose", [x], perm=[1, 0, 2]), True
            x, last_h = _recurrent(graph, part, x)
            if part is last:
                x = _after_recurrent(graph, chain, part, x, last_h)
    graph.nodes.append(helper.make_node("Identity", [x], ["outputs"]))
    graph.output("outputs", [*([streams[0]] if chain.last_only else streams), None])
    for name, (layers, size) in chain.states.items():
        graph.output(f"{name}_next", [layers, "batch", size])
    model = graph.model()
    states = {name: f"{name}_next" for name in chain.states}
    helper.set_model_props(model, {"states": json.dumps(states)})
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Collects nodes, constants, inputs and outputs."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.count = 0

    def input(self, name: str, kind: int, shape: list[Any]) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: list[Any]) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))

    def constant(self, name: str, value: Any) -> str:
        if not isinstance(value, np.ndarray):
            value = dense_weight(value).numpy()
        self.constants[name] = numpy_helper.from_array(np.ascontiguousarray(value), name)
        return name

    def numbers(self, *values: int) -> str:
        return self.constant("_".join(["numbers", *map(str, values)]).replace("-", "m"), np.array(values, np.int64))

    def fresh(self) -> str:
        self.count += 1
        return f"x{self.count}"

    def node(self, operator: str, inputs: list[str], outputs: list[str] | None = None, **attributes: Any) -> str:
        outputs = outputs or [self.fresh()]
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def model(self) -> onnx.ModelProto:
        taken = sum(constant.ByteSize() for constant in self.constants.values())
        if taken > MOST_BYTES:
            raise UserError(f"an ONNX file holds at most {MOST_BYTES:,} bytes of weights, and these are {taken:,}.")
        graph = helper.make_graph(self.nodes, "network", self.inputs, self.outputs, list(self.constants.values()))
        opsets = [helper.make_opsetid("", OPSET)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="srnn")


def _linear(graph: _Graph, name: str, x: str, weight: Tensor, bias: Tensor | None) -> str:
    y = graph.node("MatMul", [x, graph.constant(f"{name}_weight", weight.T)])
    return y if bias is None else graph.node("Add", [y, graph.constant(f"{name}_bias", bias)])


def _after_recurrent(graph: _Graph, chain: Chain, part: RecurrentPart, x: str, last_h: str) -> str:
    """What the layers behind the recurrent ones read: every step, in the chain's layout, or the final state."""
    if not chain.last_only:
        return graph.node("Transpose", [x], perm=[1, 0, 2]) if chain.batch_first else x
    if part.directions == 1:
        return graph.node("Squeeze", [last_h, graph.numbers(0)])
    return graph.node("Reshape", [graph.node("Transpose", [last_h], perm=[1, 0, 2]), graph.numbers(0, -1)])


def _recurrent(graph: _Graph, part: RecurrentPart, x: str) -> tuple[str, str]:
    """The layers of one module: outputs [T, B, D * P], and the last layer's final h, [D, B, P]."""
    count, size = len(part.layers), part.directions
    pieces: dict[str, list[str]] = {}
    for name in part.states:
        pieces[name] = [name] if count == 1 else [graph.fresh() for _ in range(count)]
        if count > 1:
            graph.node("Split", [name, graph.numbers(*[size] * count)], pieces[name], axis=0)
    ends: dict[str, list[str]] = {name: [] for name in part.states}
    for index, layer in enumerate(part.layers):
        after = [f"{name}_next" if count == 1 else graph.fresh() for name in part.states]
        before = [pieces[name][index] for name in part.states]
        run = _projected_layer if layer[0].w_hr is not None else _layer
        x = run(graph, part, index, [x, *before], after)
        for name, end in zip(part.states, after, strict=True):
            ends[name].append(end)
    if count > 1:
        for name in part.states:
            graph.node("Concat", ends[name], [f"{name}_next"], axis=0)
    return x, next(iter(ends.values()))[-1]


def _layer(graph: _Graph, part: RecurrentPart, index: int, inputs: list[str], after: list[str]) -> str:
    """One layer as ONNX's own operator."""
    x, *before = inputs
    layer, name = part.layers[index], f"{part.name}_l{index}"

    def stacked(kind: str, weights: list[Tensor]) -> str:
        return graph.constant(f"{name}_{kind}", torch.stack([_reordered(w, part.cell) for w in weights]))

    w = stacked("w", [dense_weight(d.w_ih) for d in layer])
    r = stacked("r", [dense_weight(d.w_hh) for d in layer])
    bias = ""
    if layer[0].b_ih is not None or layer[0].b_hh is not None:
        parts = [torch.cat([_reordered(b, part.cell) for b in _biases(d)]) for d in layer]
        bias = graph.constant(f"{name}_b", torch.stack(parts))
    attributes: dict[str, Any] = {"hidden_size": part.hidden_size}
    if len(layer) == 2:  # the default, forward, is not written: emx-onnx-cgen 1.4 misreads it
        attributes["direction"] = "bidirectional"
    if part.cell == "gru":
        attributes["linear_before_reset"] = 1  # the reset gate multiplies W h + b, as in torch
    elif part.cell != "lstm":
        attributes["activations"] = ["Tanh" if part.cell == "tanh" else "Relu"] * len(layer)
    if part.cell == "clipped_relu":
        attributes["clip"] = CLIP  # of what goes into the activation, from both sides
    y = graph.fresh()
    operator = _OPERATORS.get(part.cell, "RNN")
    graph.node(operator, [x, w, r, bias, "", *before], [y, *after], **attributes)
    if len(layer) == 1:
        return graph.node("Squeeze", [y, graph.numbers(1)])
    turned = graph.node("Transpose", [y], perm=[0, 2, 1, 3])
    return graph.node("Reshape", [turned, graph.numbers(0, 0, -1)])


def _biases(direction: Direction) -> tuple[Tensor, Tensor]:
    """Both, zero where one is not there."""
    zero = torch.zeros(direction.w_ih.shape[0])
    return (
        zero if direction.b_ih is None else direction.b_ih,
        zero if direction.b_hh is None else direction.b_hh,
    )


def _reordered(weight: Tensor, cell: str) -> Tensor:
    """The rows of torch's gates in ONNX's order."""
    if cell not in _GATE_ORDER:
        return weight
    gates = weight.chunk(len(_GATE_ORDER[cell]))
    return torch.cat([gates[index] for index in _GATE_ORDER[cell]])


def _projected_layer(graph: _Graph, part: RecurrentPart, index: int, inputs: list[str], after: list[str]) -> str:
    """One LSTM layer with a projection, which ONNX's LSTM lacks: a loop of steps, one a direction."""
    x, *before = inputs
    layer, outputs, ends = part.layers[index], [], []
    halves = [[piece] if len(layer) == 1 else [graph.fresh(), graph.fresh()] for piece in before]
    if len(layer) == 2:
        for piece, names in zip(before, halves, strict=True):
            graph.node("Split", [piece, graph.numbers(1, 1)], names, axis=0)
    for backward, direction in enumerate(layer):
        name = f"{part.name}_l{index}{'_reverse' * backward}"
        u = _linear(graph, f"{name}_ih", x, dense_weight(direction.w_ih), sum(_biases(direction)))  # type: ignore[arg-type]
        start = [graph.node("Squeeze", [names[backward], graph.numbers(0)]) for names in halves]
        h, c, y = graph.fresh(), graph.fresh(), graph.fresh()
        graph.node(
            "Scan", [*start, u], [h, c, y], num_scan_inputs=1, body=_projected_step(graph, name, direction),
            scan_input_directions=[backward], scan_output_directions=[backward],
        )  # fmt: skip
        outputs.append(y)
        ends.append([graph.node("Unsqueeze", [end, graph.numbers(0)]) for end in (h, c)])
    for target, several in zip(after, zip(*ends, strict=True), strict=True):
        graph.node("Concat", list(several), [target], axis=0)
    return outputs[0] if len(outputs) == 1 else graph.node("Concat", outputs, axis=2)


def _projected_step(graph: _Graph, name: str, direction: Direction) -> onnx.GraphProto:
    """h, c and x W' + b of a step -> h, c and the output, which is h."""
    assert direction.w_hr is not None
    w_hh = graph.constant(f"{name}_hh_weight", dense_weight(direction.w_hh).T)
    w_hr = graph.constant(f"{name}_hr_weight", dense_weight(direction.w_hr).T)
    steps: list[tuple[str, list[str], list[str], dict[str, Any]]] = [
        ("MatMul", ["h", w_hh], ["v"], {}),
        ("Add", ["u", "v"], ["a"], {}),
        ("Split", ["a"], ["i", "f", "g", "o"], {"axis": 1}),
        *(("Sigmoid", [gate], [f"{gate}_open"], {}) for gate in "ifo"),
        ("Tanh", ["g"], ["new"], {}),
        ("Mul", ["f_open", "c"], ["kept"], {}),
        ("Mul", ["i_open", "new"], ["added"], {}),
        ("Add", ["kept", "added"], ["c_next"], {}),
        ("Tanh", ["c_next"], ["shown"], {}),
        ("Mul", ["o_open", "shown"], ["wide"], {}),
        ("MatMul", ["wide", w_hr], ["h_next"], {}),
        ("Identity", ["h_next"], ["y"], {}),
    ]
    nodes: list[Any] = [helper.make_node(op, ins, outs, **attributes) for op, ins, outs, attributes in steps]
    rows, outputs = direction.w_ih.shape[0], direction.w_hh.shape[1]
    sizes = {"h": outputs, "c": rows // GATES["lstm"], "u": rows, "h_next": outputs, "y": outputs}
    sizes["c_next"] = sizes["c"]

    def infos(*names: str) -> list[Any]:
        return [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", sizes[n]]) for n in names]

    return helper.make_graph(nodes, f"{name}_step", infos("h", "c", "u"), infos("h_next", "c_next", "y"))
