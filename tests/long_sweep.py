"""Whether a sweep of many jobs in one process stays as it is: ``python -m tests.long_sweep 100``."""

import atexit
import cProfile
import gc
import itertools
import logging
import os
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import srnn.training.run
from srnn.__main__ import main
from tests.conftest import SMALL

OURS = ("srnn", "torch", "pytorch_lightning")  # W&B and Hydra keep a little of each run and job


@dataclass(frozen=True)
class Sample:
    """What there was in the process when a job had ended, and what the job took."""

    cpu_seconds: float  # of all threads
    calls: Counter[str]  # of each Python function: most repeat exactly, and time does not on a busy machine
    objects: Counter[str]  # of srnn, torch and Lightning, by type or function
    entries: Counter[str]  # of what a process has one list of
    memory_mb: float
    files: int
    threads: int
    children: int


def sample_sweep(
    folder: Path, jobs: int, after: Callable[[int], None] = lambda _: None, by_name: bool = True
) -> list[Sample]:
    """Run a sweep of so many small jobs in this process, tracked offline, and look at it at the end of each.

    Args:
        folder: of the sweep.
        jobs: how many.
        after: called with the number of the job within each one, at its end.
        by_name: whether to keep numbers of calls and objects by name, and not their sums alone: they take 5 MB a job,
            which would look as if the sweep grew.
    """
    samples: list[Sample] = []
    train = srnn.training.run.train

    def watched(*arguments, **options):
        began, profile = time.process_time(), cProfile.Profile(builtins=False)
        profile.enable()
        try:
            report = train(*arguments, **options)
            after(len(samples))
        finally:
            profile.disable()
        seconds = time.process_time() - began
        sample = _look(seconds, _calls(profile))
        sums = {kind: Counter(all=getattr(sample, kind).total()) for kind in ("calls", "objects")}
        samples.append(sample if by_name else replace(sample, **sums))
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srnn.training.run, "train", watched)
        swept = ["kernel=dense", "pruning=hard", f"seed=range(0,{jobs})"]
        assert main(["-m", *SMALL, *swept, f"hydra.sweep.dir={folder}"]) == 0
    assert len(samples) == jobs
    return samples


def grown(samples: Sequence[Sample]) -> list[str]:
    """What there is more of with each of these jobs, or more than noise explains: the names of it."""
    first, last = samples[0], samples[-1]
    found = [*_growing(samples, "objects"), *_growing(samples, "entries")]
    # A loop that times or waits goes round more or less often by chance, and not by as much with each job.
    found += [name for name, more in _growing(samples, "calls").items() if max(more) <= 1.25 * min(more)]
    found += ["memory"] if last.memory_mb > 1.1 * first.memory_mb else []
    found += [name for name in ("threads", "children") if getattr(last, name) > getattr(first, name)]
    return found + (["files"] if last.files > first.files + 2 else [])


def _growing(samples: Sequence[Sample], kind: str) -> dict[str, list[int]]:
    """How many more with each job, for each name that has more with each."""
    steps = [getattr(after, kind) - getattr(before, kind) for before, after in itertools.pairwise(samples)]
    return {name: more for name in steps[0] if all(more := [step[name] for step in steps])}


def _calls(profile: cProfile.Profile) -> Counter[str]:
    calls: Counter[str] = Counter()
    for entry in profile.getstats():
        code = entry.code
        place = code if isinstance(code, str) else f"{code.co_qualname} ({code.co_filename}:{code.co_firstlineno})"
        calls[place] += entry.callcount
    return calls


def _look(seconds: float, calls: Counter[str]) -> Sample:
    gc.collect()
    objects = Counter(name for thing in gc.get_objects() if (name := _name(thing)).startswith(OURS))
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    entries = Counter(
        {
            "atexit": atexit._ncallbacks(),
            "warnings": len(warnings.filters),
            "logging": sum(len(logger.handlers) for logger in loggers if isinstance(logger, logging.Logger)),
            "sys.path": len(sys.path),
            "environment": len(os.environ),
        }
    )
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    files, memory = len(os.listdir("/proc/self/fd")), int(status["VmRSS"].split()[0]) / 1024
    return Sample(seconds, calls, objects, entries, memory, files, threading.active_count(), len(children))


def _name(thing: object) -> str:
    """Of its type; of a function or method its own, and where it is written."""
    if type(thing) is types.MethodType:
        thing = thing.__func__
    kind = type(thing)  # isinstance would ask the thing, which may be a proxy that warns
    kind = thing if issubclass(kind, types.FunctionType | type) else kind
    return f"{kind.__module__}.{kind.__qualname__}"


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = sample_sweep(Path(scratch) / "sweep", int(sys.argv[1]), by_name=False)
    print("job,cpu_seconds,calls,objects,memory_mb,files,threads,children")
    for number, s in enumerate(found, 1):
        objects = s.objects.total()
        calls = s.calls.total()
        print(f"{number},{s.cpu_seconds:.2f},{calls},{objects},{s.memory_mb:.0f},{s.files},{s.threads},{s.children}")
