#!/usr/bin/env bash
# The same commands on real photographs: scikit-image's own, nothing is downloaded.
#
#   bash recipes/photos.sh OUT [SEED]            every stage; some minutes on two cores
#   QUICK=1 bash recipes/photos.sh OUT [SEED]    a handful of steps a stage: shows that everything runs
#   HIDDEN=128 LAYERS=6 bash recipes/photos.sh   a larger tiny model
#
# Scenes show learning, photographs show that nothing depends on scenes: five subjects are far too few to learn from,
# and "lighter was above", the rule of the scenes, holds for some of them and fails for others (step 1 prints how often).
set -euo pipefail
OUT=${1:-runs/photos}
SEED=${2:-0}
HERE=$(cd "$(dirname "$0")/.." && pwd)
if [ "${QUICK:-0}" = 1 ]; then
    # The formats are kept more often: a few steps on noise would leave a base without one well-formed reply to reward.
    NOISE=(--reply-format think --follow 0.8)
    CROPS=24 WORDS=400 SCENE_STEPS=60 WORD_STEPS=15 FORMATS=400 FORMAT_STEPS=15 ZERO=4 PAIRS=40 COLD=3 RL=4 TESTS=16 P=8
else
    NOISE=(--follow 0.4)
    CROPS=300 WORDS=3600 SCENE_STEPS=300 WORD_STEPS=300 FORMATS=7200 FORMAT_STEPS=250 ZERO=40 PAIRS=900 COLD=25 RL=200 TESTS=300 P=32
fi
mkdir -p "$OUT"
# What bench/readme.py shows beside the numbers: the commit, with a + if files have changed since.
git -C "$HERE" describe --always --abbrev=12 --exclude='*' --dirty=+ > "$OUT/commit" 2> /dev/null || true
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
# from_photos SCRIPT FOLDER OUT COUNT SEED flags…: the folder is one side of the split already, so all of it is used
from_photos() {
    python "$HERE/$1" --images "$2" --max-side 112 --split all --rows 2 --cols 1 --swap 0 \
        --out "$3" --count "$4" --seed "$5" "${@:6}"
}

step "1 photographs: whole subjects are held out"
python "$HERE/recipes/photos.py" --out "$OUT/photos" --crops "$CROPS" --seed "$SEED"

step "2 puzzles; for the tests each subject is a source of its own, seen-… or held-out-…"
from_photos jigsaw.py "$OUT/photos/train" "$OUT/puzzles" $((3 * CROPS)) "$SEED"
SETS=()
for folder in "$OUT"/photos/{train,test}/*/; do
    case $folder in */train/*) name=seen ;; *) name=held-out ;; esac
    name=$name-$(basename "$folder")
    from_photos jigsaw.py "$folder" "$OUT/test/$name" "$TESTS" $((SEED + 3000 + ${#SETS[@]}))  # each with orders of its own
    sed -i.bak "s/\"source\": \"[^\"]*\"/\"source\": \"$name\"/" "$OUT/test/$name/records.jsonl"
    rm "$OUT/test/$name/records.jsonl.bak"
    SETS+=("$OUT/test/$name/records.jsonl")
done

step "3 a base model: random weights, true words about scenes, then about photographs, then formats kept now and then"
# Scenes first: on photographs alone, whose halves are often about equally light, 300 steps of SFT end in well-formed
# replies whose words are true half the time, so that there is nothing for RL to go by.
python "$HERE/toy/primer.py" --reply-format think --follow 1 --scenes $((WORDS / 4)) --count "$WORDS" \
    --rows 2 --cols 1 --swap 0 --split train --seed $((SEED + 1000)) --out "$OUT/scenes"
from_photos toy/primer.py "$OUT/photos/train" "$OUT/words" "$WORDS" $((SEED + 1000)) --reply-format think --follow 1
from_photos toy/primer.py "$OUT/photos/train" "$OUT/formats" "$FORMATS" $((SEED + 2000)) "${NOISE[@]}"
python "$HERE/toy/tiny_model.py" "$OUT/random" --hidden "${HIDDEN:-64}" --layers "${LAYERS:-4}" --seed "$SEED"
sft() { # sft FROM DATA TO STEPS flags…
    python "$HERE/dpo.py" --loss sft --model "$OUT/$1" --data "$OUT/$2/primer.jsonl" --out "$OUT/$3" --batch 32 \
        --steps "$4" --save-every 0 --seed "$SEED" --overwrite "${@:5}"
}
sft random scenes scenes/model "$SCENE_STEPS" --lr 2e-3 --warmup 20 --schedule constant
sft scenes/model words words/model "$WORD_STEPS" --lr 1e-3 --warmup 20 --schedule linear
sft words/model formats base "$FORMAT_STEPS" --lr 1e-3 --warmup 20 --schedule linear
evaluate() { # evaluate NAME RESULT flags…
    python "$HERE/eval.py" --model "$OUT/$1" --out "$OUT/results/$2.json" --data "${SETS[@]}" --max-new-tokens 40 \
        --seed 1 --overwrite "${@:3}"
}
evaluate base base --temperature 1

step "4 GRPO-zero"
grpo() { # grpo FROM TO STEPS
    python "$HERE/grpo.py" --model "$OUT/$1" --data "$OUT/puzzles/records.jsonl" --out "$OUT/$2" --steps "$3" \
        --prompts "$P" --group 8 --lr 2e-4 --kl 0.04 --clip-high 0.28 --normalizer token --max-new-tokens 40 \
        --save-every 0 --seed "$SEED" --overwrite
}
grpo base zero "$ZERO"

step "5 self-distillation"
python "$HERE/distill.py" --policy "$OUT/zero" --base "$OUT/base" --data "$OUT/puzzles/records.jsonl" \
    --limit "$PAIRS" --samples 8 --max-new-tokens 40 --out "$OUT/pairs.jsonl" --seed "$SEED" --overwrite

step "6 cold start from the base: DPO + SFT"
python "$HERE/dpo.py" --model "$OUT/base" --data "$OUT/pairs.jsonl" --loss dpo+sft --out "$OUT/cold" \
    --batch 32 --lr 2e-4 --steps "$COLD" --seed "$SEED" --overwrite

step "7 GRPO"
grpo cold rl "$RL"
evaluate rl rl --temperature 1
[ "${QUICK:-0}" = 1 ] || evaluate rl rl-greedy

step "8 report"
RESULTS=("$OUT/results/base.json" "$OUT/results/rl.json")
[ "${QUICK:-0}" = 1 ] || RESULTS+=("$OUT/results/rl-greedy.json")
python "$HERE/eval.py" --report "$OUT/report.html" --table "$OUT/table.md" \
    --runs "$OUT"/{base,zero,cold,rl} --results "${RESULTS[@]}"
step "done: $OUT/report.html"
