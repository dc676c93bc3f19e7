#!/usr/bin/env bash
# The quantised Triton kernels on one GPU that runs nothing else: judged first, then timed in every format beside the
# other implementations and the floor.  Writes a verdict, figures and a log of each step to the folder given, and goes
# on behind a step that fails.  As a test run: STEPS=check, or STEPS=bench.  Ten minutes and less on an H200.
set -uo pipefail
out=${1:-suites/performance/data}
steps=${STEPS:-check bench}
mkdir -p "$out"
failed=0
step() { # name, command...
    local name=$1 begin=$SECONDS
    shift
    timeout "${STEP_SECONDS:-240}" "$@" >"$out/$name.log" 2>&1
    local status=$?
    echo "$name: exit status $status after $((SECONDS - begin)) s"
    [ $status = 0 ] || { failed=1; tail -n 15 "$out/$name.log"; }
}
bench() { # name, format, config, implementations and options...
    local name=quantized-$2-$1 format=$2 config=$3
    shift 3
    step "$name" python -m moe_harness bench --stage quantized_experts --format "$format" --config "$config" \
        --json "$out/$name.json" "$@"
}

if [[ $steps == *check* ]]; then
    for spec in triton triton:fp8_group128; do
        step "check-${spec/:/-}" python -m moe_harness check --stage quantized_experts --impl "$spec" --device cuda \
            --json "$out/check-${spec/:/-}.json"
    done
    # Shapes that are timed below: exact data and the bound, at the sizes of the models themselves.
    step check-models python -m moe_harness check --stage quantized_experts --impl triton --device cuda \
        --config Qwen3-30B-A3B,gpt-oss-20b --check exact,numeric --dtype bf16
fi
if [[ $steps == *bench* ]]; then
    vllm=()
    python -c 'import vllm' 2>/dev/null && vllm=(--impl vllm:fp8)
    bench qwen3-30b-a3b fp8_block qwen3-30b-a3b --impl triton:fp8_group128 --impl triton "${vllm[@]}"
    bench deepseek-v3-ep8 fp8_block deepseek-v3 --ep-size 8 --impl triton:fp8_group128 "${vllm[@]}"
    bench qwen3-30b-a3b int4_group qwen3-30b-a3b --impl triton
    bench gpt-oss-20b mxfp4 gpt-oss-20b --impl triton
fi
exit $failed
