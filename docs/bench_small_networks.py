"""``srnn bench bench=small`` as one process a core, on all cores but two: the table in minutes instead of hours.

    python docs/bench_small_networks.py small.csv
    python docs/bench_small_networks.py small_fp16.csv values=fp16
    python docs/bench_small_networks.py small_avx2.csv avx2

With ``avx2`` AVX-512 is hidden from all of them, onnxruntime too (``only_avx2.c``, which takes a C compiler). Further
options go to ``bench``. Each process has one thread, and a physical core to itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Not `python -m srnn`, which needs Hydra for other commands.
BENCH = "import sys; from srnn.commands.bench import main; main(sys.argv[1:])"
SECONDS = 300  # after which no process begins another case


def cores() -> list[int]:
    """One processor of each physical core that this process may use."""
    found: dict[str, int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        siblings = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        found.setdefault(siblings.read_text() if siblings.exists() else str(cpu), cpu)
    several = list(found.values())
    return several[:-2] if len(several) > 4 else several


def only_avx2(folder: Path) -> dict[str, str]:
    """What hides AVX-512 from the processes that have it in their environment."""
    library = folder / "only_avx2.so"
    source = Path(__file__).parent / "only_avx2.c"
    subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", library], check=True)
    return {"LD_PRELOAD": str(library)}


def start(core: int, folder: Path, environment: dict[str, str], *options: str) -> subprocess.Popen[bytes]:
    """A process that writes ``small.csv`` and a log into a folder."""
    folder.mkdir()
    command = ["taskset", "-c", str(core), sys.executable, "-c", BENCH, "bench=small", f"output={folder}", *options]
    with (folder / "log").open("wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def main(output: str, *options: str) -> None:
    """Compile, then measure, then write one CSV."""
    hides = "avx2" in options
    options = tuple(option for option in options if option != "avx2")
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    used = cores()
    with tempfile.TemporaryDirectory() as kept:
        caches = {"SRNN_CACHE": f"{kept}/choices", "NUMBA_CACHE_DIR": f"{kept}/numba"}
        environment = os.environ | threads | caches | (only_avx2(Path(kept)) if hides else {})
        few = ("sparsity=0.5", "shard=0/12")
        warm = [
            start(core, Path(kept) / structure, environment, f"structure={structure}", *few, *options)
            for core, structure in zip(used, ("element", "16x1"), strict=False)
        ]
        for process in warm:
            process.wait()
        Path(caches["SRNN_CACHE"], "kernels.json").unlink(missing_ok=True)
        folders = [Path(kept) / str(i) for i in range(len(used))]
        running = [
            start(core, folder, environment, f"shard={i}/{len(used)}", f"limit={SECONDS}", *options)
            for i, (core, folder) in enumerate(zip(used, folders, strict=True))
        ]
        failed = {folder for process, folder in zip(running, folders, strict=True) if process.wait()}
        written = []
        for folder in folders:
            log, table = (folder / "log").read_text(), folder / "small.csv"
            lines = log.splitlines()
            print(
                *(lines[-20:] if folder in failed else [x for x in lines if x.startswith("left out")]), sep="\n", end=""
            )
            written += [table.read_text().splitlines()] if table.exists() else []
    rows = sorted(row for lines in written for row in lines[1:])
    Path(output).write_text("\n".join([written[0][0], *rows]) + "\n")
    print(f"{len(rows)} rows of {len(used)} processes in {output}")


if __name__ == "__main__":
    main(*sys.argv[1:])
