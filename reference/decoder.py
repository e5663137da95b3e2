#!/usr/bin/env python3
"""Reference decoder of the transom format, version 1.

Written from docs/format.md alone, in its order, with the section numbers in
the comments. Plain Python 3.8 or later, no dependencies, no speed: it exists
to be compared with, and to be read.

    decoder.py record FILE OUT      one record -> the bytes of its tensor
    decoder.py unpack PACKED OUT    packed safetensors file -> the original
    decoder.py verify PACKED        decode everything, write nothing

`--no-hash` skips the two hashes, which take most of the time. The exit code is
0 if all is well, 1 with a message on stderr if the input is not valid, 2 if the
command line is not.
"""

import json
import struct
import sys
import zlib


class Invalid(Exception):
    """The input is not what the specification allows."""


def need(condition, message):
    if not condition:
        raise Invalid(message)


# === Section 2: conventions ==================================================


def u32(data, at):
    return int.from_bytes(data[at : at + 4], "little")


def u64(data, at):
    return int.from_bytes(data[at : at + 8], "little")


class Bits:
    """Bit fields, least significant bit first (section 2.3)."""

    def __init__(self, data):
        self.data = data
        self.position = 0

    def take(self, n_bits):
        end = self.position + n_bits
        need(end <= 8 * len(self.data), "bit field is cut off")
        window = self.data[self.position // 8 : (end + 7) // 8]
        value = int.from_bytes(window, "little") >> (self.position % 8)
        self.position = end
        return value & ((1 << n_bits) - 1)

    def finish(self):
        """Bytes used; the unused bits of the last one must be zero."""
        if self.position % 8:
            rest = self.data[self.position // 8] >> (self.position % 8)
            need(rest == 0, "unused bits are not zero")
        return (self.position + 7) // 8


def take_leb128(data, at):
    """Section 2.4. At most 9 bytes, in the shortest form."""
    value = 0
    for i in range(9):
        need(at + i < len(data), "LEB128 is cut off")
        byte = data[at + i]
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            need(i == 0 or byte > 0, "LEB128 is longer than necessary")
            return value, at + i + 1
    raise Invalid("LEB128 is longer than 9 bytes")


# === Section 3: record =======================================================

MAGIC = b"TRSM"
VERSION_MAJOR = 1
VERSION_MINOR = 0
FIXED_BYTES = 52
ENTRY_BYTES = 12
MAX_ELEMS = 1 << 48

# Section 3.3, Dtype: name, bytes of an element, planes that may be coded.
DTYPES = [
    ("opaque", 1, 0b00),
    ("BF16", 2, 0b01),
    ("F16", 2, 0b11),
    ("F8_E4M3", 1, 0b01),
    ("F8_E5M2", 1, 0b01),
    ("I8", 1, 0b01),
    ("U8", 1, 0b01),
]


class Record:
    """A parsed record (section 3). `data` is the whole record."""

    def __init__(self, data, check_hashes=True):
        self.data = data
        self.check_hashes = check_hashes
        # 3.1, 3.2
        need(len(data) >= FIXED_BYTES, "record is shorter than any header")
        need(data[:4] == MAGIC, "magic is wrong")
        need(data[4] == VERSION_MAJOR, "major version is %d" % data[4])
        minor = data[5]
        # 3.3
        self.header_bytes = u32(data, 48)
        need(FIXED_BYTES < self.header_bytes <= len(data), "header does not fit the record")
        header = data[: self.header_bytes]
        if check_hashes:
            found = xxh3_64(header[:8] + header[16:])
            need(found == u64(header, 8), "header checksum is wrong")
        need(header[6] < len(DTYPES), "dtype code is %d" % header[6])
        self.dtype, self.elem_bytes, codable = DTYPES[header[6]]
        coded = header[7]
        need(coded & ~codable == 0, "coded planes are not possible for the dtype")
        self.content_hash = bytes(header[16:48])
        at = self.take_shape(header)
        # 3.4
        self.tables = [None, None]
        for plane in range(2):
            if coded >> plane & 1:
                self.tables[plane], at = take_table(header, at)
        # 3.5
        self.take_directory(header, at, minor)

    def take_shape(self, header):
        n_dims, at = take_leb128(header, FIXED_BYTES)
        need(n_dims <= self.header_bytes - at, "more dimensions than bytes")
        self.shape, self.n_elems = [], 1
        for _ in range(n_dims):
            dim, at = take_leb128(header, at)
            self.shape.append(dim)
            self.n_elems *= dim
            need(self.n_elems < 1 << 64, "shape is too large")
        need(self.n_elems <= MAX_ELEMS, "shape is too large")
        self.tiles = Tiling(self.shape, self.n_elems)
        return at

    def take_directory(self, header, at, minor):
        n_tiles = self.tiles.count()
        directory = self.header_bytes - ENTRY_BYTES * n_tiles
        if minor == VERSION_MINOR:
            need(directory == at, "header is not as long as its fields")
        else:
            need(directory >= at, "header is shorter than its fields")
        n_coded = sum(table is not None for table in self.tables)
        self.n_raw_planes = self.elem_bytes - n_coded
        start, self.entries = self.header_bytes, []
        for index in range(n_tiles):
            entry = directory + ENTRY_BYTES * index
            n_bytes, checksum = u32(header, entry), u64(header, entry + 4)
            n = self.tiles.n_elems(index)
            longest = n * self.elem_bytes
            shortest = longest
            if n_coded:
                shortest = min(longest, n * self.n_raw_planes + MIN_STATES_BYTES)
            need(shortest <= n_bytes <= longest, "tile %d: impossible length" % index)
            self.entries.append((start, n_bytes, checksum))
            start += n_bytes
        need(start == len(self.data), "header and tiles do not add up to the record")

    def decode(self):
        """The bytes of the tensor."""
        out = bytearray(self.n_elems * self.elem_bytes)
        for index in range(len(self.entries)):
            try:
                self.decode_tile(index, out)
            except Invalid as error:
                raise Invalid("tile %d: %s" % (index, error)) from None
        if self.check_hashes:
            need(blake3(bytes(out)) == self.content_hash, "content hash is wrong")
        return bytes(out)

    def decode_tile(self, index, out):
        # Section 5.6: checksum, then raw or coded by the length alone.
        start, n_bytes, checksum = self.entries[index]
        stored = self.data[start : start + n_bytes]
        if self.check_hashes:
            need(xxh3_64(stored) == checksum, "checksum is wrong")
        n = self.tiles.n_elems(index)
        if n_bytes == n * self.elem_bytes:
            planes = [stored[n * p : n * (p + 1)] for p in range(self.elem_bytes)]
        else:
            n_stream = n_bytes - n * self.n_raw_planes
            coded = iter(decode_stream(stored[:n_stream], n, [t for t in self.tables if t]))
            planes, at = [], n_stream
            for p in range(self.elem_bytes):
                if self.tables[p]:
                    planes.append(next(coded))
                else:
                    planes.append(stored[at : at + n])
                    at += n
        elements = join(self.dtype, planes)
        self.tiles.place(index, elements, self.elem_bytes, out)


# === Section 4: transform ====================================================


def join(dtype, planes):
    """Planes -> the bytes of the elements, in tile order (4.1, 4.2)."""
    if len(planes) == 1:
        return bytes(planes[0])
    out = bytearray(2 * len(planes[0]))
    if dtype == "BF16":
        for i, (high, low) in enumerate(zip(*planes)):
            word = high << 8 | low
            word = word >> 1 | (word & 1) << 15
            out[2 * i] = word & 0xFF
            out[2 * i + 1] = word >> 8
    else:
        out[0::2] = planes[1]
        out[1::2] = planes[0]
    return bytes(out)


# === Section 5.1: tiles and order ============================================

TILE_ROWS = 128
TILE_COLS = 512
TILE_ELEMS = TILE_ROWS * TILE_COLS
BLOCK = 16


def fragment_position(index):
    """Row and column of element `index` of a block (5.1)."""
    i, lane = index // 32, index % 32
    row = lane // 4 + 8 * (i >> 1 & 1)
    col = lane % 4 * 2 + (i & 1) + 8 * (i >> 2)
    return row, col


class Tiling:
    def __init__(self, shape, n_elems):
        self.fragment = (
            len(shape) == 2 and n_elems > 0 and shape[0] % BLOCK == 0 and shape[1] % BLOCK == 0
        )
        if self.fragment:
            (self.rows, self.cols), self.sides = shape, (TILE_ROWS, TILE_COLS)
        else:
            (self.rows, self.cols), self.sides = (1, n_elems), (1, TILE_ELEMS)
        self.across = -(-self.cols // self.sides[1])
        self.down = -(-self.rows // self.sides[0]) if self.cols else 0

    def count(self):
        return self.across * self.down

    def rectangle(self, index):
        """First row, first column, rows, columns."""
        row = index // self.across * self.sides[0]
        col = index % self.across * self.sides[1]
        rows = min(self.sides[0], self.rows - row)
        return row, col, rows, min(self.sides[1], self.cols - col)

    def n_elems(self, index):
        _, _, rows, cols = self.rectangle(index)
        return rows * cols

    def place(self, index, elements, width, out):
        """Puts a tile's elements where they belong in the tensor."""
        row0, col0, rows, cols = self.rectangle(index)
        if not self.fragment:
            out[col0 * width : (col0 + cols) * width] = elements
            return
        inside = [fragment_position(i) for i in range(BLOCK * BLOCK)]
        offsets = [(row * self.cols + col) * width for row, col in inside]
        at = 0
        for block_row in range(row0, row0 + rows, BLOCK):
            for block_col in range(col0, col0 + cols, BLOCK):
                base = (block_row * self.cols + block_col) * width
                for offset in offsets:
                    target = base + offset
                    out[target : target + width] = elements[at : at + width]
                    at += width


# === Section 5.2: frequencies ================================================

MIN_PROB_BITS = 12
MAX_PROB_BITS = 15
MAX_GOLOMB_ORDER = 12


class Table:
    """Decode table of one plane: symbol, freq and slot - start of each slot."""

    def __init__(self, prob_bits, freqs):
        self.prob_bits = prob_bits
        self.symbols, self.freqs, self.offsets = [], [], []
        ranked = sorted((s for s in range(256) if freqs[s]), key=lambda s: (-freqs[s], s))
        for symbol in ranked:
            freq = freqs[symbol]
            self.symbols += [symbol] * freq
            self.freqs += [freq] * freq
            self.offsets += range(freq)


def take_golomb(bits, order):
    """Exp-Golomb code of order `order`."""
    b = order
    while bits.take(1) == 0:
        b += 1
        need(b <= MAX_PROB_BITS, "a frequency is longer than 16 bits")
    return (1 << b) + bits.take(b) - (1 << order)


def take_table(header, at):
    bits = Bits(header[at:])
    table_bits, order = bits.take(4), bits.take(4)
    need(1 <= table_bits <= MAX_PROB_BITS, "table_bits is %d" % table_bits)
    need(order <= MAX_GOLOMB_ORDER, "Exp-Golomb order is %d" % order)
    first, last = bits.take(8), bits.take(8)
    need(first <= last, "symbol range is empty")
    prob_bits = max(table_bits, MIN_PROB_BITS)
    freqs, total = [0] * 256, 0
    for symbol in range(first, last + 1):
        units = take_golomb(bits, order)
        total += units
        need(total <= 1 << table_bits, "frequencies sum to too much")
        freqs[symbol] = units << (prob_bits - table_bits)
    need(total == 1 << table_bits, "frequencies sum to too little")
    need(freqs[first] and freqs[last], "symbol range is not tight")
    return Table(prob_bits, freqs), at + bits.finish()


# === Sections 5.3 to 5.5: states, words, end of tile =========================

LANES = 32
STATE_LOWER_BOUND = 1 << 16
MIN_STATES_BYTES = LANES // 2 + 2 * LANES
TAIL_BYTES = 2 * LANES


def take_states(stream):
    """Section 5.3: the lane states, and where the words begin."""
    need(len(stream) >= LANES // 2, "lane states are cut off")
    bits = Bits(stream[LANES // 2 :])
    states = []
    for lane in range(LANES):
        n_bits = 16 + (stream[lane // 2] >> 4 * (lane % 2) & 0xF)
        states.append(1 << n_bits | bits.take(n_bits))
    return states, LANES // 2 + bits.finish()


def decode_stream(stream, n, tables):
    """The coded planes of a tile of `n` elements."""
    states, at = take_states(stream)
    need((len(stream) - at) % 2 == 0, "half a word at the end")
    words = struct.unpack_from("<%dH" % ((len(stream) - at) // 2), stream, at)
    share = TAIL_BYTES // len(tables)
    n_tail = min(n, share)
    n_coded = n - n_tail
    planes = [bytearray(n) for _ in tables]
    used, n_words = 0, len(words)
    # Section 5.4: steps of 32 symbols, planes alternating, lanes ascending.
    for first in range(0, n_coded, LANES):
        n_lanes = min(LANES, n_coded - first)
        for table, plane in zip(tables, planes):
            prob_bits, mask = table.prob_bits, (1 << table.prob_bits) - 1
            symbols, freqs, offsets = table.symbols, table.freqs, table.offsets
            for lane in range(n_lanes):
                state = states[lane]
                slot = state & mask
                plane[first + lane] = symbols[slot]
                state = freqs[slot] * (state >> prob_bits) + offsets[slot]
                if state < STATE_LOWER_BOUND:
                    need(used < n_words, "words ran out")
                    state = state << 16 | words[used]
                    used += 1
                states[lane] = state
    # Section 5.5: every word used, high halves 1, low halves carry the tail.
    need(used == n_words, "words are left over")
    need(all(state >> 16 == 1 for state in states), "a lane does not end at the lower bound")
    tail = struct.pack("<32H", *(state & 0xFFFF for state in states))
    for p, plane in enumerate(planes):
        part = tail[share * p : share * (p + 1)]
        plane[n_coded:] = part[:n_tail]
        need(not any(part[n_tail:]), "final states carry symbols beyond the tile")
    return planes


# === Section 7: integrity ====================================================
#
# XXH3-64 with seed 0 and the default secret (xxHash specification, XXH3), and
# BLAKE3 in its default mode (BLAKE3 paper, section 2).

M64 = (1 << 64) - 1
P32 = (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D)
P64 = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)
SECRET = bytes.fromhex(
    "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671f"
    "cb79e64eccc0e578825ad07dccff7221b8084674f743248ee03590e6813a264c"
    "3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8"
    "a8fa763fe39c343ff9dcbbc7c70b4f1d8a51e04bcdb45931c89f7ec9d9787364"
    "eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e"
    "2b16be587d47a1fc8ff8b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e"
)


def fold(a, b):
    product = a * b
    return (product & M64) ^ (product >> 64)


def avalanche(h):
    h ^= h >> 37
    h = h * 0x165667919E3779F9 & M64
    return h ^ h >> 32


def avalanche_xxh64(h):
    h ^= h >> 33
    h = h * P64[1] & M64
    h ^= h >> 29
    h = h * P64[2] & M64
    return h ^ h >> 32


def xxh3_64(data):
    n = len(data)
    if n > 240:
        return xxh3_long(data)
    if n > 16:
        return xxh3_medium(data)
    if n > 8:
        low = u64(data, 0) ^ (u64(SECRET, 24) ^ u64(SECRET, 32))
        high = u64(data, n - 8) ^ (u64(SECRET, 40) ^ u64(SECRET, 48))
        swapped = int.from_bytes(low.to_bytes(8, "little"), "big")
        return avalanche(n + swapped + high + fold(low, high) & M64)
    if n >= 4:
        h = (u32(data, n - 4) + (u32(data, 0) << 32)) ^ (u64(SECRET, 8) ^ u64(SECRET, 16))
        h ^= (h << 49 | h >> 15) & M64 ^ (h << 24 | h >> 40) & M64
        h = h * 0x9FB21C651E98DF25 & M64
        h ^= (h >> 35) + n
        h = h * 0x9FB21C651E98DF25 & M64
        return h ^ h >> 28
    if n:
        combined = data[0] << 16 | data[n >> 1] << 24 | data[n - 1] | n << 8
        return avalanche_xxh64(combined ^ (u32(SECRET, 0) ^ u32(SECRET, 4)))
    return avalanche_xxh64(u64(SECRET, 56) ^ u64(SECRET, 64))


def xxh3_medium(data):
    n = len(data)

    def mix(at, key):
        return fold(u64(data, at) ^ u64(SECRET, key), u64(data, at + 8) ^ u64(SECRET, key + 8))

    h = n * P64[0]
    if n <= 128:
        for i in range((n - 1) // 32 + 1):
            h += mix(16 * i, 32 * i) + mix(n - 16 * (i + 1), 32 * i + 16)
        return avalanche(h & M64)
    h += sum(mix(16 * i, 16 * i) for i in range(8))
    h = avalanche(h & M64)
    h += sum(mix(16 * i, 16 * (i - 8) + 3) for i in range(8, n // 16))
    return avalanche(h + mix(n - 16, 136 - 17) & M64)


def xxh3_long(data):
    n = len(data)
    acc = [P32[2], P64[0], P64[1], P64[2], P64[3], P32[1], P64[4], P32[0]]
    keys = [struct.unpack_from("<8Q", SECRET, 8 * i) for i in range(17)]

    def accumulate(at, key):
        lanes = struct.unpack_from("<8Q", data, at)
        for i in range(8):
            keyed = lanes[i] ^ key[i]
            acc[i ^ 1] += lanes[i]
            acc[i] += (keyed & 0xFFFFFFFF) * (keyed >> 32)
        for i in range(8):
            acc[i] &= M64

    n_stripes = (n - 1) // 64
    for stripe in range(n_stripes):
        accumulate(64 * stripe, keys[stripe % 16])
        if stripe % 16 == 15:
            for i in range(8):
                acc[i] = (acc[i] ^ acc[i] >> 47 ^ keys[16][i]) * P32[0] & M64
    accumulate(n - 64, struct.unpack_from("<8Q", SECRET, 121))
    h = n * P64[0]
    for i in range(0, 8, 2):
        low, high = u64(SECRET, 11 + 8 * i), u64(SECRET, 19 + 8 * i)
        h += fold(acc[i] ^ low, acc[i + 1] ^ high)
    return avalanche(h & M64)


IV = (
    0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
    0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19,
)  # fmt: skip
PERMUTATION = (2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8)
MIXES = (
    (0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15),
    (0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14),
)  # fmt: skip
CHUNK_START, CHUNK_END, PARENT, ROOT = 1, 2, 4, 8


def compress(chaining, block, counter, n_bytes, flags):
    """The chaining value of one block of 16 words."""
    v = list(chaining) + list(IV[:4]) + [counter & 0xFFFFFFFF, counter >> 32, n_bytes, flags]
    m = block
    for _ in range(7):
        for i, (a, b, c, d) in enumerate(MIXES):
            va, vb, vc, vd = v[a], v[b], v[c], v[d]
            va = va + vb + m[2 * i] & 0xFFFFFFFF
            vd ^= va
            vd = (vd >> 16 | vd << 16) & 0xFFFFFFFF
            vc = vc + vd & 0xFFFFFFFF
            vb ^= vc
            vb = (vb >> 12 | vb << 20) & 0xFFFFFFFF
            va = va + vb + m[2 * i + 1] & 0xFFFFFFFF
            vd ^= va
            vd = (vd >> 8 | vd << 24) & 0xFFFFFFFF
            vc = vc + vd & 0xFFFFFFFF
            vb ^= vc
            vb = (vb >> 7 | vb << 25) & 0xFFFFFFFF
            v[a], v[b], v[c], v[d] = va, vb, vc, vd
        m = [m[i] for i in PERMUTATION]
    return tuple(v[i] ^ v[i + 8] for i in range(8))


def hash_chunk(data, counter, last_flag):
    """The chaining value of a chunk of at most 1,024 bytes."""
    chaining = IV
    n_blocks = max(1, -(-len(data) // 64))
    for i in range(n_blocks):
        block = data[64 * i : 64 * (i + 1)]
        flags = CHUNK_START if i == 0 else 0
        if i == n_blocks - 1:
            flags |= CHUNK_END | last_flag
        words = struct.unpack("<16I", block.ljust(64, b"\0"))
        chaining = compress(chaining, words, counter, len(block), flags)
    return chaining


def blake3(data):
    """The 32-byte hash."""
    n_chunks = max(1, -(-len(data) // 1024))
    if n_chunks == 1:
        return struct.pack("<8I", *hash_chunk(data, 0, ROOT))
    nodes = [hash_chunk(data[1024 * i : 1024 * (i + 1)], i, 0) for i in range(n_chunks)]
    # Pairing neighbours level by level, an odd one moving up, gives the
    # left-complete tree of the definition.
    while len(nodes) > 1:
        flags = PARENT | (ROOT if len(nodes) == 2 else 0)
        parents = [
            compress(IV, nodes[i] + nodes[i + 1], 0, 64, flags)
            for i in range(0, len(nodes) - 1, 2)
        ]
        nodes = parents + nodes[len(nodes) // 2 * 2 :]
    return struct.pack("<8I", *nodes[0])


# === Section 8: packed safetensors files =====================================

TRAILER_NAME = "__transom__"
TRAILER_MAGIC = b"TRSF"
TRAILER_BYTES = 88
MAX_HEADER_BYTES = 100_000_000
MAX_EXPANSION = 4


def parse_header(data, data_bytes=None):
    """Section 8.1: (bytes of length and JSON, tensors in the order of their data).

    `data_bytes` is what follows the header, None if that is not known.
    """
    need(len(data) >= 8, "file is shorter than any header")
    n_json = u64(data, 0)
    need(n_json <= MAX_HEADER_BYTES, "header is too long")
    need(8 + n_json <= len(data), "header is cut off")

    def unique(pairs):
        need(len({name for name, _ in pairs}) == len(pairs), "duplicate name")
        return dict(pairs)

    try:
        entries = json.loads(data[8 : 8 + n_json].decode("utf-8"), object_pairs_hook=unique)
        need(isinstance(entries, dict), "header is not an object")
        entries.pop("__metadata__", None)
        tensors = []
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            need(isinstance(start, int) and isinstance(end, int), "offsets are not integers")
            tensors.append((start, end, name, entry["dtype"], list(entry["shape"])))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Invalid("header is not valid: %s" % error) from None
    tensors.sort(key=lambda tensor: tensor[:2])
    at = 0
    for start, end, name, _, _ in tensors:
        need(start == at and end >= start, "tensor %s: data not contiguous" % name)
        at = end
    need(data_bytes is None or at == data_bytes, "data are not as long as the tensors")
    return data[: 8 + n_json], tensors


def read_trailer(trailer, packed_header, check_hashes):
    """Section 8.1, the trailer: the original header."""
    need(len(trailer) >= TRAILER_BYTES, "trailer is cut off")
    need(trailer[:4] == TRAILER_MAGIC, "magic of the trailer is wrong")
    need(trailer[4] == VERSION_MAJOR, "major version is %d" % trailer[4])
    if check_hashes:
        found = xxh3_64(trailer[:8] + trailer[16:])
        need(found == u64(trailer, 8), "checksum of the trailer is wrong")
    need(trailer[6] in (0, 1), "method is %d" % trailer[6])
    need(trailer[7] == 0, "reserved byte is not zero")
    if check_hashes:
        need(blake3(packed_header) == trailer[56:88], "hash of the header is wrong")
    n_bytes, stored = u64(trailer, 16), trailer[TRAILER_BYTES:]
    if trailer[6] == 1:
        need(n_bytes <= MAX_EXPANSION * len(packed_header), "original header is too long")
        try:
            inflater = zlib.decompressobj()
            stored = inflater.decompress(stored, n_bytes + 1)
        except zlib.error as error:
            raise Invalid("original header: %s" % error) from None
    need(len(stored) == n_bytes, "original header has another length")
    if check_hashes:
        need(blake3(stored) == trailer[24:56], "hash of the original header is wrong")
    return stored


def unpack(data, check_hashes=True):
    """Packed file -> original file."""
    need(len(data) >= 8, "file is shorter than any header")
    packed_header, packed = parse_header(data, len(data) - 8 - u64(data, 0))
    need(packed and packed[-1][2] == TRAILER_NAME, "not a packed file")
    base = len(packed_header)
    start, end = packed[-1][:2]
    header = read_trailer(data[base + start : base + end], packed_header, check_hashes)
    parsed, original = parse_header(header)
    need(len(parsed) == len(header), "original header has another length")
    names = [tensor[2] for tensor in packed[:-1]]
    need(names == [tensor[2] for tensor in original], "tensors differ from the original's")
    parts = [header]
    for (start, end, name, _, _), (first, last, _, dtype, shape) in zip(packed, original):
        try:
            record = Record(data[base + start : base + end], check_hashes)
            known = dtype if dtype in [name for name, _, _ in DTYPES[1:]] else "opaque"
            need(record.dtype == known, "dtype is %s, expected %s" % (record.dtype, known))
            need(known == "opaque" or record.shape == shape, "shape differs from the original's")
            tensor = record.decode()
            need(len(tensor) == last - first, "length differs from the original's")
        except Invalid as error:
            raise Invalid("tensor %s: %s" % (name, error)) from None
        parts.append(tensor)
    return b"".join(parts)


def main(arguments):
    check_hashes = "--no-hash" not in arguments
    words = [word for word in arguments if word != "--no-hash"]
    verbs = {"record": 3, "unpack": 3, "verify": 2}
    if not words or len(words) != verbs.get(words[0]):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        with open(words[1], "rb") as file:
            data = file.read()
        if words[0] == "record":
            out = Record(data, check_hashes).decode()
        else:
            out = unpack(data, check_hashes)
        if len(words) == 3:
            with open(words[2], "wb") as file:
                file.write(out)
    except (Invalid, OSError) as error:
        print("decoder.py: %s: %s" % (words[1], error), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
