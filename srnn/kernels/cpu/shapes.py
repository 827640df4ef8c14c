"""Sizes that the compiled loops and their callers share; imports without numba."""

# Hidden units that are worked on together, multiples of every N. A chunk costs about a microsecond beside its
# arithmetic, so few large ones are best, as long as their scratch memory stays in the first cache and every thread
# gets several.
CHUNKS = (256, 128, 64, 32)
SCRATCH = 256  # units times streams of a chunk
ROWS = 16  # rows of an input that are multiplied together; a multiple of every tile
# N -> streams that share a loaded value: so many sums stay in 16 registers of 8 floats.
TILES = {1: 8, 4: 4, 8: 4, 16: 4, 32: 2}


def chunk_size(units: int, streams: int, threads: int) -> int:
    """Units of a chunk."""
    for size in CHUNKS:
        if size * streams <= SCRATCH and (threads == 1 or units >= 4 * size * threads):
            return size
    return CHUNKS[-1]
