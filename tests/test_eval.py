"""eval.py: the generalization factor, pass@k and the summaries by hand; the real program on a tiny model."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import eval as evaluation
import jigsaw
import training
from records import write_jsonl
from toy.tiny_model import make_tiny

EVAL = str(Path(evaluation.__file__).resolve())


def row(source="s", accuracy=(1.0,), form=(1.0,), length=(10,), **more):
    """A scored row; parsed and finished follow the format unless given."""
    base = {"id": "r", "source": source, "role": "data", "file": "f", "accuracy": list(accuracy), "format": list(form)}
    base["reward"] = [a + 0.5 * f for a, f in zip(accuracy, form, strict=True)]
    base |= {"length": list(length), "parsed": [f == 1 for f in form], "finished": [True] * len(form), "distinct": 1}
    return base | more


# ---------------------------------------------------------------------------------------------------------------------
# Generalization factor


def test_gains_of_50_and_20_give_22_point_7():
    # (1 + 4) * 50 * 20 / (4 * 50 + 20) = 5000 / 220
    assert evaluation.generalization_factor(50, 20) == pytest.approx(22.727272727, abs=1e-8)


def test_swapped_gains_count_for_more_because_ood_weighs_more():
    # (1 + 4) * 20 * 50 / (4 * 20 + 50) = 5000 / 130
    assert evaluation.generalization_factor(20, 50) == pytest.approx(38.461538461, abs=1e-8)


def test_beta_1_is_the_plain_harmonic_mean():
    # 2 * 50 * 20 / 70
    assert evaluation.generalization_factor(50, 20, beta=1) == pytest.approx(28.571428571, abs=1e-8)


def test_equal_gains_are_their_own_factor():
    assert evaluation.generalization_factor(37.5, 37.5) == pytest.approx(37.5)


def test_one_gain_of_zero_gives_zero():
    assert evaluation.generalization_factor(0, 0) == 0
    assert evaluation.generalization_factor(60, 0) == 0
    assert evaluation.generalization_factor(0, 60) == 0


def test_the_papers_levels_come_out_in_the_papers_order():
    # ID about 98 and OOD about 95 / 90 / 69 for DPO+SFT, DPO, SFT; the paper's GF is about 95 / 91 / 73
    factors = [evaluation.generalization_factor(98, ood) for ood in (95, 90, 69)]
    assert factors == pytest.approx([95, 91, 73], abs=1.0)


@pytest.mark.parametrize("gains", [(-1, 4.1), (25.1, -100), (-10, -40), (50, -20), (5, -20), (-3, 0), (0, -3)])
def test_with_a_negative_gain_it_is_not_defined(gains):
    assert evaluation.generalization_factor(*gains) is None


def test_of_two_gains_it_lies_between_them():
    for gains in ((0.1, 90), (90, 0.1), (35, 36), (1e-9, 100)):
        assert min(gains) <= evaluation.generalization_factor(*gains) <= max(gains)


def test_where_it_is_not_defined_the_two_gains_are_shown_and_a_reason():
    gains = {"gain_id": 35.0, "gain_ood": -12.5, "gf": None, "beta": 2.0}
    line = evaluation.gains_line(gains)
    assert "gain ID +35.0, gain OOD -12.5, GF not defined (a gain is negative)" in line


# ---------------------------------------------------------------------------------------------------------------------
# pass@k


def test_pass_at_k_by_hand():
    # 5 replies, 2 right, choose 2: 1 - C(3,2)/C(5,2) = 1 - 3/10
    assert evaluation.pass_at_k(5, 2, 2) == pytest.approx(0.7, abs=1e-15)
    # 10 replies, 3 right, draw 4: 1 - C(7,4)/C(10,4) = 1 - 35/210
    assert evaluation.pass_at_k(10, 3, 4) == pytest.approx(5 / 6, abs=1e-15)


def test_pass_at_k_equals_counting_every_choice():
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            choices = list(itertools.combinations([True] * c + [False] * (n - c), k))
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(sum(map(any, choices)) / len(choices), abs=1e-15)


def test_pass_at_1_is_the_share_and_too_few_wrong_ones_are_certain_success():
    assert evaluation.pass_at_k(64, 23, 1) == pytest.approx(23 / 64, abs=1e-15)
    assert evaluation.pass_at_k(8, 5, 4) == 1.0  # 3 wrong ones cannot fill 4 places
    assert evaluation.pass_at_k(8, 0, 8) == 0.0


def test_pass_at_k_is_exact_for_large_numbers():
    # one right reply in n: k/n, whatever the size of the binomials
    assert evaluation.pass_at_k(20_000, 1, 9_000) == pytest.approx(0.45, rel=1e-14)
    assert evaluation.pass_at_k(10**9, 1, 2) == pytest.approx(2e-9, rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(4, 2, 5), (4, 5, 2), (-1, 0, 0), (4, -1, 2), (4, 2, -1)])
def test_impossible_counts_are_errors(n, c, k):
    with pytest.raises(ValueError, match=f"n={n}, c={c}, k={k}"):
        evaluation.pass_at_k(n, c, k)


# ---------------------------------------------------------------------------------------------------------------------
# Summaries and gains


def test_a_summary_is_the_mean_over_replies_per_source_and_over_all():
    rows = [
        row("a", (1, 0, 0, 0), (1, 1, 0, 1), (10, 20, 30, 40), finished=[True, True, False, True]),
        row("a", (1, 1, 0.5, 0), (1, 1, 1, 0), (2, 4, 6, 8)),
        row("b", (0, 0, 0, 0), (0, 0, 0, 1), (7, 7, 7, 7)),
    ]
    summary = evaluation.summarise(rows)
    a, b, every = summary["sources"]["a"], summary["sources"]["b"], summary["overall"]
    assert list(summary["sources"]) == ["a", "b"]
    assert (a["n"], a["replies"], a["unparsed"], a["truncated"]) == (2, 8, 2, 1)
    assert a["accuracy"] == pytest.approx(3.5 / 8) and a["format"] == pytest.approx(6 / 8)
    assert a["reward"] == pytest.approx((3.5 + 0.5 * 6) / 8) and a["length"] == pytest.approx(120 / 8)
    assert a["unparsed_share"] == pytest.approx(2 / 8)
    assert a["accuracy_read"] == pytest.approx(3.5 / 6) and every["accuracy_read"] == pytest.approx(3.5 / 7)
    # first record 1 of 4 right, second 2 of 4 (0.5 is partly right, which is not right)
    assert a["pass@1"] == pytest.approx((1 / 4 + 2 / 4) / 2)
    assert a["pass@2"] == pytest.approx(((1 - 3 / 6) + (1 - 1 / 6)) / 2)
    assert a["pass@4"] == 1.0 and "pass@8" not in a and "pass@3" not in a
    assert b["pass@4"] == 0.0
    assert every["accuracy"] == pytest.approx(3.5 / 12) and every["unparsed"] == 5 and every["n"] == 3


def test_pass_at_k_stops_at_the_number_of_samples():
    numbers = evaluation.summarise([row(accuracy=(1, 0, 0), form=(1, 1, 1), length=(1, 1, 1))])["overall"]
    assert [key for key in numbers if key.startswith("pass@")] == ["pass@1", "pass@2"]


def test_no_rows_are_an_error():
    with pytest.raises(ValueError):
        evaluation.summarise([])


def gain_rows(think, tags, boxed):
    rows = [row("t", (0,), (f,), role="id", file="think", id=str(i)) for i, f in enumerate(think)]
    rows += [row("t:tags", (0,), (f,), role="ood", file="tags", id=str(i)) for i, f in enumerate(tags)]
    rows += [row("t:boxed", (0,), (f,), role="ood", file="boxed", id=str(i)) for i, f in enumerate(boxed)]
    return rows + [row("t", (1,), (0,), role="data", file="other", id="0")]


def by_key(rows):
    return {(r["file"], r["id"]): r for r in rows}


def test_format_gains_are_percentage_points_and_every_ood_source_counts_alike():
    before = by_key(gain_rows([1, 0, 0, 0], [0, 0], [1, 0, 0, 0]))
    after = gain_rows([1, 1, 1, 0], [1, 0], [1, 1, 1, 1])
    gains = evaluation.format_gains(after, before)
    assert gains["gain_id"] == pytest.approx(50)  # 25 -> 75 %
    assert gains["ood_gains"] == pytest.approx({"t:tags": 50, "t:boxed": 75})
    assert gains["gain_ood"] == pytest.approx(62.5)  # of the sources, not of the six records
    assert gains["gf"] == pytest.approx(5 * 50 * 62.5 / (200 + 62.5))


def test_ood_weights_weigh_the_sources():
    before = by_key(gain_rows([0], [0, 0], [1, 0, 0, 0]))
    gains = evaluation.format_gains(gain_rows([1], [1, 0], [1] * 4), before, {"t:tags": 3.0, "t:boxed": 1.0})
    assert gains["gain_ood"] == pytest.approx((3 * 50 + 75) / 4)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def says(capsys, *arguments):
    """Run the program on bad input: the one line it prints; it must end with status 2."""
    with pytest.raises(SystemExit) as ended:
        training.run(lambda: evaluation.main([str(argument) for argument in arguments]))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_flags_that_do_not_fit_together_are_refused(capsys):
    some = ["--model", "m", "--data", "d.jsonl", "--out", "o.json"]
    assert "temperature" in says(capsys, *some, "--samples", 4)
    assert "baseline" in says(capsys, *some, "--baseline", "b.json")
    assert "both" in says(capsys, *some, "--id", "x.jsonl", "--ood", "./x.jsonl")
    assert "--sample" in says(capsys, *some, "--sample", 1)  # no abbreviations
    assert "--model" in says(capsys, "--data", "d.jsonl", "--out", "o.json")
    assert "--report" in says(capsys, *some, "--runs", "runs/grpo")
    assert "--report" in says(capsys, "--report", "r.html", "--runs", "runs/grpo", "--model", "m")
    assert "--runs or --results" in says(capsys, "--report", "r.html")


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("--samples", "0", "argument --samples: must lie in [1, 1e5], not 0"),
        ("--top-p", "0", "argument --top-p: must lie in (0, 1], not 0"),
        ("--top-p", "nan", "argument --top-p: must lie in (0, 1], not nan"),
        ("--temperature", "inf", "argument --temperature: must be 0 or lie in [1e-4, 1e4], not inf"),
        ("--samples", "1000000000", "argument --samples: must lie in [1, 1e5], not 1000000000"),
        ("--temperature", "1e-40", "argument --temperature: must be 0 or lie in [1e-4, 1e4], not 1e-40"),
        ("--limit", "2.5", "argument --limit: must be a whole number, not 2.5"),
        ("--seed", "-1", "argument --seed: must lie in [0, 4294967295], not -1"),
        ("--ood-weights", "a=-1", "argument --ood-weights: must lie in [1e-6, 1e6], not -1"),
        ("--ood-weights", "a", "argument --ood-weights: must be SOURCE=WEIGHT, not a"),
    ],
)
def test_numbers_out_of_range_are_refused_by_flag_and_interval(capsys, flag, value, words):
    assert says(capsys, "--model", "m", "--data", "d", "--out", "o", flag, value) == f"error: {words}"


def test_help_shows_the_commands_and_the_defaults(capsys):
    with pytest.raises(SystemExit) as ended:
        evaluation.main(["--help"])
    page = capsys.readouterr().out
    assert ended.value.code == 0
    assert "\n    python eval.py --model DIR --data test.jsonl --out test.json  " in page  # as written
    assert "(default: 512)" in page and "largest image area" in page and "--results [NAME=]FILE.json" in page


def test_bad_files_are_refused_by_name(capsys, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"id": "x"\n')
    out = ["--model", tmp_path, "--out", tmp_path / "o.json"]
    assert "missing.jsonl" in says(capsys, *out, "--data", tmp_path / "missing.jsonl")
    assert "empty.jsonl" in says(capsys, *out, "--data", tmp_path / "empty.jsonl")
    assert "bad.jsonl:1" in says(capsys, *out, "--data", tmp_path / "bad.jsonl")


# ---------------------------------------------------------------------------------------------------------------------
# The real program on a tiny model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A random tiny model, five puzzles in each of two reply formats, and five open questions on the same pictures."""
    folder = tmp_path_factory.mktemp("eval")
    make_tiny(folder / "base", layers=2)
    for form in ("think", "boxed"):
        jigsaw.write_puzzles(folder / form, 5, scenes=5, swap=0.0, reply_format=form, seed=3)
    puzzles = [json.loads(line) for line in (folder / "think/records.jsonl").read_text().splitlines()]
    rows = [{"id": f"open-{i}", "images": puzzle["images"], "prompt": f"Question {i}: what is it?", "answer": "a house",
             "answer_type": "text", "think": False, "source": "open"} for i, puzzle in enumerate(puzzles)]  # fmt: skip
    write_jsonl(folder / "think/open.jsonl", rows)
    return folder


