"""The README says what the committed logs say, and names only files and flags that exist."""

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))

import readme  # noqa: E402  (bench/readme.py)


def test_the_result_tables_are_those_of_the_committed_logs():
    assert readme.main(["--check"]) == 0


def test_a_changed_number_is_noticed(monkeypatch, tmp_path):
    text = readme.README.read_text()
    number = re.search(r"<!-- results.*?\| GRPO-zero \| (\d+\.\d)", text, re.S)
    changed = tmp_path / "README.md"
    changed.write_text(text[: number.start(1)] + "12.3" + text[number.end(1) :])
    monkeypatch.setattr(readme, "README", changed)
    assert readme.main(["--check"]) == 1


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+)\)", readme.README.read_text())
    assert len(links) >= 10
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_flag_in_the_readme_is_a_flag_of_some_stage():
    text = readme.README.read_text()
    files = [*ROOT.glob("*.py"), ROOT / "bench/readme.py", ROOT / "recipes/plan.py"]
    sources = "".join(path.read_text() for path in files)
    known = set(re.findall(r'"(--[a-z][a-z-]+)"', sources)) | {"--nproc_per_node", "--no-think", "--help"}
    assert {flag for flag in re.findall(r"(--[a-z][a-z_-]+)", text) if flag not in known} == set()
