"""bench/pages.py fills a script's blocks, touches nothing else, and refuses what it cannot fill in one line."""

import subprocess
import sys

import pytest
from commands import ROOT

from bench import pages

SCRIPT = "bench/numbers.py"
PAGE = """# Title \\1

<!-- one: rebuilt by bench/numbers.py -->
old
<!-- end of one -->
between\t <!-- a comment -->
<!-- two: rebuilt by bench/numbers-py -->
of another script
<!-- end of two -->
<!-- two: rebuilt by bench/numbers.py --><!-- end of two -->
no line ends here"""


def marked(name, text="old"):
    return f"<!-- {name}: rebuilt by {SCRIPT} -->\n{text}\n<!-- end of {name} -->\n"


def test_every_block_of_the_script_is_filled_and_all_else_stays_as_it_was():
    blocks = {"one": "1\n\n1", "two": lambda: "\n2\n"}
    expected = PAGE.replace("old", "1\n\n1").replace("numbers.py --><!-- end", "numbers.py -->\n\n2\n\n<!-- end")
    assert pages.rebuilt(PAGE, blocks, SCRIPT, "page.md", each_once=True) == expected
    assert pages.rebuilt(expected, blocks, SCRIPT, "page.md") == expected


def test_a_page_without_blocks_of_the_script_stays_as_it_was():
    assert pages.rebuilt(PAGE, {"one": "1"}, "bench/letters.py", "page.md") == PAGE
    assert pages.rebuilt("", {"one": "1"}, SCRIPT, "page.md") == ""


@pytest.mark.parametrize("new", [r"\g<1> \1 \n", "\\", "<!-- end of one -->", marked("one"), ""])
def test_the_new_text_is_taken_word_for_word(new):
    assert pages.rebuilt(f"a\n{marked('one')}b\n", {"one": new}, SCRIPT, "page.md") == f"a\n{marked('one', new)}b\n"


def test_only_what_a_page_holds_is_made():
    def fail():
        raise AssertionError("made for a block that is not on the page")

    assert pages.rebuilt(marked("one"), {"one": "1", "two": fail}, SCRIPT, "page.md") == marked("one", "1")


def test_a_block_may_stand_twice_where_it_need_not_stand_once():
    page = marked("one") + marked("one")
    assert pages.rebuilt(page, {"one": "1"}, SCRIPT, "page.md") == page.replace("old", "1")


@pytest.mark.parametrize(
    "page, each_once, why",
    [
        (marked("three"), False, "nobody builds the block 'three'; the blocks are one, two"),
        (marked("on-e"), False, "nobody builds the block 'on-e'; the blocks are one, two"),
        (marked("one").replace("end of one", "end"), False, "the block one needs one end, and has 0"),
        (f"<!-- one: rebuilt by {SCRIPT} -->\n" + marked("two") + marked("one"), False,
         "the block one needs one end, and has 0"),
        (marked("one") + "<!-- end of one -->", False, "the block one needs one end, and has 2"),
        (marked("one"), True, "must hold the block two once, and holds it 0 times"),
        (marked("two") + marked("one") + marked("two"), True, "must hold the block two once, and holds it 2 times"),
    ],
)  # fmt: skip
def test_what_cannot_be_filled_is_refused_in_one_line(page, each_once, why):
    with pytest.raises(pages.Refused) as refused:
        pages.rebuilt(page, {"one": "1", "two": "2"}, SCRIPT, "page.md", each_once)
    assert str(refused.value) == f"page.md: {why}" and isinstance(refused.value, ValueError)


@pytest.mark.parametrize("script", ["house", "reliability"])
def test_a_script_finds_the_module_from_any_folder(script, tmp_path):
    command = [sys.executable, str(ROOT / f"bench/{script}.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