def evaluate(tiny, *arguments):
    """Run in this process; the last --out as a dict."""
    arguments = ["--model", tiny / "base", "--max-new-tokens", 6, *arguments]
    evaluation.main([str(argument) for argument in arguments])
    return json.loads(Path(arguments[arguments.index("--out") + 1]).read_text())


def test_the_numbers_count_what_the_model_really_said(tiny, capsys):
    # one of the replies to each of two questions becomes the gold answer: these two replies, and only these, are right
    sampling = ["--samples", 8, "--temperature", 1, "--seed", 2, "--max-new-tokens", 2]
    first = evaluate(tiny, "--data", tiny / "think/open.jsonl", "--out", tiny / "said.json", *sampling)
    assert first["overall"]["accuracy"] == 0 and first["overall"]["replies"] == 40
    said = [row["replies"] for row in first["rows"]]
    words = {n: [reply for reply in said[n][1:] if re.fullmatch("[a-z ]*[a-z]{2}[a-z ]*", reply)] for n in range(5)}
    i, j = [n for n in range(5) if words[n]][-2:]
    lines = [json.loads(line) for line in (tiny / "think/open.jsonl").read_text().splitlines()]
    lines[i]["answer"], lines[j]["answer"] = words[i][0], words[j][0]
    write_jsonl(tiny / "think/known.jsonl", lines)
    capsys.readouterr()
    second = evaluate(tiny, "--data", tiny / "think/known.jsonl", "--out", tiny / "known.json", *sampling, "--batch", 2,
                      "--keep-replies", 3)  # fmt: skip
    expected = [[float(reply == lines[n]["answer"]) for reply in said[n]] for n in range(5)]
    assert sum(map(sum, expected)) == 2
    assert [row["accuracy"] for row in second["rows"]] == expected
    numbers = second["sources"]["open:bare"]
    assert numbers["accuracy"] == pytest.approx(2 / 40) and numbers["pass@1"] == pytest.approx(2 / 40)
    # two of five records with 1 right reply in 8: a choice of 4 holds it half of the time
    assert numbers["pass@4"] == pytest.approx(0.2) and numbers["pass@8"] == pytest.approx(0.4)
    assert numbers["length"] == pytest.approx(sum(sum(row["length"]) for row in second["rows"]) / 40)
    assert [row.get("replies") for row in second["rows"]] == [*said[:3], None, None]
    assert all(row["parsed"] == [form == 1 for form in row["format"]] for row in second["rows"])
    assert numbers["unparsed"] == 40 - sum(sum(row["format"]) for row in second["rows"]) < 20
    assert second["rows"][0]["images"][0].startswith("think/images/")
    assert "open:bare" in capsys.readouterr().out


