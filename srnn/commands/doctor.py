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

from srnn.commands.options import command

PACKAGES = ("torch", "pytorch-lightning", "hydra-core", "omegaconf", "pydantic", "numba", "numpy", "safetensors",
            "torchmetrics", "wandb")  # fmt: skip
EXTRAS = {
    "scikit-learn": "dataset=digits",
    "onnxruntime": "srnn export format=onnx",
    "ziglang": "a C compiler, where there is none",
    "hydra-joblib-launcher": "hydra/launcher=joblib",
    "hydra-submitit-launcher": "hydra/launcher=slurm",
    "hydra-ray-launcher": "hydra/launcher=ray",
    "hydra-optuna-sweeper": "hydra/sweeper=search",
}


@command
def main() -> int:
    """What is installed, what can run here, and why something cannot.

    Returns:
        1 if something stands in the way of the main job.
    """
    from rich.table import Table

    from srnn.terminal import console

    troubles = []
    for title, rows in (
        ("versions", _versions()),
        ("devices", _devices()),
        ("backends", _backends()),
        ("folders", _folders()),
        ("plug-ins", _plugins()),
        ("tracking", _tracking()),
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
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package), True
        except importlib.metadata.PackageNotFoundError:
            yield package, f"is not installed: pip install {package}", False
    for package, use in EXTRAS.items():
        try:
            yield package, f"{importlib.metadata.version(package)}, for {use}", True
        except importlib.metadata.PackageNotFoundError:
            yield package, f"not there: without it no {use}", True


def _devices() -> Rows:
    import torch

    yield "cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads used, {_cpu_name()}", True
    if not torch.cuda.is_available():
        reason = "no driver or no GPU" if torch.version.cuda else "this torch is built for CPUs alone"
        yield "cuda", f"none: {reason}", True
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        yield f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}", True


def _cpu_name() -> str:
    import torch

    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def _backends() -> Rows:
    import torch

    from srnn.registry import register

    places = [torch.device("cpu"), *([torch.device("cuda")] if torch.cuda.is_available() else [])]
    for name in sorted(register.names("kernel")):
        kernel = register.build("kernel", {"name": name})
        reasons = {str(place): kernel.supports(None, place) for place in places}
        runs = ", ".join(place for place, reason in reasons.items() if not reason)
        words = [f"runs on: {runs}"] if runs else []
        words += [f"not on {place}: {reason}" for place, reason in reasons.items() if reason]
        yield f"kernel={name}", "; ".join(words), True


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


def _tracking() -> Rows:
    from srnn.recording.wandb import has_key

    yield (
        "W&B key",
        "there: tracking.mode=online works" if has_key() else "none: tracking.mode=offline, the default",
        True,
    )
