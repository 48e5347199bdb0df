#!/usr/bin/env bash
# The same on two nodes of eight GPUs. Start it on both, with the first node's address and this node's number:
#
#   MASTER=10.0.0.1 NODE=0 bash recipes/two_nodes.sh SIZE MODEL RECORDS OUT [grpo.py flags…]      on the first
#   MASTER=10.0.0.1 NODE=1 bash recipes/two_nodes.sh SIZE MODEL RECORDS OUT [grpo.py flags…]      on the second
#   PLAN=1 NODE=0 bash recipes/two_nodes.sh 7B - - -      only whether it fits
#
# --replicas 2: each node holds a whole copy of the model, sharded over its eight GPUs (HSDP), so weights are gathered
# inside a node and only gradients cross the wire, once per step. OUT must be on a disk that both nodes see. Not run by
# us yet.
set -euo pipefail
SIZE=$1 MODEL=$2 RECORDS=$3 OUT=$4
GPUS=${GPUS:-8}
HERE=$(cd "$(dirname "$0")/.." && pwd)
RUN=(torchrun --nnodes=2 --node_rank="$NODE" --nproc_per_node="$GPUS" --master_addr="${MASTER:-localhost}"
    --master_port="${PORT:-29500}" "$HERE/grpo.py" --model "$MODEL" --data "$RECORDS" --out "$OUT" --replicas 2
    --prompts 128 --group 8 --steps 2000 --lr 1e-6 --schedule linear --kl 0.04 --top-k 50 --max-new-tokens 64
    --save-every 50 --resume "${@:5}")
python "$HERE/recipes/plan.py" --command "${RUN[*]}" --as "$MODEL" "$SIZE" --gpu-gib "${GPU_GIB:-80}"
if [ "${PLAN:-0}" = 1 ]; then exit; fi
exec "${RUN[@]}"
