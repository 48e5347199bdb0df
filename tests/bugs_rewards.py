"""Planted bugs of what scores a reply: plant_bugs.py plants them, entry by entry.

(name, file, old text, new text, tests)
"""

ANSWERS = "tests/test_answers.py"
HOSTILE = "tests/test_hostile_records.py"
CHOICES = "tests/test_reward_choices.py"
SCORING = "tests/test_scoring.py"

# fmt: off
BUGS = [
    # ---- expressions.py, math_answers.py, replies.py: bounded time
    ("a text may cost what it likes", "math_answers.py", "if effort(tidied) > MAX_EFFORT:", "if False:", ANSWERS),
    ("a letter's points are counted once", "expressions.py", "(POINTS if has_letters else 1)", "1", ANSWERS),
    ("a list may hold any number of values", "math_answers.py", "MAX_ITEMS = 32", "MAX_ITEMS = 999", ANSWERS),
    ("the line below a table's head is searched for anew from each bar", "rewards.py",
     r"\|(?=[ :|]*-)[ :|-]*\|", r"\|[ :|-]*-[ :|-]*\|", ANSWERS),
    ("a folded answer may be as long as it likes", "rewards.py", "if len(folded) > MAX_ANSWER:", "if False:", ANSWERS),
    # ---- rewards.py: golds
    ("a grid may have any number of pieces", "rewards.py", "if len(gold) > MAX_PIECES:", "if False:", HOSTILE),
    ("a side may have any number of digits", "rewards.py", "1 <= side <= MAX_PIECES", "1 <= side", HOSTILE),
    ("a box may reach as far as it likes", "rewards.py", "abs(side) < MAX_COORDINATE", "True", HOSTILE),
    ("options may be anything", "rewards.py", "if not listed or not all(", "if False and not all(", HOSTILE),
    ("half of a surrogate pair is a text", "rewards.py", "and not SURROGATE.search(text)", "", HOSTILE),
    ("an error builds the whole text of a gold", "rewards.py",
     "return SHORT.repr(value)[:80]", "return repr(value)[:80]", HOSTILE),
    # ---- scoring.py
    ("a reply that hangs is asked for again", "scoring.py",
     "                    self.close()\n                    break\n", "                    self.close()\n", SCORING),
    ("a reply that was stopped is not counted", "scoring.py", "self.stopped += 1", "pass", SCORING),
    ("the process of scoring joins the group", "scoring.py", "if not GROUP.fullmatch(name):", "if True:", SCORING),
    ("a process that somebody killed costs a reply its reward", "scoring.py",
     "for _ in range(2):", "for _ in range(1):", SCORING),
    ("a hanging process outlives its parent", "scoring.py",
     "resource.setrlimit(resource.RLIMIT_CPU, (soft, hard))", "pass", SCORING),
    ("a process may take all memory", "scoring.py",
     "resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))", "pass", SCORING),
    ("the weights of a scorer are forgotten", "scoring.py", "rewards.score(reply, record, **options)",
     "rewards.score(reply, record)", SCORING),
    # ---- rewards.py: other rewards
    ("a graded grid gives no discount", "rewards.py", "GRADED_DISCOUNT = 0.2", "GRADED_DISCOUNT = 1.0", CHOICES),
    ("neighbours are read the other way round", "rewards.py", 'if record.get("question") != "inverse":',
     'if record.get("question") == "inverse":', CHOICES),
    ("the last of a row is a neighbour of the next row's first", "rewards.py",
     "        if (place + 1) % cols:\n", "        if place + 1 < len(pieces):\n", CHOICES),
    ("a repeated piece has neighbours", "rewards.py",
     '    if not is_arrangement(answer, len(gold)):\n        return 0.0\n    cols', "    cols", CHOICES),
    ("the threshold of a box falls", "rewards.py",
     "return overlap if overlap >= threshold", "return overlap if overlap > 0", CHOICES),
    ("a box without area has a centre", "rewards.py",
     "    if x2 <= x1 or y2 <= y1:\n        return 0.0\n    return point", "    return point", CHOICES),
    ("a chosen reward is what is reported as accuracy", "rewards.py",
     '"accuracy": right,', '"accuracy": earned,', CHOICES),
    ("the run's progress is not handed on", "scoring.py", '{"progress": progress}', "{}", CHOICES),
]
# fmt: on
