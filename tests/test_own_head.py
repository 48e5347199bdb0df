"""Checkpoints whose config ties the head to the embeddings, while their files hold a head of its own."""

import shutil

import pytest
import torch
from conftest import CPU
from safetensors.torch import load_file, save_file

import model


@pytest.mark.parametrize("equal", [True, False])
def test_a_checkpoint_with_a_head_of_its_own_keeps_it_though_its_config_says_tied(tiny_dirs, tmp_path, equal):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "m")
    file = tmp_path / "m/model.safetensors"
    weights = load_file(file)
    embeddings = next(value for name, value in weights.items() if name.endswith("embed_tokens.weight"))
    head = embeddings.clone() if equal else embeddings.flip(0).contiguous()
    save_file(weights | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    hf = model.load(tmp_path / "m", CPU)[0].hf
    assert torch.equal(hf.lm_head.weight, head)
    assert (hf.lm_head.weight is hf.get_input_embeddings().weight) == equal, "an equal copy is tied again"
    assert torch.equal(hf.get_input_embeddings().weight, embeddings)
