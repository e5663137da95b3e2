"""Cases of products of more than 64 tokens: `kernels/product_prefill.cuh`."""

import struct

import numpy as np

from harness import expect_equal, narrow
from matrix_units import widen
from products import FORMATS, ROWS, dtype, order_activations, pack_segments

# Blocks of a cluster, warps of a block that multiply.
CLUSTER, WARPS = 2, 8
BAND = 8


def pieces_of(n_tiles, tokens, block_tokens):
    """First tile and first token of each piece of work, in its order."""
    n_rows = -(-n_tiles // (CLUSTER * WARPS))
    n_tokens = -(-tokens // block_tokens)
    for band in range(0, n_rows, BAND):
        for token in range(n_tokens):
            for row in range(band, min(band + BAND, n_rows)):
                yield row * CLUSTER * WARPS, token * block_tokens


def reference(weights, x, bias, pieces, block_tokens, whole, n_clusters):
    """y[tokens, rows] in FP32: chains over shares of K, added from the last one to the first."""
    rows, cols = weights.shape
    across = -(-cols // 128)
    n_shared = (len(pieces) - whole) * across
    cuts = {n_shared * i // n_clusters for i in range(n_clusters + 1)}
    y = np.zeros((len(x), rows), np.float32)
    for number, (tile, token) in enumerate(pieces):
        borders = [0, across]
        if number >= whole:
            start = (number - whole) * across
            inside = (cut - start for cut in cuts if start < cut < start + across)
            borders = sorted({0, across, *inside})
        w = weights[tile * 16 : (tile + CLUSTER * WARPS) * 16]
        tokens = x[token : token + block_tokens]
        total = None
        for begin, end in reversed(list(zip(borders, borders[1:]))):
            part = np.zeros((len(w), len(tokens)), np.float32)
            for k in range(begin * 128, min(cols, end * 128), 16):
                step = w[:, k : k + 16] @ tokens[:, k : k + 16].T
                part = (part + step).astype(np.float32)
            total = part if total is None else total + part
        rows_of_piece = slice(tile * 16, tile * 16 + len(w))
        y[token : token + block_tokens, rows_of_piece] = total.T
    return y + bias.astype(np.float32)


def run_prefill(run, segments, tokens, block_tokens, n_clusters, whole, together):
    """One product compared with the reference. `whole`: pieces that are not shared.
    `together`: whether all blocks run at the same time, or a cluster after the other."""
    memory, rng, first = run.memory, run.rng, segments[0]
    matrix_format, cols = first.format, first.cols
    kind, is_int8 = dtype(matrix_format), "int8" in matrix_format
    rows = sum(segment.rows for segment in segments)
    packed, weights, end = pack_segments(memory, segments)
    pieces = list(pieces_of(end, tokens, block_tokens))
    whole = min(whole, len(pieces))

    chunks = memory.upload(np.concatenate([segment.chunks for segment in segments]))
    x = narrow(rng.standard_normal((tokens, cols)), kind)
    bias = narrow(rng.standard_normal(rows), kind)
    y = memory.reserve(2 * tokens * rows)
    activations, stride = memory.upload(x), (cols + 7) // 8 * 8
    if stride != cols:
        activations = order_activations(run, activations, tokens, cols, ROWS)
    n_words = n_clusters * CLUSTER * WARPS
    workspace = memory.reserve(n_words * block_tokens * 64)
    words = memory.upload(np.zeros(n_words, np.uint32))
    params = packed + struct.pack(
        "<6Q12I",
        *(chunks, 0, y, memory.upload(bias), workspace, words),
        *(rows, cols, tokens, len(segments), end, first.chunk_bytes),
        *(0, 0, 0, 0, 0, 0),
    )
    box = struct.pack("<5Q", activations, tokens, cols, stride, block_tokens // CLUSTER)
    params += box.ljust(128, b"\0") + struct.pack("<I", whole).ljust(64, b"\0")

    # As src/product/prefill.rs.
    plane = 0
    if not matrix_format.startswith("dense"):
        plane = 4096 + 64 if is_int8 else 2048
    warp = 2 * first.chunk_bytes + plane + 512
    n_shared = 1024 + 4 * block_tokens * 128 + 128 + 16 * (4 + 2 * WARPS) + WARPS * warp
    name = f"prefill_{matrix_format}_{block_tokens}"
    n_blocks = n_clusters * CLUSTER
    run.launch(
        name,
        (n_blocks, 1),
        32 * (WARPS + 4),
        n_shared,
        params,
        together=n_blocks if together else CLUSTER,
        cluster=CLUSTER,
    )
    left = memory.read(words, n_words, np.uint32)
    expect_equal(left, np.zeros_like(left), f"{name}, words of sums")
    found = run.read_written(y, (tokens, rows), np.uint16)
    expected = reference(
        np.concatenate(weights),
        widen(x, kind),
        widen(bias, kind),
        pieces,
        block_tokens,
        whole,
        n_clusters,
    )
    expect_equal(found, narrow(expected, kind), name, kind)


def cases(harness):
    """(name, function of a random generator)."""

    def case(matrix_names, **options):
        def execute(rng):
            segments = [harness.matrix(name) for name in matrix_names]
            run_prefill(harness.run(rng, n_bytes=1 << 25), segments, **options)

        details = [f"{key} {value}" for key, value in options.items()]
        return ", ".join([" + ".join(matrix_names), "prefill", *details]), execute

    for number, name in enumerate(FORMATS):
        # Two pieces, a cluster each, one after the other, or of one that shares them with others.
        few = [f"fixed-{name}-47x391-{(3, 40, 100)[number % 3]}"]
        n_clusters, whole = [(1, 9), (3, 0), (2, 9)][number % 3]
        yield case(
            few, tokens=131, block_tokens=128, n_clusters=n_clusters, whole=whole, together=number % 2 == 0
        )
        # Three segments; more clusters than chunks in some.
        merged = [f"fixed-{name}-{rows}x1536-{spread}" for rows, spread in ((48, 3), (32, 40), (16, 0))]
        n_clusters, whole = [(5, 0), (1, 9), (13, 0)][number % 3]
        yield case(
            merged, tokens=65, block_tokens=256, n_clusters=n_clusters, whole=whole, together=number % 2 == 1
        )
