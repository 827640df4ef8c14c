"""Whether a sweep of many jobs in one process stays as it is: ``python -m tests.long_sweep 100``."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import SMALL


@dataclass(frozen=True)
class Sample:
    """When a job had ended."""

    cpu_seconds: float  # so far, of all threads: what other work on the machine does not change much
    memory_mb: float
    files: int
    threads: int
    children: int


def sample_sweep(folder: Path, jobs: int) -> list[Sample]:
    """Run a sweep of so many small jobs, tracked offline, and look at its process at the end of each."""
    command = ["-m", *SMALL, "kernel=dense", "pruning=hard", f"seed=range(0,{jobs})", f"hydra.sweep.dir={folder}"]
    process = subprocess.Popen([sys.executable, "-m", "srnn", *command], stdout=subprocess.DEVNULL, env=os.environ)
    samples: list[Sample] = []
    while process.poll() is None:
        if len(list(folder.glob("*/report.json"))) > len(samples):
            samples.append(_look(process.pid))
        time.sleep(0.02)
    assert process.returncode == 0
    return samples


def _look(pid: int) -> Sample:
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    seconds = sum(map(int, used)) / os.sysconf("SC_CLK_TCK")
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(seconds, int(status["VmRSS"].split()[0]) / 1024, files, int(status["Threads"]), len(children))


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        found = sample_sweep(Path(scratch) / "sweep", int(sys.argv[1]))
    print("job,cpu_seconds,memory_mb,files,threads,children")
    for number, (sample, before) in enumerate(zip(found[1:], found, strict=False), 2):
        seconds = sample.cpu_seconds - before.cpu_seconds
        print(f"{number},{seconds:.2f},{sample.memory_mb:.0f},{sample.files},{sample.threads},{sample.children}")
