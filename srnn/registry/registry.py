"""The registry: every model, data set, objective, pruning method, kernel and optimiser that srnn can name."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from srnn.errors import UserError, did_you_mean
from srnn.registry.plugins import import_file, plugin_files
from srnn.registry.schema import Component, _ranges, check_options

# The package that registers srnn's own components of each kind. Only the kind that is asked for gets
# imported: rebuilding a model must not import the data pipeline.
KINDS = {
    "model": "srnn.models",
    "dataset": "srnn.datasets",
    "objective": "srnn.objectives",
    "pruning": "srnn.pruning",
    "kernel": "srnn.kernels",
    "optimizer": "srnn.training.optimizers",
    "schedule": "srnn.training.step_size",
    "averaging": "srnn.training.averaging",
}
F = TypeVar("F", bound=Callable[..., Any])


@dataclass
class Registry:
    """Names -> components, by kind. ``srnn.register`` is the one that srnn uses.

    A component is a class or function with typed arguments, and those arguments *are* its schema. Its name is then
    selectable as ``dataset=brackets``, with a YAML file in ``conf/`` or without. Keyword-only arguments without a
    default (``*, vocabulary_size: int``) are no options: the run supplies them; ``**sizes`` takes all that it supplies.

    ``register.model(name)`` registers what it decorates, and so do ``dataset``, ``objective``, ``pruning``, ``kernel``,
    ``optimizer``, ``schedule`` and ``averaging``: each is ``add`` with its own name as the kind. A decorated class or
    function stays as it is.

    Example:
        >>> import torch
        >>> from srnn import register
        >>> @register.optimizer("plain_sgd")
        ... def plain_sgd(lr: float = 0.1, *, parameters):
        ...     'Gradient descent without momentum.'
        ...     return torch.optim.SGD(parameters, lr=lr)
        >>> config = {"name": "plain_sgd", "lr": 0.5}
        >>> register.build("optimizer", config, parameters=torch.nn.GRU(4, 8).parameters()).defaults["lr"]
        0.5
        >>> register.check("optimizer", {"name": "plain_sgd", "rate": 0.5})
        Traceback (most recent call last):
        srnn.errors.UserError: optimizer.rate: unknown option of optimizer. Allowed: lr.

    Attributes:
        components: (kind, name) -> component.
        broken_plugins: file or package -> why it was left out.
        conf_folders: the ``conf/`` folders of installed plug-ins.
        plugin_folders: what plug-ins were last loaded from, beside installed packages; None before.
    """

    components: dict[tuple[str, str], Component] = field(default_factory=dict)
    broken_plugins: dict[str, str] = field(default_factory=dict)
    conf_folders: list[Path] = field(default_factory=list)
    plugin_folders: list[Path] | None = None
    _plugin: str | None = None

    def add(self, kind: str, name: str) -> Callable[[F], F]:
        """Decorator that registers a class or function as ``kind=name``.

        Args:
            kind: one of ``KINDS``; ``register.pruning(name)`` is short for ``register.add("pruning", name)``.
            name: what configs call it.

        Raises:
            UserError: the name is taken.
        """

        def decorate(factory: F) -> F:
            # Being defined in srnn just now, be it that a plug-in imports it: a plug-in may register what is there.
            module = sys.modules.get(factory.__module__)
            is_own = factory.__module__.partition(".")[0] == "srnn" and not hasattr(module, factory.__name__)
            if not is_own:  # srnn's own come first, so that a clash with one is the other's fault
                importlib.import_module(KINDS[kind])
            taken = self.components.get((kind, name))
            if taken is not None:
                raise UserError(f"{kind} '{name}' is registered already, by {taken.origin}; pick another name.")
            here = f"{factory.__module__}.{factory.__qualname__}"
            self.components[kind, name] = Component(kind, name, factory, here if is_own else self._plugin or here)
            return factory

        return decorate

    def __getattr__(self, kind: str) -> Callable[[str], Callable[[F], F]]:
        """``register.model``, ``register.pruning``, ...: ``add`` with the kind filled in. Python asks for attributes
        here only if it found none, so that a new kind needs a row of ``KINDS`` and no method.

        Raises:
            AttributeError: there is no such kind.
        """
        if kind in KINDS:
            return partial(self.add, kind)
        raise AttributeError(f"no kind '{kind}'; the kinds are {', '.join(KINDS)}")

    def names(self, kind: str) -> list[str]:
        """All names of a kind, srnn's own first."""
        importlib.import_module(KINDS[kind])
        return [name for k, name in self.components if k == kind]

    def get(self, kind: str, name: str) -> Component:
        """The component called ``name``.

        Raises:
            UserError: there is none; says the nearest name and all the names there are.
        """
        names = self.names(kind)
        if name not in names:
            raise UserError(
                f"{kind}={name}: no such {kind}.{did_you_mean(str(name), names)} There are: {', '.join(sorted(names))}."
                f"{self._how_plugins_come()}"
            )
        return self.components[kind, name]

    def _how_plugins_come(self) -> str:
        if self.plugin_folders is not None:
            return ""
        here = 'register.load_plugins([pathlib.Path("plugins")])'
        return f" Plug-ins are not loaded: in Python {here} does it, on the command line srnn.plugins=on."

    def check(self, kind: str, config: Mapping[str, Any]) -> dict[str, Any]:
        """Check ``config``, which has ``name`` and options, and return it with the defaults of what was left out.

        Raises:
            UserError: no such component; an unknown, missing, ill-typed or out-of-range option.
        """
        if not isinstance(config.get("name"), str):
            raise UserError(
                f"{kind}.name={config.get('name')!r} must be the name of a {kind}: {', '.join(self.names(kind))}."
            )
        component = self.get(kind, config["name"])
        given = {key: value for key, value in config.items() if key != "name"}
        return {"name": component.name} | check_options(component.options, given, kind)

    def build(self, kind: str, config: Mapping[str, Any], **supplied: Any) -> Any:
        """Check ``config`` and make the component.

        Args:
            kind: one of ``KINDS``.
            config: ``name`` and options.
            supplied: what the run gives, such as ``parameters``; the component is passed what it takes of it.

        Raises:
            UserError: as ``check``; or the component needs what is not supplied.
        """
        options = self.check(kind, config)
        component = self.get(kind, options.pop("name"))
        return component.factory(**options, **component.pick(supplied))

    def rebuild(self, kind: str, config: Mapping[str, Any], **supplied: Any) -> Any:
        """``build`` for a config out of a file that srnn wrote: without pydantic, which the runtime need not import.

        Names and bounds are checked here, types by the component itself.

        Raises:
            UserError: an option or value that this version does not know, or that the component refuses.
        """
        component = self.get(kind, str(config.get("name")))
        options = {key: value for key, value in config.items() if key != "name"}
        for key, value in options.items():
            if key not in component.options:
                raise UserError(f"{kind}={component.name} has no option {key[:100]}: the file is of another version.")
            for mark in _ranges(component.options[key].type):
                try:
                    mark.check(value)
                except ValueError as error:
                    raise UserError(f"{kind}.{key}={value!r:.100} {error}.") from None
        try:
            return component.factory(**options, **component.pick(supplied))
        except UserError:
            raise
        except Exception as error:  # of torch or a plug-in, which have never seen such options
            given, why = f"{options} and {supplied}"[:300], str(error)[:300] or type(error).__name__
            raise UserError(f"{kind}={component.name} cannot be built of {given}: {why}") from None

    def load_plugins(self, folders: list[Path]) -> None:
        """Import installed plug-ins, then every ``*.py`` of the folders, each once.

        An installed package is one by an entry point of the group ``srnn.plugins`` that names a module; a folder
        ``conf/`` beside that module joins srnn's own. A plug-in that raises, or takes a name that is taken, is left
        out whole and named in ``broken_plugins``; nothing is raised.

        Args:
            folders: where to look for files; those that are not there are passed over.
        """
        self.plugin_folders = folders
        for entry in sorted(importlib.metadata.entry_points(group="srnn.plugins"), key=lambda entry: entry.name):
            origin = f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.name
            if entry.module not in sys.modules and self._isolated(f"plug-in {origin}", origin, entry.load):
                self._add_conf(sys.modules[entry.module])
        for path in plugin_files(folders):
            name = f"srnn_plugin_{path.stem}_{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"
            if name not in sys.modules:
                self._isolated(f"plug-in {path.name}", str(path), partial(import_file, name, path))

    def _isolated(self, origin: str, named: str, load: Callable[[], object]) -> bool:
        """Import a plug-in; undo all it registered if it fails. Returns whether it is there."""
        before = set(self.components)
        self._plugin = origin
        try:
            load()
            for key in self.components.keys() - before:
                _ = self.components[key].options  # whose types may be named where they are not there
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # a plug-in is anybody's code: whatever it raises must not stop srnn
            for key in self.components.keys() - before:
                if self.components[key].origin == origin:
                    del self.components[key]
            self.broken_plugins[named] = f"{type(error).__name__}: {error}"
            return False
        finally:
            self._plugin = None
        return True

    def _add_conf(self, module: Any) -> None:
        folder = Path(module.__file__).parent / "conf" if module.__file__ else None
        if folder is not None and folder.is_dir():
            self.conf_folders.append(folder)


register = Registry()
"""The registry that srnn uses: ``register.model``, ``register.dataset`` and so on add a component by name."""