def test_sampling_among_one_token_is_greedy(tiny):
    def said(name, *flags):
        result = evaluate(tiny, "--data", tiny / "think/open.jsonl", "--limit", 2, "--out", tiny / name, *flags)
        return [row["replies"] for row in result["rows"]]

    greedy = said("greedy.json")
    assert said("top-k.json", "--temperature", 1, "--top-k", 1) == greedy
    assert said("top-p.json", "--temperature", 1, "--top-p", 1e-6) == greedy
    assert said("free.json", "--temperature", 1) != greedy
    assert said("seed.json", "--temperature", 1, "--seed", 7) != said("free.json", "--temperature", 1)


def test_the_generalization_factor_of_a_model_against_itself_is_zero_and_against_less_is_not(tiny, capsys):
    files = ["--id", tiny / "think/open.jsonl", "--ood", tiny / "boxed/records.jsonl"]
    base = evaluate(tiny, *files, "--out", tiny / "step0.json")
    assert base["gf"] is None and base["files"]["ood"] == ["boxed/records.jsonl"]
    itself = evaluate(tiny, *files, "--out", tiny / "same.json", "--baseline", tiny / "step0.json")
    assert (itself["gf"]["gain_id"], itself["gf"]["gain_ood"], itself["gf"]["gf"]) == (0, 0, 0)
    # a step-0 model with two ID replies fewer in format, of five
    form = [row for row in base["rows"] if row["role"] == "id" and row["format"] == [1.0]]
    assert len(form) >= 2
    for row_ in form[:2]:
        row_["format"] = [0.0]
    (tiny / "less.json").write_text(evaluation.result_text(base))
    capsys.readouterr()
    better = evaluate(tiny, *files, "--out", tiny / "better.json", "--baseline", tiny / "less.json")
    assert better["gf"]["gain_id"] == pytest.approx(40) and better["gf"]["ood_gains"] == {"jigsaw-pair-2x1:boxed": 0}
    assert "gain ID +40.0" in capsys.readouterr().out


