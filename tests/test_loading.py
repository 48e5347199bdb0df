"""model.load: a directory becomes the policy that transformers would load from it, or is refused in one line."""

import json
import shutil

import pytest
import torch
from conftest import CPU
from groups import (
    CASES,
    EXACT,
    assert_same_gradients,
    every_family,
    gradients,
    groups_of,
    picture_inputs,
    plain_log_probs,
    vision_names,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import attention
import families
import model
import run_directory
import training
from records import DataError


@every_family
def test_a_saved_model_is_the_same_to_from_pretrained_and_to_load(models, records, tmp_path, family):
    policy, encoder = models[family]
    run_directory.save_model(policy, encoder, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain) is type(policy.hf) and type(plain).__module__.startswith("transformers.models.")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied"
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name], "stored once"
    prompt = encoder.prompt(records[2])
    ids = prompt.ids[None]
    pictures = picture_inputs(encoder, prompt, ids)
    with torch.no_grad():
        expected = policy.hf(input_ids=ids, **pictures).logits
        torch.testing.assert_close(plain(input_ids=ids, **pictures).logits, expected, **EXACT)
    loaded, reader = model.load(tmp_path, CPU)
    again = reader.prompt(records[2])
    assert torch.equal(again.ids, prompt.ids) and torch.equal(again.pixels, prompt.pixels)
    assert loaded.end_ids == policy.end_ids and len(policy.end_ids) == 2
    expected = dict(policy.named_parameters())
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, expected[name]), name


def test_a_reply_ends_on_the_tokenizers_end_token_and_on_those_of_the_generation_config(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "m")
    path = tmp_path / "m/generation_config.json"
    ids = {}
    for listed in (17, [23, 17], None):
        path.write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
        policy, encoder = model.load(tmp_path / "m", CPU)
        ids[str(listed)] = set(policy.end_ids) - {encoder.end_id}
        assert encoder.end_id in policy.end_ids
    assert ids == {"17": {17}, "[23, 17]": {17, 23}, "None": set()}
    path.unlink()
    assert model.load(tmp_path / "m", CPU)[0].end_ids == (encoder.end_id,)


# ---------------------------------------------------------------------------------------------------------------------
# Tied and untied heads


def with_head(folder, source, tied, head):
    """A copy of a model directory whose config says `tied` and whose file holds a head made of the embeddings."""
    shutil.copytree(source, folder)
    change_config(folder, tie_word_embeddings=tied)
    change_config(folder, "text_config", tie_word_embeddings=tied)
    tensors = load_file(folder / "model.safetensors")
    (embeddings,) = (tensor for name, tensor in tensors.items() if name.endswith("embed_tokens.weight"))
    assert not [name for name in tensors if "lm_head" in name]
    save_file(tensors | {"lm_head.weight": head(embeddings)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("tied", [True, False])
@every_family
def test_a_head_of_its_own_is_used_even_if_the_config_ties_it(tiny_dirs, records, tmp_path, family, tied):
    with_head(tmp_path / "m", tiny_dirs[family], tied, lambda embeddings: embeddings.flip(0).contiguous())
    policy, encoder = model.load(tmp_path / "m", CPU)
    embeddings, head = policy.hf.get_input_embeddings().weight, policy.hf.lm_head.weight
    assert torch.equal(head, embeddings.flip(0))

    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "m")
    prompt, reply = encoder.prompt(records[0]), encoder.encode_reply("Answer: C")
    ids = torch.cat([prompt.ids, reply])[None]
    with torch.no_grad():
        logp, _ = model.log_probs(policy, [(prompt, [reply])])
        torch.testing.assert_close(logp[0], plain_log_probs(policy, encoder, prompt, reply), **EXACT)
        logits = plain(input_ids=ids, **picture_inputs(encoder, prompt, ids)).logits[0, len(prompt.ids) - 1 : -1]
    logits[:, encoder.forbidden] = -torch.inf
    expected = logits.log_softmax(-1).gather(-1, reply[:, None])[:, 0]
    torch.testing.assert_close(logp[0], expected, **EXACT)

    run_directory.save_model(policy, encoder, tmp_path / "again")
    again, _ = model.load(tmp_path / "again", CPU)
    assert torch.equal(again.hf.lm_head.weight, head), "what is trained stays untied on disk"


def test_a_head_that_repeats_the_embeddings_stays_tied(tiny_dirs, tmp_path):
    with_head(tmp_path / "m", tiny_dirs["qwen2_5_vl"], True, torch.clone)
    policy, _ = model.load(tmp_path / "m", CPU)
    assert policy.hf.lm_head.weight is policy.hf.get_input_embeddings().weight


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be loaded


def change_config(folder, part=None, **changes):
    """Change fields of a directory's config.json, or of one part of it ("text_config")."""
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(changes)
    (folder / "config.json").write_text(json.dumps(config))


def spoil(folder, how):
    """Break a copy of a model directory in one way."""
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in tensors
    if how == "pickled weights only":
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "no weights":
        weights.unlink()
    elif how == "truncated weights":
        weights.write_bytes(weights.read_bytes()[:200_000])
    elif how == "a weight is missing":
        del tensors[name]
        save_file(tensors, weights, {"format": "pt"})
    elif how == "a weight of another shape":
        save_file(tensors | {name: tensors[name][:5].contiguous()}, weights, {"format": "pt"})
    elif how == "another model type":
        change_config(folder, model_type="gpt2")
    elif how == "a config that is not JSON":
        (folder / "config.json").write_text('{"model_type": ')
    else:
        file = {"no config": "config", "no tokenizer": "tokenizer", "no image settings": "preprocessor_config"}[how]
        (folder / f"{file}.json").unlink()


@pytest.mark.parametrize(
    "how",
    [
        "pickled weights only",
        "no weights",
        "truncated weights",
        "a weight is missing",
        "a weight of another shape",
        "another model type",
        "a config that is not JSON",
        "no config",
        "no tokenizer",
        "no image settings",
    ],
)
def test_a_directory_that_is_no_sound_model_is_refused_in_one_line(tiny_dirs, tmp_path, how):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "bad")
    spoil(tmp_path / "bad", how)
    with pytest.raises(DataError) as caught:
        model.load(tmp_path / "bad", CPU)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "bad")) and "\n" not in message
    if how == "another model type":
        assert f"gpt2 is not supported ({', '.join(families.FAMILIES)})" in message
    if how == "a weight is missing":
        assert "layers.1.mlp.up_proj.weight" in message


