"""Bugs to plant in how flags are read: (name, file, old text, new text, tests). plant_bugs.py appends them."""

FLAGS = " ".join(
    f"tests/test_flags.py::test_{name}"
    for name in (
        "what_is_no_sensible_number_is_refused_in_one_line_that_names",
        "a_number_that_nobody_can_mean_is_refused",
        "a_word_that_can_be_no_name_is_refused_in_one_line_that_names",
        "unknown_flags_are_shown_without_what_a_terminal_would_obey",
    )
)

BUGS = [
    ("a flag reads every digit, blank and underscore that Python reads", "training.py",
     "if not WRITTEN[kind].fullmatch(text):", "if not text:", FLAGS),
    ("jigsaw.py's flags read every digit that Python reads", "jigsaw.py",
     "if not WRITTEN[kind].fullmatch(text):", "if not text:", FLAGS),
    ("a number too small for a float becomes 0", "training.py",
     'if value == 0 and re.search("[1-9]", re.split("[eE]", text)[0]):', "if False:", FLAGS),
    ("a temperature that divides to infinity is taken", "grpo.py",
     'add("--temperature", type=real("[1e-4, 1e4]")', 'add("--temperature", type=real("(0, 1e4]")', FLAGS),
    ("a value of 10,000 characters is quoted in full", "training.py",
     'text if len(text) <= 60 else f"{text[:60]}…"', "text", FLAGS),
    ("an error prints what a terminal obeys", "training.py",
     'f"error: {printable(one_line)}\\n"', 'f"error: {one_line}\\n"', FLAGS),
    ("names that are not UTF-8 are taken", "training.py", 'return "is not UTF-8"', "pass", FLAGS),
    ("a word of --flag=word is not looked at", "training.py",
     "if not equals:\n                    continue", "continue", FLAGS),
]  # fmt: skip
