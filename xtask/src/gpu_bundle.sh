#!/usr/bin/env bash
# Everything that needs a GPU: tests, memory checker, benchmarks. Made by
# `cargo xtask gpu-bundle`; needs the NVIDIA driver, cuBLAS and compute-sanitizer.
#
#     bash run.sh [folder for the results] [quick]
#
# Results also go to $OUT if that is set. With `quick`, tests and two shapes only.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${OUT:-$here/results}}
quick=${2:-}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for program in transom gpu-tests; do
    gzip -dc "$here/$program.gz" >"$work/$program" && chmod +x "$work/$program" || exit 1
done
export TRANSOM_GPU=1  # no GPU is a failure
failed=0
log=$out/gpu-tests.log

# cuBLAS as pip installs it, if the linker does not know one.
if ! ldconfig -p | grep -q libcublas.so.13; then
    folder=$(python3 - 2>/dev/null <<'PYTHON'
import importlib.util, pathlib
for package in importlib.util.find_spec("nvidia").submodule_search_locations:
    for library in pathlib.Path(package).glob("**/libcublas.so.13"):
        print(library.parent)
PYTHON
)
    folder=${folder%%$'\n'*}
    [ -n "$folder" ] && export LD_LIBRARY_PATH=$folder${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

step() {  # step NAME COMMAND...: runs it, says how it ended
    local name=$1 start=$SECONDS
    shift
    echo "=== $name" | tee -a "$log"
    if "$@" >>"$log" 2>&1; then
        echo "--- $name: passed, $((SECONDS - start)) s" | tee -a "$log"
    else
        echo "--- $name: FAILED ($?), $((SECONDS - start)) s" | tee -a "$log"
        failed=1
    fi
}

{
    echo "commit $(cat "$here/commit" 2>/dev/null)"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} | tee "$log"
step doctor "$work/transom" doctor
step tests "$work/gpu-tests"

# One test at a time: with the checker, work of several threads is slow.
checked() {
    compute-sanitizer --tool "$1" --error-exitcode 9 "$work/gpu-tests" --test-threads 1 "${reduced[@]}"
}
# Tests whose names hold one of these words; large or slow ones are left out.
reduced=(probe small)
if command -v compute-sanitizer >/dev/null; then
    step memcheck checked memcheck
    step racecheck checked racecheck
    grep -h "ERROR SUMMARY\|RACECHECK SUMMARY" "$log"
else
    echo "FAILED: compute-sanitizer is not on this machine" | tee -a "$log"
    failed=1
fi

bench() {  # bench NAME ARGUMENTS...: table to the log, JSON and CSV to the results
    local name=$1
    shift
    step "bench $name" "$work/transom" bench "$@" --csv "$out/$name.csv"
}
if [ -n "$quick" ]; then
    bench matmul matmul --device cuda --shapes 4096x4096,28672x4096 --batch 1,8
else
    bench matmul matmul --device cuda --shapes llama-8b,llama-70b --batch 1,2,4,8,16,32,64 --dtype bf16,f16
fi
bench decode decode --device cuda

grep -h "^test result" "$log"
if grep -q "SKIPPED " "$log"; then
    echo "FAILED: tests were skipped"
    failed=1
fi
[ $failed -eq 0 ] && echo "all passed, none skipped" | tee -a "$log" || echo "FAILED" | tee -a "$log"
exit $failed
