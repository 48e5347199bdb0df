#!/usr/bin/env bash
# Jigsaw-R1's five findings in miniature (docs/jigsaw_study.md): one to two hours on one core.
#
#   bash recipes/study_jigsaw.sh [OUT] [SEED…]            seeds 0 to 4; the same command goes on where it was killed
#   SMOKE=1 bash recipes/study_jigsaw.sh /tmp/smoke 0     every part with a handful of steps: shows that it runs
#   python bench/study_jigsaw.py --collect runs/study_jigsaw && python bench/study_jigsaw.py
#
# As in the paper there is one base model, and every run starts from it: a seed is a run's order of prompts and its
# samples. A line below is a stage's command line without "python"; recipes/stages.py runs them in turn.
set -euo pipefail
OUT=${1:-runs/study_jigsaw}
SEEDS=("${@:2}")
if [ ${#SEEDS[@]} = 0 ]; then SEEDS=(0 1 2 3 4); fi
HERE=$(cd "$(dirname "$0")/.." && pwd)
SIZES=(2x1 3x1 4x1 2x2)
FURTHER=3 # seeds of all but the main table
if [ "${SMOKE:-0}" = 1 ]; then
    WORDS=48 SEE=3 SPEAK=3 PUZZLES=16 TESTS=8 RL=2 SFT=2 P=4 G=2
else
    WORDS=1600 SEE=800 SPEAK=700 PUZZLES=800 TESTS=150 RL=150 SFT=75 P=16 G=8
fi
mkdir -p "$OUT"
git -C "$HERE" describe --always --abbrev=12 --exclude='*' --dirty=+ > "$OUT/commit" 2> /dev/null || true
stages() { python "$HERE/recipes/stages.py"; }

# Pieces are pictures of their own, prompts are short: a model of half a million weights finds them then.
COMMON="--separate --prompts $HERE/recipes/study_words.json --swap 0"
grid() { echo "--rows ${1%x*} --cols ${1#*x}"; }
LOOK='"How does {pair[0]} look, compared with {pair[1]}?"'

# 1. The base: sees at all sizes, guesses at puzzles of all sizes. First words that are true; then rechecks, slips, the
# bare grid, and the downstream questions.
number=0
for size in "${SIZES[@]}"; do
    number=$((number + 1))
    warm_up="toy/primer.py $COMMON $(grid "$size") --follow 1 --scenes $((WORDS / 8)) --per-picture 8 --count $WORDS --split train"
    echo "$warm_up --reply-format think --levels --look-text $LOOK --seed $((1000 + number)) --out $OUT/words/$size"
    echo "$warm_up --reply-format think --levels --look-text $LOOK --recheck 0.15 --slip 0.1 --seed $((1100 + number)) --out $OUT/noisy/$size"
    echo "$warm_up --reply-format bare --ask rank --seed $((1200 + number)) --out $OUT/ranks/$size"
    echo "$warm_up --reply-format bare --ask rank inverse --seed $((1300 + number)) --out $OUT/grids/$size"
    for kind in "pair --think" "inverse --no-think"; do
        echo "jigsaw.py $COMMON $(grid "$size") --question $kind --scenes $TESTS --count $TESTS --split test --seed $((2000 + number)) --workers 1 --out $OUT/test/${kind%% *}-$size"
    done
done | stages

{
    echo "toy/downstream.py --count $((3 * WORDS)) --split train --seed 1 --out $OUT/downstream"
    echo "toy/downstream.py --count $((2 * TESTS)) --split test --seed 2 --out $OUT/test/downstream"
    echo "bench/study_jigsaw.py --contrary $TESTS --out $OUT/contrary"
    echo "jigsaw.py $COMMON --images $OUT/contrary --split all --count $TESTS --seed 3 --workers 1 --out $OUT/test/contrary"
    echo "toy/tiny_model.py $OUT/random"
    sft="dpo.py --loss sft --batch 16 --lr 2e-3 --warmup 20 --schedule linear --save-every 0 --micro-tokens 6000 --overwrite"
    echo "$sft --model $OUT/random --data" "$OUT"/{words,ranks}/*/primer.jsonl "--steps $SEE --out $OUT/seeing"
    echo "$sft --model $OUT/seeing --data" "$OUT"/{noisy,grids}/*/primer.jsonl "$OUT/downstream/records.jsonl" \
        "--steps $SPEAK --out $OUT/base"
} | stages

evaluate() { # evaluate NAME QUESTION: as in training, at temperature 1: the greedy reply of a base that guesses is one guess
    echo "eval.py --model $OUT/$1 --data" "$OUT"/test/"$2"-{2x1,3x1,4x1,2x2}/records.jsonl "$OUT/test/downstream/records.jsonl" \
        $([ "$2" = inverse ] || echo "$OUT/test/contrary/records.jsonl") "--samples 2 --temperature 1 --seed 1" \
        "--max-new-tokens 64 --keep-replies $TESTS --overwrite --out $OUT/results/$1-$2.json"
}
puzzles() { # puzzles QUESTION SIZE SEED
    echo "jigsaw.py $COMMON $(grid "$2") --question $1 $([ "$1" = inverse ] && echo --no-think) --scenes $PUZZLES --count $PUZZLES" \
        "--split train --seed $((3000 + $3)) --workers 1 --out $OUT/puzzles/$1-$2-$3"
}
rl() { # rl FROM TO QUESTION SIZE SEED
    echo "grpo.py --model $OUT/$1 --data $OUT/puzzles/$3-$4-$5/records.jsonl --steps $RL --prompts $P --group $G --lr 3e-4" \
        "--kl 0.01 --clip-high 0.28 --normalizer token --max-new-tokens 64 --save-every 0 --seed $5 --overwrite --out $OUT/$2"
    evaluate "$2" "$3"
}
sft() { # sft FROM TO DATA SEED: as many prompts as an RL run sees
    echo "dpo.py --loss sft --model $OUT/$1 --data $3 --steps $SFT --batch $((P * RL / SFT)) --lr 3e-4 --schedule linear" \
        "--save-every 0 --seed $4 --overwrite --out $OUT/$2"
}

# 2. The base, and the main table: RL on 2x1, with reasoning (pair) and without (inverse), every seed.
{ evaluate base pair; evaluate base inverse; } | stages
for seed in "${SEEDS[@]}"; do
    puzzles pair 2x1 "$seed"
    rl base "pair-2x1-$seed" pair 2x1 "$seed"
    puzzles inverse 2x1 "$seed"
    rl base "inverse-2x1-$seed" inverse 2x1 "$seed"
done | stages

# 3. Fewer seeds: SFT on the same puzzles, on right replies of the base (pair) or on the answers (inverse); RL from there;
# RL on other sizes.
for seed in "${SEEDS[@]:0:FURTHER}"; do
    echo "distill.py --policy $OUT/base --data $OUT/puzzles/pair-2x1-$seed/records.jsonl --samples 8 --max-new-tokens 64" \
        "--judge none --reject-from chosen --seed $seed --overwrite --out $OUT/right/$seed.jsonl"
    sft base "sft-pair-$seed" "$OUT/right/$seed.jsonl" "$seed"
    evaluate "sft-pair-$seed" pair
    rl "sft-pair-$seed" "sft-rl-pair-$seed" pair 2x1 "$seed"
    echo "bench/study_jigsaw.py --answers $OUT/puzzles/inverse-2x1-$seed/records.jsonl --out $OUT/answers/$seed.jsonl"
    sft base "sft-inverse-$seed" "$OUT/answers/$seed.jsonl" "$seed"
    evaluate "sft-inverse-$seed" inverse
    rl "sft-inverse-$seed" "sft-rl-inverse-$seed" inverse 2x1 "$seed"
    for size in 3x1 4x1; do
        puzzles pair "$size" "$seed"
        rl base "pair-$size-$seed" pair "$size" "$seed"
    done
done | stages
