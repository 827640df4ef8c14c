"""``python -m srnn [command] [options]``; no command means train."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from srnn import __version__
from srnn.errors import UserError, did_you_mean, in_words
from srnn.interrupts import interruptible
from srnn.terminal import close_output, open_closed_streams, show_what_can_be_shown, warnings_in_words

COMMANDS = {
    "train": "train, prune, pack, measure, report (the default)",
    "plan": "what a config will prune, and when, without training",
    "prune": "prune a trained network once, without training; pack, score and report it",
    "rerun": "repeat a finished run, and say whether its numbers come out again",
    "resume": "resume a run that was stopped",
    "evaluate": "score a run's packed file on its validation and test data",
    "compare": "tables and plots of several runs, or of a sweep",
    "export": "write a run's network as another packed file, as ONNX or as C, and say what that costs",
    "bench": "time dense layers against every sparse backend that can run here",
    "generate": "write text with a run's packed file",
    "transcribe": "write speech down with a run's packed file",
    "doctor": "what is installed, what can run here, and why something cannot",
    "list": "every name; list GROUP=NAME: its options and what they mean",
}

HELP = """usage: python -m srnn [command] [options]      (or just: srnn ...)

commands:
{commands}

examples:
  srnn model=gru pruning=gradual                        the main job
  srnn model=lstm model.hidden_size=512 seed=1          options are group.option=value
  srnn dataset=text dataset.path=book.txt               your own text
  srnn -m pruning=none,gradual,hard seed=0,1            a sweep
  srnn plan pruning=cubic pruning.sparsity=0.95         what that would prune, and when
  srnn resume outputs/RUN                               resume a run that was stopped
  srnn prune init_from=outputs/RUN pruning.sparsity=0.9  prune a trained network, without training
  srnn init_from=outputs/RUN pruning=fixed              fine-tune a pruned network
  srnn compare outputs/SWEEP
  srnn rerun outputs/RUN
  srnn evaluate outputs/RUN
  srnn export outputs/RUN values=int8
  srnn export outputs/RUN format=onnx
  srnn export outputs/RUN format=c values=int8
  srnn bench outputs/RUN
  srnn generate outputs/RUN --prompt "def f(x):"
  srnn transcribe outputs/RUN --audio recording.wav

A run is named in every command as outputs/RUN or run=outputs/RUN. `srnn list` shows all names, `srnn list NAME`
its options; `srnn COMMAND --help` those of a command. `--cfg job` prints the config instead of running it.
SRNN_DEBUG=1 shows tracebacks; SRNN_CACHE names the cache folder."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 done, 2 the user's mistake, 130 interrupted."""
    open_closed_streams()
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] in (["--help"], ["-h"], ["help"]):
        print(HELP.format(commands="\n".join(f"  {name:12}{word}" for name, word in COMMANDS.items())))
        return 0
    if argv[:1] == ["--version"]:
        print(f"srnn {__version__}")
        return 0
    show_what_can_be_shown()
    _pass_over_what_ends_imports()
    try:
        with interruptible(), warnings_in_words():
            return _dispatch(argv)
    except BrokenPipeError:  # whoever read the output has gone, as `head` does
        close_output()
        return 141  # as a shell has it for a program that SIGPIPE ended
    except (UserError, OSError) as error:
        if os.environ.get("SRNN_DEBUG") == "1":
            raise
        print(f"srnn: {in_words(error)}", file=sys.stderr)
        return 2
    except SystemExit as done:  # argparse's way to end after --help
        return int(done.code or 0)
    except KeyboardInterrupt:
        print("srnn: interrupted; what was written so far is whole.", file=sys.stderr)
        return 130


def _pass_over_what_ends_imports() -> None:
    """Lightning and torch read these when they are imported, and they may be anybody's: RANK=junior."""
    for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK"):
        try:
            int(os.environ.get(name, "0"))
        except ValueError:
            print(f"srnn: {name}={os.environ.pop(name)} is passed over: it is no rank.", file=sys.stderr)
    name, allowed = "TORCH_DISTRIBUTED_DEBUG", ("OFF", "INFO", "DETAIL")  # torch cannot be imported with any other
    if os.environ.get(name, "OFF").upper() not in allowed:
        print(f"srnn: {name}={os.environ.pop(name)} is passed over: torch takes {', '.join(allowed)}.", file=sys.stderr)


def _dispatch(argv: list[str]) -> int:
    command = "train"
    if argv and not argv[0].startswith("-") and "=" not in argv[0] and not argv[0].startswith("~"):
        command = argv.pop(0)
    if command not in COMMANDS:
        raise UserError(
            f"{command}: no such command.{did_you_mean(command, COMMANDS)} There are: {', '.join(COMMANDS)}."
        )
    try:
        os.getcwd()
    except OSError as error:  # it was removed, by whoever cleans up
        raise UserError(f"the working folder cannot be used: {error.strerror}. Change to another one.") from None
    if argv[:1] not in (["--help"], ["-h"]):  # help says nothing of them, and importing torch takes seconds
        _load_plugins(argv)
    module = importlib.import_module(f"srnn.commands.{command}")
    return int(module.main(argv))


def _load_plugins(argv: list[str]) -> None:
    from srnn.commands.options import unquoted
    from srnn.registry import register
    from srnn.registry.plugins import passed_over, plugin_folders

    said = [unquoted(word.partition("=")[2]) for word in argv if word.startswith("srnn.plugins=")]
    wanted = said[-1] if said else "auto"
    if wanted == "off":
        return
    if line := passed_over(wanted):
        print(f"srnn: {line}", file=sys.stderr)
    register.load_plugins(plugin_folders(wanted))
    for path, reason in register.broken_plugins.items():
        print(f"srnn: plug-in {path} is left out: {reason}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
