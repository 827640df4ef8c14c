"""What the fuzz tests share: how many inputs, what is done to them, and what an answer may cost and say.

Seeds are fixed. ``SRNN_FUZZ=10 pytest tests/fuzz -m "not gpu"`` tries ten times as many inputs as the ordinary suite.
"""

import gc
import os
import random
import time
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from srnn.__main__ import main
from tests.inference.test_files_of_others import JUNK, mutated

FACTOR = int(os.environ.get("SRNN_FUZZ", "1"))
SECONDS, KILOBYTES = 1.0, 200_000  # of CPU time and memory that an answer may cost
__all__ = ["JUNK", "Answers", "damaged", "generators", "mutated"]


def generators(name, count):
    """Random generators, one an input: the same ones every time."""
    return [random.Random(f"{name} {seed}") for seed in range(count * FACTOR)]


class Answers:
    """Counts the answers of commands, checks each of them, and keeps what the dearest cost.

    Args:
        seconds: of CPU time that an answer may take.
        kilobytes: by which the process's memory may rise at its peak.
    """

    def __init__(self, seconds=SECONDS, kilobytes=KILOBYTES):
        self.limits = seconds, kilobytes
        self.counts = Counter()
        self.slowest = self.largest = 0

    @contextmanager
    def measured(self, what):
        """Raise unless what is done inside stays within the limits."""
        _forget_peak()
        collects = gc.isenabled()
        gc.disable()  # a round through all that other tests left takes a second, and is no part of the answer
        resident, began = _memory("VmRSS"), time.process_time()
        try:
            yield
        finally:
            if collects:
                gc.enable()
        took, grown = time.process_time() - began, _memory("VmHWM") - resident
        self.slowest, self.largest = max(self.slowest, took), max(self.largest, grown)
        assert took < self.limits[0], f"{what}: {took:.1f} s"
        assert grown < self.limits[1], f"{what}: {grown:,} KB"

    def to(self, capsys, arguments, what, codes=(0, 2)):
        """Run a command in this process: done, or refused in one sentence. Returns the exit code and what was said."""
        with self.measured(what):
            code = main([str(word) for word in arguments])
        said = capsys.readouterr()
        assert code in codes, f"{what}: exit code {code}: {said.err}"
        assert "Traceback" not in said.err + said.out, what
        if code == 2:
            _, ours, sentence = said.err.rpartition("srnn: ")  # a name in it may hold line ends
            assert ours, f"{what}: {said.err}"
            assert len(sentence) > 20, f"{what}: {sentence}"
        self.counts[code] += 1
        return code, said

    def refused(self, error, what):
        """Count an error of ours, which has to be a sentence and no book."""
        self.counts["refused"] += 1
        assert 15 < len(str(error)) < 10_000, what

    def __str__(self):
        counts = ", ".join(f"{count} x {what}" for what, count in sorted(self.counts.items(), key=str))
        return f"{counts}; at most {self.slowest:.2f} s of CPU time, {self.largest / 1000:.0f} MB"


def _memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def _forget_peak():
    Path("/proc/self/clear_refs").write_text("5")


def damaged(data, rng):
    """Bytes of a file after a bad disk or a hand: cut, flipped, overwritten, lost, or there twice."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        place, length = rng.randrange(len(data) + 1), min(rng.choice([1, 4, 64, 4096]), len(data))
        action = rng.choice(["cut", "flip", "flip", "flip", "overwrite", "lose", "repeat", "zero"])
        if action == "cut":
            del data[place:]
        elif action == "flip" and place < len(data):
            data[place] ^= 1 << rng.randrange(8)
        elif action == "overwrite":
            data[place : place + length] = rng.randbytes(length)
        elif action == "zero":
            data[place : place + length] = bytes(length)
        elif action == "lose":
            del data[place : place + length]
        else:
            data[place:place] = data[place : place + length]
    return bytes(data)
