"""``python -m srnn transcribe --run FOLDER --audio FILE``: write speech down with a packed network."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from srnn.commands.options import Help, KernelOption, RunOption, command, packed_file
from srnn.errors import UserError
from srnn.files import expanded
from srnn.registry import Range

RECORDINGS = (".wav", ".flac", ".ogg")
_PIECE = 1600  # samples of a stream that are heard at a time: 0.1 s


@command
def main(
    run: RunOption,
    audio: Annotated[str, Help("a recording, a folder, or - for raw 16-bit mono samples of 16 kHz from a pipe")],
    stream: Annotated[bool, Help("write while it listens: true or false")] = False,
    beam: Annotated[int, Range(ge=1, le=1000), Help("width of the prefix beam search; 1 is greedy")] = 1,
    kernel: KernelOption = "auto",
) -> int:
    """Write speech down with a run's packed file.

    Prints a line for each recording, and to stderr the time that it took over the time that it lasts.
    """
    if stream and beam > 1:
        raise UserError(f"transcribe: --beam={beam} looks at whole recordings, and --stream=true cannot wait for them.")
    path = packed_file(run)

    from srnn.inference.packed_file import load

    model: Any = load(path, kernel)
    if not hasattr(model, "transcriber"):
        raise UserError(f"{path} is a network that writes no speech down: train one with model=deepspeech2.")
    write = model.transcriber()
    listener = write.stream if stream else None
    spent = lasted = 0.0
    for name, pieces in _recordings(audio):
        began = time.perf_counter()
        text, samples = _listened(listener(), pieces) if listener else _whole(write, pieces, beam)
        spent, lasted = spent + time.perf_counter() - began, lasted + samples / 16_000
        sys.stdout.write(f"{name}\t{text}\n" if name else f"{text}\n")
        sys.stdout.flush()
    factor = f", real-time factor {spent / lasted:.3f}" if lasted else ""
    print(f"srnn: {lasted:.1f} s of audio in {spent:.1f} s{factor}", file=sys.stderr)
    return 0


def _whole(write: Any, pieces: Iterator[Any], beam: int) -> tuple[str, int]:
    import torch

    x_N = torch.cat(list(pieces) or [torch.zeros(0)])
    return write(x_N, beam), len(x_N)


def _listened(listener: Any, pieces: Iterator[Any]) -> tuple[str, int]:
    """The text and the samples heard; what was written so far goes to stderr as it grows."""
    before, samples = "", 0
    for piece in pieces:
        samples += len(piece)
        text = listener.hear(piece)
        if text != before:
            before = text
            print(text, file=sys.stderr, flush=True)
    return listener.finish(), samples


def _recordings(audio: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Name and pieces of samples of each recording; a single one has no name. Raises UserError."""
    if audio == "-":
        yield "", _raw()
        return
    path = expanded(audio)
    if not path.exists():
        raise UserError(f"transcribe: --audio={audio}: no such file or folder.")
    if path.is_file():
        yield "", _file(path)
        return
    found = sorted(each for each in path.rglob("*") if each.suffix.lower() in RECORDINGS)
    if not found:
        raise UserError(f"transcribe: --audio={audio}: this folder has no {', '.join(RECORDINGS)} files.")
    for each in found:
        yield str(each), _file(each)


def _file(path: Path) -> Iterator[Any]:
    from srnn.audio import read_audio

    yield from read_audio(path).split(_PIECE)


def _raw() -> Iterator[Any]:
    import numpy as np
    import torch

    rest = b""
    pipe: Any = sys.stdin.buffer
    while block := pipe.read1(2 * _PIECE):
        block = rest + block
        rest = block[len(block) // 2 * 2 :]
        yield torch.from_numpy(np.frombuffer(block[: len(block) // 2 * 2], "<i2").astype(np.float32) / 32768)
