"""recipes/plan.py counts, before a run, the memory that the run will need. These tests compare it with real ones."""

import json
import subprocess
import sys

import pytest
import torch
from commands import ROOT, end, processes, start

import jigsaw
import model
import training
from toy.scenes import scene
from toy.tiny_model import make_tiny

sys.path.insert(0, str(ROOT / "recipes"))
import plan

GROUPS, REPLIES, REPLY, CHUNK = 4, 8, 40, 2**22


def measured(folder, dtype, recompute, freeze_vision):
    """In every process of a group: bytes that an update of two micro-batches holds at most, with FSDP's buffers."""
    import random

    import torch.distributed as dist
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    torch.set_num_threads(1)
    world = training.setup()
    policy, encoder = model.load(folder, world, train=True, dtype=dtype, recompute=recompute, freeze_vision=freeze_vision)
    policy.chunk_bytes = CHUNK
    picture, record = jigsaw.make_puzzle(scene(random.Random(0)), 2, 1, "pair", random.Random(0))
    path = f"{folder}/picture-{world.rank}.png"
    picture.save(path)
    prompt = encoder.prompt({**record, "id": "p", "images": [path]})
    batch = model.pack([(prompt, [torch.arange(2000, 2000 + REPLY)] * REPLIES)] * GROUPS)
    optimizer = training.adamw(policy, 1e-3)
    tracker = FSDPMemTracker(policy, optimizer)

    def update():
        for micro in range(2):
            tracker.reset_mod_stats()
            training.backward(policy, world, policy(batch).sum(), last=micro == 1)
        training.update(policy, optimizer, 1e-3, 1.0)

    update()  # the optimizer has its state after the first
    with tracker:
        update()
    total = next(iter(tracker.get_tracker_snapshot("peak").values()))["Total"]
    if world.main:
        image = int((prompt.ids == encoder.image_id).sum())
        print(json.dumps({"bytes": int(total), "prompt": len(prompt.ids), "image": image}), flush=True)
    dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the proportions of a large one: several blocks, a vocabulary that weighs something."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    make_tiny(folder, hidden=256, heads=4, layers=6, vocab=20000)
    return folder


@pytest.mark.parametrize(
    "dtype, recompute, freeze",
    [("fp32", "on", False), ("fp32", "off", False), ("bf16", "on", False), ("fp32", "on", True)],
)
def test_a_plan_is_a_little_above_what_a_run_of_two_processes_holds(folder, dtype, recompute, freeze):
    arguments = (folder, dtype, recompute, "frozen" if freeze else "")
    status, out, err = end(start(*processes(2), __file__, *arguments))
    assert status == 0, err
    run = json.loads(out.splitlines()[-1])
    patches = 4 * run["image"]
    budget = GROUPS * (run["prompt"] + patches + REPLIES * (REPLY - 1))
    counted = plan.plan(
        plan.config_of(str(folder)), 2, bf16=dtype == "bf16", recompute=recompute == "on", freeze_vision=freeze,
        micro_tokens=budget, chunk_bytes=CHUNK, prompt=run["prompt"], image=run["image"], group=REPLIES, reply=REPLY,
    )  # fmt: skip
    total = sum(counted["always"].values()) + sum(counted["learn"].values())
    assert run["bytes"] <= total <= 1.25 * run["bytes"], (run["bytes"] / 2**20, total / 2**20, counted)


def weights_of(config, size=1, **settings):
    settings = {"shard": "full", "replicas": 1, "bf16": True, "freeze_vision": False} | settings
    return plan.held(config, size, **settings)


def test_published_sizes_have_the_published_number_of_weights():
    # 3.75, 8.29, 33.5 and 73.4 billion on the models' pages
    for name, billions in (("3B", 3.75), ("7B", 8.29), ("32B", 33.5), ("72B", 73.4)):
        assert weights_of(plan.config_of(name))["masters"] / 4e9 == pytest.approx(billions, rel=0.005), name


def test_shards_halve_with_twice_the_processes_and_copies_hold_more(folder):
    config = plan.config_of(str(folder))
    alone = weights_of(config)["masters"]
    assert weights_of(config, 8)["masters"] == pytest.approx(alone / 8, rel=0.01)
    assert weights_of(config, 8, replicas=4)["masters"] == pytest.approx(alone / 2, rel=0.01)
    assert weights_of(config, 8, shard="none")["masters"] == alone
    tower = sum(w.numel() for w in plan.bare_policy(config, torch.float32, bf16=True).hf.model.visual.parameters())
    assert alone - weights_of(config, freeze_vision=True)["trained"] == 4 * tower


def test_the_command_says_whether_a_run_fits(folder):
    def verdict(*words):
        command = [sys.executable, ROOT / "recipes/plan.py", *words]
        return subprocess.run(command, text=True, capture_output=True, check=True).stdout.splitlines()[-1]

    large = ("72B", "--gpus", "64")
    assert verdict("7B", "--gpus", "8").startswith("  fits into 80 GiB")
    assert verdict(*large).startswith("  does NOT fit into 80 GiB")
    assert verdict(*large, "--accumulate", "shards", "--sampler", "vllm", "--vllm-tp", "8").startswith("  fits")


if __name__ == "__main__":
    training.run(lambda: measured(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4] == "frozen"))
