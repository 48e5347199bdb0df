"""Bugs of the study in miniature for plant_bugs.py: (name, file, old text, new text, tests)."""

STUDY = "tests/test_study_jigsaw.py"
TOY = "tests/test_toy.py"
DOWNSTREAM = "tests/test_downstream.py"
STAGES = "tests/test_recipe_stages.py"


def some(file, *names):
    return " ".join(f"{file}::test_{name}" for name in names)


BUGS = [
    # ---- bench/study_jigsaw.py
    ("a second look that says the same takes the first back", "bench/study_jigsaw.py",
     'append(again and lists[-1] != lists[-2])', 'append(again)',
     some(STUDY, "the_shares_of_replies_are_those_counted_by_hand")),
    ("a reason is judged by its first look", "bench/study_jigsaw.py", 'falls(lists[-1], record["answer"])',
     'falls(lists[0], record["answer"])', some(STUDY, "the_primer_writes_what_the_study_reads")),
    ("ties are wrong", "bench/study_jigsaw.py", "first >= second", "first > second",
     some(STUDY, "the_shares_of_replies_are_those_counted_by_hand")),
    ("arms share seeds with arms of a longer name", "bench/study_jigsaw.py", "NAME.fullmatch(name)",
     'NAME.fullmatch(name.removeprefix("no-"))', some(STUDY, "seeds_belong_to_their_own_arm")),
    ("the interval is that of single seeds", "bench/study_jigsaw.py", "values[chosen].mean(1)", "values[chosen] * 3",
     some(STUDY, "the_interval_is_that_of_the_mean_over_seeds")),
    # ---- toy/
    ("every second look confirms the first", "toy/primer.py",
     "first = rng.sample(luminances, len(luminances)) if rng.random() < 0.5 else luminances", "first = luminances",
     some(STUDY, "the_primer_writes_what_the_study_reads")),
    ("a slip may say the same", "toy/primer.py", "while other == answer:", 'while other == "":',
     some(TOY, "a_slip_answers_something_else_than_the_reason_concludes")),
    ("the base knows the puzzle", "toy/primer.py",
     'verdict = " ".join(map(str, rng.sample(fields["answer"], len(fields["answer"]))))',
     'verdict = " ".join(map(str, fields["answer"]))',
     some(TOY, "a_ranking_lists_the_pieces_from_light_to_dark_and_the_puzzle_is_answered_at_random")),
    ("light from below is light from above", "toy/scenes.py", "(-slope if contrary else slope)", "slope",
     some(STUDY, "scenes_lit_from_below_are_the_same_drawing_with_the_light_turned_over")),
    ("left and right change places", "toy/downstream.py", '"right" if mirrored else "left"',
     '"left" if mirrored else "right"', some(DOWNSTREAM, "the_answers_are_those_that_the_pixels_give")),
    ("white is always first", "toy/downstream.py", "words[first != WHITE]", "words[0]",
     some(DOWNSTREAM, "the_answers_are_those_that_the_pixels_give")),
    # ---- recipes/stages.py
    ("an edited line counts as done", "recipes/stages.py", 'done.read_text() == line + "\\n"', "True",
     some(STAGES, "lines_run_in_turn_are_skipped_when_done_and_end_with_the_first_failure")),
    ("the recipe goes on after a failure", "recipes/stages.py", "        if status:\n            return status\n", "",
     some(STAGES, "lines_run_in_turn_are_skipped_when_done_and_end_with_the_first_failure")),
]  # fmt: skip
