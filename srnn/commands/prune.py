"""``python -m srnn prune init_from=RUN pruning.sparsity=0.9``: prune a trained network without training it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from srnn.commands import train
from srnn.commands.options import unquoted
from srnn.config.composing import parse_override, read_settings
from srnn.errors import UserError
from srnn.files import expanded
from srnn.registry import register
from srnn.run_folder import RunFolder

_HELP = """usage: srnn prune init_from=RUN_OR_FILE [pruning.sparsity=0.9] [GROUP.OPTION=VALUE] ...

Prune a trained network once, without training; pack, score and report it as a run of its own.

  init_from=FOLDER              a finished run: its model, data and kernel stand, unless you choose others
  init_from=FILE                any checkpoint; then model=... and dataset=... say what it is of
  pruning.sparsity=0.9          the share of zeros; pruning.structure=16x1, pruning.scope=... as for pruning=hard
  -m pruning.sparsity=0.5,0.9   several values: what each costs

It is `srnn train` with pruning=hard pruning.prune_itr=0 trainer.max_epochs=0, and takes all its other options. To train
further on the weights that are left: srnn init_from=RUN pruning=fixed."""
# What makes a run prune once and train nothing.
_ONCE = {"pruning": "hard", "pruning.prune_itr": "0", "trainer.max_epochs": "0"}
_KEPT = ("model", "dataset", "kernel", "packed")  # of the run that is pruned


def main(argv: Sequence[str]) -> int:
    """Complete the command line to that of a run without training, and run it."""
    if any(word in ("--help", "-h") for word in argv):
        print(_HELP)
        return 0
    given = dict(word.partition("=")[::2] for word in argv)
    if "init_from" not in given:
        raise UserError("prune: say which trained network: srnn prune init_from=RUN_OR_FILE pruning.sparsity=0.9.")
    for key, value in _ONCE.items():
        if given.get(key, value) != value:
            raise UserError(
                f"prune: {key}={given[key]} cannot be given: it prunes once, by magnitude, and trains nothing "
                f"({key}={value}). To prune while training, leave out the word prune."
            )
    if _are_several(given["init_from"]):
        raise UserError(
            f"prune: init_from={given['init_from']}: name one network, whose model and data stand; prune each by a "
            f"command of its own."
        )
    once = [f"{key}={value}" for key, value in _ONCE.items() if key not in given]
    kept = _of_the_run(expanded(unquoted(given["init_from"])), given)
    return train.main([*once, *kept, *argv])


def _are_several(named: str) -> bool:
    try:
        return bool(parse_override(f"init_from={named}").is_sweep_override())
    except UserError:  # a name that Hydra cannot read is quoted later
        return False


def _of_the_run(path: Path, given: dict[str, str]) -> Iterator[str]:
    """The options of the run that a network comes from, but for groups chosen anew; none where it is of no run."""
    from srnn.recording import environment

    # A run's folder, or a file in it or in its folder of checkpoints.
    homes = [RunFolder(folder) for folder in (path, *path.parents[:2])]
    homes = [home for home in homes if home.config.is_file()]
    homes = [home for home in homes if path in (home.path, home.packed, home.best, home.best_dense, home.last)]
    if not homes:
        return
    home = RunFolder(homes[0].path.resolve())
    environment.require_plugins(home)
    settings = read_settings(home.config)
    with environment.started_in(home):
        data = register.build("dataset", settings.dataset).located(settings.dataset)
    config = settings.as_dict() | {"dataset": data}
    if settings.trainer.limit_eval_batches is not None and "trainer" not in given:
        yield f"trainer.limit_eval_batches={settings.trainer.limit_eval_batches}"  # scored as the run was
    for group in _KEPT:
        if group not in given:
            options = dict(config[group])
            if "name" in options:
                yield f"{group}={options.pop('name')}"
            yield from (f"{group}.{name}={_quoted(value)}" for name, value in options.items())


def _quoted(value: Any) -> str:
    """A value as Hydra's overrides spell it."""
    if isinstance(value, str):
        # A backslash stands for itself, but before a quote.
        escaped = re.sub(r"(\\+)(?='|\Z)", r"\1\1", value).replace("'", "\\'")
        return f"'{escaped}'"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_quoted, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{key}: {_quoted(item)}' for key, item in value.items())}}}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else repr(value)
