"""vLLM as the sampler, with the real vLLM (its CPU build) and tiny models. `make test-vllm` runs this folder.

Two questions. Does it draw what the trainer would draw, whatever is changed in between? And if something is broken on
purpose that in other projects was broken by accident, does the canary that is made for it say so?
"""

import copy
import json
import shutil

import pytest
import torch
from commands import Material, call, distance, rows, timeless, torchrun, weights, write

import model
import sampler
import training
import vllm_sampler
from records import DataError, read_records

CPU = training.World(rank=0, size=1, device=torch.device("cpu"))
TOKENS = 24
LONG = Material.question("long", "Give one letter, " + "again " * 150)  # its keys fill a block that vLLM keeps
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


@pytest.fixture(scope="session")
def started(material):
    """(policy, encoder, sampler, prompts, weights as they were): an engine that the tests share."""
    policy, encoder = model.load(material.speaker, CPU, train=True)
    records = read_records(material.data)
    sampler = vllm_sampler.VLLM(material.speaker, policy, encoder, CPU, [*records, LONG], max_new_tokens=TOKENS)
    before = copy.deepcopy(policy.state_dict())
    return policy, encoder, sampler, encoder.prompts(records), before


@pytest.fixture
def engine(started):
    """(policy, sampler, prompts), as if nothing had been drawn yet."""
    policy, _, sampler, prompts, before = started
    policy.load_state_dict(before)
    policy.requires_grad_(True)
    sampler.calls = 0
    return policy, sampler, prompts


def draw(policy, sampler, prompts, n=4, seeds=None, **settings):
    seeds = seeds or list(range(len(prompts)))
    return sampler(policy, prompts, n, seeds=seeds, **{"max_new_tokens": TOKENS} | settings)


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
# What it draws
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_log_probs_are_the_trainers_for(family, models, tiny_dirs, records):
    """No picture, one, and three of different shapes between words; weights are rough, so that everything counts."""
    policy, encoder = models[family]
    prompts = encoder.prompts(records)
    assert [len(prompt.images) for prompt in prompts] == [1, 0, 3, 1]
    sampler = vllm_sampler.VLLM(tiny_dirs[family], policy, encoder, CPU, records, max_new_tokens=TOKENS)
    for temperature in (1.0, 0.7):  # the canaries look on in both calls
        replies = draw(policy, sampler, prompts, temperature=temperature)
        assert gap(policy, prompts, replies, temperature) < 1e-4
    greedy = draw(policy, sampler, prompts, n=1, temperature=0)
    ours = sampler.sample(policy, prompts, 1, seeds=[0] * 4, temperature=0, max_new_tokens=TOKENS)
    assert ids_of(greedy) == ids_of(ours)
    sampler.close()


def test_a_reply_keeps_its_end_token_and_one_that_was_cut_has_none(engine):
    policy, sampler, prompts = engine
    for tokens in (TOKENS, 2):
        replies = sum(draw(policy, sampler, prompts, max_new_tokens=tokens), [])
        for reply in replies:
            assert len(reply.ids) == len(reply.logps) <= tokens
            ends = [token in policy.end_ids for token in reply.ids.tolist()]
            assert ends[-1] == reply.finished and not any(ends[:-1])
            assert reply.finished or len(reply.ids) == tokens
        assert any(reply.finished for reply in replies)
    assert not all(reply.finished for reply in replies)


def test_the_same_seeds_give_the_same_replies_and_others_do_not(engine):
    policy, sampler, prompts = engine
    settings = {"temperature": 1.5, "n": 6}
    one, same = (draw(policy, sampler, prompts, **settings) for _ in range(2))
    other = draw(policy, sampler, prompts, seeds=[10**12 + i for i in range(len(prompts))], **settings)
    assert ids_of(one) == ids_of(same) != ids_of(other)
    alone = draw(policy, sampler, prompts[3:4], seeds=[3], **settings)
    assert ids_of(alone) == ids_of(one)[3:4]
    assert all(len({tuple(ids) for ids in group}) > 1 for group in ids_of(one)), "a group's replies are different draws"


