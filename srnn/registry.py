"""The registry: every model, dataset, pruning method, kernel and optimiser srnn can name.

A component is a class or function with typed arguments, and those arguments *are* its schema::

    @register.dataset("brackets")
    class Brackets(TextStreams):
        def __init__(self, pairs: int = 3, *, batch_size: int = 32): ...

Its name is then selectable as ``dataset=brackets``, with a YAML file in ``conf/`` or without. Keyword-only
arguments without a default (``*, vocabulary_size: int``) are not options: the run supplies them; ``**sizes`` takes all
that it supplies.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import sys
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from srnn.errors import UserError, did_you_mean

# The package that registers srnn's own components of each kind. Only the kind that is asked for gets
# imported: rebuilding a model must not import the data pipeline.
KINDS = {
    "model": "srnn.models",
    "dataset": "srnn.datasets",
    "pruning": "srnn.pruning",
    "kernel": "srnn.kernels",
    "optimizer": "srnn.training.optimizers",
}

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """Bounds of a number, written in its annotation: ``Annotated[float, Range(gt=0, lt=1)]``."""

    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None

    def __str__(self) -> str:
        signs = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
        return " and ".join(
            f"{word} {bound:.12g}" for key, word in signs.items() if (bound := getattr(self, key)) is not None
        )

    def check(self, value: Any) -> Any:
        """Return ``value``, or raise ``ValueError`` saying what is allowed. Only numbers have bounds."""
        if isinstance(value, bool) or not isinstance(value, int | float):
            return value
        inside = (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )
        if not inside:
            raise ValueError(f"must be {self}")
        return value

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Let pydantic, which checks configs, apply ``check`` after the type."""
        from pydantic_core import core_schema

        return core_schema.no_info_after_validator_function(self.check, handler(source))


@dataclass(frozen=True)
class Option:
    """One option of a component: what its signature says."""

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
    """A registered class or function and where it comes from."""

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
        """Of what the run supplies, what this component takes. Raises UserError for what it wants and is not there."""
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
    """Check the bounds in a dataclass's annotations, for those who build it in code and not from a config."""
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


def check_options(options: Mapping[str, Option], given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check ``given`` against the options' types and bounds.

    Args:
        options: what is allowed.
        given: key -> value, as a config or the command line gave it.
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
            allowed = ", ".join(options) or "nothing"
            raise UserError(
                f"{prefix}{key}: unknown option of {where or 'the config'}.{did_you_mean(str(key), options)} "
                f"Allowed: {allowed}."
            )
    for option in options.values():
        if given.get(option.name, "???" if option.required else None) == "???":
            raise UserError(
                f"{prefix}{option.name} must be given ({type_name(option.type)}): add {prefix}{option.name}=..."
            )
    fields: dict[str, Any] = {o.name: (o.type, ... if o.required else o.default) for o in options.values()}
    config = pydantic.ConfigDict(strict=True, arbitrary_types_allowed=True, protected_namespaces=())
    try:
        checked = pydantic.create_model("Options", __config__=config, **fields)(**given)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False)
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


