"""Bugs of the tool that breaks runs and of the page about it, for plant_bugs.py: (name, file, old, new, tests)."""

CHAOS = "tests/test_chaos.py::test_an_end_that_differs_is_noticed"
TOUCHED = "test_a_refusal_that_touches_the_directory_or_says_more_than_a_line_is_no_refusal"
REFUSAL = f"tests/test_chaos.py::{TOUCHED}"
MISSING = "test_a_log_that_is_missing_is_not_run_and_a_fault_that_was_not_survived_is_named"
PAGE = f"tests/test_bench.py::{MISSING}"

BUGS = [
    ("chaos.py overlooks other weights", "tests/chaos.py", 'return "other weights"', 'return ""', CHAOS),
    ("chaos.py overlooks half a checkpoint", "tests/chaos.py", "    if leftovers:\n", "    if False:\n", CHAOS),
    ("chaos.py lets a refusal touch the directory", "tests/chaos.py", "if snapshot(place) != before:", "if False:",
     REFUSAL),
    ("a fault that was not survived is not counted", "bench/reliability.py",
     'lost = sum(not fault["survived"] for fault in faults)', "lost = 0", PAGE),
]
