@every_family
def test_a_tiny_model_has_heads_of_32(models, family):
    text = models[family][0].hf.model.language_model
    assert {layer.self_attn.head_dim for layer in text.layers} == {32}
    weight = text.layers[0].self_attn.q_proj.weight
    assert weight.shape == (2 * 32, 64)


@every_family
def test_the_same_seed_makes_the_same_bytes(tiny_dirs, tmp_path, family):
    state = torch.random.get_rng_state()
    make_tiny(tmp_path / "same", family, layers=3)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are touched"
    make_tiny(tmp_path / "other", family, layers=3, seed=1)
    files = sorted(path.name for path in tiny_dirs[family].iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (tiny_dirs[family] / name).read_bytes(), name
    other_weights = (tmp_path / "other/model.safetensors").read_bytes()
    assert other_weights != (tiny_dirs[family] / "model.safetensors").read_bytes()


def test_a_tiny_model_of_another_size_has_it(tmp_path, capsys):
    tiny_model.main([str(tmp_path / "t"), "--hidden", "96", "--heads", "3", "--layers", "1", "--vocab", "2000"])
    assert "tiny qwen2_5_vl" in capsys.readouterr().out
    policy, encoder = model.load(tmp_path / "t", CPU)
    assert policy.hf.get_input_embeddings().weight.shape == (2000, 96)
    assert len(policy.hf.model.language_model.layers) == 1
    assert encoder.decode([1999]) == "", "a row that no token has"


def test_sizes_that_fit_no_head_are_refused_before_anything_is_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        tiny_model.main([str(tmp_path / "t"), "--hidden", "72"])
    assert caught.value.code == 2 and "--hidden" in capsys.readouterr().err
    assert not (tmp_path / "t").exists()
