"""pairs_page.py: pairs in numbers, what differs marked, and a page on which no reply becomes markup."""

import json
import re

import pytest
from PIL import Image
from test_report import HOSTILE, Page, says
from test_report_inputs import check_page

import distill
import pairs_page
import report
from records import write_jsonl

PAIR = {"id": "p", "images": [], "prompt": "Which?", "answer": "B", "answer_type": "letter", "think": True}


def pair(chosen, rejected, corruption=None, **more):
    return PAIR | {"chosen": chosen, "rejected": rejected, "corruption": corruption} | more


def write(folder, pairs):
    write_jsonl(folder / "pairs.jsonl", [row | {"id": f"p{number}"} for number, row in enumerate(pairs)])
    return folder / "pairs.jsonl"


def page_of(folder, pairs, *more):
    report.main(["--out", str(folder / "r.html"), "--pairs", str(write(folder, pairs)), *more])
    return (folder / "r.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_the_edit_distance_counts_characters_put_in_taken_out_or_replaced():
    assert pairs_page.edit_distance("kitten", "sitting") == 3  # k to s, e to i, g put in
    assert pairs_page.edit_distance("a" * 10**6, "b" * 10**6) == 2**16  # and not after minutes
    assert pairs_page.edit_distance("", "ab\n") == 3 and pairs_page.edit_distance("答え B", "答え A") == 1


@pytest.mark.parametrize("kind, edits", [("all_tags", 32), ("answer_tags", 17), ("think_tags", 15)])
def test_a_corruption_that_takes_tags_out_is_as_many_edits_as_they_have_characters(kind, edits):
    reply = "<think>so</think><answer>B</answer>"  # tags of 7, 8, 8 and 9 characters
    assert pairs_page.edit_distance(reply, distill.corrupt(reply, kind)) == edits


def test_the_table_has_a_line_a_kind_the_most_frequent_first():
    pairs = [pair("abcd", "abc", "all_tags"), pair("ab", "a", "think_tags"), pair("abcdef", "xbc", "all_tags"),
             pair("abc", None), pair("a", "b")]  # fmt: skip
    table = pairs_page.statistics_table(pairs)
    assert table[1] == ["all_tags", "2", "40.0 %", "5.0", "3.0", "2.5"]  # edits: 1, and 1 + 3
    assert ["no rejected reply", "1", "20.0 %", "3.0", "–", "–"] in table
    assert ["malformed already", "1", "20.0 %", "1.0", "1.0", "1.0"] in table
    assert table[-1] == ["all", "5", "100.0 %", "3.2", "2.0", "1.8"]  # of four pairs: 1, 1, 4, 1 is 7 / 4


# ---------------------------------------------------------------------------------------------------------------------
# The page


def unmarked(html):
    return re.sub("<mark>.*?</mark>", "", html, flags=re.S)


def test_what_differs_is_marked_and_nothing_else():
    chosen, rejected = pairs_page.marked("<think>so</think>B", "so\nA")
    assert chosen == "<mark>&lt;think&gt;</mark>so<mark>&lt;/think&gt;B</mark>" and rejected == "so<mark>⏎\nA</mark>"
    assert pairs_page.marked("same", "same") == ("same", "same")
    assert pairs_page.marked("", "ab") == ("", "<mark>ab</mark>")


def test_without_the_marks_both_sides_are_equal_and_with_them_they_are_whole():
    one = "<think>2 looks light, so it was & above.</think><answer>A</answer>"
    for kind in distill.CORRUPTIONS:
        other = distill.corrupt(one, kind)
        shown = pairs_page.marked(one, other)
        assert unmarked(shown[0]) == unmarked(shown[1])
        for html, text in zip(shown, (one, other), strict=True):
            assert "".join(Page(html).text) == text
        assert "<mark>" in shown[0]  # whatever a corruption does, it takes something out


def test_nothing_in_a_pair_becomes_markup_and_every_field_is_hostile(tmp_path):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "p.png")
    evil = HOSTILE.replace("\ud83d", "")
    images = ["p.png", "gone.png", f"../{evil[:40]}"]
    row = pair(f"{evil} x", f"y {evil}", evil, prompt=evil, answer=[evil], images=images)
    write_jsonl(tmp_path / "pairs.jsonl", [row | {"id": evil, "chosen_from": evil, "rejected_from": {"a": evil}}])
    report.main(["--out", str(tmp_path / "r.html"), "--pairs", f"<em>x={tmp_path / 'pairs.jsonl'}"])
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    text = check_page(html)
    shown = evil.replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert text.count(shown) >= 4 and "picture gone.png is no longer there" in text and html.count("<img ") == 1
    assert not {tag for tag, _ in Page(html).tags} & {"em", "u"} and "\x1b" not in html


