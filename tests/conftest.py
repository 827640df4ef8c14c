import copy
import gc
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Small networks are no work for several threads, and those of parallel runs get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "2"  # what a test may ask for
torch.set_num_threads(1)
gc.set_threshold(20_000, 20, 50)  # as often as Python does, looking for cycles in all of torch is a tenth of the time
ROOT = Path(__file__).parent.parent

# Small enough for tests: 5 epochs of 8 batches of a GRU with 24 units.
SMALL = [
    "trainer=fast",
    "model.hidden_size=24",
    "model.embedding_size=8",
    "dataset.batch_size=8",
    "dataset.sequence_length=16",
]
QUIET = [*SMALL, "tracking.mode=disabled", "kernel=dense"]


def train(folder, *overrides):
    """One small run in this process, not tracked; returns its report."""
    from srnn.__main__ import main

    assert main([*SMALL, "tracking.mode=disabled", f"hydra.run.dir={folder}", *map(str, overrides)]) == 0
    return json.loads((folder / "report.json").read_text())


def less_to_time_and_draw(patch):
    """Half of a small run's time would be 200 rounds of timing, and a second drawing of each plot to find its edges.

    No test asks how fast a network is; runs in processes of their own do both as users' do. Hydra would copy all
    components whenever it composes, a quarter of that time, though it copies what it takes of them once more.
    """
    from hydra.core.config_store import ConfigStore
    from matplotlib.figure import Figure

    from srnn.inference import latency

    interleaved, savefig = latency.interleaved, Figure.savefig

    def few_rounds(calls, device, rounds, seconds):
        return interleaved(calls, device, min(rounds, 5), seconds)

    def draw_once(figure, path, **options):
        return savefig(figure, path, **options | {"bbox_inches": None, "dpi": 50})

    patch.setattr(latency, "interleaved", few_rounds)
    patch.setattr(Figure, "savefig", draw_once)
    patch.setattr(ConfigStore, "__deepcopy__", lambda store, _: store, raising=False)
    compose_once(patch)


def compose_once(patch):
    """Each command composes what all have in common once more, a third of a second: the same choices, Hydra's own part.

    Here it is composed again only where its presets, the components, the folder or the words are others.
    """
    from hydra.core.global_hydra import GlobalHydra

    from srnn.config import composing, sweeps
    from srnn.registry import register

    compose, composed = composing.compose_config, {}

    def compose_new(overrides, return_hydra_config=False):
        GlobalHydra.instance().clear()  # as it does
        presets = [path for folder in composing.conf_folders() for path in folder.rglob("*.yaml")]
        files = tuple((path, path.stat().st_mtime_ns, path.stat().st_size) for path in presets)
        components = tuple(register.components.values())  # kept, so that no other is at its place
        key = (tuple(overrides), return_hydra_config, Path.cwd(), files, tuple(map(id, components)))
        if key not in composed:
            composed[key] = copy.deepcopy(compose(overrides, return_hydra_config)), components
        return copy.deepcopy(composed[key][0])

    for module in (composing, sweeps):
        patch.setattr(module, "compose_config", compose_new)


@pytest.fixture(scope="session", autouse=True)
def isolated_session(tmp_path_factory):
    """Caches in a temporary folder, no network key, less to time and to draw: for the runs that tests share, too."""
    cache = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # kernels are compiled once for all workers
        cache = cache.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SRNN_CACHE", str(cache / "cache"))
        patch.delenv("SRNN_DEBUG", raising=False)
        patch.delenv("WANDB_API_KEY", raising=False)
        patch.setenv("WANDB_X_SAVE_REQUIREMENTS", "false")  # W&B would read about all installed packages in each run
        less_to_time_and_draw(patch)
        yield


@pytest.fixture(autouse=True)
def isolated(monkeypatch):
    """A fixed seed, and an idle machine, whatever else this one does meanwhile."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    torch.manual_seed(0)


@pytest.fixture
def srnn_command(tmp_path):
    """Run ``python -m srnn ...`` for real, in a folder of its own."""

    def run(*arguments, cwd=tmp_path, timeout=300, **environment):
        return subprocess.run(
            [sys.executable, "-m", "srnn", *map(str, arguments)],
            cwd=cwd,
            env=os.environ | environment,
            text=True,
            capture_output=True,
            timeout=timeout,
            check=False,
        )

    return run


# Runs that many tests read. A test that writes into one copies its folder first.


@pytest.fixture
def ctrl_c():
    """SIGINT interrupts, as in a terminal: jobs that a shell starts in the background are started without."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def text_run(tmp_path_factory):
    """The folder of a small run on text, pruned gradually, on dense kernels: ``auto`` may not choose the same twice."""
    folder = tmp_path_factory.mktemp("runs") / "text_run"
    train(folder, "kernel=dense")
    return folder


@pytest.fixture(scope="session")
def sweep(tmp_path_factory):
    """The folder of a sweep, tracked offline: dense, and hard pruning at two sparsities, of two seeds each.

    Hard pruning is not the default, on which Hydra composes the sweep's own config, and ``prune_itr`` is only its.
    """
    from srnn.__main__ import main

    folder = tmp_path_factory.mktemp("runs") / "sweep"
    hard = ["pruning.sparsity=0.5,0.9", "pruning.prune_itr=0.5", "pruning.layer_types=[recurrent,linear]"]
    swept = ["pruning=none,hard", *hard, "seed=0,1", "tracking.tags=[mine]"]
    assert main(["-m", *SMALL, "kernel=dense", *swept, f"hydra.sweep.dir={folder}"]) == 0
    return folder
