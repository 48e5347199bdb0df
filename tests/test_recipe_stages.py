"""recipes/stages.py: every line is run as by Python, finished lines are skipped, a failure ends the recipe."""

import subprocess
import sys

from commands import ROOT, environment

SCRIPT = """import sys
from pathlib import Path
words = sys.argv[1:]
print("said", words)
assert __name__ == "__main__" and "distill" in sys.modules
out = Path(words[words.index("--out") + 1])
if "fail" in words:
    sys.exit("no such thing")
out.write_text((out.read_text() if out.exists() else "") + "once ")
"""


def run(lines):
    return subprocess.run(
        [sys.executable, str(ROOT / "recipes/stages.py")], input="\n".join(lines), text=True, capture_output=True,
        env=environment(), cwd=ROOT, timeout=300,
    )  # fmt: skip


def test_lines_run_in_turn_are_skipped_when_done_and_end_with_the_first_failure(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    lines = [f'{script} "a b" --out {one}', f"{script} fail --out {two}", f"{script} --out {three}"]
    first = run(lines)
    assert first.returncode == 1 and "no such thing" in first.stderr and "fail --out" in first.stderr
    assert one.read_text() == "once " and not three.exists()
    assert "'a b'" in (tmp_path / "one.log").read_text()

    again = run([lines[0], "", "# a remark", lines[2]])
    assert again.returncode == 0, again.stderr
    assert one.read_text() == "once " and three.read_text() == "once "  # the first was done already
    edited = run([f"{script} other --out {one}", lines[2]])
    assert edited.returncode == 0 and one.read_text() == "once once " and three.read_text() == "once "


def test_a_line_that_does_not_say_where_it_writes_is_refused_before_anything_runs(tmp_path):
    refused = run([f"script.py --out {tmp_path / 'x'}", "script.py --count 3"])
    assert refused.returncode == 2 and "names no --out: script.py --count 3" in refused.stderr
    assert not list(tmp_path.iterdir())
