"""``python -m srnn list [KIND]``: every component, its options, defaults and origin."""

from __future__ import annotations

from collections.abc import Sequence

from srnn.commands.options import Parser
from srnn.registry import KINDS, Component, register, type_name


def main(argv: Sequence[str]) -> int:
    """Print a table a kind."""
    parser = Parser(prog="srnn list", description="Every component srnn can name, with its options.")
    parser.add_argument("kind", nargs="?", choices=[*KINDS], help="only this kind")
    chosen = parser.parse(argv).kind

    from rich.markup import escape
    from rich.table import Table

    from srnn.terminal import console

    for kind in [chosen] if chosen else KINDS:
        table = Table(title=f"{kind}=", title_justify="left", show_lines=True, expand=True)
        table.add_column("name", no_wrap=True)
        table.add_column("options = default (allowed)", ratio=3)
        table.add_column("what and where from", ratio=2, overflow="fold")
        for name in sorted(register.names(kind)):
            component = register.get(kind, name)
            about = f"{component.summary.replace('``', '')}\n({component.origin})"
            table.add_row(name, escape(_options(component)), escape(about))
        console.print(table)
    return 0


def _options(component: Component) -> str:
    rows = []
    for option in component.options.values():
        default = "must be given" if option.required else _plain(option.default)
        rows.append(f"{option.name} = {default} ({type_name(option.type)})")
    return "\n".join(rows) or "none"


def _plain(value: object) -> str:
    """A default as one would type it."""
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
