#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in one go: about 9 minutes on an H100. vLLM for CUDA must be importable.
#
#   benchmarks/gpu.sh OUT [PART...]          on a GPU; without PARTs all of them, as far as the time goes
#   benchmarks/gpu.sh --cpu OUT [PART...]    the same programs, tiny, on a machine without a GPU: do they run?
#
# PARTs: kernels, exactness, 8b, 1b, demo, 32b, sync. Each leaves a JSON file and a log in the folder OUT (all of them
# are in all.tar.gz at the end), and a line in OUT/status.jsonl. If one fails the others still run, and the status is 1
# at the end, as it is if one is left out for lack of time. PYTHON names the interpreter, SECONDS_LEFT the time for all
# of them (default: 530).
set -uo pipefail

cpu=
if [ "${1:-}" = --cpu ]; then cpu=--cpu; shift; fi
if [ $# -lt 1 ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit 2
parts=${*:-kernels exactness 8b 1b demo 32b sync}
python=${PYTHON:-python3}
left=${SECONDS_LEFT:-530}
failed=0

cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOOKAHEAD_CUDA_TREES=1 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
: > "$out/status.jsonl"

# run NAME LEAST COMMAND...: skipped if fewer than LEAST seconds are left
run() {
    local name=$1 least=$2 begin=$SECONDS rest=$((left - SECONDS)) status
    shift 2
    if [ "$rest" -lt "$least" ]; then
        printf '{"part": "%s", "skipped": "only %d s are left, it takes about %d s"}\n' "$name" "$rest" "$least"
    else
        timeout --kill-after=10 "$rest" "$@" > "$out/$name.log" 2>&1 < /dev/null
        status=$?
        [ $status = 0 ] || { failed=1; tail -n 25 "$out/$name.log" >&2; }
        printf '{"part": "%s", "status": %d, "seconds": %d}\n' "$name" $status $((SECONDS - begin))
    fi | tee -a "$out/status.jsonl"
    grep -q "\"part\": \"$name\", \"status\": 0" "$out/status.jsonl" || failed=1
}

step_cost() { # step_cost NAME LEAST MODEL ENGINE [OPTION...]
    local name=$1 least=$2 model=$3 engine=$4
    shift 4
    run "$name" "$least" "$python" benchmarks/gpu_step_cost.py $cpu "$out/$name.json" --model "$model" --engine "$engine" "$@"
}

demo() {
    # the engines are processes of their own, and find the plugin by its metadata
    local site engine='{"gpu_memory_utilization": 0.2, "max_num_seqs": 16, "max_model_len": 1024}'
    if ! "$python" -c 'from importlib.metadata import entry_points as e; exit(not e(group="vllm_lookahead.proposers"))'; then
        site=$(mktemp -d)
        "$python" -m pip install -q --no-deps --no-index --no-build-isolation --target "$site" "$root" >&2
        export PYTHONPATH="$PYTHONPATH:$site"
    fi
    local options=(--batch 1,8 --rounds 2 --num-prompts 8 --max-tokens 128 --dtype bfloat16 --engine "$engine")
    [ -z "$cpu" ] || options=(--batch 1 --rounds 1 --num-prompts 1 --max-tokens 12 --eager)
    run demo $((${#cpu} ? 20 : 110)) "$python" -m vllm_lookahead.cli bench run -m stock -m prompt_lookup -m lookahead \
        --starts 1 "${options[@]}" --out "$out/demo.json"
}

tiny=(--nodes 0,8,32 --batches 2,1 --contexts 64 --windows 1 --window 2)
for part in $parts; do
    case $part in
    kernels) run kernels 20 "$python" benchmarks/gpu_kernels.py $cpu "$out/kernels.json" ;;
    exactness) run exactness 60 "$python" benchmarks/gpu_exactness.py $cpu "$out/exactness.json" ;;
    demo) demo ;;
    8b | 1b | 32b | sync)
        if [ -n "$cpu" ]; then
            [ "$part" = 8b ] || continue # one shape is enough to see that it runs
            for engine in stock ours; do step_cost "step-cost-tiny-$engine" 20 tiny $engine "${tiny[@]}"; done
            continue
        fi
        case $part in
        32b)
            step_cost step-cost-32b-ours 80 32b-fp8 ours --batches 4,1
            step_cost step-cost-32b-stock 70 32b-fp8 stock --batches 4,1
            ;;
        sync) step_cost step-cost-8b-stock-sync 60 8b stock-sync ;;
        *)
            step_cost "step-cost-$part-ours" 60 "$part" ours
            step_cost "step-cost-$part-stock" 50 "$part" stock
            ;;
        esac
        ;;
    *)
        echo "unknown part: $part" >&2
        failed=1
        ;;
    esac
done
tar -C "$out" -czf "$out/all.tar.gz" --exclude=all.tar.gz . # one file to carry home
exit $failed
