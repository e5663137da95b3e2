"""Planted errors: a kernel that lacks one of its waits has to be caught."""

from ptx import Kernel, parse_instruction

import products
import rans
from harness import Difference
from machine import KernelError

ATTEMPTS = 10


def waits(kernel, opcodes):
    """Places of the kernel's instructions that begin so."""
    return [i for i, x in enumerate(kernel.code) if x.opcode.startswith(opcodes)]


def without(kernel, place):
    """The kernel without one of its waits."""
    instruction = kernel.code[place]
    text = "fence.mbarrier_init.release.cluster"  # Of no effect.
    if instruction.opcode.startswith("mbarrier.try_wait"):
        text = f"setp.eq.u32 {instruction.operands[0].name}, 0, 0"
    code = list(kernel.code)
    code[place] = parse_instruction(text)
    return Kernel(kernel.name, code, kernel.labels)


def expect_caught(harness, kernel_name, number, opcodes, execute, rng):
    """`execute`: a case of the kernel, given a random generator."""
    kernel = harness.kernels[kernel_name]
    place = waits(kernel, opcodes)[number]
    harness.kernels[kernel_name] = without(kernel, place)
    try:
        for _ in range(ATTEMPTS):
            execute(rng)
    except (Difference, KernelError):
        return
    finally:
        harness.kernels[kernel_name] = kernel
    text = kernel.code[place].text
    raise Difference(f"{kernel_name} without `{text}` is not caught")


def cases(harness):
    """(name, function of a random generator)."""

    def product(rng, n_parts=1):
        # Two groups of four warps: one alone waits for itself in every wgmma.
        names = ["48x1536-3", "32x1536-40", "16x1536-0"]
        segments = [harness.matrix(f"fixed-bf16x3-{name}") for name in names]
        shape = (6, n_parts, 1)
        products.run_product(
            harness.run(rng), segments, 32, "m32", shape, together=n_parts
        )

    def small_product(rng):
        segments = [harness.matrix("fixed-bf16x3-64x4096-3")]
        products.run_product(harness.run(rng), segments, 8, "m8", n_blocks=2)

    def parts(rng):
        product(rng, 2)

    def entropy_coded(rng):
        matrix = harness.matrix("rans-bf16-Usual-48x528")
        run = harness.run(rng, check_races=True)
        rans.expect_product(run, matrix, rans.load(run, matrix), 8)

    for kernel_name, opcodes, execute in [
        ("product_bf16x3_m32", "mbarrier.try_wait", product),
        ("product_bf16x3_m32", "wgmma.wait_group", product),
        ("product_bf16x3_m32", "bar.sync", parts),
        ("product_bf16x3_m8", "mbarrier.try_wait", small_product),
        ("product_bf16x3_m8", "bar.sync", small_product),
        # The last is for copies that nothing reads.
        ("product_bf16x3_m8", "cp.async.wait_all", small_product),
        ("rans_product_bf16_8", "bar.sync", entropy_coded),
    ]:
        n = len(waits(harness.kernels[kernel_name], opcodes))
        for number in range(n - (opcodes == "cp.async.wait_all")):

            def case(rng, arguments=(kernel_name, number, opcodes, execute)):
                expect_caught(harness, *arguments, rng)

            yield f"{kernel_name} without {opcodes} {number}", case
