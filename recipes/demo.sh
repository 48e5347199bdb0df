#!/usr/bin/env bash
# Both papers' main path in miniature, on a laptop CPU: about 11 minutes on two cores.
#
#   base -> GRPO-zero -> self-distilled pairs -> cold start (DPO+SFT | SFT) -> GRPO, every stage evaluated
#
# The same scripts and flags train a 7B model; only the numbers are small. Every step can be run again on its own.
set -euo pipefail
OUT=${1:-runs/demo}
SEED=${2:-0}
HERE=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$OUT"
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "1 a base model: random weights, then warm-up SFT"
bash "$HERE/recipes/tiny_base.sh" "$OUT" "$SEED"

step "2 held-out puzzles: the trained size, three sizes never trained on, five reply formats never trained on"
for size in 2x1 3x1 4x1 2x2; do
    python "$HERE/jigsaw.py" --scenes 200 --count 200 --rows "${size%x*}" --cols "${size#*x}" --swap 0 --split test \
        --seed "$SEED" --out "$OUT/test/$size"
done
for format in bare tags boxed json line; do
    python "$HERE/jigsaw.py" --scenes 100 --count 100 --rows 2 --cols 1 --swap 0 --split test \
        --reply-format "$format" --seed "$SEED" --out "$OUT/test/$format"
done
evaluate() { # evaluate NAME [baseline]: held-out accuracy and format of one stage, at sampling temperature 1
    python "$HERE/eval.py" --model "$OUT/$1" --out "$OUT/results/$1.json" --temperature 1 --samples 4 --seed 1 \
        --max-new-tokens 40 --overwrite --data "$OUT"/test/{3x1,4x1,2x2}/records.jsonl --id "$OUT/test/2x1/records.jsonl" \
        --ood "$OUT"/test/{bare,tags,boxed,json,line}/records.jsonl ${2:+--baseline "$OUT/results/$2.json"}
}
grpo() { # grpo FROM TO STEPS: rates for half a million weights; the KL (Jigsaw-R1's) keeps it exploring
    python "$HERE/grpo.py" --model "$OUT/$1" --data "$OUT/puzzles/records.jsonl" --out "$OUT/$2" --steps "$3" \
        --prompts 32 --group 8 --lr 2e-4 --kl 0.04 --clip-high 0.28 --normalizer token \
        --max-new-tokens 40 --save-every 100 --seed "$SEED" --overwrite
}
evaluate base

step "3 GRPO-zero: a short run that learns to keep the format"
grpo base zero 40
evaluate zero base

step "4 self-distillation: well-formed replies of GRPO-zero against the base's, corrupted in format"
python "$HERE/distill.py" --policy "$OUT/zero" --base "$OUT/base" --data "$OUT/puzzles/records.jsonl" --limit 1000 \
    --max-new-tokens 40 --out "$OUT/pairs.jsonl" --seed "$SEED" --overwrite

step "5 cold start from the base: DPO + SFT, and plain SFT beside it"
for loss in dpo+sft sft; do
    python "$HERE/dpo.py" --model "$OUT/base" --data "$OUT/pairs.jsonl" --loss "$loss" --out "$OUT/cold-${loss/+/-}" \
        --batch 32 --lr 5e-5 --steps 25 --seed "$SEED" --overwrite
    evaluate "cold-${loss/+/-}" base
done

step "6 GRPO from both cold starts"
for cold in dpo-sft sft; do
    grpo "cold-$cold" "rl-$cold" 300
    evaluate "rl-$cold" base
done

step "7 report"
python "$HERE/eval.py" --report "$OUT/report.html" --table "$OUT/table.md" \
    --runs "$OUT"/{base,zero,cold-dpo-sft,cold-sft,rl-dpo-sft,rl-sft} \
    --results "$OUT"/results/{base,zero,cold-dpo-sft,cold-sft,rl-dpo-sft,rl-sft}.json
step "done: $OUT/report.html"
echo "$SECONDS" > "$OUT/seconds"
