#!/usr/bin/env bash
# SPECS in miniature, on a laptop CPU: the chain of recipes/study_specs.sh for one seed, without its ablations.
#
#   base -> GRPO-zero -> self-distilled pairs -> cold start (SFT | DPO+SFT) -> GRPO, every stage evaluated
#
# The same scripts and flags train a 7B model (recipes/specs_7b.sh); only the numbers are small. What has finished is not
# run again: a killed demo goes on where it was. To begin anew, delete its folder.
set -euo pipefail
OUT=${1:-runs/demo} SEED=${2:-0} D=$OUT
# Its functions print command lines for recipes/stages.py: base_and_questions, zero_and_pairs, cold, grpo, evaluate.
source "$(dirname "$0")/study_specs.sh" "$OUT"
stages() { python "$HERE/recipes/stages.py"; }
step() { printf '\n== %s (%d s so far)\n' "$*" "$SECONDS"; }

mkdir -p "$OUT"
echo "What a stage prints while it runs lies beside what it writes: tail -f $OUT/base.log, $OUT/zero.log, …"
step "1 a base that can follow the reply format in its prompt, and often does not: four SFT runs of half a minute to two"
base_and_questions | stages

step "2 GRPO-zero, a short run that learns to keep one format; pairs: its replies against the base's, broken in format"
zero_and_pairs | stages

step "3 cold starts of the base by SFT and by DPO + SFT, then GRPO from each: side by side, about two minutes"
branch() { # branch NAME flags…: cold start, its GF along the updates, then GRPO and what came of it
    cold "$D/pairs.jsonl" "$D/cold/$1" "${@:2}"
    evaluate "$D/results/cold-$1.json" --checkpoints "$D/cold/$1"
    grpo "$D/cold/$1" "$D/rl/$1" 100
    evaluate "$D/results/rl-$1.json" --model "$D/rl/$1"
}
# The two sides of a pipe run at the same time, one thread each; and Ctrl-C and a failure of either side end the demo,
# which they do not with `&`. Nothing goes through the pipe: the left side prints where the right one does.
exec 3>&1
{ branch sft --loss sft | stages >&3; } | { branch specs --loss dpo+sft --sft-weight 1 | stages; }

step "4 report"
results=("$D"/results/{zero,cold-sft,cold-specs,rl-sft,rl-specs}.json)
if [ -z "${BASE:-}" ]; then results=("$D/results/follow.json" "${results[@]}"); fi
python "$HERE/report.py" --out "$OUT/report.html" --pairs "$OUT/pairs.jsonl" \
    --runs zero="$D/zero" cold-sft="$D/cold/sft" cold-specs="$D/cold/specs" rl-sft="$D/rl/sft" rl-specs="$D/rl/specs" \
    --results "${results[@]}" > "$OUT/report.log"

step "5 the tables of docs/specs_study.md, of this seed alone"
python "$HERE/bench/study_specs.py" --table "$D"
step "done: $OUT/report.html"
