"""The study of Jigsaw-R1 in miniature: its counts are those of the replies, its page those of the counts."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, environment

sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "recipes")]

import study_jigsaw as study  # noqa: E402  (bench/study_jigsaw.py)

from toy import primer  # noqa: E402
from toy.scenes import list_scenes, scene  # noqa: E402

# -------- replies

COLUMN = {"answer": [3, 1, 2], "order": [2, 3, 1], "rows": 3, "cols": 1}  # 3 lies lightest, then 1, then 2


def think(reason, answer):
    return f"<think>{reason}</think><answer>{answer}</answer>"


def test_a_reply_is_read_as_levels_conclusion_and_answer():
    said = study.read_thoughts(think("1 5, 2 3, 3 8. recheck: 1 5, 2 4, 3 8. so 3 1 2.", "3 2 1"))
    assert said == {"lists": [[5, 3, 8], [5, 4, 8]], "conclusion": [3, 1, 2], "answer": [3, 2, 1]}
    assert study.read_thoughts("no tags at all") == {"lists": [], "conclusion": None, "answer": None}
    # Positions out of order are no list of levels, and numbers of the answer are no reason.
    assert study.read_thoughts(think("2 5, 1 3. so 2 1.", "2 1"))["lists"] == []
    assert study.read_thoughts("so 2 1.</think>")["answer"] is None


def test_the_shares_of_replies_are_those_counted_by_hand():
    replies = [
        think("1 5, 2 3, 3 8. so 3 1 2.", "3 1 2"),  # true, follows, consistent
        think("1 5, 2 3, 3 8. so 1 3 2.", "3 1 2"),  # true, does not follow, inconsistent
        think("1 9, 2 3, 3 8. so 1 3 2.", "1 3 2"),  # false, follows, consistent
        think("1 5, 2 5, 3 8. recheck: 1 5, 2 5, 3 8. so 3 2 1.", "3 2 1"),  # a tie is true; confirmed
        think("1 8, 2 3, 3 5. recheck: 1 5, 2 3, 3 8. so 3 1 2.", "1 2 3"),  # taken back; inconsistent
        "well",
    ]
    found = study.thoughts_of([(reply, COLUMN) for reply in replies])
    assert found == {
        "consistent": 0.6, "true": 0.8, "licensed": 0.8,
        "recheck": round(2 / 6, 4), "verification": round(1 / 6, 4), "backtracking": round(1 / 6, 4),
        "ends_twice": 1, "ends_once": 0.75,
    }  # fmt: skip
    assert study.thoughts_of([("well", COLUMN)])["consistent"] is None


def test_the_primer_writes_what_the_study_reads():
    import random

    import mixing

    manner = primer.Manner(
        follow=1, reply_format="think", ask=("rank", "inverse"), recheck=0.5, slip=0.25, separate=True
    )
    mixed = mixing.mix(scene(random.Random(3), 56), 3, 1, random.Random(1), swap=0, derange=False)
    items = primer.primer_items(mixed, 2000, random.Random(2), manner)
    rank = [(item["chosen"], item) for item in items if item["question"] == "rank"]
    puzzle = [(item["chosen"], item) for item in items if item["question"] == "inverse"]
    for said in (rank, puzzle):
        found = study.thoughts_of(said)
        assert found["true"] == 1 and found["consistent"] == pytest.approx(0.75, abs=0.05)
        assert found["recheck"] == pytest.approx(0.5, abs=0.06)
        # Half of the first looks are shuffled, and one shuffle in six changes nothing.
        assert found["backtracking"] / found["recheck"] == pytest.approx(0.5 * 5 / 6, abs=0.08)
    assert study.thoughts_of(rank)["licensed"] == 1
    assert study.thoughts_of(puzzle)["licensed"] == pytest.approx(1 / 6, abs=0.05)  # sampled at random
    conclusions = {tuple(study.read_thoughts(text)["conclusion"]) for text, _ in puzzle}
    assert len(conclusions) == 6


# -------- readers, intervals, tables


def test_readers_put_pieces_in_order_by_light_by_warmth_and_by_seams():
    def piece(red, green, blue):
        return np.full((4, 4, 3), (red, green, blue), dtype=np.float32)

    # As they lie: 1 dark and cool, 2 light and cool, 3 light and warm, 4 dark and warm.
    shown = [piece(40, 60, 80), piece(140, 160, 180), piece(180, 160, 140), piece(80, 60, 40)]
    assert study.by_light_and_warmth(shown, 2) == [3, 2, 4, 1]
    assert set(study.by_light(shown)[:2]) == {2, 3}
    ramp = np.repeat(np.arange(12, dtype=np.float32)[:, None, None], 4, axis=1).repeat(3, axis=2)
    strips = [ramp[8:], ramp[:4], ramp[4:8]]  # light to dark is the wrong way here: only the seams tell
    assert study.by_seams(strips, 1) == [2, 3, 1] and study.by_light(strips) == [1, 3, 2]


def test_scenes_lit_from_below_are_the_same_drawing_with_the_light_turned_over():
    import random

    for number in list_scenes(5, 7, "test", 0.1):
        plain, contrary = (
            np.asarray(scene(random.Random(number), 56, contrary=turned), dtype=float).mean(axis=(1, 2))
            for turned in (False, True)
        )
        assert plain[:28].mean() > plain[28:].mean() and contrary[:28].mean() < contrary[28:].mean()


def test_the_interval_is_that_of_the_mean_over_seeds():
    mean, low, high = study.interval([0.0, 1.0, 2.0, 5.0])
    assert mean == 2 and 0 <= low < mean < high <= 5
    assert study.interval([3.0, 3.0]) == (3, 3, 3)
    assert study.shown([0.5]) == "50.0" and study.shown([0.5, 0.5]) == "50.0 (50.0–50.0)" and study.shown([None]) == "–"


def test_seeds_belong_to_their_own_arm():
    named = {"think-2x1-0": "a", "no-think-2x1-0": "b", "sft-rl-think-1": "c", "sft-think-1": "d", "base-think": "e"}
    assert study.of_arm(named, "think-2x1") == {0: "a"}
    assert study.of_arm(named, "sft-rl-think") == {1: "c"} and study.of_arm(named, "sft-think") == {1: "d"}


def test_the_page_says_what_the_numbers_say():
    assert study.main(["--check"]) == 0
    text = study.rebuilt((ROOT / "docs/jigsaw_study.md").read_text(), json.loads(study.RESULTS.read_text()))
    assert all(f"<!-- {name}: rebuilt" in text for name in study.TABLES)
    assert all((ROOT / f"docs/figures/study_jigsaw_{name}.png").exists() for name in study.FIGURES)


def test_a_page_that_says_something_else_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text((ROOT / "docs/jigsaw_study.md").read_text().replace("| chance | 50.0 |", "| chance | 51.0 |"))
    assert study.main(["--check", "--page", str(page)]) == 1
    with pytest.raises(ValueError, match="nobody builds the block 'verse'"):
        study.rebuilt("<!-- verse: rebuilt by bench/study_jigsaw.py -->", {})


# -------- the recipe


def test_every_part_of_the_study_runs_and_its_page_can_be_built(tmp_path):
    out = tmp_path / "out"
    env = environment() | {"SMOKE": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [shutil.which("bash"), str(ROOT / "recipes/study_jigsaw.sh"), str(out), "0"]
    done = subprocess.run(command, env=env, text=True, capture_output=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    page, numbers = tmp_path / "page.md", tmp_path / "numbers.json"
    page.write_text((ROOT / "docs/jigsaw_study.md").read_text())
    where = ["--results", str(numbers), "--page", str(page), "--figures", str(tmp_path)]
    assert study.main(["--collect", str(out), *where]) == 0
    found = json.loads(numbers.read_text())
    assert set(found["curves"]) == {
        "think-2x1-0", "no-think-2x1-0", "think-3x1-0", "no-think-3x1-0", "no-think-2x2-0", "sft-rl-think-0",
        "sft-rl-no-think-0",
    }  # fmt: skip
    assert study.main(["--check", *where]) == 0
    assert len(list(tmp_path.glob("study_jigsaw_*.png"))) == len(study.FIGURES)
