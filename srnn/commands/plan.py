"""``python -m srnn plan [GROUP=NAME] [GROUP.OPTION=VALUE] ...``: what a config will prune, and when."""

from __future__ import annotations

from typing import Annotated

from srnn.commands.options import Help, command
from srnn.errors import UserError, cannot_be_written
from srnn.files import expanded

_CONFIG = "the config, as for a run: pruning=cubic pruning.sparsity=0.95"

_TAKES = "what a run does, GROUP=NAME and GROUP.OPTION=VALUE (`srnn list` shows all), and --plot FILE"


@command
def main(
    overrides: Annotated[list[str], Help(_CONFIG, metavar="GROUP.OPTION=VALUE")],
    /,
    plot: Annotated[str, Help("the picture", metavar="FILE")] = "outputs/plan.png",
) -> int:
    """What a config will prune, and when, without training.

    Prints and plots the forecast. The data are read, for the number of steps.
    """
    path = expanded(plot)
    if path.suffix != ".png":
        raise UserError(f"plan: --plot={plot} must be a file named *.png.")

    from srnn.config.command_line import told_of_sweep
    from srnn.config.composing import compose_settings, parse_override
    from srnn.recording.console import print_plan
    from srnn.recording.plots import plot_plan
    from srnn.terminal import console
    from srnn.training.preparing import prepare

    for text in overrides:
        if "=" not in text and not text.startswith("~"):
            raise UserError(f"plan: {text}: it takes {_TAKES}.")
        if parse_override(text).is_sweep_override():
            raise UserError(f"plan: {text}: it plans one run: give one value, or quote several to mean one.")
    pruner = prepare(compose_settings(overrides, ("experiment", "plot", "hydra"))).pruner()
    if told := told_of_sweep(overrides):
        console.print(f"Note: {told}", soft_wrap=True)
    print_plan(pruner)
    if pruner.groups:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            console.print(f"Plotted in {plot_plan(pruner, path)}", soft_wrap=True)
        except OSError as error:
            raise cannot_be_written(path.parent, error, "--plot") from None
    return 0
