"""The matrix instructions: D = f32(C + A * B), one rounding for each k16 step.

How a GPU rounds inside is not documented; results agree with one that sums
exactly where every partial sum is representable, and nearly elsewhere.
"""

import numpy as np

LANES = np.arange(32)
# Row and first column of a lane in an 8 x 8 matrix.
ROW, COL = LANES // 4, LANES % 4 * 2


def widen(bits, dtype):
    """Values of BF16 or FP16."""
    bits = bits.astype(np.uint16)
    if dtype == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def _halves(register, dtype):
    return widen(register & np.uint64(0xFFFF), dtype), widen(
        register >> np.uint64(16) & np.uint64(0xFFFF), dtype
    )


def _unpack_a(registers, dtype):
    """A of 16 x 16 from the fragments of a warp."""
    a = np.zeros((16, 16))
    for i, register in enumerate(registers):
        row, col = ROW + 8 * (i & 1), COL + 8 * (i >> 1)
        a[row, col], a[row, col + 1] = _halves(register, dtype)
    return a


def _accumulate(a, b, c):
    """c + a * b of fragments of FP32, four registers for each 8 columns."""
    columns = b.shape[1]
    sums = np.zeros((16, columns))
    place = [
        (ROW + 8 * (i >> 1 & 1), i // 4 * 8 + COL + (i & 1)) for i in range(len(c))
    ]
    for (row, col), register in zip(place, c):
        sums[row, col] = register.astype(np.uint32).view(np.float32)
    with np.errstate(all="ignore"):
        sums = (sums + a @ b).astype(np.float32)
    return [sums[row, col].view(np.uint32).astype(np.uint64) for row, col in place]


def multiply_fragments(a, b, c, dtype):
    """mma.m16n8k16: registers in, registers out."""
    matrix = np.zeros((16, 8))
    for i, register in enumerate(b):
        row = COL + 8 * i
        matrix[row, ROW], matrix[row + 1, ROW] = _halves(register, dtype)
    return _accumulate(_unpack_a(a, dtype), matrix, c)


def multiply_shared(a, shared, descriptor, d, dtype):
    """A warp's 16 rows of wgmma.m64nNk16, with B in shared memory.

    B lies in core matrices of 8 columns (of K) x 8 tokens; the descriptor has
    their distances in 16 bytes: from one k8 to the next, from 8 tokens to the
    next. Or a token's columns are 128 bytes, whose pieces of 16 are swizzled.
    """
    assert descriptor >> 62 in (0, 1), "other swizzles are not modelled"
    is_swizzled = descriptor >> 62 == 1
    start, k_step, n_step = (
        (descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32)
    )
    tokens = np.arange(len(d) // 4 * 8)
    b = np.zeros((16, len(tokens)))
    for half in range(2):
        if is_swizzled:
            at = start + half * 16 + tokens // 8 * n_step + tokens % 8 * 128
            at ^= (at >> 7 & 7) << 4
        else:
            at = start + half * k_step + tokens // 8 * n_step + tokens % 8 * 16
        assert at.max() + 16 <= len(shared), "wgmma beyond shared memory"
        index = at[:, None] + np.arange(16)
        b[8 * half : 8 * half + 8] = widen(shared[index].view(np.uint16), dtype).T
    return _accumulate(_unpack_a(a, dtype), b, d)
