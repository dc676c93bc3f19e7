#!/usr/bin/env bash
# Every figure of docs/benches.md, on one GPU that runs nothing else: writes suites/performance/data (or the folder given).
set -euo pipefail
out=${1:-suites/performance/data}
bench() { name=$1; shift; moe-harness bench "$@" --json "$out/$name.json"; }
experts() { name=$1; shift; bench "experts-$name" --stage experts --impl triton --impl transformers:grouped_mm "$@"; }

experts qwen3-30b-a3b --impl transformers:batched_mm --impl liger --config qwen3-30b-a3b
experts qwen3-235b-a22b --config qwen3-235b-a22b
experts qwen3-next-80b-a3b --config qwen3-next-80b-a3b
experts mixtral-8x7b --config mixtral-8x7b
experts deepseek-v3-ep8 --config deepseek-v3 --ep-size 8
for config in qwen3-30b-a3b qwen3-next-80b-a3b; do
    bench "router-$config" --stage router --impl triton --impl torch:topk --config $config \
        --tokens 1,33,256,1024,4096,16384
done
for config in qwen3-omni-talker qwen3-next-80b-a3b; do
    bench "shared_expert_gate-$config" --stage shared_expert_gate --impl triton --impl torch:expression \
        --config $config --tokens 1,7,33,1024,7177,8192
done
