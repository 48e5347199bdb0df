"""eval.py --checkpoints: a run along its steps equals an evaluation of each of its models; intervals by hand."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import CPU
from test_eval import row, says

import eval as evaluation
import jigsaw
import model
import report
from journal import Journal
from records import write_jsonl
from run_directory import Run, save_model
from toy.tiny_model import make_tiny

# ---------------------------------------------------------------------------------------------------------------------
# Intervals


def test_an_interval_is_between_percentiles_of_what_other_questions_would_have_given():
    # Four questions, one right: of four drawn anew, k are right with the binomial(4, 1/4). None: 32 %, so 2.5 % lies at
    # 0. Four: 0.4 %; three or four: 5.1 %, so 97.5 % lies at three. The other column has one right in two: none 6 %,
    # all 6 %.
    values = np.array([[0, 0], [0, 1], [1, 0], [0, 1]], dtype=float)
    assert evaluation.bootstrap_intervals(values).tolist() == [[0, 0.75], [0, 1]]


def test_an_interval_narrows_with_the_root_of_the_number_of_questions_and_repeats():
    draws = np.random.default_rng(3).random((900, 1))
    low, high = evaluation.bootstrap_intervals(draws)[0]
    # The mean of 900 numbers that spread by 1/sqrt(12) spreads by a thirtieth of it; 1.96 of that on each side.
    assert high - low == pytest.approx(2 * 1.96 / 12**0.5 / 30, rel=0.15) and low < draws.mean() < high
    assert evaluation.bootstrap_intervals(draws)[0].tolist() == [low, high]


def test_a_summary_has_intervals_over_questions_and_means_over_tokens():
    rows = [
        row("a", (1, 0), (1, 1), (10, 30), entropy=[2.0, 1.0], rbf=[8.0, 2.0], distinct=2),
        row("a", (0, 0), (1, 0), (5, 5), entropy=[0.0, 0.0], rbf=[1.0, 1.0], distinct=1),
    ]
    numbers = evaluation.summarise(rows)["overall"]
    assert numbers["entropy"] == pytest.approx((20 + 30) / 50) and numbers["rbf"] == pytest.approx((80 + 60 + 10) / 50)
    assert numbers["distinct"] == 1.5
    # Of two questions both may be the first, or both the second: each a quarter of the time.
    expected = {"accuracy": [0, 0.5], "format": [0.5, 1], "pass@1": [0, 0.5], "pass@2": [0, 1]}
    assert numbers["intervals"] == expected
    assert "entropy" not in evaluation.summarise([row()])["overall"]


def test_the_table_shows_the_intervals():
    rows = [row("a", (1, 0), (1, 1), (1, 1), rbf=[1.5, 2.5], entropy=[0.5, 0.25]), row("b", (0, 0), (1, 0), (1, 1))]
    rows[1] |= {"rbf": [4.0, 4.0], "entropy": [0.0, 0.0]}
    *lines, words = [line.split("  ") for line in evaluation.result_table(evaluation.summarise(rows)).splitlines()]
    titles, first, _, overall = ([cell.strip() for cell in line if cell] for line in lines)
    assert titles[-5:] == ["distinct", "entropy", "rbf", "pass@1", "pass@2"]
    assert first[-3:] == ["2.00", "50.0 [50.0, 50.0]", "100.0 [100.0, 100.0]"]
    assert overall[:3] == ["overall", "2", "25.0 [0.0, 50.0]"] and "95 % intervals" in words[0]


# ---------------------------------------------------------------------------------------------------------------------
# A run along its steps


def shaken(policy, seed):
    """The same policy with other weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.1)
    return policy


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A run with checkpoints of steps 3 and 5 and a final model after step 7, and each of them as a model directory."""
    folder = tmp_path_factory.mktemp("curve")
    make_tiny(folder / "step0", layers=2)
    jigsaw.write_puzzles(folder / "boxed", 3, scenes=3, swap=0.0, reply_format="boxed", seed=3)
    common = {"images": [], "answer": "a house", "answer_type": "text", "think": False, "source": "open"}
    rows = [{"id": f"open-{i}", "prompt": f"Question {i}: what is it?", **common} for i in range(6)]
    write_jsonl(folder / "open.jsonl", rows)
    policy, encoder = model.load(str(folder / "step0"), CPU)
    run = Run(folder / "run", CPU)
    for step in (3, 5):
        run.save(step, shaken(policy, step), torch.optim.AdamW(policy.parameters()), keep=9)
        run.finish()
        save_model(policy, encoder, folder / f"step{step}")
    save_model(shaken(policy, 7), encoder, folder / "run")
    (folder / "step7").symlink_to("run")
    write_jsonl(folder / "run/log.jsonl", [{"step": step} for step in range(1, 8)])
    (folder / "run/args.json").write_text(json.dumps({"model": str(folder / "step0")}))
    return folder


def flags(place, out, *more):
    files = ["--id", place / "open.jsonl", "--ood", place / "boxed/records.jsonl", "--batch", 4]
    sampling = ["--samples", 2, "--temperature", 1, "--max-new-tokens", 16, "--exploration"]
    return [str(word) for word in [*files, *sampling, "--out", place / out, *more]]


RUN = ["--ood-weights", "jigsaw-pair-2x1:boxed=2", "--checkpoints"]


@pytest.fixture(scope="module")
def whole(place):
    """The bytes of the run's result."""
    evaluation.main(flags(place, "whole.json", *RUN, place / "run"))
    return (place / "whole.json").read_bytes()


