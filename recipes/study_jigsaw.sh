#!/usr/bin/env bash
# Jigsaw-R1's five findings in miniature (docs/jigsaw_study.md): about an hour on one core that nobody else uses.
#
#   bash recipes/study_jigsaw.sh [OUT] [SEED…]            seeds 0 to 4; the same command goes on where it was killed
#   SMOKE=1 bash recipes/study_jigsaw.sh runs/smoke 0     every part with a handful of steps: shows that it runs
#   python bench/study_jigsaw.py --collect runs/study_jigsaw && python bench/study_jigsaw.py
#
# As in the paper there is one base model, and every run starts from it: a seed is a run's order of prompts and its
# samples. A line below is a stage's command line without "python"; recipes/stages.py runs them in turn.
set -euo pipefail
OUT=${1:-runs/study_jigsaw}
SEEDS=("${@:2}")
if [ ${#SEEDS[@]} = 0 ]; then SEEDS=(0 1 2 3 4); fi
HERE=$(cd "$(dirname "$0")/.." && pwd)
FURTHER=3 # seeds of all but the main table
if [ "${SMOKE:-0}" = 1 ]; then
    WORDS=16 SEE=2 SPEAK=2 PUZZLES=8 TESTS=2 RL=4 P=2 G=2
else
    WORDS=1600 SEE=800 SPEAK=500 PUZZLES=320 TESTS=120 RL=40 P=16 G=8
fi
mkdir -p "$OUT"
git -C "$HERE" describe --always --abbrev=12 --exclude='*' --dirty=+ > "$OUT/commit" 2> /dev/null || true

# Pieces are pictures of their own, prompts are short: a model of half a million weights finds them then.
COMMON="--separate --prompts $HERE/recipes/study_words.json --swap 0"
grid() { echo "--rows ${1%x*} --cols ${1#*x}"; }
LOOK='"How does {pair[0]} look, compared with {pair[1]}?"'

# 1. The base: sees at all sizes, guesses at puzzles of all sizes. First words and lists that are true; then the own
# question of puzzles, answered at random, rechecks, slips, and the downstream questions.
data() {
    local number=0 size kind warm_up
    for size in 2x1 3x1 4x1 2x2; do
        number=$((number + 1))
        warm_up="toy/primer.py $COMMON $(grid "$size") --follow 1 --scenes $((WORDS / 8)) --per-picture 8"
        warm_up+=" --count $WORDS --split train"
        echo "$warm_up --reply-format think --levels --look-text $LOOK --seed $((1000 + number)) --out $OUT/words/$size"
        echo "$warm_up --reply-format bare --ask rank --seed $((1200 + number)) --out $OUT/ranks/$size"
        echo "$warm_up --reply-format bare --ask rank inverse --seed $((1300 + number)) --out $OUT/grids/bare-$size"
        echo "$warm_up --reply-format think --ask rank inverse --recheck 0.15 --slip 0.1 --seed $((1400 + number))" \
            "--out $OUT/grids/think-$size"
        for kind in think no-think; do
            echo "jigsaw.py $COMMON $(grid "$size") --question inverse --$kind --scenes $TESTS --count $TESTS" \
                "--split test --seed $((2000 + number)) --workers 1 --out $OUT/test/$kind-$size"
        done
    done
    echo "toy/downstream.py --count $((3 * WORDS)) --split train --seed 1 --out $OUT/downstream"
    echo "toy/downstream.py --count $((2 * TESTS)) --split test --seed 2 --out $OUT/test/downstream"
    echo "bench/study_jigsaw.py --contrary $TESTS --out $OUT/contrary"
    for kind in think no-think; do
        echo "jigsaw.py $COMMON --images $OUT/contrary --split all --count $TESTS --question inverse --$kind" \
            "--seed 3 --workers 1 --out $OUT/test/$kind-contrary"
    done
}
base() {
    local sft="dpo.py --loss sft --batch 16 --lr 2e-3 --warmup 20 --schedule linear --save-every 0 --micro-tokens 6000"
    sft+=" --overwrite"
    echo "toy/tiny_model.py $OUT/random"
    echo "$sft --model $OUT/random --data" "$OUT"/{words,ranks}/{2x1,2x2,3x1,4x1}/primer.jsonl \
        "--steps $SEE --out $OUT/seeing"
    echo "$sft --model $OUT/seeing --data" "$OUT"/grids/{bare,think}-{2x1,2x2,3x1,4x1}/primer.jsonl \
        "$OUT/downstream/records.jsonl --steps $SPEAK --out $OUT/base"
    evaluate base think base-think
    evaluate base no-think base-no-think
}

# evaluate NAME KIND [RESULT]: at temperature 1, as in training; the greedy reply of a base that guesses is one guess
evaluate() {
    echo "eval.py --model $OUT/$1 --data" "$OUT"/test/"$2"-{2x1,3x1,4x1,2x2,contrary}/records.jsonl \
        "$OUT/test/downstream/records.jsonl --temperature 1 --seed 1 --max-new-tokens 64" \
        "--keep-replies $TESTS --overwrite --out $OUT/results/${3:-$1}.json"
}
rl() { # rl FROM TO KIND SIZE SEED
    echo "jigsaw.py $COMMON $(grid "$4") --question inverse --$3 --scenes $PUZZLES --count $PUZZLES --split train" \
        "--seed $((3000 + $5)) --workers 1 --out $OUT/puzzles/$3-$4-$5"
    echo "grpo.py --model $OUT/$1 --data $OUT/puzzles/$3-$4-$5/records.jsonl --steps $RL --prompts $P --group $G" \
        "--lr 2e-4 --kl 0.04 --clip-high 0.28 --normalizer token --max-new-tokens 64 --save-every 0 --seed $5" \
        "--overwrite --out $OUT/$2"
    evaluate "$2" "$3"
}
sft() { # sft TO KIND DATA SEED: as many prompts and updates as an RL run
    echo "dpo.py --loss sft --model $OUT/base --data $3 --steps $RL --batch $P --lr 2e-4 --save-every 0 --seed $4" \
        "--overwrite --out $OUT/$1"
    evaluate "$1" "$2"
}

{
    data
    base
    # 2. The main table: RL on 2x1, with reasoning and without, every seed.
    for seed in "${SEEDS[@]}"; do
        rl base "no-think-2x1-$seed" no-think 2x1 "$seed"
        rl base "think-2x1-$seed" think 2x1 "$seed"
    done
    # 3. Fewer seeds: SFT on the same puzzles, by the answers without reasoning, by right replies of the base with it,
    # and RL from there; RL on other sizes.
    for seed in "${SEEDS[@]:0:FURTHER}"; do
        echo "bench/study_jigsaw.py --answers $OUT/puzzles/no-think-2x1-$seed/records.jsonl" \
            "--out $OUT/answers/$seed.jsonl"
        sft "sft-no-think-$seed" no-think "$OUT/answers/$seed.jsonl" "$seed"
        rl "sft-no-think-$seed" "sft-rl-no-think-$seed" no-think 2x1 "$seed"
    done
    for seed in "${SEEDS[@]:0:FURTHER}"; do rl base "no-think-3x1-$seed" no-think 3x1 "$seed"; done
    for seed in "${SEEDS[@]:0:FURTHER}"; do
        right=$OUT/right/$seed.jsonl
        if [ "${SMOKE:-0}" = 1 ]; then
            right=$OUT/grids/think-2x1/primer.jsonl # a base of a few updates says nothing right
        else
            echo "distill.py --policy $OUT/base --data $OUT/puzzles/think-2x1-$seed/records.jsonl --samples 8" \
                "--max-new-tokens 64 --judge none --reject-from chosen --seed $seed --overwrite --out $right"
        fi
        sft "sft-think-$seed" think "$right" "$seed"
        rl "sft-think-$seed" "sft-rl-think-$seed" think 2x1 "$seed"
    done
    for seed in "${SEEDS[@]:0:FURTHER}"; do
        rl base "no-think-2x2-$seed" no-think 2x2 "$seed"
        rl base "think-3x1-$seed" think 3x1 "$seed"
    done
} | python "$HERE/recipes/stages.py"
