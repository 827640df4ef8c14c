"""Schemas from signatures: the typed arguments of a class or function are its options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any

from srnn.errors import UserError, did_you_mean


@dataclass(frozen=True)
class Range:
    """Bounds of a number, written in its annotation: ``Annotated[float, Range(gt=0, lt=1)]``.

    Example:
        >>> print(Range(gt=0, lt=1))
        above 0 and below 1
        >>> Range(gt=0, lt=1).check(0.9)
        0.9

    Attributes:
        gt: the number is above it.
        ge: the number is at least that.
        lt: the number is below it.
        le: the number is at most that. None, for all four, sets no bound.
    """

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __str__(self) -> str:
        if self.ge is not None and self.le is not None:
            return f"from {self.ge:,.12g} to {self.le:,.12g}"
        signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return " and ".join(
            f"{word} {bound:,.12g}" for key, word in signs.items() if (bound := getattr(self, key)) is not None
        )

    def check(self, value: Any) -> Any:
        """Return ``value`` as it is. Only numbers have bounds: ``"auto"`` or null beside them pass.

        Raises:
            ValueError: a number out of bounds, NaN among them; says what is allowed.
        """
        if isinstance(value, bool) or not isinstance(value, int | float) or self._holds(value):
            return value
        raise ValueError(f"must be {self}{self._of_percent(value)}")

    def _holds(self, value: float) -> bool:
        # Written so that NaN, of which every comparison is false, is out of any bounds.
        return (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )

    def _of_percent(self, value: float) -> str:
        """`` (90 % is 0.9)`` where a share of a whole was given as a percentage, which it may have."""
        is_share = 0 in (self.gt, self.ge) and any(bound is not None and bound <= 1 for bound in (self.lt, self.le))
        if not (is_share and 1 < value <= 100 and self._holds(value / 100)):
            return ""
        return f" ({value:.12g} % is {value / 100:.12g})"

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Let pydantic, which checks configs, apply ``check`` after the type."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


@dataclass(frozen=True)
class Option:
    """One option of a component: what its signature says.

    Attributes:
        name: of the argument.
        type: its annotation, with ``Range`` where it has bounds.
        default: ``inspect.Parameter.empty`` where there is none.
    """

    name: str
    type: Any
    default: Any = inspect.Parameter.empty

    @property
    def required(self) -> bool:
        """Whether the user has to give it."""
        return self.default is inspect.Parameter.empty


def _fields(factory: Callable[..., Any]) -> tuple[Field[Any], ...]:
    return fields(factory) if is_dataclass(factory) else ()


@dataclass(frozen=True)
class Component:
    """A registered class or function, its schema, and where it comes from.

    Attributes:
        kind: one of ``KINDS``.
        name: what configs call it.
        factory: the class or function.
        origin: the module and name, or the plug-in, for messages and ``srnn list``.
    """

    kind: str
    name: str
    factory: Callable[..., Any]
    origin: str

    @cached_property
    def _arguments(self) -> list[tuple[inspect.Parameter, Any]]:
        # A dataclass may inherit options: their types are names of the module of the class that has them.
        whole = is_dataclass(self.factory) or not inspect.isclass(self.factory)
        hints = typing.get_type_hints(self.factory if whole else self.factory.__init__, include_extras=True)
        parameters = inspect.signature(self.factory).parameters.values()
        return [(p, hints.get(p.name, Any)) for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]

    @property
    def options(self) -> dict[str, Option]:
        """What a config may set."""
        # A signature shows a placeholder for a default that a dataclass makes anew for each instance.
        factories = {f.name: f.default_factory for f in _fields(self.factory) if f.default_factory is not MISSING}
        return {
            p.name: Option(p.name, t, factories[p.name]() if p.name in factories else p.default)
            for p, t in self._arguments
            if p.name not in self.supplied
        }

    @property
    def supplied(self) -> list[str]:
        """Arguments the run supplies: keyword-only and without a default."""
        return [p.name for p, _ in self._arguments if p.kind is p.KEYWORD_ONLY and p.default is p.empty]

    def pick(self, supplied: Mapping[str, Any]) -> dict[str, Any]:
        """Of what the run supplies, what this component takes.

        Raises:
            UserError: it needs something that is not supplied.
        """
        target = self.factory.__init__ if inspect.isclass(self.factory) else self.factory
        if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(target).parameters.values()):
            return dict(supplied)
        for name in self.supplied:
            if name not in supplied:
                raise UserError(
                    f"{self.kind}={self.name} needs {name}, and these data have {', '.join(supplied) or 'nothing'}: "
                    f"choose another {self.kind} or data set."
                )
        return {name: supplied[name] for name in self.supplied}

    @property
    def summary(self) -> str:
        """The first line of its docstring."""
        return (inspect.getdoc(self.factory) or "").partition("\n")[0]

    def defaults(self) -> dict[str, Any]:
        """The config that selects this component; ``???`` marks what the user must give."""
        return {"name": self.name} | {o.name: "???" if o.required else o.default for o in self.options.values()}


def check_ranges(component: object) -> None:
    """Check the bounds in a dataclass's annotations, for those who build it in code and not from a config.

    Args:
        component: an instance of a dataclass.

    Raises:
        UserError: a number is out of bounds; names the attribute.
    """
    for name, annotation in typing.get_type_hints(type(component), include_extras=True).items():
        for mark in _ranges(annotation):
            try:
                mark.check(getattr(component, name))
            except ValueError as error:
                raise UserError(f"{name}={getattr(component, name)!r} {error}.") from None


def _ranges(annotation: Any) -> list[Range]:
    """The bounds on a number itself; not those on the values inside a list or mapping."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return [mark for mark in args[1:] if isinstance(mark, Range)]
    return [] if origin in (list, dict) else [mark for a in args for mark in _ranges(a)]


