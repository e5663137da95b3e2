"""Cases of entropy-coded weights: `kernels/rans.cu`."""

import struct
from types import SimpleNamespace

import numpy as np

from harness import UNWRITTEN, Difference, dequantise, expect_equal, narrow, product, slices
from matrix_units import widen
from products import FRAGMENTS, order_activations

RAW_UNIT = 1 << 31
NONE = 2**64 - 1
ROW_BYTES = 64


def elements(matrix):
    kind = np.uint8 if matrix.dtype == "int8" else np.uint16
    return matrix.elements.view(kind).reshape(matrix.rows, matrix.cols)


def load(run, matrix, tiles=None):
    """As `Rans::load`: measures the words of the units, places them, lays them.

    `tiles`: other bytes than the matrix's. The result's `first_bad` is NONE,
    or the first bad tile and its error.
    """
    memory = run.memory
    two_planes = matrix.suffix == "_two_planes"
    n_units = matrix.rows // 16 * ((matrix.cols + 255) // 256)
    n_tiles = len(matrix.starts) // 8 - 1
    has_raw = matrix.dtype != "int8" and not two_planes
    loaded = SimpleNamespace(
        table=memory.upload(matrix.table),
        words=0,
        states=memory.reserve(n_units * 128),
        positions=memory.reserve(4 * n_units + 4),
        raw=memory.reserve(n_units * 4096) if has_raw else 0,
        table_bytes=len(matrix.table),
        is_f16=matrix.dtype == "f16",
    )
    tiles = memory.upload(matrix.tiles if tiles is None else tiles)
    starts = memory.upload(matrix.starts)
    first_bad = memory.upload(np.array([NONE], np.uint64))

    def launch():
        params = struct.pack(
            "<8Q8I",
            *(tiles, starts, loaded.table, loaded.words, loaded.states),
            *(loaded.positions, loaded.raw, first_bad),
            *(matrix.rows, matrix.cols, matrix.prob_bits, loaded.table_bytes),
            *(1, n_tiles, loaded.is_f16, 0),
        )
        n_shared = 8 * 8192 * (1 + two_planes) + loaded.table_bytes
        name = f"rans_load{matrix.suffix}"
        run.launch(name, ((n_tiles + 7) // 8, 1), 256, n_shared, params)
        return int(memory.read(first_bad, 1, np.uint64)[0])

    loaded.first_bad = launch()
    if loaded.first_bad != NONE:
        return loaded
    counts = [int(count) for count in memory.read(loaded.positions, n_units, np.uint32)]
    positions, n_rows = [], 0
    for count in counts:
        positions.append(n_rows | count & RAW_UNIT)
        n_rows += count & ~RAW_UNIT
    positions.append(n_rows)
    memory.write(loaded.positions, np.array(positions, np.uint32))
    loaded.words = memory.reserve((n_rows + 1) * ROW_BYTES)
    if loaded.raw and matrix.cols % 256:
        # What lies beyond the last column is copied and not looked at.
        memory.written[loaded.raw : loaded.raw + n_units * 4096] = True
    loaded.first_bad = launch()
    return loaded


def matrix_params(matrix, loaded):
    return struct.pack(
        "<5Q6I",
        *(loaded.table, loaded.words, loaded.states, loaded.positions, loaded.raw),
        *(matrix.rows, matrix.cols, matrix.prob_bits, loaded.table_bytes),
        *(1, loaded.is_f16),
    )


def decode(run, matrix, loaded, part):
    """`part`: first row, first column, rows, columns."""
    row, col, rows, cols = part
    values = elements(matrix)
    out = run.memory.reserve(rows * cols * values.itemsize)
    params = matrix_params(matrix, loaded)
    if values.itemsize == 2:
        n_units = rows // 16 * ((cols + 255) // 256)
        n_blocks = max(1, min(2, (n_units + 15) // 16))
        params += struct.pack("<2Q4I", out, cols, *part)
        n_shared = 16 * (2 * 32 * ROW_BYTES + 2048) + loaded.table_bytes
        run.launch(f"rans_decode{matrix.suffix}", (n_blocks, 1), 512, n_shared, params)
    else:
        params += struct.pack("<Q6I", out, *part, 0x80, 0)
        n_shared = 8 * 2 * 32 * ROW_BYTES + loaded.table_bytes
        name = f"rans_decode_bytes{matrix.suffix}"
        run.launch(name, (2, 1), 256, n_shared, params)
    return run.read_written(out, (rows, cols), values.dtype)


def expect_decoded(run, matrix, loaded, part):
    row, col, rows, cols = part
    expected = elements(matrix)[row : row + rows, col : col + cols]
    found = decode(run, matrix, loaded, part)
    expect_equal(found, expected, f"decode{matrix.suffix} {part}")


def expect_gathered(run, matrix, loaded):
    values = elements(matrix)
    ids = np.array([0, matrix.rows - 1, 7, matrix.rows, 12, 2**32 - 1], np.uint32)
    out = run.memory.reserve(len(ids) * matrix.cols * values.itemsize)
    name = "rans_gather" + ("_bytes" if values.itemsize == 1 else "") + matrix.suffix
    flip = 0x80 if values.itemsize == 1 else 0
    params = matrix_params(matrix, loaded) + struct.pack(
        "<2Q2I", run.memory.upload(ids), out, len(ids), flip
    )
    n_shared = 8 * 2 * 32 * ROW_BYTES + loaded.table_bytes
    run.launch(name, (2, 1), 256, n_shared, params)
    shape = (len(ids), matrix.cols)
    found = run.memory.read(out, shape[0] * shape[1], values.dtype).reshape(shape)
    expected = np.full(shape, UNWRITTEN[values.itemsize], values.dtype)
    for i, row in enumerate(ids):
        if row < matrix.rows:
            expected[i] = values[row]
    expect_equal(found, expected, name)


def expect_product(run, matrix, loaded, tokens, n_blocks=None):
    memory, rng, is_int8 = run.memory, run.rng, matrix.dtype == "int8"
    kind = "bf16" if matrix.dtype == "bf16" else "f16"
    n_slices, _ = slices(matrix.cols)
    most = 64
    if not matrix.suffix:
        most = next(most for most in (8, 32, 64) if tokens <= most)
    x = narrow(rng.standard_normal((tokens, matrix.cols)), kind)
    bias = narrow(rng.standard_normal(matrix.rows), kind)
    scales = (0.003 * np.exp(0.3 * rng.standard_normal(matrix.rows))).astype(np.float32)
    fragments = order_activations(run, memory.upload(x), tokens, matrix.cols, FRAGMENTS)
    y = memory.reserve(2 * tokens * matrix.rows)
    params = matrix_params(matrix, loaded) + struct.pack(
        "<5Q4I",
        *(0, fragments, memory.upload(scales) if is_int8 else 0),
        *(memory.upload(bias), y, tokens, n_slices, is_int8, matrix.rows),
    )
    word_rows = 60 if is_int8 else 32 if matrix.suffix == "_two_planes" else 2 * 32
    n_shared = 2 * 16 * most * 64 + 16 * word_rows * ROW_BYTES + loaded.table_bytes
    per_block = 16 // n_slices
    grid = (n_blocks or (matrix.rows // 16 + per_block - 1) // per_block, 1)
    name = f"rans_product_{matrix.dtype}_{most}{matrix.suffix}"
    run.launch(name, grid, 512, n_shared, params)

    values = elements(matrix)
    if is_int8:
        weights = dequantise(values.view(np.int8), scales)
    else:
        weights = widen(values, kind)
    expected = product(weights, widen(x, kind), widen(bias, kind))
    found = run.read_written(y, (tokens, matrix.rows), np.uint16)
    expect_equal(found, narrow(expected, kind), name, kind)


def expect_damage_found(run, matrix):
    """One flipped bit: found in its tile, or decoded within bounds."""
    rng = run.rng
    starts = matrix.starts.view(np.uint64).astype(int)
    tile = int(rng.integers(len(starts) - 1))
    tiles = matrix.tiles.copy()
    tiles[rng.integers(starts[tile], starts[tile + 1])] ^= 1 << rng.integers(8)
    loaded = load(run, matrix, tiles)
    if loaded.first_bad == NONE:
        # A raw bit, or one by which a stream is another valid stream.
        decode(run, matrix, loaded, (0, 0, matrix.rows, matrix.cols))
    elif loaded.first_bad >> 8 != tile:
        raise Difference(f"tile {tile} is damaged, {loaded.first_bad:#x} reported")


def cases(harness):
    """(name, function of a random generator)."""

    def case(name, *steps):
        def execute(rng):
            matrix = harness.matrix(name)
            run = harness.run(rng, check_races=True)
            loaded = load(run, matrix)
            if loaded.first_bad != NONE:
                raise Difference(f"{loaded.first_bad:#x} is reported as bad")
            for step, *arguments in steps:
                step(run, matrix, loaded, *arguments)

        details = [" ".join(str(word) for word in arguments) for _, *arguments in steps]
        return f"{name}, {', '.join([steps[0][0].__name__, *details])}", execute

    def damaged(name, number):
        def execute(rng):
            expect_damage_found(harness.run(rng), harness.matrix(name))

        return f"{name}, damaged {number}", execute

    for name in harness.matrices("rans-"):
        matrix = harness.matrix(name)
        rows, cols = matrix.rows, matrix.cols
        parts = [(0, 0, rows, cols)]
        if cols > 256:
            parts += [(0, 256, rows, cols - 256), (rows - 16, 256, 16, min(cols - 256, 48))]
        yield case(name, *((expect_decoded, part) for part in parts), (expect_gathered,))
        if matrix.suffix:
            yield case(name, (expect_product, 9))
        else:
            yield case(name, (expect_product, 7))
            if rows == 48:
                yield case(name, (expect_product, 20), (expect_product, 5, 1))
                yield case(name, (expect_product, 33))
        if rows == 48:
            yield from (damaged(name, number) for number in range(2))
