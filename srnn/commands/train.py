"""``python -m srnn [overrides]``: train, prune, pack, report."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from srnn import config
from srnn.errors import JobFailed, UserError

HELP = """usage: srnn [train] [GROUP=NAME] [GROUP.OPTION=VALUE] ...

Train, prune, pack, measure, report. Everything lands in a folder of its own under outputs/.

  model=gru|lstm|rnn            the network                     pruning=gradual|cubic|block|...    the method
  dataset=NAME                  the data                        kernel=auto|cpu|csr|dense         runs the packed file
  optimizer=adam|adamw|sgd      the optimiser                   trainer=default|cpu|gpu|fast      the loop
  experiment=NAME               a preset of all of these        tracking.mode=offline|online|disabled
  seed=0                        fixes all that is random        init_from=FILE   start from an existing network
  resume=FOLDER                 go on with a stopped run, as it was configured; takes no other option

  -m, --multirun                every combination of options with several values: pruning=none,gradual seed=0,1,2
  --cfg job                     print the config instead of running it
  hydra.run.dir=FOLDER          where the run lands

`srnn list` shows every name, with its options, their defaults and what is allowed."""


def main(argv: Sequence[str]) -> int:
    """Check every job of the command line, then let Hydra run them. ``resume=FOLDER`` goes on with a stopped run."""
    if any(word in ("--help", "-h") for word in argv):
        print(HELP)
        return 0
    if any(word.startswith("resume=") for word in argv):
        return _resume(argv)
    config.check_command_line(argv)
    config.connect_hydra()
    # Without it Hydra reports an error of its own work, such as a folder it cannot make, and exits by itself.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    # Hydra reads the arguments from there; it must not see the command's name.
    sys.argv = ["srnn", *argv]
    job = hydra.main(version_base="1.3", config_path=str(config.conf_folder().resolve()), config_name="config")(_job)
    job()
    return 0


def _job(composed: DictConfig) -> float:
    """One job; returns what a sweeper can optimise: the best loss on the validation part."""
    from srnn.training.run import train

    settings = config.settings_of(composed)
    of_hydra = HydraConfig.get()
    folder = Path(of_hydra.runtime.output_dir)
    sweep = Path(of_hydra.sweep.dir).name if of_hydra.mode == RunMode.MULTIRUN else None
    try:
        report = train(settings, folder, group=sweep)
    except Exception as error:
        raise JobFailed(error) from error
    return float(report["scores"]["best"]["loss"])


def _resume(argv: Sequence[str]) -> int:
    """Go on with a stopped run, as it was configured."""
    folders = [word.partition("=")[2] for word in argv if word.startswith("resume=")]
    others = [word for word in argv if not word.startswith("resume=") and word != "srnn.plugins=off"]
    if others or len(folders) > 1:
        raise UserError(
            f"resume=FOLDER goes on with a run as it was configured, so {' '.join(others) or 'a second one'} cannot be "
            f"given with it; to train its network with other options, start a run with init_from=FOLDER."
        )
    from srnn.training.run import resume

    resume(Path(folders[0].strip("'\"")).expanduser())
    return 0