def plain_containers(value: Any) -> Any:
    """Lists and dictionaries of any sequences and mappings, such as tuples and OmegaConf's; others as they are.

    Example:
        >>> plain_containers({"layer_types": ("recurrent", "linear"), "sparsity": 0.9})
        {'layer_types': ['recurrent', 'linear'], 'sparsity': 0.9}
    """
    if isinstance(value, Mapping):
        return {key: plain_containers(each) for key, each in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [plain_containers(each) for each in value]
    return value


def _wants_tuple(annotation: Any) -> bool:
    return typing.get_origin(annotation) is tuple or any(map(_wants_tuple, typing.get_args(annotation)))


def check_options(options: Mapping[str, Option], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check ``given`` against the options' types and bounds.

    Args:
        options: what is allowed.
        given: key -> value, as a config or the command line gave it. A list may be any sequence, a mapping any mapping.
        where: the config key these belong under, for messages.

    Returns:
        ``given`` plus the defaults of what was left out.

    Raises:
        UserError: an unknown, missing, ill-typed or out-of-range key; names the key, the value, what is
            allowed and the nearest name.
    """
    import pydantic  # here, so that kernels and the runtime import without it

    prefix = f"{where}." if where else ""
    for key in given:
        if key not in options:
            what = f"{prefix}{key}: unknown option of {where or 'the config'}"
            if not options:
                raise UserError(f"{what}: what is chosen there has no options.")
            raise UserError(f"{what}.{did_you_mean(str(key), options)} Allowed: {', '.join(options)}.")
    for option in options.values():
        if given.get(option.name, "???" if option.required else None) == "???":
            raise UserError(
                f"{prefix}{option.name} must be given ({type_name(option.type)}): add {prefix}{option.name}=..."
            )
    given = {key: value if _wants_tuple(options[key].type) else plain_containers(value) for key, value in given.items()}
    fields: dict[str, Any] = {o.name: (o.type, ... if o.required else o.default) for o in options.values()}
    # Strict: true for an int, or "0.9" for a float, is a slip in a config. Options may begin with model_, as they like.
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    try:
        checked = pydantic.create_model("Options", __config__=config, **fields)(**given)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
        # One error is enough to mend. Of a union, such as a number or "auto", there is one for each member: bounds say
        # more than that it is no "auto".
        key = str(errors[0]["loc"][0])
        out_of_range = [e["ctx"]["error"] for e in errors if e["type"] == "value_error" and e["loc"][0] == key]
        allowed = str(out_of_range[0]) if out_of_range else f"must be {type_name(options[key].type)}"
        raise UserError(f"{prefix}{key}={given[key]!r} {allowed}.") from None
    return {name: getattr(checked, name) for name in options}


def type_name(annotation: Any) -> str:
    """An annotation in words a person types: ``int above 0``, ``'tanh' or 'relu'``."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        ranges = [str(mark) for mark in args[1:] if isinstance(mark, Range)]
        return " ".join([type_name(args[0]), *ranges])
    if origin is typing.Literal:
        return " or ".join(repr(a) if not isinstance(a, str) else f"'{a}'" for a in args)
    if args and origin not in (list, dict):
        return " or ".join(type_name(a) for a in args)
    if origin is list:
        return f"list of {type_name(args[0])}"
    if origin is dict:
        return f"mapping of {type_name(args[0])} to {type_name(args[1])}"
    return "null" if annotation in (None, type(None)) else getattr(annotation, "__name__", str(annotation))
