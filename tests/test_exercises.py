"""Every exercise can be planted, says what it promises, and its page is the list's."""

import re
import subprocess
import sys

import exercises
import pytest
from exercises import EXERCISES, LEFT_OUT, bug_of
from plant_bugs import ROOT, problem_with, source_files

NUMBERS = range(1, len(EXERCISES) + 1)


def run(*argv):
    """tests/exercises.py as a command: -> (exit status, stdout, stderr)."""
    command = [sys.executable, "tests/exercises.py", *map(str, argv)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_there_are_twenty_and_no_bug_comes_twice():
    assert len(EXERCISES) == 20 == len({exercise.bug for exercise in EXERCISES})


@pytest.mark.parametrize("number", NUMBERS)
def test_an_exercise_can_be_planted_and_its_tests_exist(number):
    assert problem_with(bug_of(EXERCISES[number - 1])) is None


@pytest.mark.parametrize("number", NUMBERS)
def test_a_task_names_the_file_and_the_tests_and_not_the_mistake(number, tmp_path):
    exercise = EXERCISES[number - 1]
    bug = bug_of(exercise)
    text = exercises.task(number, tmp_path)
    assert f"mistake in {bug.file}" in text
    assert exercise.symptom in text and exercise.hint in text and all(test in text for test in bug.tests.split())
    for secret in (exercise.bug, exercise.why, bug.old.strip(), bug.new.strip()):
        assert not secret or secret not in text


@pytest.mark.parametrize("number", NUMBERS)
def test_a_solution_shows_the_line_as_it_was_and_as_it_was_planted(number):
    bug = bug_of(EXERCISES[number - 1])
    right = (ROOT / bug.file).read_text().splitlines()
    wrong = (ROOT / bug.file).read_text().replace(bug.old, bug.new).splitlines()
    text = exercises.solution(number)
    file, line = re.search(r"^(\S+):(\d+) ", text, re.M).groups()
    assert file == bug.file and "+" + right[int(line) - 1] in text.splitlines()
    shown = {sign: [row[1:] for row in text.splitlines() if row.startswith(sign)] for sign in "+-"}
    assert shown["+"] and shown["-"] and set(shown["+"]) <= set(right) and set(shown["-"]) <= set(wrong)
    assert EXERCISES[number - 1].why in text


def test_a_copy_differs_from_the_repository_in_the_bugs_file_alone_and_its_tests_see_it(tmp_path):
    status, out, err = run(1, "--into", tmp_path)
    assert (status, err) == (0, "") and str(tmp_path / "1") in out
    changed = []
    for name in source_files():
        copy = tmp_path / "1" / name
        assert copy.exists() == (name not in LEFT_OUT), name
        if copy.exists() and copy.read_bytes() != (ROOT / name).read_bytes():
            changed.append(name)
    bug = bug_of(EXERCISES[0])
    assert changed == [bug.file]
    # What the task says to run fails, and passes once the line is mended.
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *bug.tests.split()]
    assert subprocess.run(command, cwd=tmp_path / "1", capture_output=True).returncode == 1
    (tmp_path / "1" / bug.file).write_bytes((ROOT / bug.file).read_bytes())
    assert subprocess.run(command, cwd=tmp_path / "1", capture_output=True).returncode == 0


def test_a_copy_that_is_there_is_left_alone(tmp_path):
    (tmp_path / "1").mkdir()
    status, _, err = run(1, "--into", tmp_path)
    assert status == 2 and err == f"error: {tmp_path / '1'} is there already; remove it to start anew\n"
    assert list((tmp_path / "1").iterdir()) == []


def test_show_prints_the_original_line(tmp_path):
    status, out, err = run(1, "--show", "--into", tmp_path)
    assert (status, err) == (0, "") and list(tmp_path.iterdir()) == []
    assert "+    return -(weight[:, None] * gain.masked_fill(~mask, 0.0)).sum()" in out.splitlines()


@pytest.mark.parametrize("number", ["0", "21", "x", "01", "1.0"])
def test_a_number_that_is_none_gives_one_line(number):
    assert run(number) == (2, "", f"error: there are exercises 1 to 20, not {number}\n")


def test_without_a_number_all_are_listed():
    status, out, _ = run()
    assert status == 0 and len(out.splitlines()) == 20


def test_the_page_is_the_list():
    assert (ROOT / "docs/exercises.md").read_text() == exercises.page(), "python tests/exercises.py --write-docs"
