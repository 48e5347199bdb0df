#!/usr/bin/env bash
# A tiny Qwen2.5-VL that can speak, from nothing: random weights, then warm-up SFT in two parts. About 2 minutes on two
# cores.
#
#   words    the think format only, always kept: visual words that are true, options that are read right
#   formats  six reply formats asked for, kept 40 % of the time
#
# In both, answers to plain visual questions are right and answers to puzzles are sampled at random. What comes out is to
# RL what a real base model is: it sees, it can write every format but does not keep to it, and it does not know the task.
set -euo pipefail
OUT=${1:-runs/embedded}
SEED=${2:-0}
HERE=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUT"
# What bench/readme.py shows beside the numbers: the commit, with a + if files have changed since.
git -C "$HERE" describe --always --abbrev=12 --exclude='*' --dirty=+ > "$OUT/commit" 2> /dev/null || true
COMMON=(--rows 2 --cols 1 --swap 0 --split train)

python "$HERE/jigsaw.py" --scenes 2000 --count 2000 "${COMMON[@]}" --seed "$SEED" --out "$OUT/puzzles"
python "$HERE/toy/primer.py" --reply-format think --follow 1 --scenes 1000 --count 4000 "${COMMON[@]}" \
    --seed "$((SEED + 1000))" --out "$OUT/words"
python "$HERE/toy/primer.py" --follow 0.4 --scenes 2000 --count 8000 "${COMMON[@]}" \
    --seed "$((SEED + 2000))" --out "$OUT/formats"

python "$HERE/toy/tiny_model.py" "$OUT/random" --seed "$SEED"
python "$HERE/dpo.py" --loss sft --model "$OUT/random" --data "$OUT/words/primer.jsonl" --out "$OUT/words/model" \
    --batch 32 --steps 300 --lr 2e-3 --warmup 20 --schedule constant --save-every 0 --seed "$SEED" --overwrite
python "$HERE/dpo.py" --loss sft --model "$OUT/words/model" --data "$OUT/formats/primer.jsonl" --out "$OUT/base" \
    --batch 32 --steps 250 --lr 1e-3 --warmup 20 --schedule linear --save-every 0 --seed "$SEED" --overwrite