@pytest.mark.parametrize("model_type", families.REFUSED)
def test_a_model_type_that_is_refused_for_a_reason_is_refused_with_it(tiny_dirs, tmp_path, model_type):
    shutil.copytree(tiny_dirs["qwen3_vl"], tmp_path / "bad")
    change_config(tmp_path / "bad", model_type=model_type)
    with pytest.raises(DataError) as caught:
        model.load(tmp_path / "bad", CPU)
    assert str(caught.value) == f"{tmp_path / 'bad'}: model_type {model_type}: {families.REFUSED[model_type]}"


def test_mixtures_of_experts_and_checkpoints_with_code_of_their_own_are_refused_for_a_reason():
    assert "mixtures of experts" in families.REFUSED["qwen3_vl_moe"]
    assert "-hf" in families.REFUSED["internvl_chat"]


def test_sliding_window_attention_is_refused(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "bad")
    change_config(tmp_path / "bad", "text_config", use_sliding_window=True)
    with pytest.raises(DataError) as caught:
        model.load(tmp_path / "bad", CPU)
    expected = "sliding-window attention is not supported (use_sliding_window)"
    assert str(caught.value) == f"{tmp_path / 'bad'}: {expected}"


def test_a_missing_model_directory_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="^--model .*nowhere: no such directory") as caught:
        model.load(tmp_path / "nowhere", CPU)
    assert "\n" not in str(caught.value)


def test_what_one_process_cannot_load_is_refused_by_all_before_they_wait_for_each_other():
    class Pair:
        """The first of two processes; the second has found `other`."""

        def __init__(self, other):
            self.other, self.asked = other, []

        def gather(self, thing):
            self.asked.append(thing)
            return [thing, self.other]

    world = Pair(None)
    with model.together(world):
        pass
    assert world.asked == [None]
    with pytest.raises(DataError, match="^its own$"), model.together(Pair(None)):
        raise DataError("its own")
    world = Pair("the other's")
    with pytest.raises(DataError, match="^the other's$"), model.together(world):
        pass
    with pytest.raises(ZeroDivisionError), model.together(Pair(None)):
        1 / 0  # noqa: B018, a mistake of ours stays one


def test_every_way_to_load_looks_for_nan(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "bad")
    weights = tmp_path / "bad/model.safetensors"
    tensors = load_file(weights)
    tensors["model.embed_tokens.weight"][7, 3] = float("nan")
    save_file(tensors, weights, {"format": "pt"})
    for load in (model.load, model.load_reference):
        for options in ({}, {"dtype": "bf16"}):
            with pytest.raises(DataError, match=f"^{tmp_path / 'bad'}: .*embed_tokens.weight holds NaN or inf"):
                load(tmp_path / "bad", CPU, **options)


def test_a_model_directory_is_checked_without_loading_it(tiny_dirs, tmp_path, monkeypatch):
    monkeypatch.setattr(model, "build", lambda *args, **options: pytest.fail("it was loaded"))
    assert model.check_folder(tiny_dirs["qwen3_vl"]) == str(tiny_dirs["qwen3_vl"])
    with pytest.raises(DataError, match="^--base .*nowhere: no such directory"):
        model.check_folder(tmp_path / "nowhere", "--base")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="^--base .*file: a model is a directory, this is a file$"):
        model.check_folder(tmp_path / "file", "--base")


# ---------------------------------------------------------------------------------------------------------------------
# How it is loaded


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(tiny_dirs, records, monkeypatch, family):
    calls, attend = [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(1) or attend(*args))
    found = {}
    for switch in ("off", "on"):
        policy, encoder = model.load(tiny_dirs[family], CPU, train=True, gradient_checkpointing=switch)
        calls.clear()
        logp, _ = model.log_probs(policy, groups_of(encoder, records, CASES["text and pictures in one batch"]))
        once = len(calls)
        found[switch] = logp.detach(), gradients(policy, logp.exp().sum())
        assert len(calls) == (2 * once if switch == "on" else once)
    torch.testing.assert_close(found["on"][0], found["off"][0], **EXACT)
    assert_same_gradients(found["on"][1], found["off"][1])


def test_a_frozen_vision_tower_gets_no_gradient_and_no_update(tiny_dirs, records):
    policy, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, train=True, freeze_vision=True)
    assert next(policy.parameters()).dtype == torch.float32
    before = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(0, 2)]))
    (-logp.sum()).backward()
    optimizer = training.adamw(policy, 1e-3)
    training.update(policy, optimizer, 1e-3, 1.0)
    frozen = vision_names(policy)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) == (name in frozen), name
