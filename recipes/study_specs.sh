#!/usr/bin/env bash
# SPECS in miniature, as a study: the whole chain from several seeds, with its ablations. What came out of it is in
# docs/specs_study.md; bench/study_specs.py rebuilds that page from the runs.
#
#   bash recipes/study_specs.sh runs/study_specs 0 1 2 3 4       # seeds; killed at any moment it goes on where it was
#   RUNS=sources bash recipes/study_specs.sh runs/study_specs 0 1 2     # ablation: where the pairs come from
#   RUNS=longer bash recipes/study_specs.sh runs/study_specs 0 1 2      # cold starts of five times as many updates
#   RUNS=further bash recipes/study_specs.sh runs/study_specs 0 1 2     # after sources: GRPO from the other cold starts
#   PART=0.05 BASE=DIR bash recipes/study_specs.sh /tmp/smoke 0  # a twentieth of it, of a base you have: does it all run?
#
# One core is enough, and two seeds at a time are twice as fast on two. All settings were chosen in trials before the first
# of these runs, on seeds 2, 8 and 9 (docs/specs_study.md). recipes/demo.sh takes its functions from here, so the demo's
# flags are the study's.
set -euo pipefail
OUT=${1:-runs/study_specs}
HERE=$(cd "$(dirname "$0")/.." && pwd)
export PART=${PART:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
share() { awk "BEGIN { n = $1 * $PART; n += n > int(n); print n < 2 ? 2 : int(n) }"; } # rounded up, and two at least

puzzles() { # puzzles FORMAT COUNT SPLIT SEED OUT flags…
    local count
    count=$(share "$2")
    echo toy/formats.py questions --format "$1" --count "$count" --scenes "$count" --split "$3" --seed "$4" --out "$5" \
        "${@:6}"
}
grpo() { # grpo FROM OUT STEPS: SPECS' clip and token mean, and no KL
    echo grpo.py --model "$1" --data "$D/puzzles/records.jsonl" --out "$2" --steps "$(share "$3")" --prompts 16 \
        --group 8 --lr 2e-4 --clip-high 0.28 --normalizer token --max-new-tokens 48 --save-every 0 \
        --seed "$SEED" --overwrite
}
pairs() { # pairs OUT flags…: the policy's replies against the base's
    echo distill.py --base "${BASE:-$D/base}" --data "$D/puzzles/records.jsonl" --limit "$(share 640)" --max-new-tokens 48 \
        --seed "$SEED" --overwrite --out "$1" "${@:2}"
}
cold() { # cold PAIRS OUT flags…: the cold start, a checkpoint every sixth update
    echo dpo.py --model "${BASE:-$D/base}" --data "$1" --out "$2" --batch "$(share 64)" --steps 24 --lr 5e-5 --schedule constant \
        --save-every 6 --keep 100 --seed "$SEED" --overwrite "${@:3}"
}
evaluate() { # evaluate OUT flags…: format and accuracy at temperature 1, in the trained format and in four kinds of others
    local others=("$D"/test/{tags,seen,unseen,ask}/records.jsonl)
    echo eval.py --id "$D/test/trained/records.jsonl" --ood "${others[@]}" --temperature 1 --samples 4 \
        --max-new-tokens 48 --seed 1 --overwrite --out "$1" "${@:2}"
}
see() { # see OUT MODEL: does it name the right letter for how a piece looks?
    echo eval.py --data "$D/test/look/records.jsonl" --temperature 1 --samples 4 --max-new-tokens 48 --seed 3 --overwrite \
        --out "$1" --model "$2"
}
explore() { # explore OUT MODEL: pass@k up to 64, entropy, branching factor, in the trained format
    echo eval.py --data "$D/test/trained/records.jsonl" --limit 30 --temperature 1 --samples 64 --exploration \
        --max-new-tokens 48 --seed 2 --overwrite --out "$1" --model "$2"
}

base_and_questions() { # the base, its puzzles, and the questions that nothing is trained on
    if [ -z "${BASE:-}" ]; then bash "$HERE/recipes/specs_base.sh" "$D" "$SEED"; fi
    puzzles trained 1600 train "$((SEED + 5000))" "$D/puzzles"
    puzzles trained 60 test "$((SEED + 1))" "$D/test/trained"
    for format in tags seen unseen; do puzzles "$format" 60 test "$((SEED + 2000))" "$D/test/$format"; done
    puzzles tags 60 test "$((SEED + 3000))" "$D/test/ask" --ask test
    puzzles trained 60 test "$((SEED + 4000))" "$D/test/look" --question look
    # Before anything else: does the model copy words and shapes that it has never seen, and does it see?
    if [ -z "${BASE:-}" ]; then
        evaluate "$D/results/follow.json" --model "$D/follow/model"
        see "$D/results/see-follow.json" "$D/follow/model"
    fi
    see "$D/results/see-base.json" "${BASE:-$D/base}"
}
zero_and_pairs() { # GRPO-zero, and the pairs that it makes; its curve begins with the base
    grpo "${BASE:-$D/base}" "$D/zero" 12
    evaluate "$D/results/zero.json" --checkpoints "$D/zero"
    see "$D/results/see-zero.json" "$D/zero"
    pairs "$D/pairs.jsonl" --policy "$D/zero"
}

chain() {
    # 1. and 2.
    base_and_questions
    zero_and_pairs
    # 3. Cold starts of the base, each with its curve
    cold "$D/pairs.jsonl" "$D/cold/sft" --loss sft
    cold "$D/pairs.jsonl" "$D/cold/dpo" --loss dpo
    cold "$D/pairs.jsonl" "$D/cold/half" --loss dpo+sft --sft-weight 0.5
    cold "$D/pairs.jsonl" "$D/cold/specs" --loss dpo+sft --sft-weight 1
    for name in sft dpo half specs; do evaluate "$D/results/cold-$name.json" --checkpoints "$D/cold/$name"; done
    # 4. GRPO from a cold start, and from none with as many steps as zero, and the cold start, had
    for name in sft specs; do grpo "$D/cold/$name" "$D/rl/$name" 100; done
    grpo "${BASE:-$D/base}" "$D/rl/none" 112
    for name in none sft specs; do evaluate "$D/results/rl-$name.json" --model "$D/rl/$name"; done
    explore "$D/results/explore-base.json" "${BASE:-$D/base}"
    for name in zero cold/sft cold/specs rl/none rl/sft rl/specs; do
        explore "$D/results/explore-${name/\//-}.json" "$D/$name"
    done
}

sources() { # where the pairs come from
    pairs "$D/pairs-base.jsonl" --policy "${BASE:-$D/base}"               # base against base
    pairs "$D/pairs-chosen.jsonl" --policy "$D/zero" --reject-from chosen # the chosen reply itself, corrupted
    pairs "$D/pairs-coupled.jsonl" --policy "$D/zero" --coupled           # the rejected reply may be wrong
    pairs "$D/pairs-unjudged.jsonl" --policy "$D/zero" --judge none       # no judge
    pairs "$D/pairs-teacher.jsonl" --policy "${BASE:-$D/follow/model}"    # another model, which follows always (not BASE)
    for name in base chosen coupled unjudged teacher; do
        cold "$D/pairs-$name.jsonl" "$D/cold/$name" --loss dpo+sft --sft-weight 1
        evaluate "$D/results/cold-$name.json" --checkpoints "$D/cold/$name"
    done
}

longer() { # five times as many updates: does a model come to know the trained format by heart, and lose the others?
    for name in sft dpo specs; do
        cold "$D/pairs.jsonl" "$D/cold/longer-$name" --loss "${name/specs/dpo+sft}" --steps "$(share 120)" --save-every 24
        evaluate "$D/results/cold-longer-$name.json" --checkpoints "$D/cold/longer-$name"
    done
}

further() { # GRPO from the other cold starts, those of sources too
    for name in dpo half coupled base teacher; do
        grpo "$D/cold/$name" "$D/rl/$name" 100
        evaluate "$D/results/rl-$name.json" --model "$D/rl/$name"
    done
}

# recipes/demo.sh sources this file, for the functions alone
[ "${BASH_SOURCE[0]}" = "$0" ] || return 0

mkdir -p "$OUT"
# A line for every commit that a part of the study was run at
COMMIT=$(git -C "$HERE" describe --always --abbrev=12 --exclude='*' --dirty=+ 2> /dev/null || true)
grep -qxF "$COMMIT" "$OUT/commit" 2> /dev/null || echo "$COMMIT" >> "$OUT/commit"
for SEED in "${@:2}"; do
    D=$OUT/$SEED
    "${RUNS:-chain}" | python "$HERE/recipes/stages.py"
done
