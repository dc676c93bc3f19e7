#!/usr/bin/env bash
# The quantised Triton kernels on one GPU that runs nothing else: judged first, then timed in every format beside vLLM's
# where it is installed, and the floor.  Writes verdicts, figures and a log of each step to the folder given, and goes on
# behind a step that fails.  STEPS=check or STEPS=bench does one half.  Most of the first half compiles kernels (360 for
# each dtype of `triton`, a third to one second each); four processes at once, as with thirteen cases beside each other
# were not answered in time.
set -uo pipefail
out=${1:-suites/performance/data}
steps=${STEPS:-check bench}
mkdir -p "$out"

step() { # name, command...: its output goes to a log, its exit status beside it
    local name=$1 begin=$SECONDS status
    shift
    timeout "${STEP_SECONDS:-270}" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$name: exit status $status after $((SECONDS - begin)) s"
    [ $status = 0 ] || tail -n 12 "$out/$name.log"
    return $status
}
check() { # name, implementation, options...
    step "check-$1" python -m moe_harness check --stage quantized_experts --impl "$2" --device cuda \
        --json "$out/check-$1.json" "${@:3}"
}
bench() { # name, format, options...
    step "quantized-$1-$2" python -m moe_harness bench --stage quantized_experts --format "$2" \
        --json "$out/quantized-$1-$2.json" "${@:3}"
}

failed=0
if [[ $steps == *check* ]]; then
    running=0
    beside() { # command...: beside at most three others
        if ((running == 4)); then
            wait -n || failed=1
            running=3
        fi
        "$@" &
        running=$((running + 1))
    }
    rest=layouts,memory,determinism,leak,property,graph_replay,side_stream,large_offsets
    for dtype in bf16 fp16 fp32; do
        beside check "triton-$dtype-exact" triton --dtype $dtype --check contract,exact
        beside check "triton-$dtype-numeric" triton --dtype $dtype --check numeric,sentinels,special,laws
        beside check "triton-$dtype-rest" triton --dtype $dtype --check $rest
        beside check "fp8-$dtype" triton:fp8_group128 --dtype $dtype
    done
    # Exact data and the bound at the sizes of models, with the tiles that are timed below.
    beside check models triton --config Qwen3-30B-A3B,gpt-oss-20b --check exact,numeric --dtype bf16
    for ((; running > 0; running--)); do wait -n || failed=1; done
fi
if [[ $steps == *bench* ]]; then
    fp8=(--impl triton:fp8_group128 --impl triton)
    int4=(--impl triton) mxfp4=(--impl triton)
    if python -c 'import vllm' 2>/dev/null; then
        fp8+=(--impl vllm:fp8)
        int4+=(--impl moe_harness.suites.performance.marlin:int4)
        mxfp4+=(--impl moe_harness.suites.performance.marlin:mxfp4)
    fi
    bench qwen3-30b-a3b fp8_block --config qwen3-30b-a3b "${fp8[@]}" || failed=1
    bench deepseek-v3-ep8 fp8_block --config deepseek-v3 --ep-size 8 "${fp8[@]}" || failed=1
    bench qwen3-30b-a3b int4_group --config qwen3-30b-a3b "${int4[@]}" || failed=1
    bench gpt-oss-20b mxfp4 --config gpt-oss-20b "${mxfp4[@]}" || failed=1
fi
exit $failed
