#!/usr/bin/env bash
# SPECS (arXiv 2510.25801) with Qwen2.5-VL-7B on eight GPUs of 80 GB.
# NOT RUN BY US: the settings are the paper's where it states them, the memory is counted (recipes/plan.py), vLLM has been
# tried on CPUs only, and the result is unknown.
#
#   bash recipes/specs_7b.sh TRAIN.jsonl TEST.jsonl OUT      # records of Orsta-47k and ViRL39K: about 86,000 prompts
#   python recipes/plan.py --reply 2048 --recipe recipes/specs_7b.sh train.jsonl test.jsonl OUT      # does it fit?
#
# What to expect, by the paper's table: MathVista 63.7 before, 75.9 after; format kept 41.6 % before, 96.7 % after zero.
set -euo pipefail
TRAIN=$1 TEST=$2 OUT=$3
GPUS=${GPUS:-8}
HERE=$(cd "$(dirname "$0")/.." && pwd)
BASE=Qwen/Qwen2.5-VL-7B-Instruct
run() { torchrun --standalone --nproc_per_node="$GPUS" "$HERE/$1" "${@:2}"; }

GRPO=(
    --prompts 128 --group 8 --lr 1e-6 --max-new-tokens 10240 # stated
    --kl 0 --normalizer token --clip-high 0.28               # stated: no KL, DAPO-like; the clip values are DAPO's
    --temperature 1 --freeze-vision                          # not stated: defaults of the framework it used
    --max-pixels 1003520                                     # ours: at most 1,280 image tokens
    # Ours, for 80 GB. The builtin sampler decodes replies of 10,240 tokens for three prompts at a time; vLLM batches as
    # many as its cache holds. A group is learned at once, so its 82,000 tokens leave no room for a whole fp32 gradient.
    --sampler vllm --vllm-memory 0.5 --accumulate shards
    --save-every 10 --resume
)

# 1. GRPO-zero: a short run on the base. The paper does not state its length; 100 steps are our choice.
run grpo.py --model "$BASE" --data "$TRAIN" --out "$OUT/zero" --steps 100 "${GRPO[@]}"

# 2. Pairs: chosen from GRPO-zero, rejected from the base, both right, rejected corrupted in format. The paper has 9,000;
# --limit is ours: enough questions for that many pairs. Its judge is another model, here it is a rule.
run distill.py --policy "$OUT/zero" --base "$BASE" --data "$TRAIN" --out "$OUT/pairs.jsonl" --limit 20000 \
    --samples 4 --max-new-tokens 10240 --max-pixels 1003520 --sampler vllm --resume

# 3. Cold start of the base: DPO + 1.0 SFT, batch 64, lr 1e-6, one pass: stated. β is not: 0.1 is its trainer's default.
run dpo.py --model "$BASE" --data "$OUT/pairs.jsonl" --out "$OUT/cold" --loss dpo+sft --sft-weight 1 --beta 0.1 \
    --batch 64 --lr 1e-6 --max-pixels 1003520 --accumulate shards --resume

# 4. GRPO from the cold start. The reported score is that of step 600.
run grpo.py --model "$OUT/cold" --data "$TRAIN" --out "$OUT/specs" --steps 600 "${GRPO[@]}"

run eval.py --model "$OUT/specs" --data "$TEST" --out "$OUT/specs.json" --max-new-tokens 10240 --max-pixels 1003520 \
    --sampler vllm --resume
