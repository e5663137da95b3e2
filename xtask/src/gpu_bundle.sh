#!/usr/bin/env bash
# Everything that needs a GPU: tests, memory checker, benchmarks. Made by
# `cargo xtask gpu-bundle`; needs the NVIDIA driver, cuBLAS and compute-sanitizer.
#
#     bash run.sh [folder for the results] [tests | bench | prefill | quick]
#
# Results also go to $OUT if that is set. `tests` are the tests alone, `quick` adds
# a few products, `bench` and `prefill` are the tables alone: everything takes longer
# than some machines run a command. Without a word, everything.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=${1:-${OUT:-$here/results}}
what=${2:-all}
mkdir -p "$out"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for program in transom gpu-tests; do
    gzip -dc "$here/$program.gz" >"$work/$program" && chmod +x "$work/$program" || exit 1
done
export TRANSOM_GPU=1  # no GPU is a failure
failed=0
log=$out/gpu-$what.log

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

# One test at a time: with the checker, work of several threads is slow. Only the
# tests with one of these words in their names, which are small.
checked() {  # checked TOOL [OPTION OF THE TESTS...]
    local options=(--error-exitcode 9)
    # Kernels are looked up in several modules, which memcheck takes for errors of the API.
    [ "$1" = memcheck ] && options+=(--report-api-errors no)
    compute-sanitizer --tool "$1" "${options[@]}" "$work/gpu-tests" --test-threads 1 probe small "${@:2}"
}

tests() {
    step tests "$work/gpu-tests"
    if command -v compute-sanitizer >/dev/null; then
        step memcheck checked memcheck
        # Not the kernels of a library.
        step racecheck checked racecheck --skip prefill
        grep -h "ERROR SUMMARY\|RACECHECK SUMMARY" "$log"
    else
        echo "FAILED: compute-sanitizer is not on this machine" | tee -a "$log"
        failed=1
    fi
}

bench() {  # bench NAME ARGUMENTS...: table to the log, JSON and CSV to the results
    local name=$1
    shift
    step "bench $name" "$work/transom" bench "$@" --csv "$out/$name.csv"
}
real=(--weights "$here/gpt2-small-partial")
layers=6144x4096,4096x4096,28672x4096,4096x14336  # of Llama 3.1 8B, without the head

products() {
    bench product matmul --device cuda --shapes llama-8b,llama-70b --batch 1,2,4,8,16,32,64 --dtype bf16,f16,int8
    bench chain matmul --device cuda --shapes 4096x4096,6144x4096 --dtype bf16,int8 --chain
    bench decode decode --device cuda --shapes 4096x4096,28672x4096
    if [ -d "${real[1]}" ]; then
        bench real matmul --device cuda --shapes "$layers" --batch 1,8 "${real[@]}"
        bench real-decode decode --device cuda --shapes 28672x4096 "${real[@]}"
    fi
}
prefill() {
    bench prefill matmul --device cuda --shapes llama-8b,llama-70b --batch 512,2048,8192 --layouts dense,fixed
    bench prefill-int8 matmul --device cuda --shapes "$layers" --batch 512,2048,8192 --layouts dense,fixed --dtype int8
    bench prefill-ahead matmul --device cuda --shapes "$layers" --batch 512,2048,8192 --layouts fixed,rans --ahead
}

{
    echo "commit $(cat "$here/commit" 2>/dev/null)"
    nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
} | tee "$log"
step doctor "$work/transom" doctor
case $what in
    all) tests; products; prefill ;;
    tests) tests ;;
    bench) products ;;
    prefill) prefill ;;
    quick)
        tests
        bench product matmul --device cuda --shapes 4096x4096,28672x4096 --batch 1,8,64
        bench decode decode --device cuda
        ;;
    *) echo "FAILED: $what: expected tests, bench, prefill or quick" && failed=1 ;;
esac

grep -h "^test result" "$log"
if grep -q "SKIPPED " "$log"; then
    echo "FAILED: tests were skipped"
    failed=1
fi
[ $failed -eq 0 ] && echo "all passed, none skipped" | tee -a "$log" || echo "FAILED" | tee -a "$log"
exit $failed
