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


def test_seed_by_seed_the_base_cancels_out_and_a_start_that_has_not_run_is_no_difference():
    def run(gain, more, accuracy):
        def cold(gained):
            return [{"step": 24, "gain_id": gained, "gain_ood": 1.0, "gf": None}]

        rl = {"trained": {"accuracy": accuracy, "format": 90.0}, "tags": {"accuracy": 0.0, "format": 10.0}}
        names = ("sft", "specs")
        return {
            "cold": {"sft": cold(gain), "specs": cold(gain + more)},
            "rl": {name: rl for name in names},
            "explore": {"cold-sft": {"rbf": 1.0}, "cold-specs": {"rbf": 1.5}},
            "logs": {f"rl-{name}": [{"reward": 1.0, "accuracy": 0.5}] * 20 for name in names},
        }

    text = study.seed_by_seed_table({"seeds": {"0": run(40.0, 2.0, 50.0), "1": run(10.0, 3.0, 97.0)}})
    rows = {row[0]: row[1:] for row in ([cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines())}
    assert rows["gain, trained format"] == ["–", "–", "–", "+2.5 (-3.9 … +8.9); 2 of 2"]  # 2.5 +- 12.706 * 0.5
    assert rows["gain, other formats"][3] == "+0.0 (+0.0 … +0.0); 0 of 2"
    assert rows["GF"][3] == "–" and rows["RBF after the cold start"][3] == "+0.500 (+0.500 … +0.500); 2 of 2"
    assert rows["after GRPO: accuracy"][3] == "+0.0 (+0.0 … +0.0); 0 of 2"


def test_a_level_is_reached_when_the_last_ten_steps_are_there_on_average():
    def run(*accuracies):
        return {"logs": {"rl-sft": [{"accuracy": accuracy} for accuracy in accuracies]}}

    assert study.steps_to(run(*[0.5] * 5, *[1.0] * 10), "sft") == 10  # 5 halves and 5 ones: 0.75
    assert study.steps_to(run(*[0.5] * 6, *[1.0] * 10), "sft") == 11
    assert study.steps_to(run(*[1.0] * 9), "sft") is None and study.steps_to(run(*[0.7] * 30), "sft") is None


def test_grpo_from_the_base_is_measured_without_the_steps_that_the_cold_starts_had_before():
    rows = [{"accuracy": 0.0}] * 12 + [{"accuracy": 1.0}] * 100
    run = {"logs": {"rl-none": rows, "rl-sft": rows[12:]}}
    for name in ("none", "sft"):
        assert study.whole(run, name, "accuracy") == 1 and study.early(run, name, "accuracy") == 100
        assert study.steps_to(run, name) == 10


def test_a_gf_without_a_value_is_the_zero_that_it_goes_to():
    points = [{"step": 0, "gf": None, "sources": {}}, {"step": 6, "sources": {}, "gf":
              {"gain_id": 40.0, "gain_ood": -3.0, "gf": None}}]  # fmt: skip
    assert [point["gf"] for point in study.curve_of({"curve": points})] == [0.0, 0.0]


def test_seeds_of_different_length_are_no_study():
    seeds = {"0": {"logs": {"zero": [{}] * 12}}, "1": {"logs": {"zero": [{}] * 3}}}
    with pytest.raises(study.Refused, match="12 steps of seed 0, 3 of seed 1"):
        study.check_lengths(seeds)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that has learned one format by heart and keeps it half of the time: all a smoke test needs."""
    folder = tmp_path_factory.mktemp("base")
    make_tiny(folder / "random", corpus="formats", layers=2)
    formats.main(["replies", "--format", "trained", "--follow", "0.5", "--count", "96", "--scenes", "12",
                  "--per-picture", "8", "--out", str(folder / "half")])  # fmt: skip
    call("dpo", model=folder / "random", data=folder / "half/records.jsonl", out=folder / "model", loss="sft",
         batch=16, steps=120, lr=4e-3, schedule="linear", save_every=0)  # fmt: skip
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
    shutil.copy(folder / "results/see-base.json", folder / "results/see-follow.json")
    # The ablations would take as long again, and are the same stages.
    for name in ("base", "chosen", "coupled", "unjudged", "teacher"):
        (folder / f"results/cold-{name}.json").write_text((folder / "results/cold-specs.json").read_text())
        (folder / f"pairs-{name}.jsonl").write_text((folder / "pairs.jsonl").read_text())
    for name in ("sft", "dpo", "specs"):
        (folder / f"results/cold-longer-{name}.json").write_text((folder / f"results/cold-{name}.json").read_text())
    for name in ("dpo", "half", "coupled", "base", "teacher"):
        (folder / f"results/rl-{name}.json").write_text((folder / "results/rl-specs.json").read_text())
        shutil.copytree(folder / "rl/specs", folder / "rl" / name)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "study.json")
    study.collect(tmp_path / "study")
    found = json.loads((tmp_path / "study.json").read_text())
    tables = {name: build(found) for name, build in study.BLOCKS.items()}
    for name, rows in {"cold": study.COLD, "longer": study.LONGER, "pairs": study.PAIRS, "rl": study.RL}.items():
        assert all(f"\n| {title} | " in tables[name] for title in rows.values()), name
    # Three gains of five sources of pairs; GRPO has run from three of them, and reaches no 75 % in two steps.
    assert tables["pairs_seeds"].count("; 0 of 1") == 5 * 3 + 3 * 4
    assert tables["subject"].count("\n") == 2 + len(study.FORMATS)
    monkeypatch.setattr(study, "FIGURES", tmp_path)
    study.draw(found)
    assert all((tmp_path / f"specs_{name}.png").stat().st_size > 10_000 for name in ("gf", "longer", "rl"))


def lines_of(recipe, out, folder, **settings):
    """(command lines that a recipe hands to stages.py, other calls of python), nothing of which is run."""
    noted = folder / "noted"
    folder.mkdir()
    (folder / "python").write_text(f'#!/bin/sh\ncase $1 in */stages.py) cat ;; *) echo "$*" ;; esac >> {noted}\n')
    (folder / "python").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(["bash", ROOT / recipe, *out], env=os.environ | settings | {"PATH": path}, check=True)
    lines = [line.removeprefix(f"{ROOT}/") for line in noted.read_text().splitlines()]
    return lines, [line for line in lines if line.startswith(("report.py", "bench/"))]


def out_of(line):
    """Where a line writes."""
    words = shlex.split(line)
    return words[words.index("--out") + 1] if "--out" in words else words[1]


@pytest.mark.parametrize("runs, count", [("chain", 44), ("sources", 15), ("longer", 6), ("further", 10)])
def test_every_line_of_the_study_is_one_that_its_stage_takes(runs, count, tmp_path):
    lines, others = lines_of("recipes/study_specs.sh", [tmp_path / "out", "0"], tmp_path / "bin", RUNS=runs)
    assert len(lines) == count and not others
    for line in lines:
        script, *flags = shlex.split(line)
        importlib.import_module(script.removesuffix(".py").replace("/", ".")).parse_args(flags)


def test_the_demo_is_the_study_without_its_ablations_word_for_word(tmp_path):
    study_lines, _ = lines_of("recipes/study_specs.sh", [tmp_path / "out", "3"], tmp_path / "study")
    lines, shown = lines_of("recipes/demo.sh", [tmp_path / "out/3", "3"], tmp_path / "demo")
    lines = [line for line in lines if line not in shown]
    assert set(lines) < set(study_lines) and len(set(lines)) == len(lines)
    left_out = {out_of(line).removeprefix(f"{tmp_path}/out/3/") for line in set(study_lines) - set(lines)}
    explored = {f"results/explore-{name}.json" for name in study.EXPLORED}
    assert left_out - explored == {"cold/dpo", "cold/half", "rl/none", "results/cold-dpo.json",
                                   "results/cold-half.json", "results/rl-none.json"}  # fmt: skip
    # Everything that the report shows, and the folder of the tables, is something that the demo has made.
    made = {out_of(line) for line in lines}
    report, table = (shlex.split(line) for line in shown)
    inputs = [word.split("=")[-1] for word in report[report.index("--pairs") :] if not word.startswith("--")]
    assert len(inputs) == 12 and set(inputs) <= made
    assert table == ["bench/study_specs.py", "--table", str(tmp_path / "out/3")]


def test_the_tables_of_an_unfinished_seed_have_the_rows_that_have_run(tmp_path, capsys):
    def result(kept):
        sources = {f"formats-{name}": {"format": kept, "accuracy": 0.25} for name in study.FORMATS}
        return {"sources": sources, "gf": {"gain_id": 40.0, "gain_ood": 20.0, "gf": 22.2}}

    folder = tmp_path / "3"
    (folder / "results").mkdir(parents=True)
    assert study.main(["--table", str(folder)]) == 1
    assert "zero.json is missing" in capsys.readouterr().err
    for run in ("zero", "cold/specs", "cold/half"):
        (folder / run).mkdir(parents=True)
        (folder / run / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    curve = {"curve": [{"step": 0, **result(0.3)}, {"step": 12, **result(0.9)}]}
    for name in ("zero", "cold-specs"):
        (folder / f"results/{name}.json").write_text(json.dumps(curve))
    assert study.main(["--table", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (row,) = [line for line in lines if line.startswith("format kept: trained format ")]
    assert row.split()[-3:] == ["–", "30.0", "90.0"]
    (row,) = [line for line in lines if line.startswith("DPO")]
    assert row.split("  ")[0] == "DPO + SFT" and row.split()[3:] == ["+40.0", "+20.0", "22.2", "22.2", "at", "12"]
    assert not any(line.startswith("GRPO from") for line in lines)  # none has run


def test_the_page_says_what_the_committed_runs_say():
    assert study.rebuilt(study.PAGE.read_text(), json.loads(study.RESULTS.read_text())) == study.PAGE.read_text()
