"""run_directory.py: nothing of a run is lost, mixed with another, or trusted when it is damaged."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from commands import ROOT, distance
from conftest import CPU
from groups import groups_of

import files
import model
import run_directory
import training
from processes import StageError
from records import DataError, read_jsonl
from run_directory import Run

# ---------------------------------------------------------------------------------------------------------------------
# Run directory


@pytest.fixture
def signals_restored():
    """Run.open takes Ctrl-C and SIGTERM for itself: give them back."""
    before = {number: signal.getsignal(number) for number in run_directory.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def settings(out, **changes):
    usual = {"out": str(out), "lr": 1e-2, "resume": False, "overwrite": False, "steps": 4}
    return usual | changes


def learn(policy, optimizer, groups, steps):
    for _ in range(steps):
        logp, _ = model.log_probs(policy, groups)
        (-logp.mean()).backward()
        training.update(policy, optimizer, 1e-2, 1.0)


def test_a_resumed_run_ends_with_the_weights_of_an_unbroken_one(tiny_dirs, records, tmp_path, signals_restored):
    path = tiny_dirs["qwen2_5_vl"]
    policy, encoder = model.load(path, CPU, train=True)
    groups = groups_of(encoder, records, [(0, 2), (1, 1)])
    optimizer = training.adamw(policy, 1e-2)
    run = Run.open(settings(tmp_path / "run"), CPU)
    for step in range(1, 4):
        learn(policy, optimizer, groups, 1)
        run.log({"step": step}, [{"reply": "A"}])
        if step == 2:
            run.save(step, policy, optimizer)
    run.finish()
    unbroken = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}

    policy, _ = model.load(path, CPU, train=True)
    optimizer = training.adamw(policy, 1e-2)
    run = Run.open(settings(tmp_path / "run", resume=True, steps=9), CPU)
    assert run.step == 2
    for name in ("log.jsonl", "samples.jsonl"):  # step 3 will be done again
        assert [row["step"] for _, row in read_jsonl(tmp_path / "run" / name)] == [1, 2]
    run.restore(policy, optimizer)
    learn(policy, optimizer, groups, 1)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, unbroken[name]), name


def test_a_run_directory_refuses_a_second_run_and_changed_settings(tmp_path, signals_restored):
    Run.open(settings(tmp_path), CPU).log({"step": 1})
    with pytest.raises(DataError, match="add --resume to go on with it or --overwrite"):
        Run.open(settings(tmp_path), CPU)
    with pytest.raises(DataError, match="--lr was 0.01, now 0.5"):
        Run.open(settings(tmp_path, resume=True, lr=0.5), CPU)
    Run.open(settings(tmp_path, resume=True, lr=0.5), CPU, may_change=("lr",))
    Run.open(settings(tmp_path, overwrite=True, lr=0.7), CPU)
    assert (tmp_path / "log.jsonl").read_text() == ""
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 0.7


def test_checkpoints_are_few_whole_and_written_when_due(scratch_model, records, tmp_path, signals_restored):
    policy, encoder = scratch_model
    optimizer = training.adamw(policy, 1e-3)
    learn(policy, optimizer, groups_of(encoder, records, [(1, 1)]), 1)
    run = Run.open(settings(tmp_path), CPU)
    assert [step for step in range(1, 8) if run.checkpoint_due(step, 7, 3)] == [3, 6, 7]
    assert [step for step in range(1, 8) if run.checkpoint_due(step, 7, 0)] == [7]
    for step in (3, 6, 7):
        run.save(step, policy, optimizer, keep=2)
    run.finish()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_000006", "step_000007"]
    assert (tmp_path / "LATEST").read_text() == "step_000007"


def test_a_step_ends_with_the_checkpoint_that_is_due_and_a_run_asked_to_stop_leaves_after_one(
    scratch_model, records, tmp_path, signals_restored
):
    policy, encoder = scratch_model
    optimizer = training.adamw(policy, 1e-3)
    learn(policy, optimizer, groups_of(encoder, records, [(1, 1)]), 1)
    run = Run.open(settings(tmp_path), CPU)
    options = {"save_every": 2, "keep": 5, "extra": lambda: {"seed": 7}}
    for step in (1, 2, 3):
        run.end_step(step, 9, policy, optimizer, **options)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt, match="after step 5 of 9; --resume"):
        run.end_step(5, 9, policy, optimizer, **options)
    saved = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert saved == ["step_000002", "step_000005"] and (tmp_path / "LATEST").read_text() == "step_000005"
    run.end_step(9, 9, policy, optimizer, **options)  # it is finished: nothing to leave
    run.finish()

    again = Run.open(settings(tmp_path, resume=True), CPU)
    assert again.step == 9 and again.restore(policy, optimizer) == {"seed": 7}

# ---------------------------------------------------------------------------------------------------------------------
# Damaged checkpoints


@pytest.fixture
def saved(scratch_model, records, tmp_path, signals_restored):
    """A run of five steps with checkpoints after 2, 4 and 5: (its directory, {step: weights})."""
    policy, encoder = scratch_model
    optimizer = training.adamw(policy, 1e-2)
    groups = groups_of(encoder, records, [(1, 1)])
    run = Run.open(settings(tmp_path / "run"), CPU)
    weights = {}
    for step in range(1, 6):
        learn(policy, optimizer, groups, 1)
        run.log({"step": step, "skipped": 0}, [{"reply": "A"}])
        if step in (2, 4, 5):
            run.save(step, policy, optimizer, keep=9, extra={"step": step})
            weights[step] = {name: weight.clone() for name, weight in training.whole_weights(policy).items()}
    run.finish()
    return run.out, weights


def resumed(out, policy):
    """(the run, the weights it goes on from, its extra)"""
    run = Run.open(settings(out, resume=True, steps=9), CPU)
    extra = run.restore(policy, training.adamw(policy, 1e-2))
    return run, training.whole_weights(policy), extra


def weights_file(out, step):
    (file,) = (out / f"checkpoints/step_{step:06d}").glob("*.safetensors")
    return file


def flip_a_bit(path):
    """Of a weight, not of the header: only a digest can tell."""
    content = bytearray(path.read_bytes())
    content[-5] ^= 4
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def replace_by_pipe(path):
    path.unlink()
    os.mkfifo(path)


DAMAGES = {
    "a flipped bit": lambda out, step: flip_a_bit(weights_file(out, step)),
    "a truncated shard": lambda out, step: truncate(weights_file(out, step)),
    "an empty shard": lambda out, step: weights_file(out, step).write_bytes(b""),
    "a missing shard": lambda out, step: weights_file(out, step).unlink(),
    "a shard too many": lambda out, step: shutil.copy(weights_file(out, step), weights_file(out, step).parent / "x"),
    "a pipe for a shard": lambda out, step: replace_by_pipe(weights_file(out, step)),
    "a changed extra": lambda out, step: (weights_file(out, step).parent / "extra.json").write_text('{"step": 1}'),
    "no digests": lambda out, step: (weights_file(out, step).parent / "SHA256SUMS").unlink(),
    "empty digests": lambda out, step: (weights_file(out, step).parent / "SHA256SUMS").write_text(""),
    "a binary file for digests": lambda out, step: (weights_file(out, step).parent / "SHA256SUMS").write_bytes(b"\xff"),
    "no checkpoint at all": lambda out, step: shutil.rmtree(weights_file(out, step).parent),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(saved, scratch_model, capsys, name):
    out, weights = saved
    DAMAGES[name](out, 5)
    run, found, extra = resumed(out, scratch_model[0])
    assert run.step == 4 and extra == {"step": 4} and distance(found, weights[4]) == 0
    said = capsys.readouterr().err
    assert "checkpoints/step_000005" in said and said.endswith("; going on from step_000004\n")
    assert said.count("\n") == 1
    assert [row["step"] for _, row in read_jsonl(out / "log.jsonl")] == [1, 2, 3, 4]  # step 5 is done again


def test_when_no_checkpoint_is_whole_the_run_does_not_start(saved):
    out, _ = saved
    for step in (2, 4, 5):
        flip_a_bit(weights_file(out, step))
    with pytest.raises(DataError, match="step_000005.*: is damaged, .*; no other checkpoint is whole, --overwrite"):
        Run.open(settings(out, resume=True), CPU)


LATEST = [None, b"", b"\xff\xfe", b"step_", b"step_000009", b"../../etc", b"step_000005\n" * 9]


@pytest.mark.parametrize("latest", LATEST)
def test_a_damaged_latest_costs_nothing(saved, scratch_model, capsys, latest):
    out, weights = saved
    (out / "LATEST").unlink()
    if latest is not None:
        (out / "LATEST").write_bytes(latest)
    run, found, _ = resumed(out, scratch_model[0])
    assert run.step == 5 and distance(found, weights[5]) == 0
    assert (out / "LATEST").read_text() == "step_000005"  # also if this run has nothing more to write
    assert "LATEST: names no checkpoint" in capsys.readouterr().err or latest == b"step_000009"


@pytest.mark.parametrize("damage", [b"", b"\xff\xfe{", b"[1]", b'{"lr": ', b"{" * 99999])
def test_of_a_damaged_args_json_the_checkpoint_has_a_copy(saved, damage):
    out, _ = saved
    (out / "args.json").write_bytes(damage)
    with pytest.raises(DataError, match="--lr was 0.01, now 7.0"):
        Run.open(settings(out, resume=True, lr=7.0), CPU)
    assert Run.open(settings(out, resume=True), CPU).step == 5
    assert json.loads((out / "args.json").read_text())["lr"] == 0.01


def test_damaged_lines_of_a_log_are_counted_and_the_rest_kept(saved, capsys):
    out, _ = saved
    lines = (out / "log.jsonl").read_bytes().split(b"\n")
    lines[1] = b"\xff" + lines[1]
    lines[2] = b'["no object"]'
    (out / "log.jsonl").write_bytes(b"\n".join(lines) + b'{"step": 6, "lo')  # and the half line of a killed process
    (out / "samples.jsonl").unlink()
    assert Run.open(settings(out, resume=True), CPU).step == 5
    assert "log.jsonl: 2 damaged lines left out, 2 steps are missing" in capsys.readouterr().err
    assert [row["step"] for _, row in read_jsonl(out / "log.jsonl")] == [1, 4, 5]


def test_the_digests_are_those_that_sha256sum_checks(saved):
    folder = weights_file(saved[0], 5).parent
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Inputs


@pytest.fixture
def inputs(tmp_path):
    """Settings with a data file and a model directory."""
    data, base = tmp_path / "data.jsonl", tmp_path / "base"
    base.mkdir()
    data.write_text("one\n")
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_bytes(b"weights")
    (base / "README.md").write_text("no input")
    return settings(tmp_path / "run", data=[str(data)], model=str(base))


@pytest.mark.parametrize("name", ["data.jsonl", "base/config.json", "base/model.safetensors"])
def test_a_resumed_run_refuses_inputs_that_have_changed(inputs, tmp_path, signals_restored, name):
    Run.open(inputs, CPU).log({"step": 1})
    before = json.loads((tmp_path / "run/args.json").read_text())["inputs"]
    assert sorted(before) == sorted(str(tmp_path / path) for path in INPUTS)
    (tmp_path / "base/README.md").write_text("says what it likes")
    Run.open(inputs | {"resume": True}, CPU).log({"step": 1})
    (tmp_path / name).write_text("other")
    with pytest.raises(DataError, match=f"{name}: has changed since .*run was started; a resumed run needs the same"):
        Run.open(inputs | {"resume": True}, CPU)


INPUTS = ("data.jsonl", "base/config.json", "base/model.safetensors")


def test_ranks_that_read_different_files_do_not_start():
    run_directory.check_inputs([{"a": "1"}, {"a": "1"}])
    for other in ({"a": "2"}, {}, {"a": "1", "b": "1"}):
        with pytest.raises(DataError, match="rank 2 reads other bytes than rank 0"):
            run_directory.check_inputs([{"a": "1"}, {"a": "1"}, other])


@pytest.mark.parametrize("size", [10, files.SAMPLED * 3])
def test_the_identity_of_a_file_tells_training_apart(tmp_path, monkeypatch, size):
    monkeypatch.setattr(files, "PIECES", 2)
    path = tmp_path / "weights"
    path.write_bytes(bytes(size))
    before = files.identity(path)
    assert before == files.identity(path)
    for place in (0, size - 1):
        changed = bytearray(size)
        changed[place] = 1
        path.write_bytes(changed)
        assert files.identity(path) != before
    path.write_bytes(bytes(size + 1))
    assert files.identity(path) != before


# ---------------------------------------------------------------------------------------------------------------------
# One place for one run


def test_an_output_that_is_an_input_is_refused(inputs, tmp_path, signals_restored):
    for name in ("base", "base/../base", "link"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(tmp_path / "base")
        with pytest.raises(DataError, match="--out .*: is what --model reads; choose another place"):
            Run.open(inputs | {"out": str(tmp_path / name), "overwrite": True}, CPU)
    with pytest.raises(DataError, match="is a file; a directory is needed"):
        Run.open(inputs | {"out": inputs["data"][0]}, CPU)
    assert (tmp_path / "base/model.safetensors").read_bytes() == b"weights"


def test_a_model_that_no_run_made_is_not_written_over(inputs, tmp_path, signals_restored):
    shutil.copytree(tmp_path / "base", tmp_path / "precious")
    for more in ({}, {"overwrite": True}, {"resume": True}):
        with pytest.raises(DataError, match="precious: holds a model that no run made; choose another --out"):
            Run.open(inputs | {"out": str(tmp_path / "precious")} | more, CPU)
    assert (tmp_path / "precious/model.safetensors").read_bytes() == b"weights"


def test_overwrite_leaves_nothing_that_is_a_model(saved, scratch_model, signals_restored):
    out, _ = saved
    Run.open(settings(out, resume=True), CPU).export(*scratch_model)
    model.load(str(out), CPU)
    Run.open(settings(out, overwrite=True), CPU)
    assert sorted(path.name for path in out.glob("*.json*")) == [
        "args.json", "log.jsonl", "preprocessor_config.json", "samples.jsonl", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    assert not list(out.rglob("*.safetensors"))
    with pytest.raises(DataError):
        model.load(str(out), CPU)


def test_a_run_that_is_given_more_steps_is_no_model_until_it_has_made_them(saved, scratch_model):
    out, _ = saved
    policy, encoder = scratch_model
    Run.open(settings(out, resume=True), CPU).export(policy, encoder)
    assert (out / "config.json").exists()
    run, _, _ = resumed(out, policy)
    assert not (out / "config.json").exists()
    run.export(policy, encoder)
    assert (out / "config.json").exists()


HOLD = """
import sys, time
import torch
from processes import World
from run_directory import Run
settings = {"out": sys.argv[1], "resume": False, "overwrite": False}
Run.open(settings, World(0, 1, torch.device("cpu"))).log({"step": 1})
print("holds", flush=True)
time.sleep(600)
"""


def test_two_processes_cannot_write_to_one_directory_and_the_lock_ends_with_its_process(tmp_path, signals_restored):
    out = tmp_path / "run"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen([sys.executable, "-c", HOLD, out], stdout=subprocess.PIPE, env=environment)
    try:
        assert holder.stdout.readline() == b"holds\n"
        for more in ({}, {"resume": True}, {"overwrite": True}):
            with pytest.raises(DataError, match=rf"another process is at work here \(process {holder.pid} on "):
                Run.open(settings(out) | more, CPU)
    finally:
        holder.kill()
        holder.wait()
    Run.open(settings(out, resume=True), CPU)


# ---------------------------------------------------------------------------------------------------------------------
# Steps without a finite gradient


def test_a_gradient_that_is_no_number_changes_nothing(scratch_model, records):
    policy, encoder = scratch_model
    optimizer = training.adamw(policy, 1e-2)
    groups = groups_of(encoder, records, [(1, 1)])
    learn(policy, optimizer, groups, 1)
    before = {name: value.clone() for name, value in run_directory.checkpoint_state(policy, optimizer).items()}
    for bad in (math.nan, math.inf):
        logp, _ = model.log_probs(policy, groups)
        (logp.sum() * bad).backward()
        assert not math.isfinite(training.update(policy, optimizer, 1e-2, 1.0))
        assert all(weight.grad is None for weight in policy.parameters())
    assert distance(before, run_directory.checkpoint_state(policy, optimizer)) == 0
    learn(policy, optimizer, groups, 1)  # and the next step does
    assert distance(before, run_directory.checkpoint_state(policy, optimizer)) > 0


def test_skipped_steps_are_kept_and_too_many_in_a_row_end_the_run(tmp_path, capsys, signals_restored):
    run = Run.open(settings(tmp_path), CPU)
    for step, skipped in enumerate([True, True, False, True, True], 1):
        run.log({"step": step, "grad_norm": math.nan, "skipped": int(skipped)})
        run.count_skipped(step, skipped, [{"id": f"q{step}", "replies": ["?"]}], 3)
    with pytest.raises(StageError, match="3 steps in a row without a finite gradient .--max-skipped 3.*--lr"):
        run.count_skipped(6, True, [{"id": "q6"}], 3)
    kept = [row for _, row in read_jsonl(tmp_path / "skipped.jsonl")]
    assert kept[0] == {"step": 1, "id": "q1", "replies": ["?"]} and [row["step"] for row in kept] == [1, 2, 4, 5, 6]
    assert "step 6: the gradient is no finite number" in capsys.readouterr().err
    assert json.loads((tmp_path / "log.jsonl").read_text().split("\n")[0])["grad_norm"] is None
    run.count_skipped(7, True, [], 0)  # 0: never


def test_a_resumed_run_knows_how_many_were_skipped_before_it(tmp_path, scratch_model, signals_restored):
    policy, _ = scratch_model
    run = Run.open(settings(tmp_path), CPU)
    for step, skipped in enumerate([1, 0, 2, 1], 1):
        run.log({"step": step, "skipped": skipped})
    run.save(4, policy, training.adamw(policy, 1e-2))
    run.finish()
    again = Run.open(settings(tmp_path, resume=True), CPU)
    assert again.step == 4 and again.skipped == 2


# ---------------------------------------------------------------------------------------------------------------------
# Signals


def test_one_wish_to_stop_may_arrive_several_times_and_a_second_one_comes_seconds_later(tmp_path, monkeypatch):
    run, now = Run(tmp_path, CPU), [100.0]
    monkeypatch.setattr(run_directory.time, "monotonic", lambda: now[0])
    run.stop = True  # another rank was asked first, and has passed it on
    run._ask_to_stop(signal.SIGTERM, None)
    now[0] += 1.0
    run._ask_to_stop(signal.SIGTERM, None)  # by the scheduler, after the launcher
    now[0] += 1.5
    with pytest.raises(KeyboardInterrupt):
        run._ask_to_stop(signal.SIGINT, None)
