"""What srnn needs of Hydra that Hydra keeps private, all of it in this file. Written for Hydra 1.3.

A test calls both functions and names the installed version where one of them has moved.
"""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Sequence

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig


def flags_parser() -> ArgumentParser:
    """The parser of Hydra's own flags, such as ``-m`` and ``--cfg``. Overrides are its ``overrides``."""
    parser: ArgumentParser = get_args_parser()
    return parser


def apply_overrides(overrides: Sequence[Override], config: DictConfig) -> None:
    """Set options of a composed config in place, as Hydra does.

    Raises:
        HydraException: an override does not fit the config; or OmegaConf's own error.
    """
    ConfigLoaderImpl._apply_overrides_to_config(list(overrides), config)
