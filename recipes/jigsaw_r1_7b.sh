#!/usr/bin/env bash
# Jigsaw-R1 (arXiv 2505.23590) with Qwen2.5-VL-7B on eight GPUs of 80 GB: jigsaw_r1_3b.sh with the larger model; section
# 4.3 of the paper has one setting for all models. NOT RUN BY US: memory and hours are estimates (recipes/plan.py).
#
#   bash recipes/jigsaw_r1_7b.sh COCO OUT        # COCO holds train2014/ and test2014/
#   python recipes/plan.py --reply 200 --mean-reply 200 --records 64000 --recipe recipes/jigsaw_r1_7b.sh COCO OUT
#
# The last line says that every stage fits (59 GiB at most) and takes 11 to 32 hours in all on eight H100.
#
# To expect, by its tables. Pair puzzles, accuracy in percent on 2x1 / 3x1 / 4x1 / 2x2 (chance 50 50 50 12.5):
#   without thinking    before 50.4 / 49.6 / 54.2 / 13.2    after 98.9 / 65.9 / 53.9 / 14.9
#   with thinking       before 49.4 / 48.7 / 50.6 / 15.8    after 97.8 / 61.7 / 54.8 / 15.2
# Mean of CV-Bench, MMVP, SAT and Super-CLEVR: without thinking 79.98 -> 80.10, with it 65.60 -> 72.03.
set -euo pipefail
export BASE=Qwen/Qwen2.5-VL-7B-Instruct
exec bash "$(dirname "$0")/jigsaw_r1_3b.sh" "$@"
