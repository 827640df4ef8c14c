"""Where numba keeps what it compiles."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable
from typing import TypeVar

from srnn.importing import nothing_collected

T = TypeVar("T")


def where_it_can_be_kept(make: Callable[[], T]) -> T:
    """What ``make`` gives, which has numba look for a place to keep code; called once more if there is none.

    Where neither the package nor the home can be written, as in a container whose files are read-only, code is compiled
    anew in each process, and kept in a folder that goes with it.
    """
    try:
        with nothing_collected():
            return make()
    except RuntimeError as error:
        if "cannot cache" not in str(error):
            raise
    import numba

    folder = tempfile.mkdtemp(prefix="srnn-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    numba.config.CACHE_DIR = folder  # type: ignore[attr-defined]
    return make()
