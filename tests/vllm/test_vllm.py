"""vLLM as the sampler, with the real vLLM (its CPU build) and tiny models. `make test-vllm` runs this folder.

Two questions. Does it sample what the trainer would sample, whatever is changed in between? And if something is broken
on purpose that in other projects was broken by accident, does the parity check that is made for it say so?
"""

import copy
import json
import shutil

import pytest
import torch
from commands import Material, call, distance, rows, timeless, torchrun, weights, write
from conftest import FAMILIES, load_rough

import model
import sampler
import training
import vllm_sampler
from head import TokenFilter
from records import DataError, read_records
from toy.tiny_model import make_tiny

CPU = training.World(rank=0, size=1, device=torch.device("cpu"))
TOKENS = 24
LONG = Material.question("long", "Give one letter, " + "again " * 150)  # its keys fill a block that vLLM keeps


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


@pytest.fixture(scope="session")
def started(material):
    """(policy, encoder, vllm, prompts, weights as they were): an engine that the tests share."""
    policy, encoder = model.load(material.speaker, CPU, train=True)
    records = read_records(material.data)
    vllm = vllm_sampler.VLLM(material.speaker, policy, encoder, CPU, [*records, LONG], max_new_tokens=TOKENS)
    before = copy.deepcopy(policy.state_dict())
    return policy, encoder, vllm, encoder.prompts(records), before


@pytest.fixture
def engine(started):
    """(policy, vllm, prompts), as if nothing had been sampled yet."""
    policy, _, vllm, prompts, before = started
    policy.load_state_dict(before)
    policy.requires_grad_(True)
    vllm.calls = 0
    return policy, vllm, prompts


def ask(policy, vllm, prompts, n=4, seeds=None, **settings):
    seeds = seeds or list(range(len(prompts)))
    return vllm(policy, prompts, n, seeds=seeds, **{"max_new_tokens": TOKENS} | settings)


def ids_of(replies):
    return [[reply.ids.tolist() for reply in group] for group in replies]


def gap(policy, prompts, replies, temperature=1.0):
    """Largest difference of the trainer's log-probs from those that came with the replies."""
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        logp, mask = model.log_probs(policy, groups, temperature)
    return (logp[mask] - torch.cat([reply.logps for group in replies for reply in group])).abs().max()


def learn(policy, prompts):
    """One large step of AdamW, away from what the policy says: every weight moves, the vision tower's too."""
    optimizer = training.adamw(policy, 0.03)
    replies = sampler.sample(policy, prompts, 1, seeds=[0] * len(prompts), temperature=0, max_new_tokens=4)
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    model.log_probs(policy, groups)[0].sum().backward()
    assert all(weight.grad is not None for weight in policy.parameters())
    training.update(policy, optimizer, 0.03, 1.0)


# ---------------------------------------------------------------------------------------------------------------------
# What it samples


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probs_are_the_trainers_for(family, models, tiny_dirs, records):
    """No picture, one, and three of different shapes between words; weights are rough, so that everything counts."""
    policy, encoder = models[family]
    prompts = encoder.prompts(records)
    assert [len(prompt.images) for prompt in prompts] == [1, 0, 3, 1]
    vllm = vllm_sampler.VLLM(tiny_dirs[family], policy, encoder, CPU, records, max_new_tokens=TOKENS)
    for temperature in (1.0, 0.7):  # parity is checked in both calls
        replies = ask(policy, vllm, prompts, temperature=temperature)
        assert gap(policy, prompts, replies, temperature) < 1e-4
    greedy = ask(policy, vllm, prompts, n=1, temperature=0)
    ours = sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=TOKENS)
    assert ids_of(greedy) == ids_of(ours)
    vllm.close()


