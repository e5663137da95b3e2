"""Arithmetic of PTX on lanes: unsigned types are uint64, signed ones int64."""

from dataclasses import dataclass
from typing import Callable

import numpy as np

LANES = np.arange(32, dtype=np.uint64)
WIDE = {"u16": "u32", "u32": "u64", "s32": "s64"}


def n_bits(name):
    return int(name.lstrip("busf"))


def to_type(bits, name):
    """Values of a type from the bits of registers."""
    if name == "pred":
        return bits
    if name == "f32":
        return bits.astype(np.uint32).view(np.float32)
    if name == "f16":
        return bits.astype(np.uint16).view(np.float16)
    if name[0] == "s":
        narrow = bits.astype(f"u{n_bits(name) // 8}")
        return narrow.view(f"i{n_bits(name) // 8}").astype(np.int64)
    return bits if n_bits(name) == 64 else bits & np.uint64((1 << n_bits(name)) - 1)


def from_type(value, name):
    """Bits of registers from values of a type."""
    if name == "pred":
        return value
    if name == "f32":
        return value.astype(np.float32).view(np.uint32).astype(np.uint64)
    if name == "f16":
        return value.astype(np.float16).view(np.uint16).astype(np.uint64)
    if name == "bf16":
        return round_to_bf16(value).astype(np.uint64)
    bits = value.view(np.uint64) if value.dtype == np.int64 else value
    return to_type(bits, "b" + name[1:])


def round_to_bf16(value):
    """Bits of the nearest BF16, ties to even."""
    value = np.asarray(value, np.float32)
    bits = value.view(np.uint32)
    with np.errstate(over="ignore"):
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
    nearest = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), nearest)


def fused_multiply_add(a, b, c):
    """a * b + c of FP32 or FP16, rounded once."""
    # The product is exact in 53 bits. The sum is rounded to odd, after which
    # rounding it to fewer bits is as if it had been exact.
    kind = a.dtype
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    error = (product - (total - part)) + (c - part)
    even = total.view(np.uint64) & np.uint64(1) == 0
    inexact = np.isfinite(error) & (error != 0) & even
    towards = np.where(error > 0, np.inf, -np.inf)
    return np.where(inexact, np.nextafter(total, towards), total).astype(kind)


@dataclass
class Entry:
    function: Callable
    modifiers: set
    arguments: str
    """Types of the operands; `t` is that of the instruction."""
    result: str

    def argument_types(self, instruction):
        return [self._type(name, instruction) for name in self.arguments.split()]

    def result_type(self, instruction):
        return self._type(self.result, instruction)

    @staticmethod
    def _type(name, instruction):
        if name == "t":
            return instruction.type
        if name == "to":
            return instruction.parts[-2]
        if name == "wide":
            return WIDE[instruction.type] if "wide" in instruction.parts else instruction.type
        return name


ARITHMETIC = {}
INTEGERS = "s16 u16 s32 u32 s64 u64"
BITS = "b16 b32 b64"


def define(name, modifiers, arguments, result="t"):
    def register(function):
        ARITHMETIC[name] = Entry(function, set(modifiers.split()), arguments, result)
        return function

    return register


def _simple(name, modifiers, arguments, function, result="t"):
    define(name, modifiers, arguments, result)(lambda _, *values: function(*values))


_simple("add", INTEGERS + " f32", "t t", np.add)
_simple("sub", INTEGERS + " f32", "t t", np.subtract)
_simple("min", INTEGERS, "t t", np.minimum)
_simple("max", INTEGERS, "t t", np.maximum)
_simple("neg", "f32", "t", np.negative)
_simple("fma", "rn f32", "t t t", fused_multiply_add)
_simple("selp", BITS + " u16 u32 u64 f32", "t t pred", lambda a, b, p: np.where(p, a, b))
_simple("and", BITS + " pred", "t t", np.bitwise_and)
_simple("or", BITS + " pred", "t t", np.bitwise_or)
_simple("xor", BITS + " pred", "t t", np.bitwise_xor)
_simple("not", BITS + " pred", "t", np.invert)
_simple("div", "u32 u64", "t t", lambda a, b: a // np.maximum(b, 1))
_simple("rem", "u32 u64", "t t", lambda a, b: a % np.maximum(b, 1))
_simple("popc", "b32", "t", lambda a: np.bitwise_count(a).astype(np.uint64))

COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


@define("setp", "lt le gt ge eq ne f32 b16 b32 b64 " + INTEGERS, "t t", "pred")
def compare(instruction, a, b):
    return COMPARISONS[instruction.parts[1]](a, b)


@define("mul", "lo wide rn f32 " + INTEGERS, "t t", "wide")
def multiply(_, a, b):
    return a * b


@define("mad", "lo " + INTEGERS, "t t t")
def multiply_add(_, a, b, c):
    return a * b + c


@define("cvt", "rn f16 bf16 f16x2 f32 " + INTEGERS, "t", "to")
def convert(instruction, value):
    to = instruction.parts[-2]
    if instruction.type in ("f16", "f32"):
        assert to[0] in "fb", "floats to integers are not modelled"
    return value.astype(np.float32) if to == "f32" else value


@define("shl", BITS, "t u32")
def shift_left(_, a, n):
    return np.where(n < 64, a << np.minimum(n, 63), np.uint64(0))


@define("shr", "b16 b32 b64 " + INTEGERS, "t u32")
def shift_right(_, a, n):
    if a.dtype == np.int64:
        return a >> np.minimum(n, 63).astype(np.int64)
    return np.where(n < 64, a >> np.minimum(n, 63), np.uint64(0))


@define("shf", "l r wrap b32", "t t u32")
def funnel_shift(instruction, low, high, n):
    both, n = low | high << np.uint64(32), n & np.uint64(31)
    if instruction.parts[1] == "r":
        return both >> n
    return both << n >> np.uint64(32)


@define("prmt", "b32", "t t u32")
def permute_bytes(_, low, high, selector):
    both, result = low | high << np.uint64(32), np.zeros(32, np.uint64)
    for i in range(4):
        nibble = selector >> np.uint64(4 * i) & np.uint64(15)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte >= 128, np.uint64(255), np.uint64(0))
        result |= np.where(nibble >= 8, sign, byte) << np.uint64(8 * i)
    return result


@define("lop3", "b32", "t t t u32")
def any_function(_, a, b, c, table):
    result = np.zeros(32, np.uint64)
    for i in range(8):
        if int(table[0]) >> i & 1:
            result |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    return result


@define("bfi", "b32", "t t u32 u32")
def insert_bits(_, a, b, position, length):
    position, length = position & np.uint64(255), length & np.uint64(255)
    mask = ((np.uint64(1) << np.minimum(length, 32)) - np.uint64(1)) << np.minimum(
        position, 32
    )
    return b & ~mask | a << np.minimum(position, 32) & mask
