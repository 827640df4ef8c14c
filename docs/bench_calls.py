"""Calls of sparse modules on a GPU: what one takes beside its CUDA graph alone, and the memory that many shapes keep.

    python docs/bench_calls.py FOLDER [CALLS]

It writes gpu_calls.csv and gpu_memory.csv there, in half a minute and, for 100,000 calls, another one.
"""

from __future__ import annotations

import csv
import gc
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from srnn.bench.cases import Format, pruned
from srnn.inference.sparsify import sparsify
from srnn.kernels.replay import nothing_recorded
from srnn.kernels.timing import Call, graphed, hardware, timed

DEVICE = torch.device("cuda")
CALLS = 50
# Cell, units, layers, structure -> streams and steps of calls.
LAYERS: dict[tuple[str, int, int, Any], tuple[tuple[int, int], ...]] = {
    ("gru", 1024, 1, "element"): ((1, 1), (1, 64), (1, 128), (1, 256)),
    ("gru", 2560, 1, "32x1"): ((1, 1), (1, 64), (1, 256), (16, 64), (16, 256), (64, 64), (64, 256)),
    ("lstm", 1500, 2, "32x1"): ((1, 1), (1, 64), (1, 256), (64, 64), (64, 256)),
}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Each row as it comes, so that what stops later leaves those before."""
    with path.open("w", newline="", buffering=1) as file:
        table = None
        for row in rows:
            row = {"device": hardware(DEVICE), **row}
            if table is None:
                table = csv.DictWriter(file, list(row), lineterminator="\n")
                table.writeheader()
            table.writerow(row)


def network(cell: str, inputs: int, units: int, layers: int, structure: Any) -> nn.Module:
    """Random layers at 90 %, on sparse kernels."""
    made = {"gru": nn.GRU, "lstm": nn.LSTM}[cell](inputs, units, layers).to(DEVICE).requires_grad_(False)
    generator = torch.Generator("cuda").manual_seed(0)
    for weight in made.parameters():
        if weight.ndim == 2:
            weight.copy_(pruned(*weight.shape, 3 if cell == "gru" else 4, Format(0.9, structure, "fp16"), generator))
    return sparsify(made, structure, "fp16", "triton")


def on_the_host(call: Call) -> float:
    """Seconds until a call comes back, not awaited; nothing is queued before it."""
    took = []
    for _ in range(CALLS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        took.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return median(took)


def calls() -> Iterator[dict[str, Any]]:
    """A call of a module, its graph alone, and the call without replays, each awaited, in turns."""
    for (cell, units, layers, structure), shapes in LAYERS.items():
        net = network(cell, units, units, layers, structure)
        for streams, steps in shapes:
            x_TBI = torch.randn(steps, streams, units, device=DEVICE, dtype=torch.float16)

            def call(x_TBI: Tensor = x_TBI, net: nn.Module = net) -> Tensor:
                return net(x_TBI)[0]

            with torch.inference_mode():
                truth = call()
                with nothing_recorded():
                    plain = [timed(call, DEVICE) for _ in range(CALLS)]
                alone, _ = graphed(call, DEVICE)
                for _ in range(3):
                    # Equal, but for rounding where a call takes so much that it is replayed as parts.
                    torch.testing.assert_close(call(), truth, atol=2e-3 if streams * steps >= 1 << 14 else 0.0, rtol=0)
                took: dict[str, list[float]] = {"graph": [], "call": []}
                for _ in range(CALLS):
                    took["graph"].append(timed(alone, DEVICE))
                    took["call"].append(timed(call, DEVICE))
                host = on_the_host(call)
            micros = {"graph_us": took["graph"], "call_us": took["call"], "without_replays_us": plain}
            yield {
                "layer": f"{layers} x {cell} {units}", "structure": structure, "values": "fp16", "sparsity": 0.9,
                "streams": streams, "steps": steps,
                **{name: f"{1e6 * median(each):.1f}" for name, each in micros.items()}, "host_us": f"{1e6 * host:.1f}",
            }  # fmt: skip


def memory(count: int) -> Iterator[dict[str, Any]]:
    """What is allocated and reserved while shapes change at each call: 256 of them."""
    net = network("gru", 256, 512, 1, "element")
    generator = torch.Generator().manual_seed(0)
    x_TBI = torch.randn(64, 4, 256, device=DEVICE, dtype=torch.float16)
    with torch.inference_mode():
        for done in range(1, count + 1):
            steps, streams = (int(torch.randint(1, most + 1, (1,), generator=generator)) for most in (64, 4))
            net(x_TBI[:steps, :streams].contiguous())
            if done % (count // 20) == 0:
                torch.cuda.synchronize()
                free, whole = torch.cuda.mem_get_info()
                yield {
                    "calls": done,
                    "allocated_bytes": torch.cuda.memory_allocated(),
                    "reserved_bytes": torch.cuda.memory_reserved(),
                    "used_on_card_bytes": whole - free,
                }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    write(folder / "gpu_calls.csv", calls())
    gc.collect()  # the networks above refer to themselves
    torch.cuda.empty_cache()
    write(folder / "gpu_memory.csv", memory(int(sys.argv[2]) if len(sys.argv) > 2 else 100_000))
