#!/usr/bin/env bash
# A tiny base model for SPECS in miniature: it can follow a reply format that its prompt shows, and often does not.
# Prints command lines for recipes/stages.py; about five minutes on one core.
#
#   bash recipes/specs_base.sh OUT SEED | python recipes/stages.py        # the model: OUT/base
#
#   drill    copy lines of made-up words and signs: a model of four layers learns to copy from this, and from little else
#   words    how do two pieces look, which option says so; where one was is guessed. No format is asked for
#   follow   the same, and every prompt shows a reply format of its own, which every reply has
#   half     half of the replies have the format asked for, the others one plain form: that is the base
set -euo pipefail
OUT=$1 SEED=${2:-0}
PART=${PART:-1} # of the updates: a smoke test takes a small part of them
updates() { awk "BEGIN { n = $1 * $PART; n += n > int(n); print n < 2 ? 2 : int(n) }"; } # rounded up, and two at least
sft() { # sft FROM OUT UPDATES RATE SCHEDULE data…
    echo dpo.py --loss sft --model "$1" --out "$2" --data "${@:6}" --batch 32 --steps "$(updates "$3")" --lr "$4" \
        --schedule "$5" --warmup 20 --save-every 0 --seed "$SEED" --overwrite
}
echo toy/tiny_model.py "$OUT/random" --corpus formats --seed "$SEED"
echo toy/formats.py drill --count 16000 --seed "$((SEED + 1000))" --out "$OUT/drill"
echo toy/formats.py words --count 8000 --scenes 1000 --per-picture 8 --seed "$((SEED + 2000))" --out "$OUT/words"
echo toy/formats.py replies --count 8000 --scenes 1000 --per-picture 8 --seed "$((SEED + 3000))" --out "$OUT/follow"
echo toy/formats.py replies --follow 0.5 --count 4800 --scenes 600 --per-picture 8 --seed "$((SEED + 4000))" \
    --out "$OUT/half"
sft "$OUT/random" "$OUT/drill/model" 500 2e-3 constant "$OUT/drill/records.jsonl"
sft "$OUT/drill/model" "$OUT/words/model" 150 2e-3 constant "$OUT/words/records.jsonl"
sft "$OUT/words/model" "$OUT/follow/model" 500 2e-3 linear "$OUT/words/records.jsonl" "$OUT/follow/records.jsonl"
sft "$OUT/follow/model" "$OUT/base" 150 5e-4 linear "$OUT/half/records.jsonl"
