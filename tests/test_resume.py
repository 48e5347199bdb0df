"""Stop a run anywhere, go on with --resume, and end with the same bits as a run that nobody stopped.

Commands are really killed, at random moments. What cannot be hit by chance (the instant between two renames,
half a line in the log) is laid out by hand.
"""

import json
import random
import shutil
import signal
import threading
from concurrent.futures import Future

import pytest
import torch
from commands import ROOT, Material, call, checkpoint, distance, end, rows, start, stop, timeless, weights

import dpo
import model
import run_directory
import sampler
import training
import vllm_sampler

STEPS = 24
SETTINGS = {
    "dpo": {"steps": STEPS, "save_every": 3, "schedule": "linear", "warmup": 4},
    "grpo": {"steps": STEPS, "save_every": 3, "schedule": "linear", "kl": 0.04, "updates": 2},
}


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


@pytest.fixture(scope="module")
def unbroken(material, tmp_path_factory):
    """{stage: the directory of a run that nobody stopped}"""
    folder = tmp_path_factory.mktemp("unbroken")
    for stage, settings in SETTINGS.items():
        call(stage, **getattr(material, stage)(out=folder / stage, **settings))
    return {stage: folder / stage for stage in SETTINGS}


def check_same(out, whole, steps=STEPS):
    """The same weights to the bit, the same optimizer state, the same log and samples."""
    assert timeless(out) == timeless(whole)
    assert (out / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
    assert distance(weights(out), weights(whole)) == 0
    assert distance(checkpoint(out, steps), checkpoint(whole, steps)) == 0
    assert (out / "LATEST").read_text() == f"step_{steps:06d}"
    assert not list(out.rglob("*.partial"))


def test_a_run_killed_at_a_random_moment_resumes_to_the_same_bits(material, unbroken, tmp_path):
    rng = random.Random()
    moments = {stage: (rng.randrange(4, 14), rng.uniform(0, 0.05)) for stage in SETTINGS}
    print("killed at", moments)  # shown when the test fails
    # One after the other: while one was waited for, another could come to its end unseen.
    for stage, settings in SETTINGS.items():
        out = tmp_path / stage
        process = start(ROOT / f"{stage}.py", **getattr(material, stage)(out=out, **settings))
        stop(process, out, moments[stage][0], signal.SIGKILL, moments[stage][1])
        assert end(process)[0] == -signal.SIGKILL
        assert not (out / "model.safetensors").exists() and 3 <= len(rows(out)) < STEPS
        # what a less lucky moment leaves behind: half a line, half a checkpoint
        for name in ("log.jsonl", "samples.jsonl"):
            with open(out / name, "a") as file:
                file.write('{"step": 17, "loss": 0.')
        half = out / "checkpoints/step_000018.partial"
        half.mkdir()
        (half / "shard-00001-model-00001-of-00001.safetensors").write_bytes(b"half")
        (out / "log.jsonl.partial").write_text('{"step"')
        call(stage, **getattr(material, stage)(out=out, resume=True, **SETTINGS[stage]))
        check_same(out, unbroken[stage])


def test_sigterm_and_ctrl_c_save_a_checkpoint_end_with_130_and_resume_to_the_same_bits(material, unbroken, tmp_path):
    for stage, number in (("dpo", signal.SIGINT), ("grpo", signal.SIGTERM)):
        out = tmp_path / stage
        process = start(ROOT / f"{stage}.py", **getattr(material, stage)(out=out, **SETTINGS[stage]))
        stop(process, out, 4, number)
        status, _, err = end(process)
        done = len(rows(out))
        assert status == 130 and 4 <= done < STEPS
        assert f"stopped after step {done} of {STEPS}; --resume goes on from there" in err
        assert "Traceback" not in err
        assert (out / "LATEST").read_text() == f"step_{done:06d}"  # the very step it stopped at
        call(stage, **getattr(material, stage)(out=out, resume=True, **SETTINGS[stage]))
        check_same(out, unbroken[stage])


@pytest.mark.parametrize("stage", SETTINGS)
def test_more_steps_can_be_asked_for_later_and_equal_a_longer_run(material, tmp_path, stage):
    settings = getattr(material, stage)
    call(stage, **settings(out=tmp_path / "whole", steps=5, schedule="constant"))
    call(stage, **settings(out=tmp_path / "parts", steps=2, schedule="constant"))
    call(stage, **settings(out=tmp_path / "parts", steps=5, schedule="constant", resume=True, save_every=1))
    check_same(tmp_path / "parts", tmp_path / "whole", 5)
    assert json.loads((tmp_path / "parts/args.json").read_text())["steps"] == 5
    # a finished run that is resumed does nothing and still ends as a model directory
    (tmp_path / "parts/model.safetensors").unlink()
    call(stage, **settings(out=tmp_path / "parts", steps=5, schedule="constant", resume=True))
    check_same(tmp_path / "parts", tmp_path / "whole", 5)


@pytest.mark.parametrize("stage", SETTINGS)
def test_resume_without_a_run_starts_one(material, tmp_path, stage):
    call(stage, **getattr(material, stage)(out=tmp_path / "new", steps=2, resume=True))
    assert [row["step"] for row in rows(tmp_path / "new")] == [1, 2]


def test_a_run_that_died_before_its_first_checkpoint_starts_again(material, unbroken, tmp_path):
    settings = material.grpo(out=tmp_path, resume=True, **SETTINGS["grpo"])
    for name in ("args.json", "log.jsonl", "samples.jsonl"):
        shutil.copy(unbroken["grpo"] / name, tmp_path / name)
    text = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text(text[: len(text) // 20])  # died in the middle of a line
    settings["out"].mkdir(exist_ok=True)
    args = json.loads((tmp_path / "args.json").read_text()) | {"out": str(tmp_path)}
    (tmp_path / "args.json").write_text(json.dumps(args))
    call("grpo", **settings)
    check_same(tmp_path, unbroken["grpo"])


def test_a_run_that_died_between_its_last_checkpoint_and_latest_goes_on_from_the_one_before(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path / "whole", steps=6, save_every=1, keep=9))
    out = tmp_path / "out"
    shutil.copytree(tmp_path / "whole", out)
    args = json.loads((out / "args.json").read_text()) | {"out": str(out)}
    (out / "args.json").write_text(json.dumps(args))
    (out / "LATEST").write_text("step_000002")  # 3 to 6 are there, but nobody vouches for them
    for file in (out / "checkpoints/step_000003").iterdir():
        file.write_bytes(b"half")
    call("dpo", **material.dpo(out=out, steps=6, save_every=1, keep=1, resume=True))
    check_same(out, tmp_path / "whole", 6)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step_000006"]


class Engine:
    """Stands in for vllm_sampler.VLLM: the builtin sampler, which nobody waits for."""

    def __init__(self, path, policy, *args, **settings):
        assert settings["seed"] == 0 and settings["tp"] == 1

    def __call__(self, *args, **settings):
        return sampler.sample(*args, **settings)

    def begin(self, *args, **settings):
        future = Future()
        future.set_result(self(*args, **settings))
        return future


def test_a_one_step_off_policy_run_resumes_with_the_replies_it_had_sampled(material, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_sampler, "VLLM", Engine)
    settings = material.grpo(sampler="vllm", one_step_off_policy=True, steps=5, updates=2, save_every=2, keep=9)
    call("grpo", **settings, out=tmp_path / "whole")
    assert [row["staleness"] for row in rows(tmp_path / "whole")] == [0, 2, 2, 2, 2]
    shutil.copytree(tmp_path / "whole", tmp_path / "out")
    args = json.loads((tmp_path / "out/args.json").read_text()) | {"out": str(tmp_path / "out")}
    (tmp_path / "out/args.json").write_text(json.dumps(args))
    (tmp_path / "out/LATEST").write_text("step_000002")
    call("grpo", **settings, out=tmp_path / "out", resume=True)
    check_same(tmp_path / "out", tmp_path / "whole", 5)


def test_a_checkpoint_newer_than_the_one_just_written_does_not_push_it_out(material, tmp_path):
    # killed after it wrote checkpoint 6 and before it said so, then resumed from 3 with --save-every 1 --keep 1
    for step in (3, 6):
        (tmp_path / f"checkpoints/step_00000{step}").mkdir(parents=True)
    (tmp_path / "LATEST").write_text("step_000003")
    policy, _ = model.load(material.speaker, training.setup(), train=True)
    run = run_directory.Run(tmp_path, training.setup(), step=3)
    run.save(4, policy, training.adamw(policy, 1e-3), keep=1)
    run.finish()
    assert (tmp_path / "LATEST").read_text() == "step_000004"
    assert "hf.model.language_model.norm.weight" in checkpoint(tmp_path, 4)
    assert not (tmp_path / "checkpoints/step_000003").exists()


def test_a_checkpoint_holds_the_moment_it_was_asked_for_though_it_is_written_later(material, tmp_path):
    policy, _ = model.load(material.speaker, training.setup(), train=True)
    before = {name: weight.detach().clone() for name, weight in policy.named_parameters()}
    run, may_write = run_directory.Run(tmp_path, training.setup()), threading.Event()
    run.writer.submit(may_write.wait)  # the writer is busy
    run.save(1, policy, training.adamw(policy, 1e-3))
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()  # training goes on
    assert not (tmp_path / "LATEST").exists()
    may_write.set()
    run.finish()
    assert (tmp_path / "LATEST").read_text() == "step_000001"
    assert distance(checkpoint(tmp_path, 1), before) == 0


def test_what_goes_wrong_in_the_background_ends_the_run_and_leaves_the_last_checkpoint(material, tmp_path):
    policy, _ = model.load(material.speaker, training.setup(), train=True)
    run = run_directory.Run(tmp_path, training.setup())
    run.save(1, policy, training.adamw(policy, 1e-3))
    run.finish()
    (tmp_path / "checkpoints/step_000002.partial").write_text("a file stands where the folder should be")
    run.save(2, policy, training.adamw(policy, 1e-3))
    with pytest.raises(RuntimeError, match="could not be written, the last one is good"):
        run.save(3, policy, training.adamw(policy, 1e-3))
    assert (tmp_path / "LATEST").read_text() == "step_000001"
    assert checkpoint(tmp_path, 1)


@pytest.mark.parametrize("keep, kept", [(1, [5]), (3, [3, 4, 5])])
def test_the_last_checkpoints_are_kept_and_older_ones_removed(material, tmp_path, keep, kept):
    call("grpo", **material.grpo(out=tmp_path, steps=5, save_every=1, keep=keep))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [f"step_00000{n}" for n in kept]


def test_save_every_0_writes_only_the_last_checkpoint(material, tmp_path):
    call("dpo", **material.dpo(out=tmp_path, steps=4, save_every=0, keep=9))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_000004"]


CHANGED = {
    "dpo": [("lr", 2e-3), ("beta", 0.2), ("loss", "sft"), ("batch", 8), ("seed", 1), ("freeze_vision", True)],
    "grpo": [("lr", 2e-3), ("group", 8), ("kl", 0.1), ("max_new_tokens", 9), ("top_k", 5), ("updates", 2)],
}


@pytest.mark.parametrize("stage", CHANGED)
def test_a_resumed_run_keeps_its_settings(material, tmp_path, capsys, stage):
    settings = getattr(material, stage)(out=tmp_path, steps=2)
    call(stage, **settings)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    capsys.readouterr()
    for name, value in CHANGED[stage]:
        with pytest.raises(SystemExit) as ended:
            changed = settings | {name: value, "resume": True, "steps": 4}
            training.run(lambda changed=changed: call(stage, **changed))
        assert ended.value.code == 2
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and err[0].startswith("error: ") and f"--{name.replace('_', '-')} was" in err[0], err
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_a_step_without_a_finite_gradient_is_skipped_kept_and_made_up_by_no_other(material, tmp_path, monkeypatch):
    plain, calls = dpo.dpo_loss, []

    def sometimes_nan(*args):
        calls.append(args)
        losses, margin = plain(*args)
        return losses * (float("nan") if len(calls) == 2 else 1.0), margin

    monkeypatch.setattr(dpo, "dpo_loss", sometimes_nan)
    call("dpo", **material.dpo(out=tmp_path / "run", steps=3, save_every=1, keep=9))
    assert len(calls) == 3, "a micro-batch a step is what this test counts on"
    log = rows(tmp_path / "run")
    assert [row["skipped"] for row in log] == [0, 1, 0] and log[1]["grad_norm"] is None and log[1]["loss"] is None
    steps = [checkpoint(tmp_path / "run", step) for step in (1, 2, 3)]
    assert distance(steps[0], steps[1]) == 0 and distance(steps[1], steps[2]) > 0
    kept = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    assert kept and all(row["step"] == 2 and row["where"] and row["id"] for row in kept)