@dataclass
class Registry:
    """Names -> components, by kind. ``register`` below is the one srnn uses."""

    components: dict[tuple[str, str], Component] = field(default_factory=dict)
    broken_plugins: dict[str, str] = field(default_factory=dict)
    conf_folders: list[Path] = field(default_factory=list)  # of installed plug-ins
    _plugin: str | None = None

    def add(self, kind: str, name: str) -> Callable[[F], F]:
        """Decorator that registers a class or function as ``kind=name``. A name already taken raises."""

        def decorate(factory: F) -> F:
            taken = self.components.get((kind, name))
            if taken is not None:
                raise UserError(f"{kind} '{name}' is registered already, by {taken.origin}; pick another name.")
            origin = self._plugin or f"{factory.__module__}.{factory.__qualname__}"
            self.components[kind, name] = Component(kind, name, factory, origin)
            return factory

        return decorate

    def __getattr__(self, kind: str) -> Callable[[str], Callable[[F], F]]:
        if kind in KINDS:
            return partial(self.add, kind)
        raise AttributeError(f"no kind '{kind}'; the kinds are {', '.join(KINDS)}")

    def names(self, kind: str) -> list[str]:
        """All names of a kind, srnn's own first."""
        importlib.import_module(KINDS[kind])
        return [name for k, name in self.components if k == kind]

    def get(self, kind: str, name: str) -> Component:
        """The component, or a UserError with the nearest name and all the names there are."""
        names = self.names(kind)
        if name not in names:
            raise UserError(
                f"{kind}={name}: no such {kind}.{did_you_mean(str(name), names)} There are: {', '.join(sorted(names))}."
            )
        return self.components[kind, name]

    def check(self, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Check ``config`` (``name`` and options) and return it complete."""
        if not isinstance(config.get("name"), str):
            raise UserError(
                f"{kind}.name={config.get('name')!r} must be the name of a {kind}: {', '.join(self.names(kind))}."
            )
        component = self.get(kind, config["name"])
        given = {key: value for key, value in config.items() if key != "name"}
        return {"name": component.name} | check_options(component.options, given, kind)

    def build(self, kind: str, config: Mapping[str, Any], **supplied: Any) -> Any:
        """Check ``config`` and make the component. ``supplied`` holds what the run gives, if it takes it."""
        options = self.check(kind, config)
        component = self.get(kind, options.pop("name"))
        return component.factory(**options, **component.pick(supplied))

    def rebuild(self, kind: str, config: Mapping[str, Any], **supplied: Any) -> Any:
        """``build`` for a config out of a file that srnn wrote: without pydantic, which the runtime need not import.

        Names and bounds are checked here, types by the component itself.
        """
        component = self.get(kind, str(config.get("name")))
        options = {key: value for key, value in config.items() if key != "name"}
        for key, value in options.items():
            if key not in component.options:
                raise UserError(f"{kind}={component.name} has no option {key}: the file is of another version.")
            for mark in _ranges(component.options[key].type):
                try:
                    mark.check(value)
                except ValueError as error:
                    raise UserError(f"{kind}.{key}={value!r} {error}.") from None
        try:
            return component.factory(**options, **component.pick(supplied))
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(f"{kind}={component.name} cannot be built of {options} and {supplied}: {error}") from None

    def load_plugins(self, folders: list[Path]) -> None:
        """Import installed plug-ins, then every ``*.py`` of the folders, each once.

        An installed package is one by an entry point of the group ``srnn.plugins`` that names a module; a folder
        ``conf/`` beside that module joins srnn's own. A plug-in that raises, or takes a name that is taken, is left
        out whole and named in ``broken_plugins``.
        """
        for entry in sorted(importlib.metadata.entry_points(group="srnn.plugins"), key=lambda entry: entry.name):
            origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name
            if entry.module not in sys.modules and self._isolated(f"plug-in {origin}", origin, entry.load):
                self._add_conf(sys.modules[entry.module])
        for path in _plugin_files(folders):
            name = f"srnn_plugin_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
            if name not in sys.modules:
                self._isolated(f"plug-in {path.name}", str(path), partial(_import_file, name, path))

    def _isolated(self, origin: str, named: str, load: Callable[[], object]) -> bool:
        """Import a plug-in; undo all it registered if it fails. Returns whether it is there."""
        for package in KINDS.values():  # first, so that a clash with a name of srnn's own is the plug-in's fault
            importlib.import_module(package)
        before = dict(self.components)
        self._plugin = origin
        try:
            load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plug-in is anybody's code: whatever it raises must not stop srnn
            self.components = before
            self.broken_plugins[named] = f"{type(error).__name__}: {error}"
            return False
        finally:
            self._plugin = None
        return True

    def _add_conf(self, module: Any) -> None:
        folder = Path(module.__file__).parent / "conf" if module.__file__ else None
        if folder is not None and folder.is_dir():
            self.conf_folders.append(folder)


def _import_file(name: str, path: Path) -> None:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise


def _plugin_files(folders: list[Path]) -> Iterator[Path]:
    seen = set()
    for folder in folders:
        if folder.is_dir() and folder.resolve() not in seen:
            seen.add(folder.resolve())
            yield from sorted(p for p in folder.glob("*.py") if not p.name.startswith("_"))


register = Registry()
