"""A barrier over all programs of a grid: the yardstick that steps of a recurrence are measured by."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def barriers(counter, rounds):
    """So many barriers, one after the other. All programs must run at once."""
    for i in range(rounds):
        tl.atomic_add(counter, 1, sem="release")
        wanted = (i + 1) * tl.num_programs(0)
        while tl.load(counter, volatile=True) < wanted:
            pass
