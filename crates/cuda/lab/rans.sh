#!/usr/bin/env bash
# The rANS experiments on a machine with a GPU, nvcc, ncu and compute-sanitizer:
# the memory checker on small shapes, the tables of times, a profile of each
# variant of the product. About two minutes on an H200.
#
#     bash crates/cuda/lab/rans.sh [folder for the results]
set -euo pipefail
out=$(realpath -m "${1:-${OUT:-rans-results}}")
mkdir -p "$out"
cd "$(dirname "$0")"
for program in rans_product rans_decode; do
    nvcc -O3 -std=c++17 -gencode=arch=compute_90a,code=sm_90a -o "$out/$program" $program.cu -lcublas &
done
wait
for program in rans_product rans_decode; do
    compute-sanitizer --report-api-errors no --error-exitcode 9 "$out/$program" --small >"$out/$program-memcheck.txt" 2>&1 || echo "$program: memcheck FAILED"
    timeout 180 "$out/$program" | tee "$out/$program.txt"
done
grep -l "DIFFER\|BAD TILE" "$out"/*.txt && exit 1
metrics=sm__cycles_active.avg,sm__inst_executed.sum,sm__inst_issued.avg.pct_of_peak_sustained_active
metrics+=,sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active,sm__inst_executed_pipe_fma.avg.pct_of_peak_sustained_active
metrics+=,l1tex__data_pipe_lsu_wavefronts.avg.pct_of_peak_sustained_elapsed,l1tex__data_pipe_lsu_wavefronts_mem_shared.sum
metrics+=,l1tex__data_bank_conflicts_pipe_lsu_mem_shared_op_ld.sum,dram__bytes_read.sum.pct_of_peak_sustained_elapsed
metrics+=,smsp__average_warps_issue_stalled_short_scoreboard_per_issue_active.ratio
metrics+=,smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio,smsp__average_warps_issue_stalled_mio_throttle_per_issue_active.ratio
timeout 180 ncu --csv -k regex:product_kernel --metrics "$metrics" "$out/rans_product" --profile >"$out/rans_product-ncu.csv"
