"""``python -m srnn resume RUN``: resume a run that was stopped, as it was configured."""

from __future__ import annotations

from collections.abc import Sequence

from srnn.commands.options import unquoted
from srnn.errors import UserError
from srnn.files import expanded
from srnn.run_folder import RunFolder

_HELP = """usage: srnn resume RUN

Resume a run that was stopped, as it was configured. On a CPU the result is
the uninterrupted run's, bit for bit.

  RUN    its folder, such as outputs/RUN; also run=RUN, and `srnn resume=RUN`"""


def main(argv: Sequence[str]) -> int:
    """Resume the run that is named, bare or as ``run=FOLDER`` or ``resume=FOLDER``."""
    if any(word in ("--help", "-h") for word in argv):
        print(_HELP)
        return 0
    runs, others = _named(argv)
    if others or len(runs) > 1:
        raise UserError(
            f"srnn resume RUN resumes a run as it was configured, so {' '.join(others) or 'a second one'} cannot be "
            f"given with it; to train its network with other options, start a run with init_from=FOLDER."
        )
    if not runs:
        raise UserError("resume: which run? Give its folder, as `srnn resume outputs/RUN`.")
    from srnn.recording.environment import require_plugins
    from srnn.training.run import resume

    folder = expanded(runs[0])
    require_plugins(RunFolder(folder))
    resume(folder)
    return 0


def _named(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The folders among the words, and what else there is."""
    runs: list[str] = []
    others: list[str] = []
    words = iter(argv)
    for word in words:
        key, equals, value = word.partition("=")
        if equals and key in ("resume", "run", "--run"):
            runs.append(value if key == "--run" else unquoted(value))
        elif word == "--run":
            runs.append(next(words, ""))
        elif word.startswith("-") or (equals and key.replace(".", "").isidentifier()):
            others += [word] if key != "srnn.plugins" else []  # acted on already
        else:
            runs.append(word)
    return runs, others
