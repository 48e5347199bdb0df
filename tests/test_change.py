"""docs/change.md cannot rot: every diff in it is applied to a copy of the sources, where the section's check must pass.

A check is the section's ```python and ```sh blocks, run in their order. Without the diff it must fail.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from plant_bugs import ROOT, source_files

PAGE = (ROOT / "docs/change.md").read_text(encoding="utf-8")
SLOW = ("A model family", "A flag")  # checks that make a model first
SECTIONS = {}  # title -> [(language, text of the block)]
for section in re.split(r"^## ", PAGE, flags=re.M)[1:]:
    title = section.split("\n", 1)[0]
    SECTIONS[title] = re.findall(r"^```(\w+)\n(.*?)^```$", section, re.M | re.S)


def diff_of(title):
    (diff,) = [text for language, text in SECTIONS[title] if language == "diff"]
    return diff


def copy_sources(folder):
    for name in source_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)


def run(command, folder, **options):
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GIT_CEILING_DIRECTORIES": str(folder.parent)}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # its `python` is this one
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, cwd=folder, env=env, text=True, timeout=300, **streams, **options)


def check(title, folder):
    """Run a section's blocks: -> (exit status, output) of the first that fails, or of the last."""
    for language, text in SECTIONS[title]:
        if language == "diff":
            continue
        command = ["bash", "-e", "-c", text]
        if language == "python":
            (folder / "check.py").write_text(text, encoding="utf-8")
            command = [sys.executable, "check.py"]
        done = run(command, folder)
        if done.returncode:
            break
    return done.returncode, "\n".join(done.stdout.splitlines()[-30:])


def test_every_section_has_one_diff_and_a_check():
    assert len(SECTIONS) == 8
    for title, blocks in SECTIONS.items():
        languages = [language for language, _ in blocks]
        assert languages[0] == "diff" and languages.count("diff") == 1, title
        assert set(languages) <= {"diff", "python", "sh"} and "python" in languages, title


@pytest.mark.parametrize("title", SECTIONS)
def test_a_diff_applies_and_its_check_passes(tmp_path, title):
    copy_sources(tmp_path)
    applied = run(["git", "apply", "--verbose", "-"], tmp_path, input=diff_of(title))
    assert applied.returncode == 0, f"docs/change.md, {title}: write the diff anew\n{applied.stdout}"
    status, output = check(title, tmp_path)
    assert status == 0, output


@pytest.mark.parametrize("title", [title for title in SECTIONS if title not in SLOW])
def test_without_its_diff_the_check_fails(tmp_path, title):
    copy_sources(tmp_path)
    assert check(title, tmp_path)[0] != 0


def test_what_the_page_links_to_is_there():
    headings = {title.lower().replace(" ", "-") for title in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", PAGE)) <= headings
    for file in re.findall(r"`((?:tests|toy|docs)/[\w.]+|\w+\.py)`", PAGE):
        assert (ROOT / file).exists(), file
