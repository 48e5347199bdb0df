#!/usr/bin/env bash
# On a machine with a GPU: grpo.py under torchrun as a user starts it, one GPU, bf16, built-in sampler, on the 3B shape
# with random weights (--kl, for such a model earns no reward to learn from); its peak memory beside recipes/plan.py's.
#
#     bash bench/gpu_run.sh OUT        # some minutes; writes OUT/gpu-run.json
set -euo pipefail
out=${1:-bench/results}
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PYTHONPATH=$here

python - "$work" <<'PYTHON'
"""A checkpoint of the published 3B shape with random weights, and records for it."""
import sys
from pathlib import Path
from types import SimpleNamespace

import torch

sys.path.insert(0, f"{sys.path[1]}/bench")
import gpu

small = not torch.cuda.is_available()
stage = SimpleNamespace(work=Path(sys.argv[1]), smoke=small, device="cuda" if torch.cuda.is_available() else "cpu")
folder = gpu.model_folder(stage)
gpu.random_model(folder, stage.device, torch.bfloat16).save_pretrained(folder)
gpu.make_records(stage, 400, 16)
PYTHON

shape=(--prompt 400 --image 300 --group 8 --reply 20 --micro-tokens 16384)
python "$here/recipes/plan.py" "$work/shape" --gpus 1 --kl "${shape[@]}" --gpu-gib 140 | tee "$work/plan.txt"
torchrun --standalone --nproc_per_node=1 "$here/grpo.py" --model "$work/shape" --data "$work/400-16/records.jsonl" \
    --out "$work/run" --prompts 16 --group 8 --steps 5 --max-new-tokens 20 --lr 1e-6 --kl 0.04 --save-every 0 --measure-peak
python - "$work" "$out" "$here" <<'PYTHON'
import json
import shutil
import subprocess
import sys
from pathlib import Path

work, out = map(Path, sys.argv[1:3])
log = [json.loads(line) for line in (work / "run/log.jsonl").read_text().splitlines()]
git = ["git", "-C", sys.argv[3], "describe", "--always", "--abbrev=12", "--exclude=*", "--dirty=+"]
commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
result = {"commit": commit, "plan": (work / "plan.txt").read_text().splitlines(), "log": log}
out.mkdir(parents=True, exist_ok=True)
(out / "gpu-run.json").write_text(json.dumps(result, indent=1) + "\n")
last = log[-1]
print({key: last[key] for key in last if key.startswith(("seconds", "peak", "mfu", "rollouts"))})
PYTHON
