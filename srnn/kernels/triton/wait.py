"""Waiting, inside a kernel, for what other programs of the same launch write.

Of few data, the data is its own flag, ``written``. Memory that is to be written starts as all ones, which no result is
(kernels write another NaN instead), and a thread that finds a part of what it loaded unwritten loads that again, by
itself: no other thread of its program waits with it, and nobody has to publish that data is complete.

Of many data, each program counts itself in once it has written all of its own, and others wait until ``all_in``:
looking at each vector again and again would take the bandwidth that the data needs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from srnn.kernels.triton.tuning import TRIES


def _assembly(vectors: int, bits: int) -> tuple[str, str]:
    """PTX for ``vectors`` loads of 16 bytes a thread, and its constraints.

    Operands, a register each: results; what was loaded before; offsets (of elements, one an element, of which the first
    of each vector is used); the base address, the address of the flag for failures, and whether to wait at all, once an
    element, all the same.
    """
    per_vector = 128 // bits
    elements, words = vectors * per_vector, 4 * vectors
    places = iter(range(2 * words + 4 * elements))
    out, loaded, offset, base, failed, wait = ([f"${next(places)}" for _ in range(n)] for n in
                                               (words, words, *([elements] * 4)))  # fmt: skip

    def unwritten(of: list[str], where: str) -> list[str]:
        """Set a predicate if one of these words has a part that is all ones."""
        if bits == 32:
            first, *rest = of
            return [f"setp.eq.b32 {where}, {first}, -1;", *(f"setp.eq.or.b32 {where}, {w}, -1, {where};" for w in rest)]
        # A half of w is all ones if a half of ~w is zero, which takes a bit from the highest of the half.
        lines = ["mov.b32 any, 0;"]
        for word in of:
            lines += [f"not.b32 n, {word};", "sub.u32 n, n, 0x00010001;", f"and.b32 n, n, {word};"]
            lines.append("or.b32 any, any, n;")
        return [*lines, "and.b32 any, any, 0x80008000;", f"setp.ne.b32 {where}, any, 0;"]

    def perhaps_nan(of: list[str], where: str) -> list[str]:
        """Set a predicate if one of these words has a part that may be unwritten, and seldom if none has.

        All ones is a NaN as fp16, bf16 or fp32, and sums of products with a NaN are NaN. Of a warp's instructions
        between two steps so many are for this that it counts: two words an instruction, not six instructions a word.
        """
        kind = "f16x2" if bits == 16 else "f32"
        sums = [f"t{i % 2}" for i in range(len(of) // 2)]
        lines = [f"fma.rn.{kind} {t}, {a}, {b}, {t};" for t, a, b in zip(sums, of[::2], of[1::2], strict=True)]
        lines = ["mov.b32 t0, 0;", "mov.b32 t1, 0;", *lines]
        if bits == 32:
            return [*lines, f"setp.nan.f32 {where}, t0, t1;"]
        return [*lines, f"setp.nan.f16x2 {where}|other, t0, t1;", f"or.pred {where}, {where}, other;"]

    lines = [".reg .pred missing, other;", ".reg .b32 any, n, tries, t0, t1;", ".reg .b64 a;"]
    lines += [f"mov.b32 {o}, {x};" for o, x in zip(out, loaded, strict=True)]
    lines += [f"setp.eq.b32 other, {wait[0]}, 0;", "@other bra FINISHED;"]
    lines += [*perhaps_nan(out, "missing"), "@!missing bra FINISHED;"]
    lines += [*unwritten(out, "missing"), "@!missing bra FINISHED;", "mov.b32 tries, 0;"]
    lines.append("AGAIN:")
    for v in range(vectors):
        own = out[4 * v : 4 * v + 4]
        lines += [*unwritten(own, "other"), f"mad.wide.s32 a, {offset[v * per_vector]}, {bits // 8}, {base[0]};"]
        lines.append(f"@other ld.relaxed.gpu.global.v4.b32 {{{', '.join(own)}}}, [a];")
    lines += [*unwritten(out, "missing"), "@!missing bra FINISHED;", "add.s32 tries, tries, 1;"]
    # Now and then, whether others have given up: what they failed to write will not come.
    lines += ["and.b32 n, tries, 255;", "setp.ne.b32 other, n, 0;", "@other bra AGAIN;"]
    lines += [f"ld.relaxed.sys.global.b32 n, [{failed[0]}];", "setp.ne.b32 other, n, 0;", "@other bra FINISHED;"]
    lines += [f"setp.lt.s32 other, tries, {TRIES};", "@other bra AGAIN;"]
    lines += [f"st.relaxed.sys.global.b32 [{failed[0]}], 1;", "FINISHED:"]
    constraints = ["=&r"] * words + ["r"] * (words + elements) + ["l"] * (2 * elements) + ["r"] * elements
    return "\n".join(["{", *lines, "}"]), ",".join(constraints)


# A kernel sees constexpr globals only.
_SIZES = [(vectors, bits) for vectors in (1, 2, 4, 8) for bits in (16, 32)]
_TEXTS = tl.constexpr({size: _assembly(*size)[0] for size in _SIZES})
_CONSTRAINTS = tl.constexpr({size: _assembly(*size)[1] for size in _SIZES})


@triton.jit
def written(bits, offset, base, failed, wait, VECTORS: tl.constexpr):
    """``bits`` as loaded from ``base + offset``, once all of them are written.

    Args:
        bits: int16 or int32, of which each thread holds vectors of 16 bytes, neighbours in the last dimension.
        offset: of the vector that an element is in.
        base: pointer.
        failed: pointer to the flag that is set when this gives up.
        wait: 0 takes whatever was loaded.
        VECTORS: that each thread holds; up to 8 are waited for at a time.
    """
    SIZE: tl.constexpr = bits.dtype.primitive_bitwidth
    AT_A_TIME: tl.constexpr = 8 if VECTORS > 8 else VECTORS
    TEXT: tl.constexpr = _TEXTS[(AT_A_TIME, SIZE)]
    CONSTRAINTS: tl.constexpr = _CONSTRAINTS[(AT_A_TIME, SIZE)]
    return tl.inline_asm_elementwise(
        TEXT, CONSTRAINTS,
        [bits, offset, base.to(tl.int64), failed.to(tl.int64), wait],
        dtype=bits.dtype, is_pure=False, pack=AT_A_TIME * 128 // SIZE,
    )  # fmt: skip


# A result, the addresses of the counter and of the flag for failures, and what to wait for.
_ALL_IN = tl.constexpr(f"""{{
    .reg .pred other;
    .reg .b32 n, tries;
    mov.b32 $0, 0;
    mov.b32 tries, 0;
    AGAIN:
    ld.acquire.gpu.global.b32 n, [$1];
    setp.ge.s32 other, n, $3;
    @other bra FINISHED;
    add.s32 tries, tries, 1;
    and.b32 n, tries, 255;
    setp.ne.b32 other, n, 0;
    @other bra AGAIN;
    ld.relaxed.sys.global.b32 n, [$2];
    setp.ne.b32 other, n, 0;
    @other bra GIVE_UP;
    setp.lt.s32 other, tries, {TRIES};
    @other bra AGAIN;
    st.relaxed.sys.global.b32 [$2], 1;
    GIVE_UP:
    mov.b32 $0, 1;
    FINISHED:
}}""")


@triton.jit
def count_in(counter, lost):
    """Say that this program has written all that it stored so far; not if it gave up, so that the others do, too."""
    tl.debug_barrier()
    tl.atomic_add(counter, 1 - lost, sem="release")


@triton.jit
def all_in(counter, wanted, failed):
    """Wait until programs have counted themselves in so many times. Returns 0, or 1 if this gave up.

    Args:
        counter: pointer, of ``count_in``.
        wanted: how many.
        failed: pointer to the flag that is set when this gives up.
    """
    return tl.inline_asm_elementwise(
        _ALL_IN, "=&r,l,l,r", [counter.to(tl.int64), failed.to(tl.int64), wanted],
        dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip
