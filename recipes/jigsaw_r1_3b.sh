#!/usr/bin/env bash
# Jigsaw-R1 (arXiv 2505.23590) with Qwen2.5-VL-3B on eight GPUs of 80 GB: 2x1 puzzles, with and without thinking.
# NOT RUN BY US: the settings are the paper's, the memory is counted (recipes/plan.py), the result is unknown.
#
#   bash recipes/jigsaw_r1_3b.sh COCO OUT        # COCO holds train2014/ and test2014/
#   python recipes/plan.py --recipe recipes/jigsaw_r1_3b.sh COCO OUT        # does every stage fit?
#
# What to expect, by the paper's table (2x1, accuracy in percent): without thinking 52.2 before, 98.8 after; with
# thinking 48.5 before, 96.8 after. On its eight MI250X a step took 52 s and 298 s, so 29 and 83 hours.
set -euo pipefail
COCO=$1 OUT=$2
GPUS=${GPUS:-8}
HERE=$(cd "$(dirname "$0")/.." && pwd)
BASE=Qwen/Qwen2.5-VL-3B-Instruct

# 1. Puzzles: 64,000 from the training images, and 1,000 of each size from images that no run has seen. Lazy: they are
# made when they are needed, so that no 32 GB of pictures are written.
puzzles() { # puzzles IMAGES COUNT SIZE OUT flags…
    python "$HERE/jigsaw.py" --images "$1" --count "$2" --rows "${3%x*}" --cols "${3#*x}" --question pair --split all \
        --lazy --out "$4" "${@:5}"
}
for kind in think no-think; do
    puzzles "$COCO/train2014" 64000 2x1 "$OUT/data/$kind" "--$kind" --seed 0
    for size in 2x1 3x1 4x1 2x2; do
        puzzles "$COCO/test2014" 1000 "$size" "$OUT/test/$kind-$size" "--$kind" --seed 1
    done
done

# 2. RL. The paper's: 64 prompts x 8 replies, one update a step, KL 0.04, learning rate 1e-6 falling to 0, temperature 1,
# top-k 50, clip 0.2, sequence mean, std-scaled advantages, format weight 0.5, gradient norm 1, vision tower trained; what
# is not written here is the default of grpo.py. 2,000 steps without thinking (each puzzle comes twice), 1,000 with it.
rl() { # rl KIND STEPS TOKENS
    torchrun --standalone --nproc_per_node="$GPUS" "$HERE/grpo.py" --model "$BASE" --data "$OUT/data/$1/records.jsonl" \
        --out "$OUT/$1" --steps "$2" --prompts 64 --group 8 --lr 1e-6 --schedule linear --kl 0.04 --top-k 50 \
        --max-new-tokens "$3" --save-every 50 --resume
}
rl no-think 2000 64 # ours: the paper allows 512 here too, an answer without thinking has three tokens
rl think 1000 512

# 3. Evaluation: greedy, at most 512 new tokens.
for kind in think no-think; do
    for model in "$BASE" "$OUT/$kind"; do
        torchrun --standalone --nproc_per_node="$GPUS" "$HERE/eval.py" --model "$model" --max-new-tokens 512 \
            --data "$OUT"/test/"$kind"-{2x1,3x1,4x1,2x2}/records.jsonl --resume \
            --out "$OUT/results/$kind-$(basename "$model").json"
    done
done
