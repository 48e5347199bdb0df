"""Two processes, or four, must do what one does: the same replies, losses, gradient norms, weights and checkpoints.

`torchrun` starts them on the CPU (gloo), the weights sharded by FSDP2 in every way there is. In many cases the ranks
differ: one has pictures and the other none, one has nothing to learn from, one needs more forwards than the other, one
has no pair at all. If a rank then skips a collective, the other waits for ever, or answers the wrong one. So every
start has a timeout, and a hang is a failure.

All comparable runs share one start of two processes and one of four: starting Python and torch takes longer than
training.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from commands import (
    ROOT,
    TWO_PROCESSES,
    Material,
    call,
    checkpoint,
    distance,
    end,
    environment,
    finish,
    flags,
    kill,
    rows,
    start,
    stop,
    timeless,
    torchrun,
    weights,
    write,
)
from safetensors.torch import save_file

import model
import training
from records import epoch_order, read_records
from toy.tiny_model import make_tiny

FILE = 100_000  # bytes of a file, where a model is exported in several
LR = 3e-4  # AdamW moves every weight by about this much per update, even where the gradient is close to nothing


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


def select(material, *ids):
    """A data file with these records. Those named u… ask for JSON, which the model cannot write: no reward varies."""
    records = {record["id"]: record for record in material.records}
    for name in ("u0", "u1"):
        records[name] = material.question(name, "Give one letter as JSON.", reply_format="json")
    return write(material.folder / f"{'-'.join(ids)}.jsonl", [records[name] for name in ids])


MIXED = ("p0", "t0", "p1", "t1", "t2")
CASES = {
    "dpo": ("dpo", {}),
    "dpo with one pair left at the end": ("dpo", {"batch": 7, "steps": None}),
    "dpo in small micro-batches": ("dpo", {"batch": 3, "micro_tokens": 120, "freeze_vision": True}),
    "sft one reply at a time": ("dpo", {"batch": 1, "steps": 6, "loss": "sft"}),
    "dpo on Qwen3-VL": ("dpo", {"model": "qwen3_vl", "data": "p0-t0", "batch": 2}),
    "dpo on InternVL": ("dpo", {"model": "internvl", "data": "p0-t0", "batch": 2}),
    "grpo": ("grpo", {}),
    "grpo with KL and two updates": ("grpo", {"kl": 0.04, "updates": 2, "normalizer": "token"}),
    "pictures on one rank": ("grpo", {"data": ("p0", "t0"), "prompts": 2}),
    "nothing to learn on one rank": ("grpo", {"data": ("p1", "u0"), "prompts": 2, "advantage_scale": "batch"}),
    "nothing to learn on any rank": ("grpo", {"data": ("u0", "u1"), "prompts": 2, "steps": 2}),
    "unequal micro-batches": ("grpo", {"data": MIXED, "micro_tokens": 150, "updates": 2}),
    "unequal micro-batches with KL": ("grpo", {"data": MIXED, "micro_tokens": 150, "kl": 0.04, "freeze_vision": True}),
}

# Ways to share the work: (case, number of processes, flags). One process has done each case in the plain way.
WAYS = [(name, 2, {}) for name in CASES]
WAYS += [
    ("dpo", 2, {"shard": "grad"}),
    ("dpo in small micro-batches", 2, {"shard": "grad"}),
    ("dpo in small micro-batches", 2, {"shard": "none"}),
    ("unequal micro-batches with KL", 2, {"shard": "none"}),
    ("unequal micro-batches with KL", 2, {"shard": "grad"}),
    ("unequal micro-batches with KL", 2, {"accumulate": "shards"}),
    ("unequal micro-batches", 2, {"gradient_checkpointing": "on"}),
    ("grpo with KL and two updates", 2, {"offload": True}),  # moves nothing on a CPU, but takes FSDP's way of doing so
    ("dpo in small micro-batches", 2, {"offload": True, "accumulate": "shards"}),
    ("dpo with one pair left at the end", 4, {}),
    ("dpo in small micro-batches", 4, {"shard": "none"}),
    ("dpo on Qwen3-VL", 4, {}),
    ("dpo on InternVL", 2, {"shard": "grad"}),
    ("dpo", 4, {"replicas": 2}),
    ("grpo with KL and two updates", 4, {}),
    ("grpo with KL and two updates", 4, {"replicas": 2, "accumulate": "shards"}),
    ("grpo", 4, {"shard": "none"}),
    ("grpo", 4, {"shard": "grad", "replicas": 2}),
]


def settings_of(material, name):
    stage, changes = CASES[name]
    changes = dict(changes)
    if "model" in changes:
        pairs = {pair["id"]: pair for pair in material.pairs}
        changes |= {"model": material.folder / changes["model"]}
        changes |= {"data": write(material.folder / "two_pairs.jsonl", [pairs["p0"], pairs["t0"]])}
    elif "data" in changes:
        changes["data"] = select(material, *changes["data"])
    return stage, getattr(material, stage)(lr=LR, **changes)


@pytest.fixture(scope="module")
def both(material, tmp_path_factory):
    """A folder with the runs of one process in one/…, those of two in two/…, the ways in ways/0, ways/1, …"""
    folder = tmp_path_factory.mktemp("both")
    for family in ("qwen3_vl", "internvl"):
        make_tiny(material.folder / family, family, layers=2)
    jobs = {2: [], 4: []}
    for name in CASES:
        stage, settings = settings_of(material, name)
        call(stage, **settings, out=folder / "one" / name)
    for number, (name, count, ways) in enumerate(WAYS):
        stage, settings = settings_of(material, name)
        jobs[count].append((stage, settings | ways | {"out": way(folder, number)}))
    # a run that one process begins and two go on with
    begun = folder / "two" / "resumed"
    call("grpo", **material.grpo(lr=LR, steps=2, out=begun))
    call("grpo", **material.grpo(lr=LR, steps=4, out=folder / "one" / "resumed"))
    jobs[2].append(("grpo", material.grpo(lr=LR, steps=4, out=begun, resume=True)))
    jobs[2].append(("grpo", material.grpo(lr=LR, steps=2, dtype="bf16", kl=0.04, out=folder / "two" / "bf16")))
    for name, size in (("small", 2000), ("large", 60000)):
        make_tiny(folder / name, hidden=256, heads=4, layers=2, vocab=size)
    jobs[4].append(("checks", {"check": "memory", "model": folder / "large", "out": folder / "memory"}))
    exported = {"check": "export", "model": material.speaker, "out": folder / "files", "bytes": FILE}
    jobs[2].append(("checks", exported))
    jobs[2].append(("checks", {"check": "refuse", "model": spoiled(material, folder), "out": folder / "refused.json"}))
    for count in jobs:
        torchrun(jobs[count], folder, count)
    return folder


def spoiled(material, folder):
    """A model with one NaN, in the last row of a matrix: it lies in the shard of the last rank alone."""
    shutil.copytree(material.tiny, folder / "spoiled")
    tensors = weights(material.tiny)
    tensors["model.layers.1.mlp.up_proj.weight"][-1, 0] = float("nan")
    save_file(tensors, folder / "spoiled/model.safetensors", {"format": "pt"})
    return folder / "spoiled"


def way(folder, number):
    name, count, ways = WAYS[number]
    return folder / ("ways" if ways or count > 2 else "two") / (str(number) if ways or count > 2 else name)


def check_equal(two, one, before, steps):
    """Two runs are the same but for the rounding of sums: log, samples, weights, optimizer state."""
    assert len(rows(two)) == len(rows(one)) > 0
    for row, expected in zip(timeless(two), timeless(one), strict=True):
        for key, value in expected.items():
            if key == "sampler_gap":
                assert row[key] < 1e-5
            elif key == "preference_accuracy" and expected["margin"] == pytest.approx(0, abs=1e-6):
                continue  # the first step: policy and reference are the same, every pair is a tie
            elif key == "grad_norm":
                assert row[key] == pytest.approx(value, rel=1e-5, abs=1e-6), (key, row["step"])
            else:
                assert row[key] == pytest.approx(value, rel=1e-5, abs=2e-6), (key, row["step"])
        assert row.keys() == expected.keys()
    assert (two / "samples.jsonl").read_text() == (one / "samples.jsonl").read_text()
    after, expected, start_weights = weights(two), weights(one), weights(before)
    moved = total(expected, start_weights)
    assert total(after, expected) <= 1e-3 * moved and distance(after, expected) < 5e-5
    state, wanted = checkpoint(two, steps), checkpoint(one, steps)
    assert state.keys() == wanted.keys()
    for name, value in wanted.items():
        if "/" not in name:
            continue  # a weight, see above
        assert (state[name] - value).abs().max() <= 1e-6 + 1e-3 * value.abs().max(), name
    return moved


def total(one, other):
    """Euclidean distance between two sets of weights."""
    return sum((one[name] - other[name]).square().sum().item() for name in one) ** 0.5


@pytest.mark.parametrize("number", range(len(WAYS)), ids=[f"{count} {name} {ways}" for name, count, ways in WAYS])
def test_several_processes_equal_one(material, both, number):
    name = WAYS[number][0]
    _, settings = settings_of(material, name)
    one = both / "one" / name
    moved = check_equal(way(both, number), one, settings["model"], len(rows(one)))
    if name == "nothing to learn on any rank":
        assert moved == 0
    else:
        assert moved > 10 * LR


def test_the_cases_are_what_their_names_say(material, both):
    def dealt(name):
        """[(ids of rank 0's prompts, ids of rank 1's) of each step]"""
        settings = settings_of(material, name)[1]
        records, size = read_records(settings["data"]), settings["prompts"]
        steps = [epoch_order(0, len(records), step * size, size) for step in range(settings["steps"])]
        return [["".join(records[index]["id"][0] for index in batch[rank::2]) for rank in (0, 1)] for batch in steps]

    def pictures(step):
        return [kinds.count("p") for kinds in step]

    assert all(sorted(step) == ["p", "t"] for step in dealt("pictures on one rank"))
    assert all(sorted(step) == ["p", "u"] for step in dealt("nothing to learn on one rank"))
    assert {row["useful_groups"] for row in rows(both / "two/nothing to learn on one rank")} == {0.5}
    assert {row["useful_groups"] for row in rows(both / "two/nothing to learn on any rank")} == {0.0}
    for name in ("unequal micro-batches", "unequal micro-batches with KL"):
        # 150 tokens hold one group with a picture, or two without: ranks with a different number of pictures differ
        assert any(len(set(pictures(step))) == 2 for step in dealt(name))
    log = rows(both / "two/dpo with one pair left at the end")
    assert [round(row["seconds"] * row["samples_per_s"]) for row in log] == [7, 1]


def test_two_processes_go_on_with_what_one_began(material, both):
    assert [row["step"] for row in rows(both / "two/resumed")] == [1, 2, 3, 4]
    check_equal(both / "two/resumed", both / "one/resumed", material.speaker, 4)


def test_a_model_is_exported_in_files_that_the_processes_write_in_turns(material, both):
    from transformers import AutoModelForImageTextToText

    written = json.loads((both / "files/written.json").read_text())
    names = [sorted(name for name, _ in part) for part in written]
    count = len(sum(names, []))
    assert count > 3 and abs(len(names[0]) - len(names[1])) <= 1
    largest = max(value.nbytes for value in weights(material.speaker).values())
    assert all(size <= max(FILE, largest) for part in written for _, size in part), "nobody holds more than a file"
    expected = [f"model-{number:05d}-of-{count:05d}.safetensors.partial" for number in range(1, count + 1)]
    assert sorted(sum(names, [])) == expected
    hf, loading = AutoModelForImageTextToText.from_pretrained(both / "files", output_loading_info=True)
    assert not any(loading.values()), loading
    plain = AutoModelForImageTextToText.from_pretrained(material.speaker)
    assert distance(dict(hf.state_dict()), dict(plain.state_dict())) == 0
    loaded = [model.load(path, training.setup(), train=True)[0] for path in (both / "files", material.speaker)]
    assert distance(*map(training.whole_weights, loaded)) == 0


def test_no_process_ever_holds_the_whole_model_while_loading_it(both):
    whole = (both / "large/model.safetensors").stat().st_size
    grown = json.loads((both / "memory/grown.json").read_text())
    assert len(grown) == 4 and whole > 60e6
    # its shard, and the pages of the file that it read for it
    assert all(0.2 * whole < size < 0.75 * whole for size in grown), [size / whole for size in grown]


def test_a_nan_in_the_shard_of_one_rank_is_refused_by_all_in_the_same_words(both):
    first, second = json.loads((both / "refused.json").read_text())
    assert first == second and "layers.1.mlp.up_proj.weight holds NaN or inf" in first


def test_replicas_must_divide_the_processes(material, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        training.run(lambda: call("grpo", **material.grpo(out=tmp_path / "out", replicas=2)))
    assert ended.value.code == 2 and "--replicas 2 does not divide the 1 " in capsys.readouterr().err.splitlines()[-1]


def test_sigterm_stops_both_processes_with_a_checkpoint_that_one_process_goes_on_with(material, tmp_path):
    settings = material.grpo(lr=LR, steps=300, save_every=0, kl=0.04)
    process = start(*TWO_PROCESSES, ROOT / "grpo.py", **settings, out=tmp_path / "out")
    stop(process, tmp_path / "out", 3, signal.SIGTERM)  # torchrun passes it on
    status, _, err = end(process)
    done = len(rows(tmp_path / "out"))
    assert status != 0 and 3 <= done < 300
    assert (tmp_path / "out/LATEST").exists(), err
    assert (tmp_path / "out/LATEST").read_text() == f"step_{done:06d}", err
    assert f"stopped after step {done} of 300" in err
    steps = done + 2
    call("grpo", **settings | {"steps": steps}, out=tmp_path / "out", resume=True)
    call("grpo", **settings | {"steps": steps}, out=tmp_path / "whole")
    check_equal(tmp_path / "out", tmp_path / "whole", material.speaker, steps)


def test_bad_input_ends_both_processes_soon_and_prints_one_line(material, tmp_path):
    lost = write(tmp_path / "lost.jsonl", [material.pairs[5], material.pairs[3] | {"images": ["lost.png"]}])
    # A prompt that only rank 1 meets: rank 0 knows nothing of it, and would wait for ever
    long = material.question("long", "word " * 5000)
    two = write(tmp_path / "two.jsonl", [long, material.question("t", "Give a letter.")])
    seed = next(seed for seed in range(9) if epoch_order(seed, 2, 0, 2) == [1, 0])
    commands = {
        f"error: {lost}:2: image": ("dpo.py", material.dpo(data=lost)),
        f"error: {two}:1: ": ("grpo.py", material.grpo(data=two, prompts=2, seed=seed)),
        "error: --prompts 5 cannot be dealt": ("grpo.py", material.grpo(prompts=5)),
    }
    for line, (stage, settings) in commands.items():
        status, _, err = end(start(*TWO_PROCESSES, ROOT / stage, **settings, out=tmp_path / "out"))
        assert status not in (0, None), err
        errors = [text for text in err.splitlines() if text.startswith("error: ")]
        assert len(errors) == 1 and errors[0].startswith(line), err
        assert rows(tmp_path / "out") == []


def test_two_processes_sample_and_learn_in_bf16_over_fp32_master_weights(both):
    log = rows(both / "two" / "bf16")
    assert len(log) == 2 and all(0 < row["grad_norm"] < 1e3 for row in log)
    assert all(row["sampler_gap"] < 0.5 for row in log), "bf16 may round; a prompt's lost keys would be whole nats"
    assert {str(weight.dtype) for weight in weights(both / "two" / "bf16").values()} == {"torch.float32"}


def test_the_recipe_for_two_nodes_runs_as_two_nodes_of_one_process(material, tmp_path):
    speaker, out = material.speaker, tmp_path / "out"
    command = ["bash", ROOT / "recipes/two_nodes.sh", speaker, speaker, material.data, out]
    small = material.grpo(lr=LR, steps=2)
    more = {name: small[name] for name in ("prompts", "group", "max_new_tokens", "steps", "lr")}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = environment() | {"MASTER": "localhost", "PORT": str(port), "GPUS": "1", "PATH": path}
    nodes = [
        subprocess.Popen([*command, *flags(**more)], cwd=tmp_path, env=env | {"NODE": str(node)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        for node in (0, 1)
    ]  # fmt: skip
    try:
        (first, _), (second, _) = (finish(node) for node in nodes)
    finally:
        for node in nodes:  # one that has lost the other waits for it
            if node.poll() is None:
                kill(node)
    assert all("fits: grpo.py" in out and ", 2 GPU(s), " in out for out in (first, second))  # both nodes look
    assert len(rows(tmp_path / "out")) == 2
    written = json.loads((tmp_path / "out/args.json").read_text())
    assert written["replicas"] == 2 and written["schedule"] == "linear"
    call("grpo", **material.grpo(**more, kl=0.04, top_k=50, schedule="linear", out=tmp_path / "one"))
    check_equal(tmp_path / "out", tmp_path / "one", material.speaker, 2)
