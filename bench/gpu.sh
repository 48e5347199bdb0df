#!/usr/bin/env bash
# The whole benchmark of one GPU in one command, in under nine minutes: is it right, then how fast, then tables.
#
#     bash bench/gpu.sh [OUT] [--smoke]        # OUT: where gpu.json and gpu-profile.txt go, default bench/results
#
# Each stage of gpu.py is a process of its own with a time limit of its own, and writes each number when it has it: a
# stage that crashes or runs out of time costs its own remaining rows and nothing else. --smoke: tiny shapes, any
# machine. PYTHON: the interpreter, default python3. ONLY: stages to run, default all.
set -u
out=bench/results
case "${1:---}" in --*) ;; *) out=$1 && shift ;; esac
python=${PYTHON:-python3}
here=$(cd "$(dirname "$0")/.." && pwd)
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

nvidia-smi || echo "no nvidia-smi here"
# from a cold disk, once, before any clock runs
"$python" -c "import safetensors, torch, tqdm, transformers; print(torch.__version__, torch.version.cuda)" \
    || timeout 60 "$python" -m pip install -q -r "$here/requirements.txt"

patience=1 ended=""
case " $* " in *" --smoke "*) patience=10 ;; esac # a smoke test may run on a busy machine
limit=$((515 * patience))
for stage in attention:40 check:65 learn:165 sample:80 step:90 trl:65; do
    seconds=$((${stage#*:} * patience)) stage=${stage%:*} left=$((limit - SECONDS))
    case " ${ONLY:-$stage} " in *" $stage "*) ;; *) continue ;; esac
    seconds=$((seconds < left ? seconds : left))
    if [ "$seconds" -lt 30 ]; then
        echo "== $stage: no time left"
        continue
    fi
    echo "== $stage: at most $seconds s"
    timeout -k 5 "$seconds" "$python" "$here/bench/gpu.py" "$stage" \
        --out "$out" --work "$work" --seconds "$((seconds - 18))" "$@"
    ended="$ended $stage=$?"
done
echo "== status of each stage (0: done, 124: out of time):$ended; $SECONDS s in all"
"$python" "$here/bench/gpu.py" show --out "$out"
case "$ended " in *=[1-9]*) exit 1 ;; esac