def test_internvl_with_dynamic_rope_and_a_decoder_of_qwen3_is_computed_alike(records, tmp_path):
    """Within the model's length such a RoPE is the plain one."""
    make_tiny(tmp_path, "internvl", decoder="qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"]["rope_parameters"] |= {"rope_type": "dynamic", "factor": 2.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    policy, encoder = load_rough(tmp_path)
    prompts = encoder.prompts(records)
    vllm = vllm_sampler.VLLM(tmp_path, policy, encoder, CPU, records, max_new_tokens=TOKENS)
    assert gap(policy, prompts, ask(policy, vllm, prompts)) < 1e-4
    vllm.close()


def test_a_reply_keeps_its_end_token_and_a_truncated_one_has_none(engine):
    policy, vllm, prompts = engine
    for tokens in (TOKENS, 2):
        replies = sum(ask(policy, vllm, prompts, max_new_tokens=tokens), [])
        for reply in replies:
            assert len(reply.ids) == len(reply.logps) <= tokens
            ends = [token in policy.end_ids for token in reply.ids.tolist()]
            assert ends[-1] == reply.finished and not any(ends[:-1])
            assert reply.finished or len(reply.ids) == tokens
        assert any(reply.finished for reply in replies)
    assert not all(reply.finished for reply in replies)


def test_the_same_seeds_give_the_same_replies_and_others_do_not(engine):
    policy, vllm, prompts = engine
    settings = {"temperature": 1.5, "n": 6}
    one, same = (ask(policy, vllm, prompts, **settings) for _ in range(2))
    other = ask(policy, vllm, prompts, seeds=[10**12 + i for i in range(len(prompts))], **settings)
    assert ids_of(one) == ids_of(same) != ids_of(other)
    alone = ask(policy, vllm, prompts[3:4], seeds=[3], **settings)
    assert ids_of(alone) == ids_of(one)[3:4]
    for group in ids_of(one):
        assert len({tuple(ids) for ids in group}) > 1, "a group's replies are different samples"


def test_neighbouring_prompts_do_not_share_their_random_numbers(engine):
    """vLLM samples reply g of a request from its seed + g: with seeds 0 and 1 as they are, two would be one."""
    policy, vllm, prompts = engine
    twice = ask(policy, vllm, [prompts[4]] * 2, n=8, seeds=[0, 1], temperature=2.0)
    first, second = ids_of(twice)
    assert first[1:] != second[:-1]


def test_greedy_replies_are_the_trainers_before_and_after_an_optimizer_step(engine):
    policy, vllm, prompts = engine

    def both():
        ours = sampler.sample(policy, prompts, 1, seeds=[0] * len(prompts), temperature=0, max_new_tokens=TOKENS)
        theirs = ask(policy, vllm, prompts, n=1, temperature=0)
        assert ids_of(theirs) == ids_of(ours)
        return ids_of(ours)

    before = both()
    learn(policy, prompts)
    assert both() != before


def test_image_and_video_pads_are_never_sampled_however_likely(started, engine):
    policy, vllm, prompts = engine
    image_pad, video_pad = started[1].forbidden
    embedding = policy.hf.get_input_embeddings().weight  # tied: also the rows of lm_head
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embedding[image_pad], embedding[video_pad] = 200 * direction, -200 * direction
    for n, settings in ((4, {}), (1, {"temperature": 0}), (4, {"temperature": 0.7})):
        replies = ask(policy, vllm, prompts, n=n, **settings)
        sampled = {token for group in ids_of(replies) for ids in group for token in ids}
        assert not sampled & {image_pad, video_pad}
        if settings.get("temperature") != 0:  # what is left adds up to 1 without them, as in the trainer
            assert gap(policy, prompts, replies, settings.get("temperature", 1.0)) < 1e-4


def test_after_top_k_the_log_probs_are_those_of_the_filtered_distribution(engine):
    policy, vllm, prompts = engine
    for reply in sum(ask(policy, vllm, prompts, top_k=1), []):
        assert reply.logps.abs().max() < 1e-6  # the likeliest token alone: certain
    replies = ask(policy, vllm, prompts, top_k=3)
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        logp, mask = model.log_probs(policy, groups)
    kept = (logp[mask] - torch.cat([reply.logps for group in replies for reply in group])).exp()  # mass of the three
    assert kept.max() < 1 + 1e-4 and kept.min() < 0.95


@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.8}, {"top_k": 20, "top_p": 0.6}])
def test_the_filters_are_those_that_the_trainer_replays(engine, filters):
    policy, vllm, prompts = engine
    replies = ask(policy, vllm, prompts, temperature=0.7, **filters)
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        token_filter = TokenFilter(filters.get("top_k", 0), filters.get("top_p", 1.0))
        logp, mask = model.log_probs(policy, groups, 0.7, token_filter)
    # so that importance weights are 1 up to rounding
    assert (logp[mask] - torch.cat([reply.logps for group in replies for reply in group])).abs().max() < 1e-4
    assert gap(policy, prompts, replies, 0.7) > 0.05  # without the filter


