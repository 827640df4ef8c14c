"""``python -m srnn list [GROUP]``: every name that a group takes, with its options, defaults and origin."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, cast

from omegaconf import OmegaConf

from srnn.commands.options import Help, command
from srnn.config.composing import conf_folder, conf_folders, presets
from srnn.config.settings import COMPONENTS, GROUPS, SECTIONS, Settings, options_of
from srnn.registry import Option, register, type_name

# What belongs to no group.
OTHERS = {
    "packed": "The packed file.",
    "seed": "Fixes all that is random.",
    "init_from": "Start from an existing network: a checkpoint, a packed file, a state_dict file, or a run's folder.",
    "resume": "Go on with a stopped run, as it was configured; takes no other option.",
    "srnn": "srnn itself.",
}
_Row = tuple[str, str, str]  # name, options, what it is and where from


@command
def main(group: Annotated[str | None, Help("only this group", choices=(*GROUPS, "others"))] = None, /) -> int:
    """Every name a group takes, with its options; and all other options."""
    from rich.table import Table

    from srnn.terminal import console

    for name in [group] if group else [*GROUPS, "others"]:
        table = Table(
            title=f"{name}=" if name in GROUPS else "of no group", title_justify="left", show_lines=True, expand=True
        )
        table.add_column("name", no_wrap=True)
        table.add_column("options = default (allowed)", ratio=3)
        table.add_column("what and where from", ratio=2, overflow="fold")
        for row in _rows(name):
            table.add_row(*row)
        console.print(table)
    return 0


def _rows(group: str) -> Iterator[_Row]:
    if group not in GROUPS:
        yield from _others()
        return
    components = register.names(group) if group in COMPONENTS else []
    for name in presets(group):  # a plug-in's file may be another choice of options of a component
        yield _component(group, name) if name in components else _preset(group, name)


def _component(kind: str, name: str) -> _Row:
    component = register.get(kind, name)
    return name, _options(component.options), f"{component.summary.replace('``', '')}\n({component.origin})"


def _preset(group: str, name: str) -> _Row:
    """A YAML file: what it sets, and what its head says. The default of a section shows all options there are."""
    path = next(file for folder in conf_folders() if (file := folder / group / f"{name}.yaml").is_file())
    if name == "default" and group in SECTIONS:
        options = _options(options_of(SECTIONS[group]))
    else:
        given = cast("Mapping[str, Any]", OmegaConf.to_container(OmegaConf.load(path)))
        options = "\n".join(_settings(given))
    words = " ".join(re.findall(r"^#(?! @)(.*)", path.read_text().partition("\n\n")[0], re.MULTILINE)).split()
    head = " ".join(words).removeprefix("Shows: ").partition(" Expected: ")[0]
    origin = f"conf/{group}/{name}.yaml" if path.is_relative_to(conf_folder()) else path
    return name, options, f"{head[:1].upper()}{head[1:]}\n({origin})"


def _settings(given: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """What a file sets, as on the command line."""
    for key, value in given.items():
        if key == "defaults":
            chosen = [entry for entry in value if isinstance(entry, Mapping)]
            yield from (
                f"{str(key).removeprefix('override /')}={name}" for entry in chosen for key, name in entry.items()
            )
        elif isinstance(value, Mapping):
            yield from _settings(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key} = {_plain(value)}"


def _others() -> Iterator[_Row]:
    """What belongs to no group."""
    root = options_of(Settings)
    for name, about in OTHERS.items():
        options = options_of(SECTIONS[name]) if name in SECTIONS else {n: o for n, o in root.items() if n == name}
        yield name, _options(options) if options else f"{name}=FOLDER", about


def _options(options: Mapping[str, Option]) -> str:
    rows = []
    for option in options.values():
        default = "must be given" if option.required else _plain(option.default)
        rows.append(f"{option.name} = {default} ({type_name(option.type)})")
    return "\n".join(rows) or "none"


def _plain(value: object) -> str:
    """A value as one would type it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_plain, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
