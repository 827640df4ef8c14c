"""``python -m srnn transcribe RUN --audio FILE``: write speech down with a packed network."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
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
    phrases: Annotated[str, Help("file of all that can be said, a line each: the text is one of them")] = "",
    words: Annotated[str, Help("file of words: the text consists of them; a beam of 1 is 20 wide then")] = "",
    pause: Annotated[float, Range(ge=0.02, le=60), Help("seconds of silence that end an utterance of a stream")] = 0.6,
    kernel: KernelOption = "auto",
    device: Annotated[str, Help("where it runs, such as cuda")] = "cpu",
) -> int:
    """Write speech down with a run's packed file.

    Prints a line for each recording, or for each utterance of a stream, and to stderr the time that it took over the
    time that it lasts.
    """
    for name, given in (("beam", beam > 1 and beam), ("phrases", phrases), ("words", words)):
        if stream and given:
            raise UserError(
                f"transcribe: --{name}={given} looks at whole recordings, and --stream=true cannot wait for them."
            )
    if phrases and words:
        raise UserError(f"transcribe: --phrases={phrases} are whole texts: leave --words={words} out, or the other.")
    if beam > 1 and phrases:
        raise UserError(f"transcribe: --phrases={phrases} is exact without a beam: leave --beam={beam} out.")
    path = packed_file(run)

    from srnn.inference.packed_file import load

    model: Any = load(path, kernel, device=device)
    if not hasattr(model, "transcriber"):
        raise UserError(f"{path} is a network that writes no speech down: train one with model=deepspeech2.")
    write = model.transcriber()
    options = {
        "beam": beam,
        "phrases": _listed(write.phrases, "phrases", phrases) if phrases else None,
        "words": _listed(write.words, "words", words) if words else None,
    }
    spent = lasted = 0.0
    for name, pieces in _recordings(audio):
        before = f"{name}\t" if name else ""
        began = time.perf_counter()
        if stream:
            samples = _listened(write.stream(pause), pieces, before)
        else:
            text, samples = _whole(write, pieces, options)
            _say(f"{before}{text}")
        spent, lasted = spent + time.perf_counter() - began, lasted + samples / 16_000
    factor = f", real-time factor {spent / lasted:.3f}" if lasted else ""
    print(f"srnn: {lasted:.1f} s of audio in {spent:.1f} s{factor}", file=sys.stderr)
    return 0


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def _listed(made: Callable[[Iterable[str]], Any], option: str, given: str) -> Any:
    """What is made of the lines of a file; empty ones are passed over. Raises UserError."""
    try:
        lines = expanded(given).read_text(encoding="utf-8-sig").splitlines()
        return made(line for line in lines if line.strip())
    except (OSError, UnicodeDecodeError, UserError) as error:
        why = str(getattr(error, "strerror", None) or error).rstrip(".")
        raise UserError(f"transcribe: --{option}={given}: {why}.") from None


def _whole(write: Any, pieces: Iterator[Any], options: dict[str, Any]) -> tuple[str, int]:
    import torch

    x_N = torch.cat(list(pieces) or [torch.zeros(0)])
    return write(x_N, **options), len(x_N)


def _listened(listener: Any, pieces: Iterator[Any], before: str) -> int:
    """The samples heard. Utterances are printed where they end; what was written so far goes to stderr as it grows."""
    shown, samples, said = "", 0, 0
    for piece in pieces:
        samples += len(piece)
        text = listener.hear(piece)
        for ended in listener.ended:
            _say(f"{before}{ended}")
        said += len(listener.ended)
        listener.ended.clear()
        if text != shown:
            shown = text
            if text:
                print(text, file=sys.stderr, flush=True)
    last = listener.finish()
    for text in [*listener.ended, *([last] if last.strip() or not said + len(listener.ended) else [])]:
        _say(f"{before}{text}")
    return samples


def _recordings(audio: str) -> Iterator[tuple[str, Iterator[Any]]]:
    """Name and pieces of samples of each recording; a single one has no name.

    Raises:
        UserError: there are none; or some of a folder cannot be read, after the others.
    """
    if audio == "-":
        yield "", _raw()
        return
    path = expanded(audio)
    if not path.exists():
        raise UserError(f"transcribe: --audio={audio}: no such file or folder.")
    if not path.is_dir():
        yield "", _file(path)
        return
    found = sorted(each for each in path.rglob("*") if each.suffix.lower() in RECORDINGS)
    if not found:
        raise UserError(f"transcribe: --audio={audio}: this folder has no {', '.join(RECORDINGS)} files.")
    unread = []
    for each in found:
        try:
            pieces = _file(each)
        except UserError as error:
            unread.append(str(error).rstrip("."))
        else:
            yield str(each), pieces
    if unread:
        why = "; ".join(dict.fromkeys(unread))  # once where soundfile is not installed
        raise UserError(f"transcribe: {len(unread)} of {len(found)} recordings are left out: {why}.")


def _file(path: Path) -> Iterator[Any]:
    from srnn.audio import read_audio

    return iter(read_audio(path).split(_PIECE))


def _raw() -> Iterator[Any]:
    import numpy as np
    import torch

    rest = b""
    pipe: Any = sys.stdin.buffer
    while block := pipe.read1(2 * _PIECE):
        block = rest + block
        rest = block[len(block) // 2 * 2 :]
        yield torch.from_numpy(np.frombuffer(block[: len(block) // 2 * 2], "<i2").astype(np.float32) / 32768)
