"""Reads the PTX that nvcc writes: each kernel a list of instructions."""

import re
from dataclasses import dataclass, field


class UnknownInstruction(Exception):
    """The interpreter does not know it; the message names it."""


@dataclass(frozen=True)
class Register:
    name: str


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a float."""

    value: int


@dataclass(frozen=True)
class Symbol:
    """The address of a parameter or of the block's shared memory."""

    name: str


@dataclass(frozen=True)
class Address:
    base: Register | Immediate | Symbol
    offset: int


@dataclass(frozen=True)
class Vector:
    """Several registers: `{a, b}`, or `value|predicate`."""

    items: tuple


@dataclass
class Instruction:
    opcode: str
    """For example `shl.b32`."""
    operands: list
    guard: str | None
    """Predicate register without which a lane leaves the instruction out."""
    negated: bool
    """Whether the guard has to be false instead."""
    text: str
    parts: list = field(init=False)

    def __post_init__(self):
        self.parts = self.opcode.split(".")

    @property
    def type(self):
        return self.parts[-1]


@dataclass
class Kernel:
    name: str
    code: list = field(default_factory=list)
    labels: dict = field(default_factory=dict)
    """Label -> index in `code`."""
    handlers: list | None = None
    """What executes each instruction; the machine looks them up once."""


def parse(text):
    """Kernels of a PTX file, by name."""
    text = _rename_locals(text)
    kernels = {}
    entry = r"\.visible \.entry (\w+)\(.*?\n\{\n(.*?)(?=\.visible \.entry|\Z)"
    for name, body in re.findall(entry, text, re.S):
        kernels[name] = _parse_body(name, body)
    return kernels


def _rename_locals(text):
    """Gives labels and registers of inline assembly names of their own.

    The same assembly stands in a kernel many times, each in its own scope.
    """
    n_blocks = 0

    def rename(match):
        nonlocal n_blocks
        n_blocks += 1
        block = match[0]
        names = {label: "$" for label in re.findall(r"^\s*(\w+):", block, re.M)}
        for declared in re.findall(r"\.reg \.(?:pred|b32) ([\w, ]+);", block):
            names.update((name.strip(), "%") for name in declared.split(","))
        for name, sigil in names.items():
            new = f"{sigil}asm{n_blocks}_{name}"
            block = re.sub(rf"(?<![\w%.$]){name}(?!\w)", new, block)
        return block

    return re.sub(
        r"// begin inline asm.*?// end inline asm", rename, text, flags=re.S
    )


def _parse_body(name, body):
    kernel = Kernel(name)
    for statement in re.split(r"[;\n]", re.sub(r"//.*", "", body)):
        # Scopes: an instruction never begins with a brace.
        statement = statement.strip().lstrip("{").strip()
        if statement.endswith("}") and "{" not in statement:
            statement = statement[:-1].strip()
        label = re.match(r"(\$?\w+):\s*(.*)", statement)
        if label:
            kernel.labels[label[1]] = len(kernel.code)
            statement = label[2]
        if statement and not statement.startswith("."):
            kernel.code.append(parse_instruction(statement))
    return kernel


def parse_instruction(text):
    guard = re.match(r"@(!?)(%\w+)\s+(.*)", text)
    rest = guard[3] if guard else text
    opcode, operands = (re.split(r"\s+", rest, maxsplit=1) + [""])[:2]
    return Instruction(
        opcode,
        [_parse_operand(operand) for operand in _split(operands)],
        guard[2] if guard else None,
        bool(guard and guard[1]),
        text,
    )


def _split(text):
    """At the commas that are not inside brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "[{") - (character in "]}")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def _parse_operand(text):
    if text.startswith("[") and "," in text:
        # A tensor map and where its box begins.
        return Vector(tuple(_parse_operand(item) for item in _split(text[1:-1])))
    if text.startswith("["):
        base, offset = re.fullmatch(r"\[([^+\]]+)(?:\+(-?\d+))?\]", text).groups()
        return Address(_parse_operand(base), int(offset or 0))
    if text.startswith("{"):
        return Vector(tuple(_parse_operand(item) for item in _split(text[1:-1])))
    if "|" in text:
        return Vector(tuple(_parse_operand(item) for item in text.split("|")))
    if text.startswith("%") or text == "_":
        return Register(text)
    if re.fullmatch(r"0f[0-9A-Fa-f]{8}", text):
        return Immediate(int(text[2:], 16))
    if text == "1.0":  # A share of the L2 cache.
        return Immediate(1)
    if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0) & 0xFFFF_FFFF_FFFF_FFFF)
    return Symbol(text)
