"""Speech networks on a CPU: how fast one starts, the paper's gated network against dense, when a word is written.

    python docs/bench_speech_cpu.py OUTPUT.csv [RUN FSDD]

RUN is a run of model=deepspeech2_small on strings of digits with dataset.normalise=running, FSDD its recordings;
without them only the paper's network is measured. Best of several rounds, in turns: other load makes single ones
longer.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import srnn
from srnn.audio import RATE
from srnn.datasets import SpokenDigits
from srnn.files import csv_bytes
from srnn.inference.sparsify import sparsify
from srnn.kernels.timing import processor
from srnn.models import deepspeech2_gru
from srnn.models.transcribing import NetworkStream
from srnn.pruning.once import prune

SECONDS, ROUNDS, STARTS, UTTERANCES = 2, 3, 3, 100
PIECE = RATE // 10  # samples of a stream that are heard at a time
START = """
import json, sys, time, torch
torch.set_num_threads(1)
began = time.perf_counter()
import srnn
write = srnn.load(sys.argv[1], kernel=sys.argv[2]).transcriber()
loaded = time.perf_counter()
write(torch.zeros(16000))
print(json.dumps({"start": loaded - began, "first call": time.perf_counter() - loaded,
                  "heavy": [m for m in ("pytorch_lightning", "hydra", "omegaconf", "wandb") if m in sys.modules]}))
"""


def starts(file: Path) -> Iterator[dict[str, Any]]:
    """Seconds from the end of ``import torch`` to a transcriber, in new processes; and its first second of audio."""
    told: dict[str, list[dict[str, Any]]] = {kernel: [] for kernel in ("csr", "dense", "auto")}
    for _ in range(STARTS):
        for kernel, several in told.items():
            done = subprocess.run(
                [sys.executable, "-c", START, str(file), kernel], capture_output=True, text=True, check=True
            )
            several.append(json.loads(done.stdout))
    for kernel, several in told.items():
        assert not any(one["heavy"] for one in several), several
        for case in ("start", "first call"):
            best = min(one[case] for one in several)
            yield {"part": "start", "kernel": kernel, "threads": 1, "case": case, "seconds": round(best, 3)}


def gated() -> Iterator[dict[str, Any]]:
    """The paper's gated network of 2560 units, untrained, one stream of features: dense, and 16x1 at 90 %."""
    torch.manual_seed(0)
    dense = deepspeech2_gru(input_size=161, output_size=29).eval()
    model = copy.deepcopy(dense)
    prune(model, sparsity=0.9, structure="16x1")
    networks = {"dense": dense, "cpu": sparsify(model, "16x1", "fp16", kernel="cpu")}
    del model
    x_TI = torch.randn(100 * SECONDS - 2, 161)
    for case, call in (("whole", whole), ("stream", streamed)):
        best: dict[tuple[str, int], float] = {}
        for number in range(ROUNDS + 1):  # the first one warms up
            for threads in (1, 2):
                torch.set_num_threads(threads)
                for name, network in networks.items():
                    spent = seconds(lambda call=call, network=network: call(network, x_TI))
                    if number:
                        best[name, threads] = min(spent, best.get((name, threads), spent))
        for (kernel, threads), spent in best.items():
            row = {"part": "deepspeech2_gru 2560", "kernel": kernel, "threads": threads, "case": case}
            row |= {"seconds": round3(spent), "real_time_factor": round3(spent / SECONDS)}
            yield row | {"times_dense": round(best["dense", threads] / spent, 2)}


def round3(value: float) -> float:
    """Three digits that count."""
    return float(f"{value:.3g}")


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


@torch.inference_mode()
def whole(network: nn.Module, x_TI: Tensor) -> None:
    """All at once."""
    network(x_TI[None])


@torch.inference_mode()
def streamed(network: nn.Module, x_TI: Tensor) -> None:
    """In pieces of 0.1 s, whose characters are read before the next one."""
    stream = NetworkStream(network)
    for piece in x_TI.split(10):
        stream.feed(piece).argmax(-1).tolist()
    stream.finish()


def first_words(run: Path, recordings: str) -> Iterator[dict[str, Any]]:
    """When the first text comes, and when the first word is whole, after that word's end in strings of the run's own
    test: audio heard till then, and computing."""
    torch.set_num_threads(1)
    options = json.loads((run / "report.json").read_text(encoding="utf-8"))["config"]["dataset"]
    data = SpokenDigits(**{name: value for name, value in options.items() if name != "name"} | {"path": recordings})
    data.setup()
    write = srnn.load(run / "model.safetensors", kernel="csr").transcriber()
    delays: dict[str, list[float]] = {"first partial": [], "first word": []}
    computing, wrong = [], {"first word never right": 0, "whole string not right": 0}
    strings = data.utterances()["test"]
    strings = strings[:: max(1, len(strings) // UTTERANCES)]
    for string in strings:
        ends = len(data.recording(string.names[0])) / RATE
        x_N = torch.cat([data.samples_of(string), 0.001 * torch.randn(RATE)])  # a quiet room after it
        found, text = heard(write, x_N, string.text.split()[0], computing)
        wrong["first word never right"] += found["first word"] is None
        wrong["whole string not right"] += text != string.text
        for case, at in found.items():
            if at is not None:
                delays[case].append(at - ends)
    row = {"part": "after the first word's end", "kernel": "csr", "threads": 1}
    for case, several in delays.items():
        several.sort()
        for share in (0.5, 0.9, 1):
            late = several[min(len(several) - 1, int(share * len(several)))]
            yield row | {"case": f"{case}, {share:.0%}", "seconds": round(late, 3), "utterances": len(several)}
    spent = round3(sorted(computing)[len(computing) // 2])
    yield row | {"case": "computing for a piece of 0.1 s", "seconds": spent, "utterances": len(computing)}
    for case, count in wrong.items():
        yield row | {"case": f"{case}, of {len(strings)}", "utterances": count}
    yield row | {
        "case": "computing in all", "seconds": round3(sum(computing)),
        "real_time_factor": round3(sum(computing) / (len(computing) * PIECE / RATE)),
    }  # fmt: skip


def heard(write: Any, x_N: Tensor, word: str, computing: list[float]) -> tuple[dict[str, float | None], str]:
    """Seconds from the beginning of the audio till a text was there, and till it began with the word; the last text."""
    listener, found = write.stream(), dict.fromkeys(("first partial", "first word"))
    for number, piece in enumerate(x_N.split(PIECE), start=1):
        began = time.perf_counter()
        text = listener.hear(piece).strip()
        spent = time.perf_counter() - began
        computing.append(spent)
        at = number * PIECE / RATE + spent
        if text and found["first partial"] is None:
            found["first partial"] = at
        if text.startswith(word) and found["first word"] is None:
            found["first word"] = at
    return found, listener.finish().strip()


def main(output: str, run: str = "", recordings: str = "") -> None:
    """All parts, into one file."""
    rows: list[dict[str, Any]] = list(gated())
    if run:
        size = (Path(run) / "model.safetensors").stat().st_size
        rows.append({"part": "packed file", "case": "size", "megabytes": round(size / 1e6, 3)})
        rows += [*starts(Path(run) / "model.safetensors"), *first_words(Path(run), recordings)]
    load = f"{os.getloadavg()[1]:.1f}"
    rows = [{"cpu": processor(torch.device("cpu")), "cores": os.cpu_count(), "load": load} | row for row in rows]
    Path(output).write_bytes(csv_bytes(rows))


if __name__ == "__main__":
    main(*sys.argv[1:])
