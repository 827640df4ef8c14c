"""``python -m srnn.training.follower``: a rank of a run other than the first, started by it.

It trains with the others, and writes and prints nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from srnn.config.composing import read_settings
from srnn.errors import UserError
from srnn.registry import register
from srnn.run_folder import RunFolder
from srnn.terminal import console
from srnn.training.fitting import fit, quiet
from srnn.training.preparing import prepare
from srnn.training.processes import Place, keep_channel


def main() -> int:
    """Train with the others; returns 1 if that fails."""
    keep_channel()
    folder = RunFolder(Path(sys.argv[1]))
    rank, count, port, resumes = map(int, sys.argv[2:6])
    console.quiet = True
    try:
        # Those that rank 0 has loaded, and not those a config names, which may be anybody's.
        if sys.argv[6:] != ["off"]:
            register.load_plugins([Path(name) for name in sys.argv[6:]])
        settings = read_settings(folder.config)
        quiet()
        fit(prepare(settings, Place(rank, count, port), folder.last if resumes else None), folder)
    except (UserError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # all were asked to stop
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
