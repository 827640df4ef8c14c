"""``python -m srnn doctor``: what is installed, what can run here, and why something cannot."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from srnn.commands.options import Help, command
from srnn.errors import UserError

REQUIRED = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "pydantic", "numpy", "safetensors", "torchmetrics",
            "numba", "matplotlib", "wandb")  # fmt: skip
# What it is for -> the package that it takes, and what installs it.
EXTRAS = {
    "dataset=digits": ("scikit-learn", "srnn[digits]"),
    "srnn export format=onnx": ("onnxruntime", "srnn[onnx]"),
    "a C compiler, where there is none": ("ziglang", "srnn[c]"),
    "hydra/launcher=joblib": ("hydra-joblib-launcher", "srnn[launchers]"),
    "hydra/launcher=slurm": ("hydra-submitit-launcher", "srnn[launchers]"),
    "hydra/launcher=ray": ("hydra-ray-launcher", "srnn[launchers]"),
    "hydra/sweeper=search": ("hydra-optuna-sweeper", "srnn[launchers]"),
    "the tests": ("pytest", "srnn[dev]"),
}


@command
def main(
    tune: Annotated[
        bool, Help("measure first which products are faster dense on each GPU here; kept, 10 s a GPU")
    ] = False,
) -> int:
    """What is installed, what can run here, and why something cannot.

    Returns:
        1 if something stands in the way of the main job.

    Raises:
        UserError: ``--tune`` where there is no GPU for it.
    """
    from rich.table import Table

    from srnn.terminal import console

    if tune:
        _tune()
    troubles = []
    for title, rows in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("what can be done here, and what the rest needs", _uses()),
        ("kernels", _kernels()),
        ("products on a GPU", _products()),
        ("folders", _folders()),
        ("plug-ins", _plugins()),
    ):
        table = Table(title=title, title_justify="left", show_header=False, expand=True)
        table.add_column("", ratio=1)
        table.add_column("", ratio=3, overflow="fold")
        for name, text, fine in rows:
            table.add_row(name, text if fine else f"! {text}")
            if not fine:
                troubles.append(f"{name}: {text}")
        console.print(table)
    for trouble in troubles:
        console.print(f"! {trouble}", soft_wrap=True)
    console.print("In the way: see above." if troubles else "Nothing is in the way.")
    return 1 if troubles else 0


Rows = Iterator[tuple[str, str, bool]]  # name, what there is to say, whether it is fine


def _versions() -> Rows:
    import srnn

    yield "srnn", f"{srnn.__version__}, {Path(srnn.__file__).parent}", True
    yield "python", f"{platform.python_version()}, {platform.platform()}", True
    for package in REQUIRED:
        version = _version(package)
        yield package, version or f"is not installed: pip install {package}", version is not None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> Rows:
    import torch

    yield "cpu", f"{os.cpu_count()} cores, {platform.machine()}, {torch.backends.cpu.get_cpu_capability()}", True
    yield "threads", f"{torch.get_num_threads()}, {_why_so_many()}", True
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}", True


def _why_so_many() -> str:
    """Where the number of threads comes from, as torch reads it."""
    chosen = next((name for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if os.environ.get(name)), None)
    return f"from {chosen}={os.environ[chosen]}" if chosen else "torch's own choice; OMP_NUM_THREADS=N sets another"


def _uses() -> Rows:
    """A row a use: ready, or what it takes."""
    missing = [package for package in REQUIRED if _version(package) is None]
    yield "training, packing, plots", f"needs {', '.join(missing)}" if missing else "ready", not missing
    no_gpu = _no_gpu()
    yield "training on a GPU", no_gpu or "ready: trainer=gpu", True
    no_triton = None if _version("triton") else "needs the package triton, which is for Linux: pip install triton"
    yield "Triton kernels", no_triton or no_gpu or "ready: kernel=triton", True
    yield "W&B, offline", "ready" if _version("wandb") else "needs wandb: pip install wandb", True
    yield "W&B, upload", _no_upload() or "ready: tracking.mode=online", True
    for use, (package, install) in EXTRAS.items():
        version = _version(package)
        yield use, f"ready: {package} {version}" if version else f"needs {package}: pip install '{install}'", True


def _no_gpu() -> str | None:
    """Why torch has no GPU here; None if it has."""
    import torch

    if torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "needs a CUDA build of torch, as pytorch.org shows: this one is for CPUs alone"
    return "needs an NVIDIA GPU and its driver: torch finds none"


def _no_upload() -> str | None:
    if _version("wandb") is None:
        return "needs wandb: pip install wandb"
    from srnn.recording.wandb import has_key

    return None if has_key() else "needs a key: wandb login, or WANDB_API_KEY; until then runs stay offline"


def _kernels() -> Rows:
    import torch

    from srnn.registry import register

    places = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for name in sorted(register.names("kernel")):
        kernel = register.build("kernel", {"name": name})
        reasons = {str(place): kernel.supports(None, place) for place in places}
        runs = ", ".join(place for place, reason in reasons.items() if not reason)
        yield (
            f"kernel={name}",
            f"runs on: {runs}" if runs else f"not here: {'; '.join(map(str, reasons.values()))}",
            True,
        )


def _tune() -> None:
    """Measure and keep, for each GPU. Raises UserError where none can be measured."""
    import torch

    if reason := _no_gpu() or (None if _version("triton") else "needs the package triton: pip install triton"):
        raise UserError(f"doctor: --tune measures the Triton kernels on a GPU, and {reason}.")
    from srnn.kernels.triton.products.crossovers import tune

    for index in range(torch.cuda.device_count()):
        tune(torch.device("cuda", index))


def _products() -> Rows:
    """Which products run in which form, on each GPU, and whether that was measured there."""
    import torch

    from srnn.kernels.triton.tuning import is_measured, tuning_of

    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    for device in devices:
        found = tuning_of(device)
        yield (
            str(device),
            f"{'measured here' if is_measured(device) else 'as on an H100; srnn doctor --tune measures it'}: single "
            f"elements are sparse up to {found.few_rows} rows; 32x1 blocks vectors up to {found.few_rows_of_blocks}, "
            f"and with many rows dense from {min(1.0, 32 / found.dense_from):.0%} of the weights on",
            True,
        )
    if not devices:
        yield "none", "", True


def _folders() -> Rows:
    from srnn.files import cache_folder, nearest_there

    for name, folder, advice in (
        ("cache", cache_folder(), "set SRNN_CACHE to a folder that can be written"),
        ("outputs", Path("outputs").resolve(), "run in a folder that can be written, or set hydra.run.dir"),
    ):
        there = nearest_there(folder)
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            yield name, f"{folder} cannot be written ({error.strerror}): {advice}", False
            continue
        free = shutil.disk_usage(there).free
        enough = free > 1 << 30
        where = f"{folder} ({_why_there()})" if name == "cache" else str(folder)
        yield name, f"{where}, {free / 2**30:.1f} GiB free" + ("" if enough else f": {advice}"), enough


def _why_there() -> str:
    chosen = next((name for name in ("SRNN_CACHE", "XDG_CACHE_HOME") if os.environ.get(name)), None)
    return f"from {chosen}" if chosen else "the default; SRNN_CACHE names another"


def _plugins() -> Rows:
    from srnn.registry import register

    origins = sorted({c.origin for c in register.components.values() if c.origin.startswith("plug-in")})
    for origin in origins:
        made = [f"{c.kind}={c.name}" for c in register.components.values() if c.origin == origin]
        yield origin.removeprefix("plug-in "), ", ".join(made), True
    for path, reason in register.broken_plugins.items():
        yield path, f"left out: {reason}", False
    if not origins and not register.broken_plugins:
        yield "none", "", True
