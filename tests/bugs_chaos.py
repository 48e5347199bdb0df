"""Bugs of the tool that breaks runs and of the page about it, for plant_bugs.py: (name, file, old, new, tests)."""

CHAOS = "tests/test_chaos.py -k noticed"
REFUSAL = "tests/test_chaos.py -k refusal"
PAGE = "tests/test_bench.py -k missing_is_not_run"

BUGS = [
    ("chaos.py overlooks other weights", "tests/chaos.py", 'return "other weights"', 'return ""', CHAOS),
    ("chaos.py overlooks half a checkpoint", "tests/chaos.py", "    if leftovers:\n", "    if False:\n", CHAOS),
    ("chaos.py lets a refusal touch the directory", "tests/chaos.py", "if snapshot(place) != before:", "if False:",
     REFUSAL),
    ("a fault that was not survived is not counted", "bench/reliability.py",
     'lost = sum(not fault["survived"] for fault in faults)', "lost = 0", PAGE),
]
