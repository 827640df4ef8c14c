"""Speech networks on a GPU: the recurrence against cuDNN's layers, full-size training steps, real-time factors.

    python docs/bench_speech.py FOLDER [PART ...]

It writes speech_recurrence.csv, speech_fullsize.csv and speech_realtime.csv there, in two to three minutes; a part is
one of recurrence, fullsize and realtime.
"""

from __future__ import annotations

import copy
import csv
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from srnn.inference.sparsify import sparsify
from srnn.models import deepspeech2_gru, deepspeech2_rnn, recur, recurring, recurring_gpu
from srnn.models.transcribing import NetworkStream
from srnn.objectives.ctc import ctc_losses
from srnn.pruning import Pruner
from srnn.pruning.once import prune

BATCH, STEPS, ROUNDS = 32, 500, 7
LAYERS = {"relu": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
SIZES = {"input_size": 161, "output_size": 29}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Each row as it comes, so that what stops later leaves those before."""
    device = torch.cuda.get_device_name()
    with path.open("w", newline="", buffering=1) as file:
        table = None
        for row in rows:
            row = {"device": device, **row}
            table = table or csv.DictWriter(file, list(row), lineterminator="\n")
            if file.tell() == 0:
                table.writeheader()
            table.writerow(row)


def in_turns(calls: list[Callable[[], Any]], rounds: int = ROUNDS) -> list[dict[str, float]]:
    """Median, 20th and 80th percentile of each call, in milliseconds."""
    spent: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
        call()
    for _ in range(rounds):
        for times, call in zip(spent, calls, strict=True):
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            torch.cuda.synchronize()
            times.append(1e3 * (time.perf_counter() - began))
    places = {"ms": 0.5, "p20": 0.2, "p80": 0.8}
    return [{name: round(sorted(times)[int(at * rounds)], 3) for name, at in places.items()} for times in spent]


def recurrences() -> Iterable[dict[str, Any]]:
    """A layer of cuDNN's, and its product with the input and ``recur``: forward, and forward and backward."""
    for dtype in (torch.float32, torch.bfloat16):
        for cell, kind in LAYERS.items():
            for hidden in (1760, 2560):
                torch.cuda.empty_cache()
                options = {"nonlinearity": "relu"} if cell == "relu" else {}
                layer = kind(hidden, hidden, bias=False, **options).to("cuda", dtype)
                layer.flatten_parameters()
                x = torch.randn(STEPS, BATCH, hidden, device="cuda", dtype=dtype, requires_grad=True)
                zero = (torch.zeros(BATCH, hidden, device="cuda", dtype=dtype),) * (1 + (cell == "lstm"))
                yield from compared(layer, x, zero, cell)


def compared(layer: nn.RNNBase, x: Tensor, zero: tuple[Tensor, ...], cell: Any) -> Iterable[dict[str, Any]]:
    """Rows of one layer."""

    def theirs() -> Tensor:
        return layer(x)[0]

    def ours() -> Tensor:
        return recur(x @ layer.weight_ih_l0.T, layer.weight_hh_l0, zero, cell)[0]

    def both_ways(call: Callable[[], Tensor]) -> Callable[[], None]:
        gradient = torch.randn_like(x)
        return lambda: call().backward(gradient)

    with torch.no_grad():
        truth, got = theirs().double(), ours().double()
        forward = in_turns([theirs, ours])
    error = float((truth - got).norm() / truth.norm())
    for what, (cudnn, own) in (
        ("forward", forward),
        ("forward and backward", in_turns([both_ways(theirs), both_ways(ours)])),
    ):
        row = {
            "cell": cell,
            "hidden": layer.hidden_size,
            "batch": BATCH,
            "steps": STEPS,
            "dtype": x.dtype,
            "what": what,
        }
        row |= {f"cudnn_{name}": value for name, value in cudnn.items()}
        row |= {f"recur_{name}": value for name, value in own.items()}
        yield row | {"ratio": round(own["ms"] / cudnn["ms"], 3), "error": f"{error:.1e}"}


def full_size() -> Iterable[dict[str, Any]]:
    """A training step at batch 32, 10 s of audio; pruned ones update their masks at each step, which is the most."""
    fused = recurring.runs_on_gpu
    for recurrence in ("graphs", "loop"):
        recurring.runs_on_gpu = fused if recurrence == "graphs" else lambda *given: False
        for autocast in (False, True):
            for method in (None, "gradual") if recurrence == "graphs" else (None,):
                for build in (deepspeech2_rnn, deepspeech2_gru):
                    recurring_gpu._known.clear()
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                    (spent,) = in_turns([training_step(build, autocast, method)], rounds=3)
                    memory = round(torch.cuda.max_memory_allocated() / 2**30, 2)
                    row = {"network": build.__name__, "precision": "bf16 autocast" if autocast else "fp32"}
                    yield row | {"recurrence": recurrence, "pruning": method or "none", **spent, "peak_GiB": memory}
    recurring.runs_on_gpu = fused


def training_step(build: Callable[..., nn.Module], autocast: bool, method: str | None) -> Callable[[], None]:
    """A step of a new network."""
    with torch.device("cuda"):
        model = build(**SIZES)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9, nesterov=True)
    pruner = Pruner(model, method, run=20, freq=1, start_itr=1, ramp_itr=5, end_itr=20) if method else None
    x, targets = torch.randn(32, 998, 161, device="cuda"), torch.randint(1, 29, (32, 120), device="cuda")

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            logits, lengths = model(x)
        (ctc_losses(logits, lengths, targets) / 120).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if pruner:
            pruner.step()

    return step


def real_time() -> Iterable[dict[str, Any]]:
    """The gated network of the paper, untrained, one stream: dense, and 16x1 at 90 %."""
    model = deepspeech2_gru(**SIZES).eval().cuda()
    dense = copy.deepcopy(model)
    prune(model, sparsity=0.9, structure="16x1")
    sparse = sparsify(model, "16x1", "fp16", kernel="triton")
    x_TI = torch.randn(1998, 161, device="cuda")
    for name, network in (("dense, fp32", dense), ("16x1 at 90 %, fp16 weights", sparse)):
        for what, call in (("whole", whole), ("stream of 0.2 s pieces", streamed)):
            (spent,) = in_turns([lambda call=call, network=network: call(network, x_TI)], rounds=5)
            yield {"network": name, "what": what, **spent, "real_time_factor": round(spent["ms"] / 20_000, 5)}


@torch.inference_mode()
def whole(network: nn.Module, x_TI: Tensor) -> None:
    """All at once."""
    network(x_TI[None])


@torch.inference_mode()
def streamed(network: nn.Module, x_TI: Tensor) -> None:
    """Each piece's characters are read before the next piece."""
    stream = NetworkStream(network)
    for piece in x_TI.split(20):
        stream.feed(piece).argmax(-1).tolist()
    stream.finish().tolist()


PARTS = {"recurrence": recurrences, "fullsize": full_size, "realtime": real_time}


def main(folder: Path, *parts: str) -> None:
    """Those parts, or all three."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    folder.mkdir(parents=True, exist_ok=True)
    for name in parts or PARTS:
        write(folder / f"speech_{name}.csv", PARTS[name]())


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
