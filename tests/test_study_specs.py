"""SPECS' study: its recipe runs from a base to the page's tables, and the page says what the committed runs say."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
from commands import ROOT, call

from toy import formats
from toy.tiny_model import make_tiny

spec = importlib.util.spec_from_file_location("study_specs", ROOT / "bench/study_specs.py")
study = importlib.util.module_from_spec(spec)
spec.loader.exec_module(study)


def test_a_bootstrap_interval_is_that_of_means_of_samples_with_replacement():
    assert study.interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    # Two seeds: a sample has both the lower, both the higher, or one of each, so the interval spans them.
    assert study.interval([1.0, 2.0]) == (1.0, 2.0)
    low, high = study.interval([0.0, 0.0, 0.0, 0.0, 10.0])
    assert low == 0.0 and 4.0 <= high <= 6.0  # P(at least 4 of 5 samples are the 10) is below 2.5 %, at least 2 is not


def test_a_cell_says_of_how_many_seeds_a_value_is():
    assert study.cell([1.0, 2.0]) == "1.5 (1.0 … 2.0)"
    assert study.cell([1.0, None]) == "1.0, 1 of 2 seeds"
    assert study.cell([None]) == "–"
    assert study.cell([-1.25], 1, signed=True) == "-1.2"


def test_the_best_step_is_the_one_of_the_highest_mean():
    curves = ([None, 30.0, 10.0], [None, 10.0, 20.0])
    seeds = {
        str(seed): {"cold": {"sft": [{"step": 6 * index, "gf": gf} for index, gf in enumerate(curve)]}}
        for seed, curve in enumerate(curves)
    }
    assert study.best_step(seeds, "sft") == (6, [30.0, 10.0])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that has learned one format by heart and keeps it half of the time: all a smoke test needs."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny(folder / "random", corpus="formats", layers=2)
    formats.main(["replies", "--format", "trained", "--follow", "0.5", "--count", "96", "--scenes", "12",
                  "--per-picture", "8", "--out", str(folder / "half")])  # fmt: skip
    call("dpo", model=folder / "random", data=folder / "half/records.jsonl", out=folder / "model", loss="sft",
         batch=16, steps=60, lr=4e-3, schedule="linear", save_every=0)  # fmt: skip
    return folder / "model"


def test_a_small_part_of_the_study_runs_and_makes_every_table(base, tmp_path, monkeypatch):
    settings = os.environ | {"PART": "0.02", "BASE": str(base), "OMP_NUM_THREADS": "1"}
    settings["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{settings['PATH']}"
    command = ["bash", ROOT / "recipes/study_specs.sh", tmp_path / "study", "7"]
    for _ in range(2):
        done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-2000:]
    assert " done " in done.stdout and " s " not in done.stdout  # the second time there is nothing left to do

    folder = tmp_path / "study/7"
    result = json.loads((folder / "results/zero.json").read_text())
    (folder / "results/follow.json").write_text(json.dumps(result))  # what BASE leaves out
    for name in ("base", "chosen", "coupled", "unjudged"):  # the ablations take as long again, and are the same stages
        (folder / f"results/cold-{name}.json").write_text((folder / "results/cold-specs.json").read_text())
        (folder / f"pairs-{name}.jsonl").write_text((folder / "pairs.jsonl").read_text())
    for name in ("dpo", "coupled"):
        (folder / f"results/rl-{name}.json").write_text((folder / "results/rl-specs.json").read_text())
        shutil.copytree(folder / "rl/specs", folder / "rl" / name)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")
    study.collect(tmp_path / "study")
    found = json.loads((tmp_path / "study.json").read_text())
    tables = {name: build(found) for name, build in study.BLOCKS.items()}
    assert all(title in tables["cold"] for title in study.COLD.values())
    assert all(title in tables["pairs"] for title in study.PAIRS.values())
    assert all(title in tables["rl"] for title in study.RL.values())
    assert tables["subject"].count("\n") == 1 + len(study.FORMATS)
    monkeypatch.setattr(study, "FIGURES", tmp_path)
    study.draw(found)
    assert (tmp_path / "specs_gf.png").stat().st_size > 10_000


@pytest.mark.parametrize("runs, count", [("chain", 40), ("sources", 12), ("further", 6)])
def test_every_line_of_the_study_is_one_that_its_stage_takes(runs, count, tmp_path):
    """The lines go to stages.py; here they go to a file, and each to the parser of its stage."""
    recipe = (ROOT / "recipes/study_specs.sh").read_text()
    assert recipe.count('| python "$HERE/recipes/stages.py"') == 1
    printed = recipe.replace('| python "$HERE/recipes/stages.py"', "| cat").replace('$(dirname "$0")/..', str(ROOT))
    (tmp_path / "study.sh").write_text(printed)
    settings = os.environ | {"RUNS": runs}
    done = subprocess.run(["bash", tmp_path / "study.sh", tmp_path / "out", "0"], env=settings, capture_output=True,
                          text=True, check=True)  # fmt: skip
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert len(lines) == count
    for script, *flags in lines:
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)


def test_the_page_says_what_the_committed_runs_say():
    assert study.rebuilt(study.PAGE.read_text(), json.loads(study.RESULTS.read_text())) == study.PAGE.read_text()
