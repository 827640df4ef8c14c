"""The functions of a C file that its user calls, made of the functions of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from srnn.exporting.c.layer_code import Code


@dataclass(frozen=True)
class Stage:
    """A layer as the calls see it.

    Attributes:
        kind: embedding, recurrent, plain for what has no state, or last: from here on only the last state counts.
        inputs: numbers it takes; of an embedding the tokens there are.
        width: numbers it gives.
        functions: of its code; two where a recurrent layer is bidirectional.
        members: of the state's struct, which hold its outputs; none where they go to the caller's memory.
    """

    kind: Literal["embedding", "recurrent", "plain", "last"]
    inputs: int
    width: int
    functions: tuple[str, ...] = ()
    members: tuple[str, ...] = ()


@dataclass(frozen=True)
class Calls:
    """What a caller has to know of a network.

    Attributes:
        name: all its names begin with it.
        stages: its layers.
        has_table: whether there is a table of characters.
        in_type: C type of an input's numbers.
        out_type: C type of an output's numbers.
        input_scale: what 1 of an input stands for.
        output_scale: what 1 of an output stands for.
    """

    name: str
    stages: tuple[Stage, ...]
    has_table: bool = False
    in_type: str = "float"
    out_type: str = "float"
    input_scale: float = 1.0
    output_scale: float = 1.0

    @property
    def in_integers(self) -> bool:
        """Whether it computes with whole numbers."""
        return self.out_type != "float"

    @property
    def tokens(self) -> int:
        """How many tokens there are; 0 where the input is numbers."""
        return self.stages[0].inputs if self.stages[0].kind == "embedding" else 0

    @property
    def token_type(self) -> str:
        """C type of a token; one that holds a number more, so that comparing it with ``tokens`` is no constant."""
        return "uint16_t" if self.tokens < 1 << 16 else "uint32_t"

    @property
    def inputs(self) -> int:
        """Numbers of a step's input; 0 where it is a token."""
        return 0 if self.tokens else self.stages[0].inputs

    @property
    def outputs(self) -> int:
        """Numbers of an output."""
        return self.stages[-1].width

    @property
    def can_step(self) -> bool:
        """Whether there is NAME_step; a bidirectional network has NAME_run alone."""
        return all(len(stage.functions) < 2 for stage in self.stages)

    @property
    def reads_last(self) -> bool:
        """Whether a sequence has one output, made of the last state."""
        return any(stage.kind == "last" for stage in self.stages)

    @property
    def sequence(self) -> tuple[Stage, ...]:
        """The stages that see each step."""
        kinds = [stage.kind for stage in self.stages]
        return self.stages[: kinds.index("last")] if self.reads_last else self.stages

    @property
    def head(self) -> tuple[Stage, ...]:
        """The stages that see the last state alone."""
        return self.stages[len(self.sequence) + 1 :]

    @property
    def kept(self) -> tuple[Stage, ...]:
        """Where NAME_run goes layer by layer: the stages whose outputs of all steps wait for the next one."""
        rows = [stage for stage in self.sequence if stage.kind in ("recurrent", "plain")]
        return () if self.can_step else tuple(rows[:-1])

    @property
    def scratch(self) -> int:
        """Numbers of an input's type, a step of a sequence, that NAME_run is lent: of two layers or one."""
        return min(2, len(self.kept)) * self.row

    @property
    def row(self) -> int:
        """Numbers that a step takes of one layer in that memory."""
        return max((stage.width for stage in self.kept), default=0)

    @property
    def step_input(self) -> str:
        """The parameter of NAME_step that is read."""
        return f"{self.name}_token input" if self.tokens else f"const {self.in_type} *input"

    @property
    def step_declaration(self) -> str:
        """Of NAME_step."""
        return f"void {self.name}_step({self.name}_state *state, {self.step_input}, {self.out_type} *output)"

    @property
    def run_declaration(self) -> str:
        """Of NAME_run."""
        given = f"const {self.name}_token *inputs" if self.tokens else f"const {self.in_type} *inputs"
        result = "output" if self.reads_last else "outputs"
        lent = f", {self.in_type} *scratch" if self.scratch else ""
        return f"void {self.name}_run({self.name}_state *state, {given}, size_t steps, {self.out_type} *{result}{lent})"


def calls_code(calls: Calls, code: Code) -> str:
    """NAME_reset, NAME_step and NAME_run."""
    lines = []
    for member, count in code.state.items():
        if member[0] in "hcq":
            zero = "0" if calls.in_integers else "0.0f"
            lines += [f"for (int i = 0; i < {count}; i++)", f"    state->{member}[i] = {zero};"]
    reset = _function(f"void {calls.name}_reset({calls.name}_state *state)", lines)
    run = _stepped(calls) if calls.can_step else [_function(calls.run_declaration, _layer_by_layer(calls))]
    return "\n".join([reset, *run])


