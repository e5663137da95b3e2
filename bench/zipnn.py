#!/usr/bin/env python3
"""Measures ZipNN on the bytes and by the rules of `transom bench codec`.

    python3 -m venv venv && venv/bin/pip install zipnn
    venv/bin/python bench/zipnn.py --input model.safetensors [--threads 1] [--json]

The tensors' bytes of a BF16 (or F16, F32) safetensors file are compressed as
one buffer in memory. GB/s are 10^9 uncompressed bytes a second; the result is
the median of at least five runs and one second, after a warm-up. The output is
compared with the input after every run (exit code 1 if it differs).

ZipNN reorders the buffer it is given in place, so every run gets a fresh copy,
made outside the timing.
"""

import argparse
import json
import statistics
import struct
import sys
import time
import warnings
from pathlib import Path

N_RUNS, MIN_SECONDS = 5, 1.0
ZIPNN_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def read_tensors(path):
    """The bytes of all tensors, and ZipNN's name of their dtype."""
    with open(path, "rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
        dtypes = {t["dtype"] for name, t in header.items() if name != "__metadata__"}
        if len(dtypes) != 1 or not dtypes <= ZIPNN_DTYPES.keys():
            sys.exit(f"zipnn.py: {path}: dtypes are {sorted(dtypes)}, expected one of {list(ZIPNN_DTYPES)}")
        return file.read(), ZIPNN_DTYPES[dtypes.pop()]


def timed(prepare, work, check):
    """Seconds of each run; `prepare` and `check` are not timed."""
    seconds = []
    check(work(prepare()))
    while len(seconds) < N_RUNS or sum(seconds) < MIN_SECONDS:
        data = prepare()
        start = time.perf_counter()
        result = work(data)
        seconds.append(time.perf_counter() - start)
        check(result)
    return seconds


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--input", required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    warnings.filterwarnings("ignore")
    # This file has the package's name and must not be found in its place.
    here = Path(__file__).resolve().parent
    sys.path = [folder for folder in sys.path if Path(folder).resolve() != here]
    import zipnn
    from importlib.metadata import version

    data, dtype = read_tensors(args.input)
    coder = zipnn.ZipNN(input_format="byte", bytearray_dtype=dtype, threads=args.threads)
    packed = bytes(coder.compress(bytearray(data)))
    identical = True

    def check_decoded(result):
        nonlocal identical
        identical = identical and bytes(result) == data

    encode = timed(lambda: bytearray(data), coder.compress, lambda _: None)
    decode = timed(lambda: bytearray(packed), coder.decompress, check_decoded)

    def gbps(seconds):
        return len(data) / 1e9 / seconds

    line = {
        "engine": f"zipnn-{version('zipnn')}",
        "threads": args.threads,
        "ratio": len(packed) / len(data),
        "encode_gbps": gbps(statistics.median(encode)),
        "decode_gbps": gbps(statistics.median(decode)),
        "encode_gbps_range": [gbps(max(encode)), gbps(min(encode))],
        "decode_gbps_range": [gbps(max(decode)), gbps(min(decode))],
        "encode_runs": len(encode),
        "decode_runs": len(decode),
        "identical": identical,
    }
    if args.json:
        print(json.dumps({"input": args.input, "bytes": len(data), "results": [line]}))
    else:
        print("engine           threads   ratio  encode GB/s  decode GB/s  output")
        print(
            f"{line['engine']:<16} {args.threads:>7}  {line['ratio']:.4f}  {line['encode_gbps']:>11.2f}"
            f"  {line['decode_gbps']:>11.2f}  {'identical' if identical else 'DIFFERS'}"
        )
    return 0 if identical else 1


if __name__ == "__main__":
    sys.exit(main())
