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
from srnn.errors import JobFailed


def main(argv: Sequence[str]) -> int:
    """Check every job of the command line, then let Hydra run them."""
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
    """One job; returns the metric a sweeper can optimise, bits per character on the validation text."""
    from srnn.training.run import train

    settings = config.settings_of(composed)
    of_hydra = HydraConfig.get()
    folder = Path(of_hydra.runtime.output_dir)
    sweep = Path(of_hydra.sweep.dir).name if of_hydra.mode == RunMode.MULTIRUN else None
    try:
        report = train(settings, folder, group=sweep)
    except Exception as error:
        raise JobFailed(error) from error
    return float(report["scores"]["best"]["bits_per_character"])