def _stepped(calls: Calls) -> list[str]:
    """NAME_step, and NAME_run as a loop of it."""
    lines, x = _one_step(calls, calls.sequence, _known(calls, "input"))
    at = "inputs[t]" if calls.tokens else f"inputs + t * {calls.inputs}u"
    loop = "for (size_t t = 0; t < steps; t++)"
    if not calls.reads_last:
        step = _function(calls.step_declaration, lines + _copied(calls, x))
        run = [loop, f"    {calls.name}_step(state, {at}, outputs + t * {calls.outputs}u);"]
        return [step, _function(calls.run_declaration, run)]
    ends, y = _one_step(calls, calls.head, x)
    state = f"{calls.name}_state *state"
    read = _function(f"static void {calls.name}_read({state}, {calls.step_input})", lines)
    answer = _function(f"static void {calls.name}_answer({state}, {calls.out_type} *output)", ends + _copied(calls, y))
    last = f"{calls.name}_answer(state, output);"
    step = _function(calls.step_declaration, [f"{calls.name}_read(state, input);", last])
    run = [loop, f"    {calls.name}_read(state, {at});", last]
    return [read, answer, step, _function(calls.run_declaration, run)]


def _layer_by_layer(calls: Calls) -> list[str]:
    """The body of a bidirectional network's NAME_run: each layer over the whole sequence, then the next."""
    lines, lookup = [], ""
    buffers = ["scratch + t * ROW", "scratch + (steps + t) * ROW"]
    source = f"inputs + t * {calls.inputs}u"
    for stage in calls.sequence:
        target = buffers[0].replace("ROW", f"{calls.row}u") if stage in calls.kept else ""
        if not calls.reads_last and not target:
            target = f"outputs + t * {calls.outputs}u"
        if stage.kind == "embedding":
            lookup = f"{stage.functions[0]}({_known(calls, 'inputs[t]')}, state->{stage.members[0]});"
            source = f"state->{stage.members[0]}"
        else:
            for part in range(len(stage.functions)):
                lines += _over_steps(stage, part, [lookup] if lookup else [], source, target)
            source, lookup = target, ""
            buffers.reverse()
    if calls.reads_last:
        ends, x = _one_step(calls, calls.head, _last_state(calls, lines))
        lines += ends + _copied(calls, x)
    return lines


def _over_steps(stage: Stage, part: int, lookup: list[str], source: str, target: str) -> list[str]:
    """One direction of a layer over all steps, each from ``source`` to ``target``."""
    body = [f"const size_t t = {'steps - 1 - i' if part else 'i'};", *lookup]
    if stage.kind == "plain":
        body.append(f"{stage.functions[0]}({source}, {target});")
    else:
        body.append(f"{stage.functions[part]}(state, {source});")
        units = stage.width // len(stage.functions)
        if target:
            body += [f"for (int j = 0; j < {units}; j++)"]
            body += [f"    ({target})[{part * units} + j] = state->{stage.members[part]}[j];"]
    return ["for (size_t i = 0; i < steps; i++) {", *(f"    {line}" for line in body), "}"]


def _last_state(calls: Calls, lines: list[str]) -> str:
    """Add what puts both directions' last states side by side; returns where."""
    stage = calls.sequence[-1]
    if len(stage.members) == 1:
        return f"state->{stage.members[0]}"
    units = stage.width // 2
    lines.append(f"for (int j = 0; j < {units}; j++) {{")
    lines += [f"    state->last[{part * units} + j] = state->{m}[j];" for part, m in enumerate(stage.members)]
    lines.append("}")
    return "state->last"


def _one_step(calls: Calls, stages: Sequence[Stage], x: str) -> tuple[list[str], str]:
    """Statements for one step of some stages, and where their result lies then."""
    lines: list[str] = []
    for stage in stages:
        to = f"state->{stage.members[0]}" if stage.members else "output"
        given = f"state, {x}" if stage.kind == "recurrent" else f"{x}, {to}"
        lines.append(f"{stage.functions[0]}({given});")
        x = to
    return lines, x


def _known(calls: Calls, token: str) -> str:
    """A token, or 0 in place of one that there is not: nothing is read beyond the embedding."""
    return f"{token} < {calls.tokens}u ? {token} : 0u" if calls.tokens else token


def _copied(calls: Calls, x: str) -> list[str]:
    return [] if x == "output" else [f"for (int i = 0; i < {calls.outputs}; i++)", f"    output[i] = {x}[i];"]


def _function(declaration: str, body: Sequence[str]) -> str:
    lines = "\n".join(f"    {line}" for line in body)
    return f"{declaration}\n{{\n{lines}\n}}\n"
