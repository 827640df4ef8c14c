"""``kernel=auto`` on a whole network: dense, one sparse backend, or some of both, whatever is fastest.

Measured layer by layer, a backend can win that loses in the network: the caches are cold there, and Python stands in
between. So where a network can be run, all of it is timed, in turns with torch's own modules, at the lengths that are
used; a backend that does not beat the best dense one at every length of its class is not taken.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from srnn.inference.base import TORCH, SparseModule, Use
from srnn.inference.copying import set_apart
from srnn.inference.example_calls import ExampleCalls
from srnn.kernels.choosing import DENSE, MARGIN, Choice, described_matrix, measuring, told_of
from srnn.kernels.remembering import busy, recall, remember
from srnn.kernels.timing import Call, hardware, timed

_log = logging.getLogger("srnn.kernels")

LENGTHS = (1, 16, 100, 400)
_SECONDS = 0.8  # for a class of lengths, after each candidate was tried once
_ROUNDS = 9
_BURST = 2e-3  # seconds that calls are repeated for, so that each finds the cache as it left it
_LONG = 0.03  # seconds of 100 steps from which on 400 are not timed: what a call costs beside its steps is little then
_HOPELESS = 2.0  # times the fastest: such a candidate is not timed again
_BEHIND = 1.5  # times the fastest at every length, after two rounds: such a candidate is not timed again, either
_LOST = 2.5  # times the fastest: on a CPU such a candidate is not tried with longer sequences
_SLOW = 0.2  # seconds of a call that is made once only: of a dense backend if it takes ten times as long as the fastest
_SWAPS = 4.0  # times what a slow winner takes: for so long parts of it are given to other backends

Names = dict[str, str]  # part of the network -> the candidate that runs it


def choose_for_network(network: nn.Module, example: Any) -> list[Choice]:
    """Decide what runs each sparse module of a network whose kernel is ``auto``, by timing the network.

    Args:
        network: with sparse modules; decisions are kept in them. Calls are made of a copy that shares all
            weights, and torch's random numbers go on as if there had been none.
        example: what it is called with; see ``ExampleCalls``.

    Returns:
        A choice for each class of lengths; what was not decided is measured layer by layer when it is first run.
    """
    parts = {name: m for name, m in network.named_modules() if isinstance(m, SparseModule) and m.candidates()}
    if not parts:
        return []
    device = next(iter(parts.values())).tensors()[0].device
    name = f"network {_fingerprint(network, parts)}"
    given = _described(example)
    uses_of = f"uses of {name}, {given}, {_several(torch.get_num_threads(), 'thread')}"
    again = None if given is None else _as_before(uses_of, parts, device)
    if again is not None:
        return again
    kept: list[dict[str, Any]] = []
    devices = [device] if device.type == "cuda" else []
    with measuring, torch.inference_mode(), torch.random.fork_rng(devices):
        # Not of the network itself: what it keeps of its calls would stay in it.
        apart = set_apart(network, [one for part in parts.values() for one in (part.kernel, *part.tensors())])
        originals, of_copy = parts, dict(apart.named_modules())
        parts = {name: m for name in originals if isinstance(m := of_copy[name], SparseModule)}
        examples = ExampleCalls(apart, parts, example)
        found: list[Choice] = []
        lost, warm = set[str](), set[str]()
        for lengths in examples.classes(LENGTHS):
            use = f"{_several(examples.streams, 'stream')}, {_several(lengths[0], 'step')}"
            what = f"{name}, {use}{' and more' * (len(lengths) > 1)}, {_several(torch.get_num_threads(), 'thread')}"
            calls = {steps: examples.call(steps) for steps in lengths}
            uses = examples.uses([calls[lengths[0]]])  # those of longer ones are the same
            if any(uses.values()):  # cells take single steps, whatever the length
                decision = _Network(parts, uses, calls, device, lost, warm)
                found.append(decision.decide(what, use))
                kept.append({"what": what, "use": use, "uses": {name: sorted(some) for name, some in uses.items()}})
                # Of sequences only: a step may cost a candidate more than it does within a sequence.
                lost = decision.lost if device.type == "cpu" and lengths[0] > 1 else set()
                warm = decision.warm if device.type == "cpu" and lengths[0] > 1 else set()  # steps compile less
    for name, part in originals.items():
        part.decided = parts[name].decided
        part.forget()
    if kept and given is not None and not busy():
        remember(decision.key, uses_of, {"classes": kept})
    return found


def _as_before(uses_of: str, parts: dict[str, SparseModule], device: torch.device) -> list[Choice] | None:
    """What was decided for this network and example before, without a call of it; None where something is not known."""
    entry = recall(_Network(parts, {}, {}, device).key, uses_of)
    try:
        classes = [] if entry is None else entry["classes"]
        uses = [{name: {tuple(use) for use in one["uses"][name]} for name in parts} for one in classes]
        decisions = [_Network(parts, some, {}, device) for some in uses]
        known = [d.recalled(one["what"]) for d, one in zip(decisions, classes, strict=True)]
    except (KeyError, TypeError):
        return None
    if not known or None in known:
        return None
    return [d.decide(one["what"], one["use"]) for d, one in zip(decisions, classes, strict=True)]


def _described(example: Any) -> str | None:
    """Shapes and types of the inputs, which say what a network makes of them; None of other things."""
    if isinstance(example, Tensor):
        return f"{tuple(example.shape)} {example.dtype}"
    if type(example) in (tuple, list):
        several = [_described(one) for one in example]
        return None if None in several else f"({', '.join(map(str, several))})"
    return repr(example) if example is None or isinstance(example, bool | int | float) else None


def _several(count: int, word: str) -> str:
    return f"{count:,} {word}{'s' * (count != 1)}"


def _fingerprint(network: nn.Module, parts: Mapping[str, SparseModule]) -> str:
    """What a decision depends on, in a few letters."""
    words = [str(type(network))]
    for name, part in parts.items():
        words += [name, str(part.construction()), *(described_matrix(matrix) for matrix in part.matrices().values())]
    return hashlib.sha256("\n".join(words).encode()).hexdigest()[:12]


@dataclass
class _Network:
    """The decision for one class of lengths."""

    parts: dict[str, SparseModule]
    uses: dict[str, set[Use]]
    calls: dict[int, Call]
    device: torch.device
    lost: set[str] = field(default_factory=set)  # candidates that were far slower with shorter sequences
    warm: set[str] = field(default_factory=set)  # candidates that have run: what compiles did so
    left_out: dict[str, str] = field(default_factory=dict)

    @cached_property
    def candidates(self) -> dict[str, Names]:
        """See ``_everywhere``."""
        return self._everywhere()

    @property
    def key(self) -> str:
        """What decisions are good for."""
        return f"{hardware(self.device)}; {' '.join(self.candidates)}"

    def recalled(self, what: str) -> tuple[Names, Choice] | None:
        """What was decided before."""
        return _choice_of(recall(self.key, what), self.parts, self.candidates)

    def decide(self, what: str, use: str) -> Choice:
        """Measure, or remember; the modules are then told."""
        known = self.recalled(what)
        if known is None:
            names, choice = self._measured(what, use, self.candidates)
            if not busy():
                remember(self.key, what, asdict(choice) | {"parts": names})
        else:
            names, choice = known
        self._run_by(names)
        for part in self.parts.values():
            part.forget()  # what was made ready for candidates that lost
        auto: Any = next(iter(self.parts.values())).kernel
        auto.choices[what] = choice
        _log.info("%s", choice)
        return choice

    def _everywhere(self) -> dict[str, Names]:
        """Each candidate in all parts that it can run; torch in the others."""
        kernels = next(iter(self.parts.values())).candidates()
        able: dict[str, Names] = {}
        for name, kernel in kernels.items():
            if kernel.device_types is not None and self.device.type not in kernel.device_types:
                continue
            reasons = {n: kernel.supports(p.weights_to_run(), self.device) for n, p in self.parts.items()}
            if all(reasons.values()):
                self.left_out[name] = next(str(reason) for reason in reasons.values())
            else:
                able[name] = {n: name if reason is None else TORCH for n, reason in reasons.items()}
        return able

    def _measured(self, what: str, use: str, everywhere: dict[str, Names]) -> tuple[Names, Choice]:
        tried, once = self._tried(everywhere)
        lengths = tuple(self.calls) if once[TORCH] < _LONG else tuple(self.calls)[:1]
        slow = once[TORCH] > _SLOW and once.keys() <= self.warm  # then one call of each has to do
        self.warm = self.warm | once.keys()
        times = {n: {lengths[0]: once[n]} for n in tried} if slow else self._timed(tried, lengths, 0.4 * _SECONDS)
        winner = _best(times)
        mixed = self._mixed(tried, winner, times, lengths)
        if mixed != tried[winner]:  # timed once more: the least of many figures is partly luck
            dense = [name for name in tried if name in DENSE]
            finalists = {name: tried[name] for name in {*dense, winner}} | {"mixed": mixed}
            times |= self._timed({"mixed": mixed} if slow else finalists, lengths, 0.2 * _SECONDS)
            winner = _best({name: times[name] for name in finalists})
        names = mixed if winner == "mixed" else tried[winner]
        seconds = {_words(mixed) if name == "mixed" else name: t[lengths[0]] for name, t in times.items()}
        return names, Choice(what, _words(names), seconds, self.left_out, "whole network", use)

    def _tried(self, candidates: dict[str, Names]) -> tuple[dict[str, Names], dict[str, float]]:
        """Candidates that run, and are not far slower than others, and times of all; what compiles does so here."""
        call = next(iter(self.calls.values()))
        seconds: dict[str, float] = {}
        for name in sorted(candidates, key=DENSE.__contains__):
            if name in self.lost and name != TORCH:
                continue
            self._run_by(candidates[name])
            try:
                took = timed(call, self.device)
            except Exception as error:
                if name in DENSE:
                    raise
                self.left_out[name] = told_of(name, error)
                continue
            hopeless = name in DENSE and took > 10 * min(seconds.values(), default=took)
            known = took > _SLOW and (hopeless or name in self.warm)
            seconds[name] = took if known else _burst(call, self.device)
        fastest = min(seconds.values())
        self.lost = self.lost | {name for name in seconds if seconds[name] > _LOST * fastest}
        # In the order of the candidates, of which the first wins where several are as fast.
        limit = _HOPELESS * fastest
        able = {n: names for n, names in candidates.items() if n == TORCH or seconds.get(n, limit) < limit}
        return able, seconds

    def _mixed(
        self, tried: dict[str, Names], winner: str, times: dict[str, dict[int, float]], lengths: tuple[int, ...]
    ) -> Names:
        """The winner, but for parts in which the best of the other kind makes the network faster."""
        others = [name for name in tried if (name in DENSE) != (winner in DENSE)]
        if not others or len(self.parts) == 1:
            return tried[winner]
        other = min(others, key=lambda name: sum(times[name].values()))
        swapped = {
            part: tried[winner] | {part: tried[other][part]}
            for part in self.parts
            if tried[other][part] != tried[winner][part]
        }
        budget = max(0.4 * _SECONDS, _SWAPS * times[winner][lengths[0]])
        found = self._timed({"": tried[winner]} | swapped, lengths, 0.4 * _SECONDS, budget)
        measured = [name for name in swapped if len(found[name]) == len(lengths)]
        faster = {n for n in measured if all(found[n][t] < MARGIN * found[""][t] for t in lengths)}
        return tried[winner] | {part: tried[other][part] for part in faster}

    def _timed(
        self, candidates: dict[str, Names], lengths: Iterable[int], seconds: float, most: float = float("inf")
    ) -> dict[str, dict[int, float]]:
        """The shortest time of each, of each length, in turns; those that are far behind after two are left there.

        No further turn is begun after ``seconds``, and after ``most`` none is ended: there are no times of the rest.
        """
        found: dict[str, dict[int, float]] = {name: {} for name in candidates}
        lengths, racing, began = tuple(lengths), dict(candidates), time.monotonic()
        for turn in range(_ROUNDS):
            for steps, (name, names) in itertools.product(lengths, racing.items()):
                if time.monotonic() - began > most:
                    break
                self._run_by(names)
                took = _burst(self.calls[steps], self.device)
                found[name][steps] = min(took, found[name].get(steps, took))
            if turn:
                best = {t: min(times[t] for times in found.values()) for t in lengths}
                racing = {n: c for n, c in racing.items() if any(found[n][t] < _BEHIND * best[t] for t in lengths)}
            if len(racing) == 1 or time.monotonic() - began > seconds:
                break
        return found

    def _run_by(self, names: Names) -> None:
        for name, part in self.parts.items():
            part.decided = part.decided | dict.fromkeys(self.uses[name], names[name])


def _burst(call: Call, device: torch.device) -> float:
    """Seconds of a call, of several in a row where it is short; the first is not counted: its weights are elsewhere."""
    once = timed(call, device)
    times = min(20, int(_BURST / max(once, 1e-6)))
    return min(timed(call, device) for _ in range(times)) if times else once


def _best(times: Mapping[str, Mapping[int, float]]) -> str:
    """The candidate that is fastest at the length where it does worst, against the best dense one there."""
    lengths = next(iter(times.values()))
    dense = {t: min(found[t] for name, found in times.items() if name in DENSE) for t in lengths}
    worst = {name: max(found[t] / dense[t] for t in lengths) for name, found in times.items()}
    winner = min(worst, key=worst.__getitem__)
    return winner if worst[winner] < MARGIN else min((n for n in worst if n in DENSE), key=worst.__getitem__)


def _words(names: Names) -> str:
    """What runs most of a network, and what the rest."""
    most = max(names.values(), key=list(names.values()).count)
    rest = [f"{part} {name}" for part, name in names.items() if name != most]
    return ", ".join([most, *rest])


def _choice_of(
    entry: dict[str, Any] | None, parts: Mapping[str, SparseModule], candidates: Mapping[str, Names]
) -> tuple[Names, Choice] | None:
    """What was kept, if it is of these parts and candidates."""
    if entry is None:
        return None
    names = entry.pop("parts", None)
    if not isinstance(names, dict) or names.keys() != parts.keys() or not set(names.values()) <= candidates.keys():
        return None
    try:
        return names, replace(Choice(**entry))
    except TypeError:
        return None
