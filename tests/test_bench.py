"""bench/readme.py shows no number whose commit it does not know, and finds its blocks on whichever page holds them."""

import json
import re
import subprocess
import sys

import pytest
from commands import ROOT

sys.path.insert(0, str(ROOT / "bench"))

import readme
import reliability
import versus


def test_a_table_names_the_one_clean_commit_of_its_logs():
    assert readme.source({"one.json": "abc", "two.json": "abc"}) == "abc"


@pytest.mark.parametrize("logs", [{}, {"one.json": None}, {"one.json": "abc", "two.json": None}])
def test_a_log_that_does_not_say_its_commit_is_not_shown(logs):
    assert readme.source(logs) is None


@pytest.mark.parametrize(
    "logs, why",
    [
        ({"one.json": "abc", "two.json": "def"}, r"several commits: one.json \(abc\), two.json \(def\)"),
        ({"one.json": "abc+"}, r"files changed since the commit: one.json \(abc\+\)"),
    ],
)
def test_logs_of_several_commits_or_of_a_changed_tree_are_refused_by_name(logs, why):
    with pytest.raises(readme.Refused, match=why):
        readme.source(logs)


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """bench/readme.py on a README and one page of docs, with logs of its own: -> (folder, write a log)."""
    monkeypatch.setattr(readme, "PAGES", [tmp_path / "README.md", tmp_path / "docs/results.md"])
    monkeypatch.setattr(readme, "RESULTS", tmp_path / "results")
    for folder in ("docs", "results"):
        (tmp_path / folder).mkdir()
    (tmp_path / "README.md").write_text("no table here\n")
    block = "before\n<!-- embedded: rebuilt by bench/readme.py -->\nold\n<!-- end of embedded -->\nafter\n"
    (tmp_path / "docs/results.md").write_text(block)

    def write(commit):
        rows = [{"reward": 0.1 * step, "format": 0.5, "accuracy": 0.25} for step in range(15)]
        log = {"commit": commit, "rows": rows} if commit else rows
        (tmp_path / "results/embedded.json").write_text(json.dumps(log))

    return tmp_path, write


def test_a_block_is_rebuilt_on_the_page_that_holds_it(pages, capsys):
    folder, write = pages
    write("0123456789ab")
    assert readme.main(["--check"]) == 1
    assert "results.md does not say" in capsys.readouterr().err
    assert readme.main([]) == 0
    text = (folder / "docs/results.md").read_text()
    assert "mean reward 0.20 to 0.95" in text and "commit `0123456789ab`" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert readme.main(["--check"]) == 0


def test_a_number_without_a_commit_gives_way_to_how_to_measure_it(pages):
    folder, write = pages
    write(None)
    assert readme.main([]) == 0
    text = (folder / "docs/results.md").read_text()
    assert "0.95" not in text and "`python grpo.py`" in text


def test_a_refused_table_ends_the_script_and_changes_no_page(pages, capsys):
    folder, write = pages
    write("0123456789ab+")
    assert readme.main([]) == 1
    assert "embedded.json (0123456789ab+)" in capsys.readouterr().err
    assert "old" in (folder / "docs/results.md").read_text()


def test_a_marker_that_nobody_builds_is_refused(pages, capsys):
    folder, _ = pages
    (folder / "README.md").write_text("<!-- speeed: rebuilt by bench/readme.py --><!-- end of speeed -->")
    assert readme.main(["--check"]) == 1
    assert "README.md: nobody builds the block 'speeed'" in capsys.readouterr().err


def test_a_run_that_does_not_say_its_commit_is_not_taken_over(pages, capsys):
    folder, _ = pages
    (folder / "run/photos").mkdir(parents=True)
    assert readme.main(["--collect", str(folder / "run")]) == 1
    assert "no file says at which commit" in capsys.readouterr().err


def test_a_folder_of_another_kind_is_not_taken_over(pages, capsys):
    folder, _ = pages
    assert readme.main(["--collect", str(folder / "runs/demo")]) == 1
    assert "runs/demo: neither a run of grpo.py nor one of recipes/photos.sh" in capsys.readouterr().err
    assert list((folder / "results").iterdir()) == []


