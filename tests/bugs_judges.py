"""Bugs of judges, teachers and endpoints, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


VERDICTS = some(
    "test_judges",
    "one_word_is_a_verdict",
    "everything_else_is_no_verdict_and_least_of_all_a_yes",
    "what_cannot_be_read_is_asked_again_once_and_is_then_no_verdict",
)
MARKS = some("test_judges", "what_is_judged_stands_behind_marks_that_it_does_not_hold")
FEW = some("test_judges", "only_right_replies_are_judged_and_with_first_none_after_one_that_passes")
SHORT = some("test_judges", "a_judge_is_asked_only_where_the_rule_says_no_of_a_short_answer_that_was_read")
AGAIN = some("test_endpoint", "what_may_pass_is_asked_again_and_the_answer_is_the_later_one")
KEPT = some("test_endpoint", "nothing_is_paid_for_twice", "a_damaged_answer_is_asked_for_again")
KEYS = some("test_endpoint", "a_wrong_key_or_name_ends_the_run_at_once_and_no_one_sees_the_key")
READ = some("test_endpoint", "only_a_reply_that_stopped_by_itself_is_finished")
OTHER = some("test_endpoint", "another_model_or_parameter_is_another_question")
DRIP = some("test_endpoint", "a_server_that_drips_is_left_after_the_timeout")

BUGS = [
    ("a yes anywhere in a reply is a yes", "judge.py",
     "match = VERDICT.fullmatch(reply)", "match = VERDICT.search(reply)", VERDICTS),
    ("a verdict that cannot be read is a yes", "judge.py",
     "return None if match is None else match[1]", "return True if match is None else match[1]", VERDICTS),
    ("an unread verdict is not asked for again", "judge.py", "        if unread:\n", "        if False:\n", VERDICTS),
    ("what is judged may hold special tokens", "judge.py",
     'TOKEN_LIKE.sub("< ", text[-MAX_JUDGED:])', "text[-MAX_JUDGED:]", MARKS),
    ("wrong replies are judged too", "distill.py",
     "right.append([reply for reply in replies if reply.right])", "right.append(replies)", FEW),
    ("a yes is asked for again", "distill.py",
     "open_ones = [] if True in verdicts[place].values() else open_ones[:1]", "open_ones = open_ones[:1]", FEW),
    ("what the rule finds right is judged", "scoring.py",
     'if score["format"] and not score["accuracy"]]', 'if score["format"]]', SHORT),
    ("no verdict on a short answer is a yes", "scoring.py",
     "            if verdict:\n", "            if verdict is not False:\n", SHORT),
    ("a judged answer is right and earns nothing", "scoring.py",
     'score["reward"] += self.options.get("accuracy_weight", 1.0)', "pass", SHORT),
    ("an answer that is no completion ends the run", "endpoint.py",
     "except (openai.APIConnectionError, BadAnswerError)", "except (openai.APIConnectionError,)", AGAIN),
    ("a server that fails is not asked again", "endpoint.py",
     "if status not in TRY_AGAIN and status < 500:", "if status not in TRY_AGAIN:", AGAIN),
    ("Retry-After is not honoured", "endpoint.py",
     "asked_for = retry_after(error.response.headers)", "pass",
     some("test_endpoint", "a_server_is_not_asked_again_before_the_time_it_named")),
    ("nothing is kept", "endpoint.py", "if keep and self.cache and not found[name].refused:", "if False:", KEPT),
    ("a damaged answer is believed", "endpoint.py",
     'return answer if entry["sha256"] == digest(entry["answer"]) else None', "return answer", KEPT),
    ("another temperature is the same question", "endpoint.py",
     'given = {"model": self.model} | request | self.parameters', 'given = {"model": self.model} | request', OTHER),
    ("an error shows the key", "endpoint.py", 'text.replace(key, "***") if key else text', "text", KEYS),
    ("a truncated reply counts as finished", "endpoint.py",
     '[reason == "stop" for reason in reasons]', '[reason != "error" for reason in reasons]', READ),
    ("a server that drips is waited for", "endpoint.py",
     "async with asyncio.timeout(self.timeout):", "async with asyncio.timeout(60):", DRIP),
]  # fmt: skip
