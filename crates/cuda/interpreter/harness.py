"""What all cases need: kernels, matrices, launches, references."""

import json
from types import SimpleNamespace

import numpy as np

import ptx
from arithmetic import round_to_bf16
from machine import POISON_GLOBAL, KernelError, Machine, Memory
from matrix_units import widen

UNWRITTEN = {1: POISON_GLOBAL, 2: POISON_GLOBAL << 8 | POISON_GLOBAL}


class Difference(Exception):
    """A kernel's result is not that of the reference."""


class Harness:
    def __init__(self, ptx_folder, matrix_folder):
        self.matrix_folder = matrix_folder
        self.kernels = {}
        for path in sorted(ptx_folder.glob("*.ptx")):
            self.kernels.update(ptx.parse(path.read_text()))
        self.launched = set()

    def matrices(self, prefix):
        """Names of the matrices whose files begin so."""
        paths = sorted(self.matrix_folder.glob(prefix + "*.matrix"))
        assert paths, f"no matrix is named {prefix}*"
        return [path.stem for path in paths]

    def matrix(self, name):
        """A file of the example `interpreter_matrices`: its header, arrays of bytes."""
        data = (self.matrix_folder / f"{name}.matrix").read_bytes()
        line, _, rest = data.partition(b"\n")
        header = json.loads(line)
        for array, length in header.pop("arrays"):
            header[array] = np.frombuffer(rest[:length], np.uint8)
            rest = rest[length:]
        return SimpleNamespace(name=name, **header)

    def run(self, rng, check_races=False, n_bytes=1 << 24):
        return Run(self, rng, check_races, n_bytes)


class Run:
    """A GPU for one case."""

    def __init__(self, harness, rng, check_races, n_bytes):
        self.harness, self.rng = harness, rng
        self.memory = Memory(n_bytes)
        self.machine = Machine(self.memory, rng, check_races)

    def launch(self, name, grid, n_threads, n_shared, params, together=1, cluster=1):
        self.harness.launched.add(name)
        kernel = self.harness.kernels[name]
        self.machine.launch(kernel, grid, n_threads, n_shared, params, together, cluster)

    def read_written(self, address, shape, dtype):
        """A result, of which every byte has to be written."""
        n = int(np.prod(shape))
        n_bytes = n * np.dtype(dtype).itemsize
        if not self.memory.is_written(address, n_bytes):
            raise KernelError("not all of the result is written")
        return self.memory.read(address, n, dtype).reshape(shape)


def expect_equal(found, expected, what, dtype=None):
    """Compares bits; of `dtype`, any NaN is as good as another."""
    equal = found == expected
    if dtype:
        equal |= np.isnan(widen(found, dtype)) & np.isnan(widen(expected, dtype))
    if not equal.all():
        first = [int(i) for i in np.argwhere(~equal)[0]]
        count = f"{(~equal).sum()} of {equal.size} differ"
        raise Difference(f"{what}: {count}, the first at {first}")


def narrow(values, dtype):
    """Bits of the nearest BF16 or FP16."""
    with np.errstate(all="ignore"):
        if dtype == "f16":
            return values.astype(np.float16).view(np.uint16)
        return round_to_bf16(values.astype(np.float32))


def slices(cols):
    """Bounds of the slices of K, in columns; as `kernels/reduction.cuh`."""
    n_units = (cols + 255) // 256
    n_slices = max(1, min(16, n_units))
    bounds = [i if n_units <= 16 else i * n_units // 16 for i in range(n_slices + 1)]
    return n_slices, [256 * bound for bound in bounds]


def product(weights, x, bias):
    """y[tokens, rows] in FP32, added in the order that the kernels promise.

    `weights` [rows, cols] and `x` [tokens, cols] are FP64, `bias` FP64 or None.
    """
    cols = weights.shape[1]
    n_slices, bounds = slices(cols)
    total = None
    with np.errstate(all="ignore"):
        for i in range(n_slices):
            part = np.zeros((len(weights), len(x)), np.float32)
            for k in range(bounds[i], min(cols, bounds[i + 1]), 16):
                step = weights[:, k : k + 16] @ x[:, k : k + 16].T
                part = (part + step).astype(np.float32)
            total = part if total is None else total + part
        if bias is not None:
            total = total + bias[:, None].astype(np.float32)
    return total.T


def dequantise(elements, scales):
    """f16(f32(q) * f32(scale)) as FP64; a scale a row, or one."""
    scales = np.broadcast_to(scales, len(elements)).astype(np.float32)
    with np.errstate(all="ignore"):
        wide = elements.astype(np.float32) * scales[:, None]
        return wide.astype(np.float16).astype(np.float64)
