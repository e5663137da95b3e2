"""Runs every case: `run.py PTX_FOLDER MATRIX_FOLDER [--seed N] [--only TEXT]`.

Of a case that fails, the seed and its name repeat it.
"""

import argparse
import multiprocessing
import sys
import time
import traceback
import zlib
from pathlib import Path

import numpy as np

import decode
import prefill
import products
import races
import rans
from harness import Difference, Harness
from machine import KernelError
from ptx import UnknownInstruction

# Kernels that products and decoding do not need.
UNTESTED = {"probe_"}

harness = None
cases = None


def set_up(ptx_folder, matrix_folder):
    global harness, cases
    # Infinities and NaNs are values like others here.
    np.seterr(all="ignore")
    harness = Harness(ptx_folder, matrix_folder)
    cases = {}
    for module in (products, prefill, decode, rans, races):
        for name, execute in module.cases(harness):
            assert name not in cases, f"two cases: {name}"
            cases[name] = execute


def run_case(job):
    """What a case says if it fails, the kernels it launched, its seconds."""
    name, seed = job
    start = time.monotonic()
    harness.launched.clear()
    failure = None
    try:
        cases[name](np.random.default_rng([seed, zlib.crc32(name.encode())]))
    except (Difference, KernelError, UnknownInstruction) as error:
        failure = f"{type(error).__name__}: {error}"
    except Exception:
        failure = traceback.format_exc()
    return name, seed, failure, set(harness.launched), time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ptx", type=Path)
    parser.add_argument("matrices", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--verbose", action="store_true", help="the time of each case")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    set_up(options.ptx, options.matrices)
    names = [name for name in cases if options.only in name]
    jobs = [(name, options.seed) for name in names]
    print(f"{len(jobs)} cases, seed {options.seed}", flush=True)

    failures, launched, times = 0, set(), []
    arguments = (options.ptx, options.matrices)
    with multiprocessing.Pool(options.jobs, set_up, arguments) as pool:
        for name, seed, failure, kernels, seconds in pool.imap_unordered(run_case, jobs):
            launched |= kernels
            times.append((seconds, name))
            if options.verbose:
                print(f"{seconds:6.1f} s {name}", flush=True)
            if failure:
                failures += 1
                print(f"FAILED: {name}\n    {failure}", flush=True)
                print(f"    to repeat it: --seed {seed} --only '{name}'", flush=True)
    for seconds, name in sorted(times)[-3:]:
        print(f"{seconds:6.1f} s {name}")
    n_failed_cases = failures
    if not options.only:
        missing = sorted(
            name
            for name in harness.kernels
            if name not in launched and not name.startswith(tuple(UNTESTED))
        )
        for name in missing:
            print(f"FAILED: no case launches {name}")
        failures += len(missing)
    # As `cargo test` says it, for xtask.
    verdict = "FAILED" if failures else "ok"
    passed = len(jobs) - n_failed_cases
    print(f"test result: {verdict}. {passed} passed; {failures} failed; 0 ignored")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
