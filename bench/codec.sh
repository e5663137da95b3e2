#!/bin/sh
# Measures `transom bench codec` and ZipNN in turns, on the same bytes and with
# one thread, and prints a CSV record.
#
#     bench/codec.sh INPUT.safetensors PYTHON [REPEATS] > bench/record/<machine>/<date>-codec.csv
#
# PYTHON is an interpreter with zipnn installed (see bench/zipnn.py). Taking
# turns lets a machine that slows down or speeds up do so for both.
set -eu
input=$1 python=$2 repeats=${3:-3}
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

(cd "$root" && cargo build --quiet --release --package transom-cli)
binary=$(cd "$root" && cargo metadata --format-version 1 --no-deps |
    "$python" -c 'import json, sys; print(json.load(sys.stdin)["target_directory"])')/release/transom

for turn in $(seq "$repeats"); do
    "$binary" bench codec --input "$input" --threads 1 --json > "$work/transom-$turn.json"
    "$python" "$root/bench/zipnn.py" --input "$input" --threads 1 --json > "$work/zipnn-$turn.json"
done

commit=$(git -C "$root" rev-parse --short HEAD)
"$python" - "$work" "$commit" "$(rustc --version)" <<'EOF'
import csv, datetime, hashlib, json, pathlib, platform, sys

folder, commit, compiler = pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]
cpu = platform.machine()
for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
    if line.startswith("model name"):
        cpu = line.split(":", 1)[1].strip()
        break
keys = ["engine", "threads", "ratio", "encode_gbps", "decode_gbps"]
ranges = ["encode_gbps_range", "decode_gbps_range"]
out = csv.writer(sys.stdout)
out.writerow(
    ["date", "cpu", "commit", "compiler", "input", "sha256", "bytes", "turn"] + keys
    + ["encode_gbps_min", "encode_gbps_max", "decode_gbps_min", "decode_gbps_max", "identical"]
)
for path in sorted(folder.glob("*.json"), key=lambda p: p.stem.split("-")[::-1]):
    report = json.loads(path.read_text())
    file = pathlib.Path(report["input"])
    for line in report["results"]:
        values = [line[key] for key in keys] + [v for key in ranges for v in line[key]]
        values = [f"{v:.4f}" if isinstance(v, float) else v for v in values]
        out.writerow(
            [datetime.date.today(), cpu, commit, compiler, file.name,
             hashlib.sha256(file.read_bytes()).hexdigest()[:16], report["bytes"],
             path.stem.split("-")[1]] + values + [line["identical"]]
        )
EOF