def test_a_policy_that_learns_is_sent_for_every_call_and_one_that_does_not_once(engine, monkeypatch):
    policy, vllm, prompts = engine
    sent, sync = [], vllm.sync
    monkeypatch.setattr(vllm, "sync", lambda *args, **kwargs: (sent.append(1), sync(*args, **kwargs)))
    vllm.calls = 2  # after the parity checks, which send weights too
    for calls in (1, 2, 3):
        ask(policy, vllm, prompts[:1])
        assert len(sent) == calls
    policy.requires_grad_(False)
    vllm.calls, sent[:] = 0, []
    ask(policy, vllm, prompts[:1])
    first = len(sent)
    ask(policy, vllm, prompts[:1])
    assert len(sent) == first >= 1


def test_temperatures_that_vllm_would_change_are_refused(engine):
    policy, vllm, prompts = engine
    for temperature in (0.001, 2.5):
        with pytest.raises(DataError, match=f"--temperature {temperature}: vLLM takes"):
            ask(policy, vllm, prompts, temperature=temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Sabotage: each kind is caught, and by the parity check that is made for it


def caught(check, policy, vllm, prompts):
    with pytest.raises(vllm_sampler.ParityError, match=f"^parity check {check}: ") as error:
        ask(policy, vllm, prompts)
    assert "\n" not in str(error.value)


def test_pictures_seen_with_old_weights_are_caught(engine, monkeypatch):
    policy, vllm, prompts = engine
    monkeypatch.setattr(vllm.engine.llm_engine, "reset_encoder_cache", lambda: None)
    caught("caches", policy, vllm, prompts)


def test_prompts_read_with_old_weights_are_caught(started, engine, monkeypatch):
    policy, vllm, prompts = engine
    prompts = [prompts[0], started[1].prompt(LONG)]
    monkeypatch.setattr(vllm.engine.llm_engine, "reset_prefix_cache", lambda: True)
    caught("caches", policy, vllm, prompts)


def test_weights_that_are_not_sent_after_an_update_are_caught(engine, monkeypatch):
    policy, vllm, prompts = engine
    ask(policy, vllm, prompts)
    learn(policy, prompts)
    monkeypatch.setattr(vllm, "sync", lambda *args, **kwargs: None)
    caught("log-probs", policy, vllm, prompts)


def test_weights_that_never_arrive_are_caught_even_when_an_update_changes_next_to_nothing(engine, monkeypatch):
    policy, vllm, prompts = engine
    ask(policy, vllm, prompts)
    monkeypatch.setattr(vllm, "sync", lambda *args, **kwargs: None)
    caught("sync", policy, vllm, prompts)


def test_a_parity_check_every_few_calls_catches_what_breaks_later(engine, monkeypatch):
    policy, vllm, prompts = engine
    monkeypatch.setattr(vllm, "parity_every", 3)
    for _ in range(2):
        ask(policy, vllm, prompts[:2])
    learn(policy, prompts)
    monkeypatch.setattr(vllm, "sync", lambda *args, **kwargs: None)
    ask(policy, vllm, prompts[:2])  # the third: nobody looks
    caught("log-probs", policy, vllm, prompts[:2])


def test_image_tokens_that_are_expanded_twice_are_caught(engine):
    policy, vllm, prompts = engine
    twice = [copy.copy(prompt) for prompt in prompts]
    for prompt in twice:
        prompt.plain_ids = prompt.ids.tolist()
    caught("prompt ids", policy, vllm, twice)


def test_another_limit_of_pixels_is_caught(engine, material):
    policy, vllm, prompts = engine
    encoder = model.load(material.speaker, CPU, max_pixels=56 * 56)[1]
    smaller = encoder.prompts(read_records(material.data))
    assert len(smaller[0].ids) < len(prompts[0].ids)
    caught("prompt ids", policy, vllm, smaller)


def test_other_pixels_in_the_same_place_are_caught(engine, monkeypatch):
    policy, vllm, prompts = engine
    images = vllm.encoder.images
    upside_down = 3  # PIL's number of a half turn
    turned = lambda paths: [image.transpose(upside_down) for image in images(paths)]  # noqa: E731
    monkeypatch.setattr(vllm.encoder, "images", turned)
    caught("log-probs", policy, vllm, prompts)


@pytest.mark.parametrize("lost", ["embed_tokens.weight", "visual.merger.mlp.2.bias"])
def test_a_weight_that_is_not_sent_is_caught(engine, monkeypatch, lost):
    """The embedding is the tied lm_head too."""
    policy, vllm, prompts = engine
    every = vllm_sampler.checkpoint_weights

    def without(*args):
        return (item for item in every(*args) if not item[0].endswith(lost))

    monkeypatch.setattr(vllm_sampler, "checkpoint_weights", without)
    caught("weight names", policy, vllm, prompts)


def test_a_weight_that_vllm_ignores_is_caught(engine, monkeypatch):
    policy, vllm, prompts = engine
    every = vllm_sampler.checkpoint_weights

    def one_more(*args):
        yield from every(*args)
        yield "model.language_model.layers.0.mlp.down_proj.bias", torch.zeros(64)

    monkeypatch.setattr(vllm_sampler, "checkpoint_weights", one_more)
    caught("weight names", policy, vllm, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs


def evaluated(material, **settings):
    """Settings of a greedy eval.py run."""
    return {"model": material.speaker, "data": material.data, "max_new_tokens": TOKENS, "batch": 3} | settings


def distilled(material, **settings):
    """Settings of a distill.py run: the speaker is both policy and base."""
    both = {"policy": material.speaker, "base": material.speaker, "data": material.data, "coupled": True}
    return both | {"samples": 16, "max_new_tokens": 8, "sampler": "vllm"} | settings


def mean(log, name):
    return sum(row[name] for row in log) / len(log)


def test_grpo_learns_with_vllm_as_it_does_with_the_builtin_sampler(material, tmp_path):
    logs = {}
    for name in ("builtin", "vllm"):
        settings = material.grpo(steps=40, kl=0.02, seed=1, sampler=name, save_every=0, parity_every=10)
        call("grpo", **settings, out=tmp_path / name)
        logs[name] = rows(tmp_path / name)
        assert mean(logs[name][-10:], "reward") > mean(logs[name][:5], "reward") + 0.15
        assert max(row["sampler_gap"] for row in logs[name]) < 1e-4
        assert all(row["importance_capped"] == 0 for row in logs[name])
    ends = [mean(log[-10:], "reward") for log in logs.values()]
    assert abs(ends[0] - ends[1]) < 0.15, ends
    assert logs["vllm"][0].keys() == logs["builtin"][0].keys()


def test_importance_weights_undo_top_k_and_reach_their_cap_only_when_they_should(material, tmp_path):
    settings = material.grpo(steps=2, sampler="vllm", top_k=2, updates=2, save_every=0)
    call("grpo", **settings, importance="sequence", out=tmp_path / "filtered")
    for row in rows(tmp_path / "filtered"):
        assert row["sampler_gap"] > 0.01  # vLLM gives the log-probs after top-k, the trainer before
        assert row["importance_capped"] == 0  # so the weights are below 1


def test_one_step_off_policy_samples_with_the_weights_before_the_update_and_says_so(material, tmp_path):
    runs = {"off": {"one_step_off_policy": True}, "frozen": {"lr": 1e-12}, "on": {}}
    for name, more in runs.items():
        settings = material.grpo(steps=3, sampler="vllm", updates=2, save_every=0) | more
        call("grpo", **settings, out=tmp_path / name)
    off, frozen, on = (rows(tmp_path / name) for name in runs)
    assert [row["staleness"] for row in off] == [0, 2, 2] and "staleness" not in on[0]
    for key in ("reward", "length", "entropy"):  # the second batch is sampled with weights that have learned nothing
        assert off[1][key] == pytest.approx(frozen[1][key], abs=1e-6)
    assert any(off[1][key] != on[1][key] for key in ("reward", "length", "entropy"))
    assert off[0]["sampler_gap"] < 1e-4 < off[1]["sampler_gap"], "the correction sees how old they are"


def test_a_one_step_off_policy_run_resumes_with_the_replies_it_had_sampled(material, tmp_path):
    settings = material.grpo(sampler="vllm", one_step_off_policy=True, steps=4, save_every=2, keep=9)
    call("grpo", **settings, out=tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    args = json.loads((tmp_path / "out/args.json").read_text()) | {"out": str(tmp_path / "out")}
    (tmp_path / "out/args.json").write_text(json.dumps(args))
    (tmp_path / "out/LATEST").write_text("step_000002")
    call("grpo", **settings, out=tmp_path / "out", resume=True)
    assert [row["staleness"] for row in rows(tmp_path / "out")] == [0, 1, 1, 1]
    assert timeless(tmp_path / "out") == timeless(tmp_path / "whole")
    assert distance(weights(tmp_path / "out"), weights(tmp_path / "whole")) == 0


@pytest.fixture(scope="module")
def alone(material, tmp_path_factory):
    """A run of one process, to compare with."""
    out = tmp_path_factory.mktemp("alone")
    call("grpo", **material.grpo(sampler="vllm", lr=3e-4, steps=3, out=out))
    return out


@pytest.mark.parametrize("tp", [1, 2], ids=["an_engine_each", "one_engine_between_them"])
def test_two_processes_sample_and_learn_what_one_does_with(material, alone, tmp_path, tp):
    """In the second run one process has a picture and the other none, so that they do not run the same modules."""
    settings = material.grpo(sampler="vllm", lr=3e-4, steps=3, vllm_tp=tp)
    records = {record["id"]: record for record in material.records}
    unlike = write(material.folder / "unlike.jsonl", [records["p0"], records["t0"]])
    other = settings | {"data": unlike, "prompts": 2, "shard": ("full", "grad")[tp - 1], "parity_every": 1}
    jobs = [("grpo", settings | {"out": tmp_path / "two"}), ("grpo", other | {"out": tmp_path / "unlike"})]
    if tp == 1:
        jobs.append(("distill", distilled(material, batch=3, out=tmp_path / "pairs.jsonl")))
        jobs.append(("eval", evaluated(material, sampler="vllm", out=tmp_path / "eval.json")))
    torchrun(jobs, tmp_path)
    assert len(rows(tmp_path / "unlike")) == 3
    if tp == 1:
        call("distill", **distilled(material, batch=8, out=tmp_path / "one.jsonl"))
        assert (tmp_path / "pairs.jsonl").read_text() == (tmp_path / "one.jsonl").read_text()
        call("eval", **evaluated(material, sampler="builtin", out=tmp_path / "one.json"))
        one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "eval.json"))
        assert one["rows"] == two["rows"]
    log, expected = rows(tmp_path / "two"), rows(alone)
    assert len(log) == 3 and all(row["sampler_gap"] < 1e-4 for row in log)
    for row, one in zip(log, expected, strict=True):
        for name in ("reward", "length", "grad_norm", "loss", "entropy"):
            assert row[name] == pytest.approx(one[name], rel=1e-4, abs=1e-5), (name, row["step"])
    assert (tmp_path / "two/samples.jsonl").read_text() == (alone / "samples.jsonl").read_text()


def test_eval_gives_the_same_greedy_result_through_vllm(material, tmp_path):
    results = []
    for name in ("builtin", "vllm"):
        call("eval", **evaluated(material, sampler=name, out=tmp_path / f"{name}.json"))
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) == 8
    assert [result["args"]["sampler"] for result in results] == ["builtin", "vllm"]


def test_distill_makes_pairs_from_two_models_through_vllm(material, tmp_path):
    call("distill", **distilled(material, batch=3, out=tmp_path / "pairs.jsonl"))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) >= 4
    assert all(pair["chosen"] == pair["answer"] and pair["rejected"] != pair["chosen"] for pair in pairs)
