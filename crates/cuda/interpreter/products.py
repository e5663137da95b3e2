"""Cases of dense and fixed-rate products: `kernels/product*.cu`."""

import struct

import numpy as np

from harness import dequantise, expect_equal, narrow, product, slices
from matrix_units import widen

# `ActivationOrder` of params.h.
FRAGMENTS, CORE_MATRICES, ROWS = range(3)

FORMATS = [
    "dense_bf16",
    "dense_f16",
    "dense_int8",
    "bf16x3",
    "bf16x4",
    "f16x3",
    "int8x4",
    "int8x5",
    "int8x6",
    "int8x7",
]


def dtype(matrix_format):
    """Of activations and results."""
    return "bf16" if "bf16" in matrix_format else "f16"


def elements(matrix):
    is_int8 = "int8" in matrix.format
    kind = np.int8 if is_int8 else np.uint16
    return matrix.elements.view(kind).reshape(matrix.rows, matrix.cols)


def random_scales(rng, n):
    """Over many powers of two, up to far beyond 2^-5."""
    return (0.001 * np.exp(2.5 * rng.standard_normal(n))).astype(np.float32)


def sum_slots(n_slices, parts):
    own = n_slices // parts
    return n_slices - own + (own > 0)


def order_activations(run, x, tokens, cols, order):
    """The address of activations in another order."""
    n = tokens * ((cols + 7) // 8)
    if order != ROWS:
        n = (tokens + 7) // 8 * ((cols + 127) // 128) * 128
    out = run.memory.reserve(n * 16)
    params = struct.pack("<2Q4I", x, out, cols, tokens, order, 0)
    run.launch("order_activations", ((n + 255) // 256, 1), 256, 0, params)
    return out


def pack_segments(memory, segments):
    """The bytes of ProductParams::segments, weights of each in FP64, tiles of all."""
    packed, weights, end = b"", [], 0
    for segment in segments:
        end += (segment.rows + 15) // 16
        values, scales, n_scales = elements(segment), 0, 0
        if "int8" in segment.format:
            chosen = segment.scales.view(np.float32)
            n_scales = len(chosen)
            scales = memory.upload(segment.row_scales)
            weights.append(dequantise(values, chosen))
        else:
            weights.append(widen(values, dtype(segment.format)))
        overflow = segment.overflow if len(segment.overflow) else np.zeros(4, np.uint8)
        packed += struct.pack(
            "<3Q2I",
            memory.upload(overflow),
            memory.upload(segment.symbols),
            scales,
            end,
            n_scales > 1,
        )
    return packed.ljust(96, b"\0"), weights, end


def run_product(
    run, segments, tokens, variant, shape=None, n_blocks=None, together=None
):
    """One product of the segments' rows, compared with the reference.

    `variant`: the end of the kernel's name. `shape`, for m32 and m64: strips,
    parts, groups. `n_blocks`: fewer blocks than there is work for.
    `together`: how many of the parts run at the same time, otherwise one or all.
    """
    memory, rng, first = run.memory, run.rng, segments[0]
    matrix_format, cols = first.format, first.cols
    kind, is_int8 = dtype(matrix_format), "int8" in matrix_format
    rows = sum(segment.rows for segment in segments)
    n_slices, _ = slices(cols)

    packed, weights, end = pack_segments(memory, segments)
    chunks = memory.upload(np.concatenate([segment.chunks for segment in segments]))
    x = narrow(rng.standard_normal((tokens, cols)), kind)
    bias = narrow(rng.standard_normal(rows), kind)
    y = memory.reserve(2 * tokens * rows)

    has_cores = variant in ("m32", "m64")
    activations, x_stride = memory.upload(x), (cols + 7) // 8 * 8
    if has_cores or x_stride != cols:
        order = CORE_MATRICES if has_cores else ROWS
        activations = order_activations(run, activations, tokens, cols, order)

    # As src/product/shape.rs.
    def warp_bytes(n_warps, tiles):
        ring = (2 * first.chunk_bytes + 127) // 128 * 128
        plane = 4096 + 64 * tiles if is_int8 else 2048
        if matrix_format.startswith("dense"):
            plane = 0
        return n_warps * (ring + plane + 16)

    groups = {"m16": 2, "m32": 4, "m64": 8}.get(variant, 1)
    workspace = meetings = strips = slots = patience = 0
    parts, n_warps = 1, 8
    if has_cores:
        strips, parts, n_groups = shape
        n_warps = min(16, (strips + 3) // 4 * 4)
        n_shared = warp_bytes(n_warps, 1) + 3 * groups * 2048 + 256
        grid = (parts, n_groups)
        slots = sum_slots(n_slices, parts)
        if parts > 1:
            workspace = memory.reserve(n_groups * strips * slots * groups * 512)
            meetings = memory.upload(np.zeros(2 * n_groups, np.uint32))
            # Blocks that are not there at the same time hand over their shares.
            together = together or int(rng.choice([1, parts]))
            patience = int(rng.choice([0, 3] if together == 1 else [0, 3, 3000]))
    else:
        tiles = 2 if variant == "m8_pair" else 1
        n_warps = 16 if variant == "m8_deep" else 8
        slots = sum_slots(n_slices, n_warps)
        x_bytes = n_warps * groups * 8 * (272 if groups == 1 else 144)
        n_shared = warp_bytes(n_warps, tiles) + 128 + x_bytes + 2 * tiles * slots * 512 * groups
        grid = (n_blocks or end // tiles, 1)
    params = packed + struct.pack(
        "<6Q12I",
        *(chunks, activations, y, memory.upload(bias), workspace, meetings),
        *(rows, cols, tokens, len(segments), end, first.chunk_bytes, x_stride),
        *(strips, parts, slots, (65535 + parts) // parts, patience),
    )
    name = f"product_{matrix_format}_{variant}"
    run.launch(name, grid, 32 * n_warps, n_shared, params, together or 1)
    if parts > 1:
        words = memory.read(meetings, 2 * grid[1], np.uint32)
        expect_equal(words, np.zeros_like(words), f"{name}, meetings")

    found = run.read_written(y, (tokens, rows), np.uint16)
    expected = product(np.concatenate(weights), widen(x, kind), widen(bias, kind))
    expect_equal(found, narrow(expected, kind), name, kind)


def cases(harness):
    """(name, function of a random generator)."""

    def case(matrix_names, *arguments, **options):
        def execute(rng):
            segments = [harness.matrix(name) for name in matrix_names]
            run_product(harness.run(rng), segments, *arguments, **options)

        details = [f"{tokens_and_variant}" for tokens_and_variant in arguments]
        details += [f"{key} {value}" for key, value in options.items()]
        return ", ".join([" + ".join(matrix_names), *details]), execute

    for number, name in enumerate(FORMATS):
        # Every kernel; every share of escapes.
        yield case([f"fixed-{name}-47x391-0"], 1, "m8")
        yield case([f"fixed-{name}-47x391-3"], 7, "m8_deep", n_blocks=1)
        yield case([f"fixed-{name}-47x391-40"], 13, "m16", n_blocks=2)
        shape = [(1, 2, 3), (3, 1, 1), (2, 2, 2)][number % 3]
        yield case([f"fixed-{name}-47x391-100"], 33 + number, "m64", shape=shape)
        # Three segments, several rounds or parts.
        parts = ((48, 3), (32, 40), (16, 0))
        merged = [f"fixed-{name}-{rows}x1536-{spread}" for rows, spread in parts]
        yield case(merged, 20, "m32", shape=[(1, 1, 2), (2, 5, 3), (1, 3, 6)][number % 3])
        yield case(merged, 7, "m8_pair", n_blocks=1 + number % 3)
        if number in (2, 3, 6):
            yield case(merged, 8, "m8", n_blocks=4)
        if number in (0, 4, 9):
            yield case([f"fixed-{name}-1x1-100"], 2, "m16")
        # 16 slices, and from one to as many parts.
        if number in (1, 3, 5, 7):
            large = [f"fixed-{name}-64x4096-3"]
            yield case(large, 17, "m32", shape=(4, [1, 3, 7, 16][number // 2], 1))
