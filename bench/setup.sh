#!/usr/bin/env bash
# Build the environment of bench/versus.py: TRL, transformers and vLLM's CPU build around the CUDA build of torch.
#
#     bash bench/setup.sh [.venv-bench]        # about 4 minutes and 7 GB; does nothing when the folder is ready
#
# TRL needs a processor with a video half, so torchvision, as vLLM does: tests/vllm/setup.sh says how they come together.
set -euo pipefail
venv=${1:-.venv-bench}
if [ -e "$venv/ready" ]; then
    exit 0
fi
bash "$(dirname "$0")/../tests/vllm/setup.sh" "$venv"
export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=
"$venv/bin/python" -m pip install -q 'trl>=1.16,<2'
"$venv/bin/python" -c 'import torch, transformers, trl, vllm; print("versus.py:", torch.__version__, trl.__version__)'
touch "$venv/ready"
