"""Bugs of journal.py, distill.py and report.py, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


DAMAGED = some("test_journal", "damaged_replies_are_sampled_again")
MIXED = some("test_journal", "a_stopped_job_is_neither_dropped_nor_mixed_with_another")
INPUTS = some("test_journal", "a_job_is_not_resumed_on_changed_inputs")
OUTPUT = some("test_journal", "an_output_that_is_no_file_or_an_input_is_refused_before_a_model_is_loaded")
DEALT = some("test_journal", "what_is_missing_is_dealt_to_the_processes_like_cards")
TWO = some("test_journal", "two_jobs_never_write_the_same_file")
PICKED = some(
    "test_distill",
    "the_chosen_reply_is_the_first_a_random_the_shortest_or_the_most_typical_of_those_that_pass",
)
PAGE = some("test_report_inputs", "a_damaged_log_is_shown_as_far_as_it_goes")

BUGS = [
    ("a half line is continued", "journal.py", "                drop_half_line(path)", "                pass", DAMAGED),
    ("a damaged reply counts", "journal.py",
     'if entry["crc32"] == checksum(entry["index"], entry["item"]):', "if True:", DAMAGED),
    ("a stopped job is dropped", "journal.py", 'elif used and not settings["overwrite"]:', "elif False:", MIXED),
    ("another job's replies are taken", "journal.py", "            if problem:\n                raise DataError(\n",
     "            if False:\n                raise DataError(\n", MIXED),
    ("changed weights go unnoticed", "journal.py", '            digests |= input_digests({"model": path})',
     "            pass", INPUTS),
    ("changed pictures go unnoticed", "journal.py", "digests | digest_pictures(pictures)", "digests", INPUTS),
    ("a picture is written over", "journal.py", 'read | {"the picture of a record": pictures}', "read", OUTPUT),
    ("all processes sample everything", "journal.py", "[self.world.rank :: self.world.size]", "[:]", DEALT),
    ("two jobs write one file", "journal.py", "        self.lock = files.lock(", "        self.lock = open(",
     TWO),
    ("the typical reply is the odd one", "distill.py", "max(range(len(replies)), key=likeness)",
     "min(range(len(replies)), key=likeness)", PICKED),
    ("names are mathematics", "report.py", '{"text.parse_math": False, "text.usetex": False}', "{}", PAGE),
    ("half a line ends the report", "report.py", "        except (ValueError, RecursionError):\n            problems",
     "        except KeyError:\n            problems", PAGE),
]  # fmt: skip
