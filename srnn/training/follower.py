"""``python -m srnn.training.follower``: a rank of a run other than the first, started by it."""

from __future__ import annotations

import sys
from pathlib import Path

from omegaconf import OmegaConf

from srnn.config.composing import plugin_folders
from srnn.errors import UserError
from srnn.registry import register
from srnn.terminal import console
from srnn.training.processes import Place
from srnn.training.run import follow, read_settings


def main() -> int:
    """Train with the others; returns 1 if that fails."""
    folder, *numbers = sys.argv[1:]
    rank, count, port, resumes = map(int, numbers)
    console.quiet = True
    try:
        if OmegaConf.load(Path(folder) / "config.yaml").srnn.plugins == "on":
            register.load_plugins(plugin_folders())
        follow(read_settings(Path(folder)), Path(folder), Place(rank, count, port), bool(resumes))
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # all were asked to stop
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
