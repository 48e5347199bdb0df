#!/usr/bin/env bash
# Jigsaw-R1's non-thinking run on one node of eight GPUs, 3B or 7B: does it fit, then the run. Not run by us yet.
#
#   bash recipes/one_node.sh SIZE MODEL RECORDS OUT [grpo.py flags…]
#   bash recipes/one_node.sh 3B Qwen/Qwen2.5-VL-3B-Instruct data/2x1/records.jsonl runs/jigsaw-3b
#   bash recipes/one_node.sh 7B Qwen/Qwen2.5-VL-7B-Instruct data/2x1/records.jsonl runs/jigsaw-7b --sampler vllm
#   PLAN=1 bash recipes/one_node.sh 7B - - -         only whether it fits
#
# SIZE says how large MODEL is, for the plan. The same command after a crash or Ctrl-C goes on where it was. GPUS=4 for a
# smaller node, GPU_GIB=40 for smaller GPUs: a run that does not fit is not started.
set -euo pipefail
SIZE=$1 MODEL=$2 RECORDS=$3 OUT=$4
GPUS=${GPUS:-8}
HERE=$(cd "$(dirname "$0")/.." && pwd)
# The paper's settings, but for the length: it allows 512 tokens, an answer without thinking has three.
RUN=(torchrun --standalone --nproc_per_node="$GPUS" "$HERE/grpo.py" --model "$MODEL" --data "$RECORDS" --out "$OUT"
    --prompts 64 --group 8 --steps 2000 --lr 1e-6 --schedule linear --kl 0.04 --top-k 50 --max-new-tokens 64
    --save-every 50 --resume "${@:5}")
python "$HERE/recipes/plan.py" --command "${RUN[*]}" --as "$MODEL" "$SIZE" --gpu-gib "${GPU_GIB:-80}"
if [ "${PLAN:-0}" = 1 ]; then exit; fi
exec "${RUN[@]}"
