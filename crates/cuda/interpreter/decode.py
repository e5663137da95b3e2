"""Cases of decoding dense and fixed-rate weights: `kernels/fixed_decode.cu`."""

import struct

import numpy as np

from harness import UNWRITTEN, dequantise, expect_equal, narrow
from products import FORMATS, elements, random_scales


def decode(run, matrix, part, to_f16):
    """`part`: "all", "inner" rows and columns, or single rows ("gather")."""
    memory, rng = run.memory, run.rng
    rows, cols = matrix.rows, matrix.cols
    row_begin, row_end, col_begin, col_end = 0, rows, 0, cols
    ids = None
    if part == "inner":
        row_begin, row_end = rows // 3, rows - rows // 4
        col_begin, col_end = cols // 5, cols - cols // 7
    if part == "gather":
        ids = np.array([*rng.integers(0, rows, 5), rows, 0xFFFF_FFFF, 0], np.uint32)
    values = elements(matrix)
    is_bytes = values.dtype == np.int8 and not to_f16
    kind = np.uint8 if is_bytes else np.uint16
    size = np.dtype(kind).itemsize
    scales = random_scales(rng, rows)
    if to_f16:
        values = narrow(dequantise(values, scales), "f16")
    values = values.view(kind)
    n_ids = 0 if ids is None else len(ids)
    shape = (n_ids or row_end - row_begin, col_end - col_begin)
    out = memory.reserve(shape[0] * shape[1] * size)
    overflow = matrix.overflow if len(matrix.overflow) else np.zeros(4, np.uint8)
    is_aligned = shape[1] * size % 16 == 0 and col_begin * size % 16 == 0
    params = struct.pack(
        "<7Q10I",
        memory.upload(matrix.chunks),
        memory.upload(overflow),
        memory.upload(matrix.symbols),
        memory.upload(scales),
        0 if ids is None else memory.upload(ids),
        out,
        shape[1],
        *(rows, cols, row_begin, row_end, col_begin, col_end),
        *(n_ids, matrix.chunk_bytes, 1, is_aligned),
    )
    name = f"fixed_decode_{matrix.format}{'_f16' if to_f16 else ''}"
    n_shared = 8 * (2 * matrix.chunk_bytes + 2048 * size)
    run.launch(name, (2, 1), 256, n_shared, params)
    if ids is None:
        found = run.read_written(out, shape, kind)
        expected = values[row_begin:row_end, col_begin:col_end]
    else:
        found = memory.read(out, shape[0] * shape[1], kind).reshape(shape)
        expected = np.full(shape, UNWRITTEN[size], kind)
        for i, row in enumerate(ids):
            if row < rows:
                expected[i] = values[row]
    expect_equal(found, expected, f"{name}, {part}")


def cases(harness):
    """(name, function of a random generator)."""

    def case(name, part, to_f16):
        def execute(rng):
            # Every warp has its own part of shared memory.
            run = harness.run(rng, check_races=True)
            decode(run, harness.matrix(name), part, to_f16)

        return f"{name}, decode {part}{' to FP16' if to_f16 else ''}", execute

    for format_name in FORMATS:
        for to_f16 in (False, True) if "int8" in format_name else (False,):
            yield case(f"fixed-{format_name}-16x1536-0", "all", to_f16)
            yield case(f"fixed-{format_name}-47x391-100", "inner", to_f16)
            yield case(f"fixed-{format_name}-47x391-3", "gather", to_f16)
