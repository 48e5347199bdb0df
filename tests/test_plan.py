"""recipes/plan.py counts, before a run, the memory that the run will need. These tests compare it with real ones."""

import json
import random
import sys

import pytest
import torch
from commands import ROOT, end, finish, processes, start

import jigsaw
import model
import training
from records import DataError
from toy.scenes import scene
from toy.tiny_model import FAMILIES, make_tiny
from training import Sharding

sys.path.insert(0, str(ROOT / "recipes"))
import plan

GROUPS, REPLIES, REPLY, CHUNK = 2, 8, 40, 2**22


CASES = {  # what model.load is told, and plan.plan as well
    "fp32": {"dtype": "fp32", "gradient_checkpointing": "on", "freeze_vision": False},
    "all activations kept": {"dtype": "fp32", "gradient_checkpointing": "off", "freeze_vision": False},
    "bf16": {"dtype": "bf16", "gradient_checkpointing": "on", "freeze_vision": False},
    "frozen vision tower": {"dtype": "fp32", "gradient_checkpointing": "on", "freeze_vision": True},
}


def measured(folder, world, **options):
    """{"bytes": what an update of two micro-batches holds at most, with FSDP's buffers; "prompt", "image": its tokens}.

    In every process of a group.
    """
    from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker

    policy, encoder = model.load(folder, world, train=True, **options)
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
    image = int((prompt.ids == encoder.image_id).sum())
    return {"bytes": int(total), "prompt": len(prompt.ids), "image": image}


def measure_all(folder):
    """Print {case: what `measured` says}: in every process that torchrun starts, one case after the other."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    world = training.setup()
    found = {name: measured(folder, world, **options) for name, options in CASES.items()}
    if world.main:
        print(json.dumps(found), flush=True)
    dist.barrier()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model with the proportions of a large one: several blocks, a vocabulary that weighs something."""
    folder = tmp_path_factory.mktemp("plan") / "model"
    make_tiny(folder, hidden=256, heads=4, layers=4, vocab=20000)
    return folder


