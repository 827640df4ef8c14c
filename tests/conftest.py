import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Small networks are no work for several threads, and those of parallel runs get in each other's way.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["NUMBA_NUM_THREADS"] = "2"  # what a test may ask for
torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def isolated(tmp_path_factory, monkeypatch):
    """Caches in a temporary folder, a fixed seed, no network key, an idle machine."""
    monkeypatch.setenv("SRNN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.delenv("SRNN_DEBUG", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # whatever else this machine does meanwhile
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


# Small enough for tests: 5 epochs of 8 batches of a GRU with 24 units.
SMALL = [
    "trainer=fast",
    "model.hidden_size=24",
    "model.embedding_size=8",
    "dataset.batch_size=8",
    "dataset.sequence_length=16",
]
