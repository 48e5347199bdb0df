@every_family
def test_a_saved_model_is_the_same_to_from_pretrained_and_to_load(models, records, tmp_path, family):
    policy, encoder = models[family]
    training.save_model(policy, encoder, tmp_path)
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert type(plain) is type(policy.hf) and type(plain).__module__.startswith("transformers.models.")
    assert plain.lm_head.weight is plain.get_input_embeddings().weight, "tied"
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "lm_head" in name], "stored once"
    prompt = encoder.prompt(records[2])
    kinds = (prompt.ids == encoder.image_id).long()[None]
    pictures = {"pixel_values": prompt.pixels, "image_grid_thw": prompt.grids, "mm_token_type_ids": kinds}
    with torch.no_grad():
        expected = policy.hf(input_ids=prompt.ids[None], **pictures).logits
        torch.testing.assert_close(plain(input_ids=prompt.ids[None], **pictures).logits, expected, **EXACT)
    loaded, reader = model.load(tmp_path, CPU)
    again = reader.prompt(records[2])
    assert torch.equal(again.ids, prompt.ids) and torch.equal(again.pixels, prompt.pixels)
    assert loaded.end_ids == policy.end_ids and len(policy.end_ids) == 2
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, dict(policy.named_parameters())[name]), name


def test_a_reply_ends_on_the_tokenizers_end_token_and_on_those_of_the_generation_config(tiny_dirs, tmp_path):
    shutil.copytree(tiny_dirs["qwen2_5_vl"], tmp_path / "m")
    path, ids = tmp_path / "m/generation_config.json", {}
    for listed in (17, [23, 17], None):
        path.write_text(json.dumps({} if listed is None else {"eos_token_id": listed}))
        policy, encoder = model.load(tmp_path / "m", CPU)
        ids[str(listed)] = set(policy.end_ids) - {encoder.end_id}
        assert encoder.end_id in policy.end_ids
    assert ids == {"17": {17}, "[23, 17]": {17, 23}, "None": set()}
    path.unlink()
    assert model.load(tmp_path / "m", CPU)[0].end_ids == (encoder.end_id,)

# ---------------------------------------------------------------------------------------------------------------------
# What cannot be loaded


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
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt2"}))
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
    assert message.startswith(f"{tmp_path / 'bad'}: ") and "\n" not in message
    if how == "another model type":
        assert "gpt2 is not supported (qwen2_vl, qwen2_5_vl, qwen3_vl)" in message
    if how == "a weight is missing":
        assert "layers.1.mlp.up_proj.weight" in message


def test_a_missing_model_directory_is_refused_in_one_line(tmp_path):
    with pytest.raises(DataError, match="^--model .*nowhere: no such directory") as caught:
        model.load(tmp_path / "nowhere", CPU)
    assert "\n" not in str(caught.value)

# ---------------------------------------------------------------------------------------------------------------------
# How it is loaded


@every_family
def test_gradient_checkpointing_gives_the_same_gradients(tiny_dirs, records, monkeypatch, family):
    found, calls, attend = [], [], attention.attend
    monkeypatch.setattr(attention, "attend", lambda *args: calls.append(1) or attend(*args))
    for gradient_checkpointing in ("off", "on"):
        policy, encoder = model.load(tiny_dirs[family], CPU, train=True, gradient_checkpointing=gradient_checkpointing)
        calls.clear()
        logp, _ = model.log_probs(policy, groups_of(encoder, records, CASES["text and pictures in one batch"]))
        once = len(calls)
        found.append((logp.detach(), gradients(policy, logp.exp().sum())))
        assert len(calls) == (2 * once if gradient_checkpointing == "on" else once)
    torch.testing.assert_close(found[1][0], found[0][0], **EXACT)
    assert_same_gradients(found[1][1], found[0][1])


def test_a_frozen_vision_tower_gets_no_gradient_and_no_update(tiny_dirs, records):
    policy, encoder = model.load(tiny_dirs["qwen2_5_vl"], CPU, train=True, freeze_vision=True)
    assert next(policy.parameters()).dtype == torch.float32
    before = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}
    logp, _ = model.log_probs(policy, groups_of(encoder, records, [(0, 2)]))
    (-logp.sum()).backward()
    optimizer = training.adamw(policy, 1e-3)
    training.update(policy, optimizer, 1e-3, 1.0)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, before[name]) == ("visual" in name), name