def test_each_point_of_a_curve_is_what_an_evaluation_of_that_model_gives(place, whole, capsys):
    result = json.loads(whole)
    assert [point["step"] for point in result["curve"]] == [0, 3, 5, 7]
    baseline = []
    for point in result["curve"]:
        name = f"step{point['step']}"
        evaluation.main(flags(place, f"{name}.json", "--model", place / name, *baseline))
        alone = json.loads((place / f"{name}.json").read_text())
        baseline = ["--baseline", place / "step0.json"]
        assert (point["overall"], point["sources"]) == (alone["overall"], alone["sources"])
        if alone["gf"]:
            del alone["gf"]["baseline"]
            assert point["gf"] == alone["gf"]
    first, *others = result["curve"]
    assert (first["gf"]["gain_id"], first["gf"]["gain_ood"], first["gf"]["gf"]) == (0, 0, 0)
    assert len({json.dumps(point["overall"]) for point in result["curve"]}) == 4
    assert any(point["gf"]["gain_id"] for point in others)
    # The rest of the file is about the last model.
    assert result["rows"] == alone["rows"] and result["gf"] == others[-1]["gf"]
    assert result["model"] == str(place / "run")
    assert result["overall"]["entropy"] > 0 and result["overall"]["rbf"] > 1


def test_the_table_of_a_run_has_a_line_a_step():
    gains = {"gain_id": 12.5, "gain_ood": -3.0, "gf": None, "ood_gains": {"t:json": -3.0}}
    curve = [{"step": step, "overall": {"accuracy": 0.5, "format": 0.25}, "gf": gains} for step in (0, 10)]
    lines = [line.split() for line in evaluation.curve_table(curve).splitlines()]
    assert lines[2] == ["10", "50.0", "25.0", "+12.5", "-3.0", "–", "-3.0"]
    without = [point | {"gf": None} for point in curve]
    assert evaluation.curve_table(without).splitlines()[2].split() == ["10", "50.0", "25.0"]


@pytest.mark.parametrize("kept", [4, 9])
def test_a_curve_that_was_killed_goes_on_and_ends_with_the_same_bytes(place, whole, monkeypatch, kept):
    out = f"killed-{kept}.json"
    more = [*RUN, place / "run"]
    add, calls = Journal.add, []

    def add_some(journal, name, items):
        if len(calls) == kept:
            raise KeyboardInterrupt
        calls.append(add(journal, name, items))

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add", add_some)
        evaluation.main(flags(place, out, *more))
    evaluation.main(flags(place, out, *more, "--resume"))
    assert (place / out).read_bytes() == whole


def test_the_last_checkpoint_stands_for_the_final_model_and_a_run_that_goes_on_has_none(tmp_path):
    (tmp_path / "args.json").write_text('{"model": "base"}')
    for step in (12, 900):
        (tmp_path / f"checkpoints/step_{step:06d}").mkdir(parents=True)
    (tmp_path / "checkpoints/step_000950.partial").mkdir()
    points = evaluation.read_points(tmp_path, None)
    expected = [(0, "base"), (12, "step_000012"), (900, "step_000900")]
    assert [(step, path.split("/")[-1]) for step, path in points] == expected
    write_jsonl(tmp_path / "log.jsonl", [{"step": 900}])
    (tmp_path / "config.json").write_text("{}")
    assert evaluation.read_points(tmp_path, None) == points
    assert evaluation.read_points(tmp_path, "moved")[0] == (0, "moved")
    write_jsonl(tmp_path / "log.jsonl", [{"step": 900}, {"step": 901}])
    assert evaluation.read_points(tmp_path, None)[3] == (901, str(tmp_path))


def test_what_is_no_run_or_is_damaged_is_named_before_anything_is_sampled(place, tmp_path, capsys):
    def refused(run, *more):
        return says(capsys, *flags(place, tmp_path / "x.json", "--checkpoints", run, *more))

    assert "args.json" in refused(tmp_path)
    (tmp_path / "args.json").write_text('{"model": "base"}')
    assert "neither a checkpoint nor a model" in refused(tmp_path)
    (tmp_path / "args.json").write_text('{"model": null}')
    assert "add --model DIR" in refused(tmp_path)
    assert "--baseline" in refused(tmp_path, "--baseline", place / "b.json")
    run = shutil.copytree(place / "run", tmp_path / "run")
    (file,) = (run / "checkpoints/step_000005").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert f"{file.name}: is damaged" in refused(run)
    assert not list(tmp_path.glob("x.json*"))


def test_a_checkpoint_of_another_model_is_refused(place, tmp_path, capsys):
    make_tiny(tmp_path / "wide", layers=2, hidden=96)
    command = flags(place, tmp_path / "x.json", "--checkpoints", place / "run", "--model", tmp_path / "wide")
    assert "step_000003" in says(capsys, *command)


def test_a_run_that_trains_on_while_it_is_evaluated_is_not_mixed_up(place, tmp_path, monkeypatch, capsys):
    run = shutil.copytree(place / "run", tmp_path / "run")
    command = flags(place, tmp_path / "out.json", "--checkpoints", run)

    def stop(journal, name, items):
        raise KeyboardInterrupt

    add = Journal.add
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "add", lambda *item: (add(*item), stop(*item)))
        evaluation.main(command)
    shutil.rmtree(run / "checkpoints/step_000003")
    assert "step_000003" in says(capsys, *command, "--resume")


def test_a_report_can_read_a_curve(place, whole):
    assert report.read_result(place / "whole.json")["curve"][1]["step"] == 3
