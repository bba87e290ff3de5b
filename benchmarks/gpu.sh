#!/usr/bin/env bash
# Everything that has to be seen on a GPU, in one go. vLLM for CUDA must be importable.
#
#   benchmarks/gpu.sh OUT [PART...]          on a GPU; without PARTs all of them, as far as the time goes
#   benchmarks/gpu.sh --cpu OUT [PART...]    the same programs, tiny, on a machine without a GPU: do they run?
#
# PARTs: about, graphs, 8b, exactness, demo, kernels, sync, long, sizes, waits, 1b; piecewise only if it is asked for.
# Each has a time limit, and leaves a log and JSON files in OUT, which is packed into OUT/all.tar.gz after every part.
# The end of the log is printed, and its first error. If a part fails the others still run, and the status is 1.
# PYTHON: the interpreter. SECONDS_LEFT: for everything (530).
set -uo pipefail

cpu= patience=1
if [ "${1:-}" = --cpu ]; then cpu=--cpu patience=5; shift; fi
if [ $# -lt 1 ]; then sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1" && out=$(cd "$1" && pwd) && shift || exit 2
parts=${*:-about graphs 8b exactness demo kernels sync long sizes waits 1b}
python=${PYTHON:-python3}
failed=0

cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export VLLM_USE_FLASHINFER_SAMPLER=0 VLLM_LOGGING_LEVEL=${VLLM_LOGGING_LEVEL:-INFO}
# engines find the plugin by its metadata
if ! "$python" -c 'from importlib.metadata import entry_points as e; exit(not e(group="vllm_lookahead.proposers"))'; then
    "$python" -m pip install -q --no-deps --no-index --no-build-isolation --target "$out/site" "$root" >&2
    export PYTHONPATH="$PYTHONPATH:$out/site"
fi

# limited NAME SECONDS COMMAND...
limited() {
    local name=$1 limit=$(($2 * patience)) left=$((${SECONDS_LEFT:-530} - SECONDS)) begin=$SECONDS status
    shift 2
    [ "$left" -gt "$limit" ] || limit=$left
    [ "$limit" -ge 5 ] || { echo "== $name: no time left" | tee -a "$out/status"; failed=1; return; }
    timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 < /dev/null
    status=$?
    echo "== $name: status $status after $((SECONDS - begin)) s (limit $limit)" | tee -a "$out/status"
    tail -n 80 "$out/$name.log"
    [ $status = 0 ] || { failed=1; echo "-- first error:"; grep -vE ' (INFO|WARNING) ' "$out/$name.log" | grep -m 1 -E 'Error|Exception'; }
    tar -C "$out" -czf "$out/all.tar.gz" --exclude=all.tar.gz --exclude=site .
}

# step_cost NAME SHAPE CONTEXT BATCHES [ENGINE_SETTINGS]
step_cost() {
    "$python" benchmarks/gpu.py shape "$2" "$out/$2"
    local options=(--nodes 0,8,16,32,64,128 --batch "$4" --steps 16 --rounds 3)
    local engine='"load_format": "dummy", "skip_tokenizer_init": true, "max_num_seqs": 16'
    if [ -n "$cpu" ]; then
        options=(--nodes 0,4 --batch 1,2 --steps 4 --rounds 1 --dtype float32 --eager)
        engine+=', "kv_cache_memory_bytes": 67108864'
    else
        engine+=', "gpu_memory_utilization": 0.42, "max_model_len": 12288'
    fi
    limited "$1" 240 "$python" -m vllm_lookahead.cli bench step-cost --model "$out/$2" --context "$3" --profile \
        --no-stock-chain "${options[@]}" --engine "{$engine${5:+, $5}}" --logs "$out/$1" --out "$out/$1.json"
}

big=8b small=1b context=1024
[ -z "$cpu" ] || big=tiny small=tiny context=64
for part in $parts; do
    case $part in
    about)
        "$python" benchmarks/gpu.py shape tiny "$out/tiny"
        for method in stock prompt_lookup; do
            limited "about-$method" 60 "$python" benchmarks/gpu.py about $cpu "$method" "$out/tiny"
        done
        ;;
    graphs) # captured once, replayed for other trees
        "$python" benchmarks/gpu.py shape tiny "$out/tiny"
        if [ -n "$cpu" ]; then
            PYTHONPATH="$root/tests/interpreter:$PYTHONPATH" TRITON_INTERPRET=1 \
                limited graphs 90 "$python" benchmarks/gpu.py graphs --cpu "$out/tiny"
        else
            limited graphs 90 "$python" benchmarks/gpu.py graphs "$out/tiny"
        fi
        ;;
    8b) step_cost 8b $big $context 1,4,16 ;;
    1b) step_cost 1b $small $context 1,4,16 ;;
    long) step_cost long $big $((8 * context)) 1,4 ;; # 16 don't fit
    sync) step_cost sync $big $context 1,4,16 '"async_scheduling": false' ;;
    piecewise) step_cost piecewise $big $context 1,4,16 '"compilation_config": {"cudagraph_mode": "PIECEWISE"}' ;;
    sizes)
        "$python" benchmarks/gpu.py shape $big "$out/$big"
        for method in stock prompt_lookup; do
            limited "sizes-$method" 60 "$python" benchmarks/gpu.py sizes $cpu "$method" "$out/$big"
        done
        ;;
    waits) # where the host waits for the device: vLLM has torch warn of each
        export VLLM_GPU_SYNC_CHECK=warn
        limited waits 60 "$python" benchmarks/gpu.py outputs $cpu prompt_lookup "$out/outputs-waits.json"
        unset VLLM_GPU_SYNC_CHECK
        grep -A 1 -i 'synchroniz' "$out/waits.log" | sort | uniq -c | sort -rn | head -n 20
        ;;
    exactness)
        for method in stock prompt_lookup lookahead; do
            limited "outputs-$method" 90 "$python" benchmarks/gpu.py outputs $cpu "$method" "$out/outputs-$method.json"
        done
        for method in prompt_lookup lookahead; do
            limited "exactness-$method" 20 "$python" benchmarks/gpu.py compare "$out"/outputs-{stock,$method}.json
        done
        ;;
    demo)
        options=(--batch 1,8 --rounds 2 --max-tokens 128 --dtype bfloat16)
        engine='{"gpu_memory_utilization": 0.2, "max_num_seqs": 16, "max_model_len": 1024}'
        [ -z "$cpu" ] || { options=(--batch 1 --rounds 1 --num-prompts 1 --max-tokens 12 --dtype float32 --eager); engine={}; }
        limited demo 150 "$python" -m vllm_lookahead.cli bench run -m stock,prompt_lookup,lookahead "${options[@]}" \
            --engine "$engine" --logs "$out/demo" --out "$out/demo.json"
        ;;
    kernels)
        mapfile -t tests < <(ls tests/unit/test_{triton_tree,step_kernels}.py 2> /dev/null)
        TRITON_INTERPRET=${cpu:+1} limited kernels 120 "$python" -m pytest -q --noconftest -o addopts= "${tests[@]}"
        ;;
    *) echo "unknown part: $part" >&2; failed=1 ;;
    esac
done
exit $failed
