"""How far do 2 and 4 processes stray from one? Real runs on the CPU (gloo), every way to share the work.

    python bench/worlds.py            # a few minutes; writes worlds.json and plans.json of bench/results
    python bench/worlds.py --plans    # only the memory plans (recipes/plan.py)
    python bench/readme.py            # then takes both into the pages

Same data, same seeds, fp32, six updates of dpo.py (DPO + SFT) and of grpo.py (KL, two updates a step) on the tests'
tiny model. The difference is what sums in another order leave.
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests"), str(HERE.parent / "recipes")]

WORLDS = [
    (2, {"shard": "full"}), (2, {"shard": "grad"}), (2, {"shard": "none"}),
    (4, {"shard": "full"}), (4, {"shard": "grad"}), (4, {"shard": "none"}), (4, {"shard": "full", "replicas": 2}),
]  # fmt: skip
PLANS = [
    ("3B", 1, {}),
    ("3B", 8, {"kl": True}),
    ("7B", 8, {"kl": True}),
    ("7B", 16, {"kl": True, "replicas": 2}),
    ("72B", 64, {"accumulate": "shards", "sampler": "vllm", "vllm_tp": 8}),
]


def runs(folder):
    """{(processes, flags as text): {stage: run directory}}, one process in the plain way first."""
    from commands import Material, call, torchrun

    material = Material(folder / "material")
    settings = {"dpo": material.dpo(steps=6, lr=3e-4)}
    settings["grpo"] = material.grpo(steps=3, lr=3e-4, kl=0.04, updates=2)
    out = {}
    for count, flags in [(1, {}), *WORLDS]:
        name = " ".join(f"--{key} {value}" for key, value in flags.items())
        out[count, name] = {stage: folder / f"{count} {name} {stage}" for stage in settings}
        jobs = [(stage, settings[stage] | flags | {"out": out[count, name][stage]}) for stage in settings]
        if count > 1:
            torchrun(jobs, folder, count)
        for stage, flags_of_run in jobs if count == 1 else ():
            call(stage, **flags_of_run)
    return out


def difference(run, plain):
    """Largest differences: of a loss, of a gradient norm (relative), of a weight."""
    from commands import distance, rows, weights

    pairs = list(zip(rows(run), rows(plain), strict=True))
    return {
        "loss": max(abs(one["loss"] - other["loss"]) for one, other in pairs),
        "grad_norm": max(abs(one["grad_norm"] / other["grad_norm"] - 1) for one, other in pairs),
        "weight": distance(weights(run), weights(plain)),
    }


def measure_worlds():
    """[{"processes", "flags", stage: its differences to one process}]"""
    with tempfile.TemporaryDirectory() as folder:
        done = runs(Path(folder))
        plain = done.pop((1, ""))
        rows = []
        for (count, name), run in done.items():
            row = {"processes": count, "flags": name}
            for stage in run:
                row[stage] = difference(run[stage], plain[stage])
            rows.append(row)
    return rows


def count_plans():
    """[{"model", "gpus", "flags", "always", "learn", "sample"}], the last three in bytes on each GPU"""
    import plan

    from training import Sharding

    rows = []
    for model, gpus, flags in PLANS:
        settings = {key: value for key, value in flags.items() if key not in ("replicas", "accumulate")}
        sharding = {key: value for key, value in flags.items() if key not in settings}
        reply = 512 if model == "72B" else 64
        counted = plan.plan(
            plan.folder_of(model), gpus, sharding=Sharding(**sharding), reply=reply, **settings
        )  # fmt: skip
        sums = {part: sum(found.values()) for part, found in counted.items()}
        rows.append({"model": model, "gpus": gpus, "flags": flags, **sums})
    return rows


def main(argv=None):
    import versus

    from training import Parser

    parser = Parser(__doc__)
    parser.add_argument("--plans", action="store_true", help="only count the memory plans")
    args = parser.parse_args(argv)
    commit = versus.commit()  # before: that is what will run
    found = {"plans": count_plans()}
    if not args.plans:
        found["worlds"] = measure_worlds()
    for name, rows in found.items():
        text = json.dumps({"commit": commit, name: rows}, indent=1)
        (HERE / f"results/{name}.json").write_text(text + "\n")
        print(text)


if __name__ == "__main__":
    main()