def test_of_each_kind_the_first_are_shown_and_a_button_shows_one_kind_only(tmp_path, capsys):
    pairs = [pair(f"chosen {number}", f"rejected {number}", "all_tags") for number in range(7)]
    pairs += [pair("chosen 7", "rejected 7", "think_tags")]
    html = page_of(tmp_path, pairs, "--keep-pairs", "3")
    tags = Page(html).tags
    cards = [attributes["class"] for tag, attributes in tags if tag == "article"]
    assert cards == ["puzzle kind-0"] * 3 + ["puzzle kind-1"]
    buttons = [attributes for tag, attributes in tags if tag == "input"]
    assert [button["class"] for button in buttons] == ["show-all", "show-0", "show-1"]
    assert ["checked" in button for button in buttons] == [True, False, False]
    labels = [attributes["for"] for tag, attributes in tags if tag == "label"]
    assert labels == [button["id"] for button in buttons]
    assert ".pairs > .show-1:checked ~ .puzzle:not(.kind-1) { display: none; }" in html
    assert "all (8)" in html and "think_tags (1)" in html and "chosen 3" not in html
    assert "| all_tags   | 7     | 87.5 %" in capsys.readouterr().out


def test_long_replies_and_many_kinds_keep_the_page_small(tmp_path, monkeypatch):
    monkeypatch.setattr(pairs_page, "COMPARED_CHARACTERS", 1000)
    pairs = [pair("<a>" * 20_000, "b" * 50_000, f"kind {number}") for number in range(15)]
    html = page_of(tmp_path, pairs)
    assert len(html) < 300_000 and "57000 more characters" in html and "3 more kinds are left out" in html
    assert html.count("<article") == pairs_page.MOST_KINDS


def test_a_pair_without_a_rejected_reply_is_shown_alone(tmp_path):
    html = page_of(tmp_path, [pair("only this", None)])
    assert "only this" in html and "no rejected reply" in html and 'class="wrong"' not in html


def test_several_files_have_buttons_of_their_own(tmp_path):
    path = write(tmp_path, [pair("a", "b", "all_tags")])
    report.main(["--out", str(tmp_path / "r.html"), "--pairs", f"self={path}", f"base={path}"])
    tags = Page((tmp_path / "r.html").read_text(encoding="utf-8")).tags
    names = [attributes["name"] for tag, attributes in tags if tag == "input"]
    assert names == ["pairs-0", "pairs-0", "pairs-1", "pairs-1"]
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize(
    "row, words",
    [
        (pair(3, "b"), 'pairs.jsonl:1: the field "chosen" must be text'),
        (pair("a", ["b"]), 'pairs.jsonl:1: the field "rejected" must be text or null'),
        (pair("a", "b", 3), 'pairs.jsonl:1: the field "corruption" must be text or null'),
        (pair("a", "b", images="p.png"), 'pairs.jsonl:1: "images" must be a list of paths'),
        (pair("a", "b", images=["p\0"]), 'pairs.jsonl:1: "images" must be a list of paths'),
    ],
)
def test_what_is_no_pair_is_refused_by_file_and_line(tmp_path, capsys, row, words):
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    assert words in says(capsys, "--out", tmp_path / "r.html", "--pairs", tmp_path / "pairs.jsonl")
    assert not (tmp_path / "r.html").exists()


def test_a_file_of_no_pairs_and_a_page_over_the_pairs_are_refused(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    assert "no pairs" in says(capsys, "--out", tmp_path / "r.html", "--pairs", tmp_path / "empty.jsonl")
    path = write(tmp_path, [pair("a", "b")])
    assert "--pairs" in says(capsys, "--out", path, "--pairs", path)
    assert "called the same" in says(capsys, "--out", tmp_path / "r.html", "--pairs", path, path)