def test_neighbouring_prompts_do_not_share_their_random_numbers(engine):
    """vLLM draws reply g of a request with its seed + g: with seeds 0 and 1 as they are, two draws would be one."""
    policy, sampler, prompts = engine
    twice = draw(policy, sampler, [prompts[4]] * 2, n=8, seeds=[0, 1], temperature=2.0)
    first, second = ids_of(twice)
    assert first[1:] != second[:-1]


def test_greedy_replies_are_the_trainers_before_and_after_an_optimizer_step(engine):
    policy, sampler, prompts = engine

    def both():
        ours = sampler.sample(policy, prompts, 1, seeds=[0] * len(prompts), temperature=0, max_new_tokens=TOKENS)
        theirs = draw(policy, sampler, prompts, n=1, temperature=0)
        assert ids_of(theirs) == ids_of(ours)
        return ids_of(ours)

    before = both()
    learn(policy, prompts)
    assert both() != before


def test_image_and_video_pads_are_never_drawn_however_likely(started, engine):
    policy, sampler, prompts = engine
    encoder = started[1]
    embedding = policy.hf.get_input_embeddings().weight  # tied: also the rows of lm_head
    direction = torch.randn(64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        embedding[encoder.image_id], embedding[encoder.video_id] = 200 * direction, -200 * direction
    for n, settings in ((4, {}), (1, {"temperature": 0}), (4, {"temperature": 0.7})):
        replies = draw(policy, sampler, prompts, n=n, **settings)
        drawn = {token for group in ids_of(replies) for ids in group for token in ids}
        assert not drawn & {encoder.image_id, encoder.video_id}
        if settings.get("temperature") != 0:  # what is left adds up to 1 without them, as in the trainer
            assert gap(policy, prompts, replies, settings.get("temperature", 1.0)) < 1e-4


def test_after_a_cut_the_log_probs_are_those_of_the_cut_distribution(engine):
    policy, sampler, prompts = engine
    for reply in sum(draw(policy, sampler, prompts, top_k=1), []):
        assert reply.logps.abs().max() < 1e-6  # the likeliest token alone: certain
    replies = draw(policy, sampler, prompts, top_k=3)
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    with torch.no_grad():
        logp, mask = model.log_probs(policy, groups)
    kept = (logp[mask] - torch.cat([reply.logps for group in replies for reply in group])).exp()  # mass of the three
    assert kept.max() < 1 + 1e-4 and kept.min() < 0.95


def test_a_policy_that_learns_is_sent_for_every_call_and_one_that_does_not_once(engine, monkeypatch):
    policy, sampler, prompts = engine
    sent, sync = [], sampler.sync
    monkeypatch.setattr(sampler, "sync", lambda *args, **kwargs: (sent.append(1), sync(*args, **kwargs)))
    sampler.calls = 2  # after the canaries, which send weights too
    for calls in (1, 2, 3):
        draw(policy, sampler, prompts[:1])
        assert len(sent) == calls
    policy.requires_grad_(False)
    sampler.calls, sent[:] = 0, []
    draw(policy, sampler, prompts[:1])
    first = len(sent)
    draw(policy, sampler, prompts[:1])
    assert len(sent) == first >= 1


def test_temperatures_that_vllm_would_change_are_refused(engine):
    policy, sampler, prompts = engine
    for temperature in (0.001, 2.5):
        with pytest.raises(DataError, match=f"--temperature {temperature}: vLLM takes"):
            draw(policy, sampler, prompts, temperature=temperature)


# ---------------------------------------------------------------------------------------------------------------------
# Sabotage: each kind is caught, and by the canary that is made for it
# ---------------------------------------------------------------------------------------------------------------------


def caught(canary, policy, sampler, prompts):
    with pytest.raises(vllm_sampler.ParityError, match=f"^canary {canary}: ") as error:
        draw(policy, sampler, prompts)
    assert "\n" not in str(error.value)


def test_pictures_seen_with_old_weights_are_caught(engine, monkeypatch):
    policy, sampler, prompts = engine
    monkeypatch.setattr(sampler.engine.llm_engine, "reset_encoder_cache", lambda: None)
    caught("caches", policy, sampler, prompts)


def test_prompts_read_with_old_weights_are_caught(started, engine, monkeypatch):
    policy, sampler, prompts = engine
    prompts = [prompts[0], started[1].prompt(LONG)]
    monkeypatch.setattr(sampler.engine.llm_engine, "reset_prefix_cache", lambda: True)
    caught("caches", policy, sampler, prompts)


def test_weights_that_are_not_sent_after_an_update_are_caught(engine, monkeypatch):
    policy, sampler, prompts = engine
    draw(policy, sampler, prompts)
    learn(policy, prompts)
    monkeypatch.setattr(sampler, "sync", lambda *args, **kwargs: None)
    caught("log-probs", policy, sampler, prompts)


def test_weights_that_never_arrive_are_caught_even_when_an_update_changes_next_to_nothing(engine, monkeypatch):
    policy, sampler, prompts = engine
    draw(policy, sampler, prompts)
    monkeypatch.setattr(sampler, "sync", lambda *args, **kwargs: None)
    caught("sync", policy, sampler, prompts)


def test_a_canary_every_few_calls_catches_what_breaks_later(engine, monkeypatch):
    policy, sampler, prompts = engine
    monkeypatch.setattr(sampler, "canary_every", 3)
    for _ in range(2):
        draw(policy, sampler, prompts[:2])
    learn(policy, prompts)
    monkeypatch.setattr(sampler, "sync", lambda *args, **kwargs: None)
    draw(policy, sampler, prompts[:2])  # the third: nobody looks
    caught("log-probs", policy, sampler, prompts[:2])


def test_image_tokens_that_are_expanded_twice_are_caught(engine):
    policy, sampler, prompts = engine
    twice = [copy.copy(prompt) for prompt in prompts]
    for prompt in twice:
        prompt.plain_ids = prompt.ids.tolist()
    caught("prompt ids", policy, sampler, twice)


def test_another_limit_of_pixels_is_caught(engine, material):
    policy, sampler, prompts = engine
    encoder = model.load(material.speaker, CPU, max_pixels=56 * 56)[1]
    smaller = encoder.prompts(read_records(material.data))
    assert len(smaller[0].ids) < len(prompts[0].ids)
    caught("prompt ids", policy, sampler, smaller)


def test_other_pixels_in_the_same_place_are_caught(engine, monkeypatch):
    policy, sampler, prompts = engine
    opened = sampler.encoder.opened
    upside_down = 3  # PIL's number of a half turn
    turned = lambda paths: [image.transpose(upside_down) for image in opened(paths)]  # noqa: E731
    monkeypatch.setattr(sampler.encoder, "opened", turned)
    caught("log-probs", policy, sampler, prompts)


@pytest.mark.parametrize("lost", ["embed_tokens.weight", "visual.merger.mlp.2.bias"])
def test_a_weight_that_is_not_sent_is_caught(engine, monkeypatch, lost):
    """The embedding is the tied lm_head too."""
    policy, sampler, prompts = engine
    every = vllm_sampler.checkpoint_weights

    def without(*args):
        return (item for item in every(*args) if not item[0].endswith(lost))

    monkeypatch.setattr(vllm_sampler, "checkpoint_weights", without)
    caught("weight names", policy, sampler, prompts)


def test_a_weight_that_vllm_ignores_is_caught(engine, monkeypatch):
    policy, sampler, prompts = engine
    every = vllm_sampler.checkpoint_weights

    def one_more(*args):
        yield from every(*args)
        yield "model.language_model.layers.0.mlp.down_proj.bias", torch.zeros(64)

    monkeypatch.setattr(vllm_sampler, "checkpoint_weights", one_more)
    caught("weight names", policy, sampler, prompts)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------


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
    for sampler in ("builtin", "vllm"):
        settings = material.grpo(steps=40, kl=0.02, seed=1, sampler=sampler, save_every=0, canary_every=10)
        call("grpo", **settings, out=tmp_path / sampler)
        logs[sampler] = rows(tmp_path / sampler)
        assert mean(logs[sampler][-10:], "reward") > mean(logs[sampler][:5], "reward") + 0.15
        assert max(row["sampler_gap"] for row in logs[sampler]) < 1e-4
        assert all(row["importance_capped"] == 0 for row in logs[sampler])
    ends = [mean(log[-10:], "reward") for log in logs.values()]
    assert abs(ends[0] - ends[1]) < 0.15, ends
    assert logs["vllm"][0].keys() == logs["builtin"][0].keys()


def test_importance_weights_undo_a_cut_and_reach_their_cap_only_when_they_should(material, tmp_path):
    settings = material.grpo(steps=2, sampler="vllm", top_k=2, updates=2, save_every=0)
    call("grpo", **settings, importance="sequence", out=tmp_path / "cut")
    for row in rows(tmp_path / "cut"):
        assert row["sampler_gap"] > 0.01  # vLLM gives the log-probs after the cut, the trainer before
        assert row["importance_capped"] == 0  # so the weights are below 1


def test_ahead_draws_from_the_weights_before_the_update_and_says_so(material, tmp_path):
    for name, more in (("ahead", {"ahead": True}), ("frozen", {"lr": 1e-12}), ("now", {})):
        settings = material.grpo(steps=3, sampler="vllm", updates=2, save_every=0) | more
        call("grpo", **settings, out=tmp_path / name)
    ahead, frozen, now = (rows(tmp_path / name) for name in ("ahead", "frozen", "now"))
    assert [row["staleness"] for row in ahead] == [0, 2, 2] and "staleness" not in now[0]
    for key in ("reward", "length", "entropy"):  # the second batch is one that weights draw which have learned nothing
        assert ahead[1][key] == pytest.approx(frozen[1][key], abs=1e-6)
    assert any(ahead[1][key] != now[1][key] for key in ("reward", "length", "entropy"))
    assert ahead[0]["sampler_gap"] < 1e-4 < ahead[1]["sampler_gap"], "the correction sees how old they are"


def test_a_run_that_draws_ahead_resumes_with_the_replies_it_had_drawn(material, tmp_path):
    settings = material.grpo(sampler="vllm", ahead=True, steps=4, save_every=2, keep=9)
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
def test_two_processes_draw_and_learn_what_one_does_with(material, alone, tmp_path, tp):
    """In the second run one process has a picture and the other none, so that they do not run the same modules."""
    settings = material.grpo(sampler="vllm", lr=3e-4, steps=3, vllm_tp=tp)
    records = {record["id"]: record for record in material.records}
    unlike = write(material.folder / "unlike.jsonl", [records["p0"], records["t0"]])
    other = settings | {"data": unlike, "prompts": 2, "shard": ("full", "grad")[tp - 1], "canary_every": 1}
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
    for sampler in ("builtin", "vllm"):
        call("eval", **evaluated(material, sampler=sampler, out=tmp_path / f"{sampler}.json"))
        results.append(json.loads((tmp_path / f"{sampler}.json").read_text()))
    assert results[0]["rows"] == results[1]["rows"] and len(results[0]["rows"]) == 8
    assert [result["args"]["sampler"] for result in results] == ["builtin", "vllm"]


def test_distill_makes_pairs_from_two_models_through_vllm(material, tmp_path):
    call("distill", **distilled(material, batch=3, out=tmp_path / "pairs.jsonl"))
    pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(pairs) >= 4
    assert all(pair["chosen"] == pair["answer"] and pair["rejected"] != pair["chosen"] for pair in pairs)
