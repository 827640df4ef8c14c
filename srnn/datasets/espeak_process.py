"""Speaks sentences with eSpeak NG into WAV files: a process of its own, which imports nothing of srnn.

How an utterance sounds depends a little on those before it. In a new process, in one order, all are the same each time.
"""

from __future__ import annotations

import ctypes
import json
import sys
import wave
from pathlib import Path
from typing import Any

_SYNCHRONOUS, _DONT_EXIT = 2, 0x8000  # of espeak_Initialize
_CHARACTERS, _UTF8 = 1, 1  # of espeak_Synth
_SPEED = 1  # of espeak_SetParameter


def say(library: str, data: str, jobs: list[tuple[str, str, str, int]]) -> None:
    """Write all of the jobs.

    Args:
        library: the shared library's file.
        data: its folder of voices.
        jobs: path of the WAV file, text, voice, and speed in words a minute, of each.

    Raises:
        RuntimeError: the library does not start, or has no such voice.
    """
    espeak, heard = ctypes.CDLL(library), bytearray()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p)
    def hear(samples: int | None, count: int, events: Any) -> int:
        if samples and count > 0:
            heard.extend(ctypes.string_at(samples, 2 * count))
        return 0

    rate = espeak.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(errors="surrogateescape"), _DONT_EXIT)
    if rate <= 0:
        raise RuntimeError(f"eSpeak NG does not start with the voices in {data}")
    espeak.espeak_SetSynthCallback(hear)
    espeak.espeak_Synth.argtypes = [
        ctypes.c_char_p, ctypes.c_size_t, ctypes.c_uint, ctypes.c_int, ctypes.c_uint, ctypes.c_uint,
        ctypes.c_void_p, ctypes.c_void_p,
    ]  # fmt: skip
    for path, text, voice, speed in jobs:
        espeak.espeak_ng_SetRandSeed(ctypes.c_long(1))  # of the breath in some voices, else the time's
        if espeak.espeak_SetVoiceByName(voice.encode()):
            raise RuntimeError(f"eSpeak NG has no voice {voice}")
        espeak.espeak_SetParameter(_SPEED, speed, 0)
        heard.clear()
        given = text.encode()
        if espeak.espeak_Synth(given, len(given) + 1, 0, _CHARACTERS, 0, _UTF8, None, None):
            raise RuntimeError(f"eSpeak NG cannot speak {text!r}")
        with wave.open(path, "wb") as file:
            file.setnchannels(1)
            file.setsampwidth(2)
            file.setframerate(rate)
            file.writeframes(bytes(heard))


if __name__ == "__main__":
    say(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
