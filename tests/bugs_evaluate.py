"""Bugs of what is measured of a model and shown of it, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


CURVE = some("test_curve", "each_point_of_a_curve_is_what_an_evaluation_of_that_model_gives")
POINTS = some("test_curve", "the_last_checkpoint_stands_for_the_final_model_and_a_run_that_goes_on_has_none")
KILLED = some("test_curve", "a_curve_that_was_killed_goes_on_and_ends_with_the_same_bytes")
DAMAGED = some("test_curve", "what_is_no_run_or_is_damaged_is_named_before_anything_is_sampled")
INTERVALS = some(
    "test_curve",
    "an_interval_is_between_percentiles_of_what_other_questions_would_have_given",
    "an_interval_narrows_with_the_root_of_the_number_of_questions_and_repeats",
)
SUMMARY = some("test_curve", "a_summary_has_intervals_over_questions_and_means_over_tokens")
EXPLORATION = "tests/test_exploration.py"
PAIRS = "tests/test_pairs_page.py"
STEPS = some(
    "test_report",
    "stability_is_shown_side_by_side_for_runs_of_one_kind",
    "a_result_that_follows_a_run_is_drawn_by_step",
)

BUGS = [
    ("every point of a curve is step 0", "eval.py", "            load_weights(policy, point, world)\n",
     "            pass\n", CURVE),
    ("a point's replies are those of the point before", "eval.py", "item = items[number]",
     "item = items[max(index, number - count)]", CURVE),
    ("the gains of a curve are against the last model", "eval.py", "for row in rows[0]}", "for row in rows[-1]}",
     CURVE),
    ("a job that goes on begins with the weights of step 0", "eval.py",
     "any(first <= index < first + count for index in missing)",
     "len([index for index in missing if first <= index < first + count]) == count", KILLED),
    ("checkpoints are taken in no order", "eval.py", "for step, path in sorted(found.items())",
     "for step, path in sorted(found.items(), reverse=True)", POINTS),
    ("the final model stands at the step of the log's first line", "eval.py",
     'max((entry["step"]', 'min((entry["step"]', POINTS),
    ("a damaged checkpoint is evaluated", "eval.py", "if point.is_checkpoint:\n        for problem",
     "if False:\n        for problem", DAMAGED),
    ("a bootstrap without replacement", "eval.py", "values[rng.integers(len(values), size=len(values))]",
     "values[rng.permutation(len(values))]", INTERVALS),
    ("an interval of 90 %", "eval.py", "(0.025, 0.975)", "(0.05, 0.95)", INTERVALS),
    ("long and short replies count alike in RBF", "eval.py", 'np.dot(row[key], row["length"])',
     'np.mean(row[key]) * sum(row["length"])', SUMMARY),
    ("the nucleus lacks the token that reaches its mass", "exploration.py",
     "(ordered.cumsum(-1) - ordered < top_p)", "(ordered.cumsum(-1) < top_p)", EXPLORATION),
    ("the nucleus is of the unlikeliest tokens", "exploration.py", "descending=True", "descending=False", EXPLORATION),
    ("entropy in bits", "exploration.py", "torch.special.entr(logits.softmax(-1)).sum(-1)",
     "torch.special.entr(logits.softmax(-1)).sum(-1) / 0.6931", EXPLORATION),
    ("the temperature of sampling is forgotten", "exploration.py", "policy(batch, temperature, statistics",
     "policy(batch, 1.0, statistics", EXPLORATION),
    ("a reply's mean counts the padding", "exploration.py", "value.sum(1) / mask.sum(1)", "value.mean(1)", EXPLORATION),
    ("each distribution is that of the token after", "model.py", "for logits in chunks])[batch.source]",
     "for logits in chunks])[batch.source.roll(1)]", EXPLORATION),
    ("a difference reaches the page as markup", "pairs_page.py",
     "shown = escape(text, len(text))", "shown = text", PAIRS),
    ("equal characters are marked", "pairs_page.py", "if equal or not text:", "if not text:", PAIRS),
    ("each side shows the other's positions", "pairs_page.py",
     "other[steps[0].dest_start : steps[-1].dest_end]", "other[steps[0].src_start : steps[-1].src_end]", PAIRS),
    ("the distance counts words", "pairs_page.py",
     "Levenshtein.distance(one[:COMPARED_CHARACTERS], other[:COMPARED_CHARACTERS])",
     "Levenshtein.distance(one.split(), other.split())", PAIRS),
    ("a button hides its own kind", "pairs_page.py", ".puzzle:not(.kind-{kind})", ".puzzle.kind-{kind}", PAIRS),
    ("the loss of DPO is drawn as a policy loss", "report.py", '("loss", "reward", "Policy loss',
     '("loss", "loss", "Policy loss', STEPS),
    ("a GF that is not defined is drawn as 0", "report.py",
     "value for point, value in zip(points, values, strict=True) if is_number(value)}",
     "value or 0 for point, value in zip(points, values, strict=True)}", STEPS),
]  # fmt: skip