def test_a_baseline_of_other_files_or_unknown_weights_are_refused_before_the_model_is_loaded(tiny, capsys):
    files = ["--id", tiny / "think/open.jsonl", "--ood", tiny / "boxed/records.jsonl"]
    evaluate(tiny, *files, "--limit", 2, "--out", tiny / "two.json")
    capsys.readouterr()
    nowhere = ["--model", tiny / "nowhere", "--out", tiny / "x.json", *files, "--baseline", tiny / "two.json"]
    assert "open.jsonl:3" in says(capsys, *nowhere)
    assert "boxed" in says(capsys, *nowhere, "--limit", 2, "--ood-weights", "wrong=1")
    assert "nowhere" in says(capsys, *nowhere, "--limit", 2)  # the inputs fit: now the model is missed


def test_two_processes_write_the_same_file_as_one(tiny):
    shared = ["--model", tiny / "base", "--data", tiny / "think/records.jsonl", "--ood", tiny / "boxed/records.jsonl",
              "--samples", 3, "--temperature", 1, "--top-k", 50, "--seed", 5, "--max-new-tokens", 6,
              "--limit", 3, "--batch", 2]  # fmt: skip
    evaluation.main([str(argument) for argument in [*shared, "--out", tiny / "one.json"]])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", EVAL]
    done = subprocess.run([*command, *map(str, [*shared, "--out", tiny / "two.json"])], capture_output=True, text=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=120)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tiny / "two.json").read_bytes() == (tiny / "one.json").read_bytes()
    rows = json.loads((tiny / "two.json").read_text())["rows"]
    assert len({reply for row in rows for reply in row["replies"]}) > 12  # 6 records x 3 samples, hardly two alike
    assert [row["id"][-1] for row in rows] == ["0", "1", "2"] * 2 and done.stdout.count("overall") == 1


def test_a_report_is_made_from_a_real_evaluation_after_its_folder_was_moved(tiny, tmp_path):
    evaluate(tiny, "--data", tiny / "think/records.jsonl", "--out", tiny / "real.json")
    shutil.copytree(tiny / "think", tmp_path / "moved/think")
    shutil.copy(tiny / "real.json", tmp_path / "moved/real.json")
    table = tmp_path / "table.md"
    evaluation.main(["--report", str(tmp_path / "r.html"), "--table", str(table),
                     "--results", str(tmp_path / "moved/real.json")])  # fmt: skip
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("<img ") == 5 and "no longer there" not in page
    assert table.read_text().startswith("| set of questions | real ")
