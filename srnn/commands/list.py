"""``python -m srnn list [GROUP]``: every name, a line each; ``list GROUP=NAME``: its options and what they mean."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, cast

from omegaconf import OmegaConf
from rich.table import Table

from srnn.commands.options import Help, command
from srnn.config.composing import check_choice, compose_hydra, conf_folder, conf_folders, parse_override, presets
from srnn.config.settings import COMPONENTS, GROUPS, SECTIONS, Settings, options_of
from srnn.errors import UserError, did_you_mean
from srnn.registry import Option, register, type_name

# What belongs to no group.
OTHERS = {
    "packed": "How the packed file stores values and non-zeros.",
    "distill": "A trained network to learn from: a run's folder, one of its checkpoints, or a packed file.",
    "seed": "Fixes all that is random.",
    "init_from": "Start from an existing network: a checkpoint, a packed file, a state_dict file, or a run's folder.",
    "resume": "Resume a stopped run, as it was configured; takes no other option.",
    "srnn": "Which plug-ins are loaded.",
}
# Which name to take; the scores and speeds are those of docs/pruning.md and docs/results/.
ADVICE = {
    "pruning": """Which one? Bits per character of the main job at 90 % zeros (dense: 2.53), and how
many times as fast as the best dense one a GRU of 1024 units is on a CPU thread:
  for the best score: pruning=obd, as in experiment=main_obd
  by magnitude:       pruning=cubic (2.68, 3.6x) or gradual (2.69, 3.6x)
  for speed:          pruning=cubic pruning.structure=16x1 (2.86, 11.6x)
""",
}
_Row = tuple[str, str, str]  # name, options, what it is and where from


@command
def main(
    name: Annotated[str | None, Help("a group, GROUP=NAME, NAME, others, or all", metavar="WHAT")] = None, /
) -> int:
    """The names of every group, or of one, with a line each; of a name its options, and what they mean."""
    from rich.console import Group

    from srnn.terminal import console

    if name is None or name in GROUPS:
        console.print(_menu((*GROUPS, "others") if name is None else (name,)))
        console.print(ADVICE.get(name or "", ""), end="")
        console.print(f"srnn list {name or 'GROUP'}=NAME: its options and what they mean")
        if name is None:
            console.print("srnn list others: what the options of no group mean; srnn list all: everything")
    elif name in ("all", "others"):
        console.print(Group(*map(_full, (*GROUPS, "others") if name == "all" else (name,))))
    elif name in OTHERS:
        console.print(_full("others", name))
    else:
        console.print(Group(*(_meanings(group, one) for group, one in _found(name))))
    return 0


def _table(title: str, *columns: str, lines: bool = False) -> Table:
    table = Table(title=title, title_justify="left", show_lines=lines, expand=True)
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, ratio=None if number == 0 else 2, overflow="fold")
    return table


def _title(group: str) -> str:
    return f"{group}=NAME" if group in GROUPS else "of no group"


def _menu(groups: Iterable[str]) -> Table:
    """Every name, with a sentence."""
    table = Table.grid(padding=(0, 2, 0, 0))
    chosen = compose_hydra([]).runtime.choices
    for group in groups:
        default = chosen.get(group)
        table.add_row(
            _title(group), f"{default} is the default" if default not in (None, "default") else "", style="bold"
        )
        for name, _, about in _rows(group):
            words, _, origin = about.partition("\n")
            # The first sentence: what ends before a capital letter, so that "et al. 2017" goes on.
            first = re.split(r"(?<=\.) (?=[A-Z])", words)[0].removesuffix(".")
            table.add_row(f"  {name}", f"{first} {origin}" if origin.startswith("(plug-in") else first)
        table.add_row()
    return table


def _full(group: str, only: str | None = None) -> Table:
    table = _table(_title(group), "name", "options = default (allowed)", "what and where from", lines=True)
    table.columns[1].ratio = 3
    for row in _rows(group):
        if only in (None, row[0]):
            table.add_row(*row)
    return table


def _found(name: str) -> list[tuple[str, str]]:
    """The groups that have a name, which may say its group: ``pruning=gradual``, or ``gradual``."""
    group, equals, one = name.partition("=")
    if equals and group in GROUPS:
        check_choice(parse_override(name))
        return [(group, one)]
    found = [(group, name) for group in GROUPS if name in presets(group) and not equals]
    if not found:
        names = [*GROUPS, *OTHERS, "others", "all", *(name for group in GROUPS for name in presets(group))]
        raise UserError(f"list: {name}: no group or name.{did_you_mean(name, names)} `srnn list` shows all there are.")
    return found


def _meanings(group: str, name: str) -> Table:
    """Each option on a line of its own, with what its YAML file, or the docstring, says of it."""
    _, shown, about = _component(group, name) if _is_component(group, name) else _preset(group, name)
    table = _table(f"{group}={name}: {about.partition(chr(10))[0]}", "option = default (allowed)", "what it means")
    table.columns[0].no_wrap = False
    table.columns[0].ratio = 2
    # Presets such as trainer=fast set some options of their group's default, which says what these mean.
    known = dict(_of_yaml(group, "default")) | dict(_of_docstring(group, name)) | dict(_of_yaml(group, name))
    for line in shown.splitlines():
        table.add_row(line, known.get(line.partition(" = ")[0].rpartition(".")[2], ""))
    return table


def _is_component(group: str, name: str) -> bool:
    return group in COMPONENTS and name in register.names(group)


def _of_yaml(group: str, name: str) -> Iterator[tuple[str, str]]:
    """Option -> its comment, which stands behind it and may go on below."""
    file = next((file for folder in conf_folders() if (file := folder / group / f"{name}.yaml").is_file()), None)
    text = file.read_text() if file else ""
    for option, comment in re.findall(r"^ *(\w+):.*?  ?# (.*(?:\n +# .*)*)", text, re.MULTILINE):
        yield option, " ".join(re.sub(r"\n +# ", " ", comment).split())


def _of_docstring(group: str, name: str) -> Iterator[tuple[str, str]]:
    """Option -> what a component's ``Args`` say of it: for plug-ins without a YAML file."""
    factory = register.get(group, name).factory if _is_component(group, name) else None
    words = inspect.getdoc(factory) or "" if factory else ""
    _, _, arguments = words.partition("Args:\n")
    for option, meaning in re.findall(r"^    (\w+): (.*(?:\n     +.*)*)", arguments, re.MULTILINE):
        yield option, " ".join(meaning.split())


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
