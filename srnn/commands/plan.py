"""``python -m srnn plan [GROUP=NAME] [GROUP.OPTION=VALUE] ...``: what a config will prune, and when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from srnn.commands.options import Parser
from srnn.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Print and plot the forecast of a config. The data are read, for the number of steps; nothing is trained."""
    parser = Parser(prog="srnn plan", description="What a config will prune, and when, without training.")
    about = "the config, as for a run: pruning=cubic pruning.sparsity=0.95"
    parser.add_argument("overrides", nargs="*", metavar="GROUP.OPTION=VALUE", help=about)
    parser.add_argument("--plot", default="outputs/plan.png", metavar="FILE", help="the picture (%(default)s)")
    options = parser.parse(argv)
    path = Path(options.plot).expanduser()
    if path.suffix != ".png":
        raise UserError(f"plan: --plot={options.plot} must be a file named *.png.")

    from srnn.config.composing import compose_settings
    from srnn.recording.console import print_plan
    from srnn.recording.plots import plot_plan
    from srnn.terminal import console
    from srnn.training.preparing import prepare

    pruner = prepare(compose_settings(options.overrides)).pruner()
    print_plan(pruner)
    if pruner.groups:
        path.parent.mkdir(parents=True, exist_ok=True)
        console.print(f"Plotted in {plot_plan(pruner, path)}", soft_wrap=True)
    return 0