def test_the_front_page_shows_means_over_the_seeds_of_the_study(pages):
    folder, _ = pages

    def formats(kept, accuracy):
        other = {"seen": {"format": kept - 20, "accuracy": 1}, "unseen": {"format": kept - 40, "accuracy": 2}}
        return {"trained": {"format": kept, "accuracy": accuracy}} | other

    def seed(more):
        curves = {name: [{"formats": formats(41, 21)}, {"formats": formats(end + more, 50), "gf": end}]
                  for name, end in (("zero", 90), ("sft", 92), ("specs", 86))}  # fmt: skip
        rl = {"sft": formats(95, 96), "specs": formats(97, 98 + more)}
        return {"zero": curves["zero"], "cold": curves, "rl": rl}

    study = {"commit": "0123456789ab", "seeds": {"0": seed(0), "4": seed(1)}}
    (folder / "results/study_specs.json").write_text(json.dumps(study))
    rows = dict(line.strip("| ").split(" | ", 1) for line in readme.headline().splitlines() if line.startswith("| "))
    assert rows["after (2 seeds, commit `0123456789ab`)"] == "trained format | other formats | accuracy, chance 50"
    assert rows["base"] == "41.0 (41.0 … 41.0) | 11.0 (11.0 … 11.0) | 21.0 (21.0 … 21.0)"
    assert rows["GRPO-zero"] == "90.5 (90.0 … 91.0) | 60.5 (60.0 … 61.0) | 50.0 (50.0 … 50.0)"
    assert rows["cold start DPO + SFT"].startswith("86.5 (86.0 … 87.0)")
    assert rows["DPO + SFT, then GRPO"] == "97.0 (97.0 … 97.0) | 67.0 (67.0 … 67.0) | 98.5 (98.0 … 99.0)"
    assert "SFT 92.0 (92.0 … 92.0), DPO + SFT 86.0" in readme.headline()
    (folder / "results/study_specs.json").write_text(json.dumps(study | {"commit": "0123456789ab+"}))
    with pytest.raises(readme.Refused, match="study_specs.json"):
        readme.headline()


def test_every_row_of_the_speed_table_names_its_commit():
    starts = ("| GRPO", "| DPO", "| sampling", "Seconds a group", "Share")
    rows = [line for line in readme.speed_tables().splitlines() if line.startswith(starts)]
    assert len(rows) >= 12
    cells = json.loads((ROOT / "bench/results/versus.json").read_text()).values()
    known = {cell["commit"] for cell in cells}
    for row in rows:
        assert any(f"`{commit}`" in row for commit in known), row


def test_benchmarks_and_recipes_ask_git_for_the_commit_in_the_same_words():
    said = " ".join(["describe", "--always", "--abbrev=12", "--exclude", "--dirty=+"])
    for name in ("recipes/tiny_base.sh", "recipes/photos.sh"):
        (line,) = [line for line in (ROOT / name).read_text().splitlines() if line.startswith("git ")]
        words = line.split(">")[0].replace("='*'", "").split()[3:]
        assert " ".join(words) == said
        out = subprocess.run(["bash", "-c", line.split(">")[0]], env={"HERE": str(ROOT), "PATH": "/usr/bin:/bin"},
                             capture_output=True, text=True)  # fmt: skip
        assert out.stdout.strip() == versus.commit()


# ---------------------------------------------------------------------------------------------------------------------
# bench/reliability.py


def test_the_reliability_page_says_what_the_logs_say():
    assert reliability.main(["--check"]) == 0, "python bench/reliability.py rebuilds it"


def test_a_log_that_is_missing_is_not_run_and_a_fault_that_was_not_survived_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(reliability, "RESULTS", tmp_path)
    text = reliability.tables()
    assert text.count(reliability.NOT_RUN) >= 5 and not re.search(r"\| \d", text)

    fault = {"commit": "abc", "seed": 3, "number": 17, "stage": "dpo", "world": 2, "fault": "SIGKILL rank", "kills": 1}
    lines = [fault | {"survived": True, "outcome": "same"}, fault | {"survived": False, "outcome": "other\nweights"}]
    (tmp_path / "chaos.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bugs = [{"name": "one", "caught": True}, {"name": "two", "caught": False}]
    (tmp_path / "bugs.json").write_text(json.dumps({"commit": "def", "bugs": bugs}))
    text = reliability.tables()
    assert "2 faults in real runs, 2 processes killed, 1 not survived; commit `abc`." in text
    assert "| dpo, 2 processes | 2 | 2 | 1 |" in text
    assert "Not survived: dpo, 2 processes, SIGKILL rank (`--seed 3 --only 17`): other weights" in text
    assert "| planted in one whole run | 2 | 1 caught; missed: two | `def` |" in text