@pytest.fixture(scope="module")
def runs(folder):
    """{case: what a run of two processes held}, all from the same two processes."""
    status, out, err = end(start(*processes(2), __file__, folder))
    assert status == 0, err
    return json.loads(out.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_plan_is_a_little_above_what_a_run_of_two_processes_holds(folder, runs, case):
    options, run = CASES[case], runs[case]
    patches = 4 * run["image"]
    budget = GROUPS * (run["prompt"] + patches + REPLIES * (REPLY - 1))
    counted = plan.plan(
        str(folder), 2, bf16=options["dtype"] == "bf16", checkpointing=options["gradient_checkpointing"] == "on",
        freeze_vision=options["freeze_vision"], micro_tokens=budget, chunk_bytes=CHUNK,
        prompt=run["prompt"], image=run["image"], group=REPLIES, reply=REPLY,
    )  # fmt: skip
    total = sum(counted["always"].values()) + sum(counted["learn"].values())
    assert run["bytes"] <= total <= 1.15 * run["bytes"], (run["bytes"] / 2**20, total / 2**20, counted)


def weights_of(name, size=1, freeze_vision=False, **sharding):
    folder = plan.folder_of(str(name))
    return plan.held(folder, size, sharding=Sharding(**sharding), bf16=True, freeze_vision=freeze_vision)


def test_published_sizes_have_the_published_number_of_weights():
    # on the models' pages
    published = {"2B": 2.21, "3B": 3.75, "7B": 8.29, "32B": 33.5, "72B": 73.4}
    for name, billions in published.items():
        assert weights_of(name).master / 4e9 == pytest.approx(billions, rel=0.005), name


def test_shards_halve_with_twice_the_processes_and_copies_hold_more(folder):
    alone = weights_of(folder).master
    assert weights_of(folder, 8).master == pytest.approx(alone / 8, rel=0.01)
    assert weights_of(folder, 8, replicas=4).master == pytest.approx(alone / 2, rel=0.01)
    assert weights_of(folder, 8, mode="none").master == alone
    policy = plan.bare_policy(str(folder), torch.float32, bf16=True)
    tower = sum(weight.numel() for part in policy.family.vision(policy.hf) for weight in part.parameters())
    assert alone - weights_of(folder, freeze_vision=True).trained == 4 * tower


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_trained_can_be_planned_for(family, tmp_path):
    make_tiny(tmp_path, family)
    counted = plan.plan(str(tmp_path), 2, group=2, reply=8, prompt=40, image=16)
    assert all(size > 0 for part in counted.values() for size in part.values())


LARGE = "Qwen/Qwen2.5-VL-7B-Instruct"


def judged(command, **known):
    fits, gib, why = plan.judge(command, **known)
    assert f"{gib:.1f} GiB" in why
    return fits, gib


def test_a_command_line_is_judged_by_the_flags_of_its_stage():
    start_of = f"torchrun --nproc_per_node=8 grpo.py --model {LARGE} --data a.jsonl --out b --prompts 128 "
    short = judged(start_of + "--max-new-tokens 64")
    long = judged(start_of + "--max-new-tokens \\\n 10240")
    shards = judged(start_of + "--max-new-tokens 10240 --accumulate shards")
    assert short[0] and not long[0] and shards[0]
    assert short[1] < shards[1] < long[1]
    # a reference costs an eighth of the weights in fp32; one GPU has no room for AdamW's moments
    assert judged(start_of + "--max-new-tokens 64 --kl 0.04")[1] > short[1] + 8.29 * 4e9 / 8 / 2**30
    assert not judged(f"python dpo.py --model {LARGE} --data a.jsonl --out b")[0]
    assert judged(f"python eval.py --model {LARGE} --data a.jsonl --out b.json")[0]
    # larger pictures, longer pairs
    assert judged(start_of + "--max-new-tokens 64 --max-pixels 6000000 --micro-tokens 1")[1] > short[1]
    pairs = f"torchrun --nproc_per_node=8 dpo.py --model {LARGE} --data a.jsonl --out b"
    assert judged(pairs, reply=10240)[1] > judged(pairs)[1]


def test_a_teacher_behind_a_server_takes_no_memory_here():
    pairs = f"python distill.py --policy teacher --base {LARGE} --data a.jsonl --out b.jsonl"
    here = pairs.replace("teacher", LARGE)
    assert judged(pairs + " --policy-url http://localhost:8000/v1") == judged(here)


def test_a_command_that_cannot_be_judged_says_why():
    command = "python grpo.py --data a.jsonl --out b --model "
    with pytest.raises(DataError, match="runs/zero: neither a model directory"):
        plan.judge(command + "runs/zero")
    assert plan.judge(command + "runs/zero", models={"runs/zero": "2B"})[1] > 0
    with pytest.raises(DataError, match="no stage is named"):
        plan.judge("make demo")
    with pytest.raises(DataError, match="--prompts 64 cannot be dealt evenly to 7"):
        plan.judge(f"torchrun --nproc_per_node 7 grpo.py --data a.jsonl --out b --model {LARGE}")
    with pytest.raises(DataError, match="--replicas 3 does not divide"):
        plan.judge(f"torchrun --nproc_per_node 8 grpo.py --replicas 3 --data a.jsonl --out b --model {LARGE}")


def test_the_command_says_whether_a_run_fits(capsys):
    def verdict(*words):
        plan.main(list(words))
        return capsys.readouterr().out.splitlines()[-1]

    large = ("72B", "--gpus", "64")
    assert verdict("7B", "--gpus", "8").startswith("  fits into 80 GiB")
    assert verdict(*large).startswith("  does NOT fit into 80 GiB")
    assert verdict(*large, "--accumulate", "shards", "--sampler", "vllm", "--vllm-tp", "8").startswith("  fits")


def test_it_is_a_command_of_its_own(folder):
    out, _ = finish(start(ROOT / "recipes/plan.py", folder, "--gpus", "2"))
    assert out.splitlines()[-1].startswith("  fits into 80 GiB")


RECIPES = {
    "one_node.sh": ["7B", "-", "-", "-"],
    "specs_7b.sh": ["orsta", "virl39k", "benchmarks.jsonl", "out"],
}  # test_readme.py judges the others


@pytest.mark.parametrize("name", RECIPES)
def test_every_command_of_a_recipe_fits_80_gib(name, capsys, monkeypatch):
    monkeypatch.setenv("ABLATIONS", "1")
    recipe = str(ROOT / "recipes" / name)
    # the longest replies that a pair of specs_7b.sh can hold
    plan.main(["--reply", "10240", "--as", "-", "7B", "--recipe", recipe, *RECIPES[name]])
    verdicts = capsys.readouterr().out.splitlines()
    if len(verdicts) > 1:
        assert verdicts.pop().startswith("in all: ")
    stages = [line.split()[1].rstrip(",") for line in verdicts]
    assert all(line.startswith("fits: ") for line in verdicts)
    trainings = {"one_node.sh": 1, "specs_7b.sh": 3 + 2 * 9}[name]  # zero, cold, specs, and 9 ablations of two
    assert sum(stage in ("grpo.py", "dpo.py") for stage in stages) == trainings


# ---------------------------------------------------------------------------------------------------------------------
# Hours


@pytest.fixture(scope="module")
def real(folder):
    """(model.Cost of the real model, a real prompt, image tokens among it)."""
    policy, encoder = model.load(str(folder), training.setup(), train=True)
    picture, record = jigsaw.make_puzzle(scene(random.Random(0)), 2, 1, "pair", random.Random(0))
    path = f"{folder}/picture-hours.png"
    picture.save(path)
    prompt = encoder.prompt({**record, "id": "p", "images": [path]})
    return model.Cost(policy), prompt, int((prompt.ids == encoder.image_id).sum())


def test_the_work_of_each_stage_is_what_the_trainers_would_log(folder, real):
    cost, prompt, image = real

    def group(replies, reply):
        return [(prompt, [torch.arange(reply)] * replies)]

    def work(flags, **lengths):
        words = len(prompt.ids) - image
        return plan.work(f"python {flags} --data d --out o", words=words, image=image, **lengths)

    sampled, learned = sum(cost.forward(group(8, 40))), cost.learn(group(8, 40), reference=True)
    grpo = f"grpo.py --model {folder} --steps 3 --prompts 4 --group 8 --updates 2 --kl 0.04 --max-new-tokens "
    assert work(grpo + "40") == 3 * 4 * (sampled + 2 * learned)
    assert work(grpo + "200", mean_reply=40) == 3 * 4 * (sampled + 2 * learned)
    assert work(grpo + "40", mean_reply=200) == 3 * 4 * (sampled + 2 * learned)

    dpo = f"dpo.py --model {folder} --batch 7 "
    pair = cost.learn(group(2, 30)) + sum(cost.forward(group(2, 30)))
    assert work(dpo + "--steps 5", reply=30) == 5 * 7 * pair
    assert work(dpo, reply=30, records=100) == 100 * pair and work(dpo, reply=30) is None
    assert work(dpo + "--steps 5 --loss sft", reply=30) == 5 * 7 * cost.learn(group(1, 30))

    distill = f"distill.py --policy {folder} --samples 4 --max-new-tokens 20 --limit 10 "
    sampled = sum(cost.forward(group(4, 20)))
    assert work(distill + f"--base {folder}") == 2 * 10 * sampled
    assert work(distill + "--reject-from none", records=99) == 10 * sampled
    gold = distill.replace(f"--policy {folder}", "--gold")
    assert work(gold + f"--base {folder}") == 10 * sampled
    evaluate = f"eval.py --model {folder} --samples 4 --temperature 1 --max-new-tokens 20"
    assert work(evaluate, records=6) == 6 * sampled and work(evaluate + " --limit 9") == 9 * sampled


def test_hours_by_hand():
    # 5.76e16 FLOPs on 4 GPUs of 10 TFLOP/s at 0.4 of it: 3600 s
    assert plan.hours_of(5.76e16, 4, 10.0, 0.4) == pytest.approx((1.0, 1.0))
    least, most = plan.hours_of(5.76e16, 4, 10.0, None)
    assert (least * 0.23, most * 0.08) == pytest.approx((0.4, 0.4))
    assert plan.hours_of(None, 4, 10.0, 0.4) is None
    assert plan.in_hours((1.0, 1.0)) == "1.00 hours" and plan.in_hours((2.345, 67.8)) == "2.35 to 68 hours"
    assert plan.in_hours(None) == "hours depend on --records"


def test_a_recipe_is_told_how_long_its_stages_take_together(tmp_path, folder, capsys):
    recipe = tmp_path / "two.sh"
    stage = f"python eval.py --model {folder} --data d --out"
    recipe.write_text(f'python distill.py --gold --reject-from none --data d --out p\n{stage} a\n{stage} b --limit 9\n')
    plan.main(["--recipe", str(recipe), "--mfu", "0.5", "--peak", "1"])
    first, second, total = capsys.readouterr().out.splitlines()  # gold answers run no model
    assert first.endswith("; hours depend on --records") and second.endswith("; 0.00 hours")
    assert total == "in all: 0.00 hours, of 1 of 2 stages"


def test_a_recipe_that_does_not_fit_ends_with_status_1(tmp_path):
    recipe = tmp_path / "large.sh"
    recipe.write_text('for out in a b; do\n  python grpo.py --model "$1" --data x.jsonl --out $out\ndone\n')
    with pytest.raises(SystemExit) as end_of_program:
        plan.main(["--recipe", str(recipe), "72B"])
    assert end_of_program.value.code == 1
    assert len(plan.commands_of(str(recipe), ["72B"])) == 2
    recipe.write_text("echo no disk >&2; exit 3")
    with pytest.raises(DataError, match=r"ends with status 3 \(no disk\)"):
        plan.commands_of(str(recipe), [])


if __name__ == "__main__":
    training.run(lambda: measure_all(sys.argv[1]))
