"""Bugs of templates and of SPECS' study for plant_bugs.py: (name, file, old text, new text, tests)."""

TEMPLATES = "tests/test_templates.py"
STUDY = "tests/test_study_specs.py"


def some(file, *names):
    return " ".join(f"{file}::test_{name}" for name in names)


MATCHED = some(TEMPLATES, "a_template_is_matched_word_for_word_and_each_mark_stands_where_it_belongs")
REFUSED = some(TEMPLATES, "what_is_no_template_is_refused_before_training")
HELD_OUT = some(TEMPLATES, "training_and_test_share_no_word_and_no_shape")
SAME_LETTER = some(TEMPLATES, "a_verdict_always_has_the_same_letter_and_pieces_are_pictures_of_their_own")
REPLIES = some(TEMPLATES, "half_of_the_replies_follow_and_all_say_what_is_seen")

BUGS = [
    ("a mark of a template may stand twice", "replies.py", "if reply.count(mark) != sum(",
     "if reply.count(mark) < sum(", MATCHED),
    ("a template's end is not looked at", "replies.py", "or not reply.endswith(last)", "", MATCHED),
    ("plain words of a template are marks", "replies.py", 'and not piece.strip(".,;!?").isalnum()', "", MATCHED),
    ("reason and answer need nothing between them", "replies.py",
     "if any(not literal.strip(SPACE) for literal in literals[1:-1]):", "if False:", REFUSED),
    ("a template is not checked before training", "rewards.py", "        format_called(format_name)\n",
     "        pass\n",
     REFUSED),
    ("a shape is trained and held out", "toy/formats.py", "    rest = [shape for shape in different.values() if",
     "    rest = [shape for shape in everything if", HELD_OUT),
    ("tests ask with the words of training", "toy/formats.py",
     '"test": everything[TRAIN_WORDS : TRAIN_WORDS + TEST_WORDS]',
     '"test": everything[:TEST_WORDS]', HELD_OUT),
    ("all replies follow", "toy/formats.py", "if rng.random() < args.follow else PLAIN", "",
     REPLIES),
    ("puzzles are answered truly", "toy/formats.py", 'verdict, verb = rng.choice(fields["options"]), "was"',
     'verdict, verb = fields["direction"], "was"',
     REPLIES),
    ("a letter is not that of the verdict", "toy/formats.py",
     '"answer": jigsaw.LETTERS[options.index(fields["direction"])]',
     '"answer": fields["answer"]', SAME_LETTER),
    ("options have any order", "toy/formats.py", 'options = sorted(fields["options"])',
     'options = list(fields["options"])', SAME_LETTER),
    ("a difference is against another seed", "bench/study_specs.py",
     "both = [(get(run, name), get(run, reference)) for",
     "both = [(get(run, name), get(seeds[\"0\"], reference)) for",
     some(STUDY, "seed_by_seed_the_base_cancels_out_and_a_start_that_has_not_run_is_no_difference")),
    ("a loss that forgets is measured on the other seeds", "bench/study_specs.py", 'gains.get("gf") or 0.0}',
     'gains.get("gf")}', some(STUDY, "a_gf_without_a_value_is_the_zero_that_it_goes_to")),
    ("the first steps of GRPO from the base count", "bench/study_specs.py", '["logs"][f"rl-{name}"][-100:]',
     '["logs"][f"rl-{name}"]',
     some(STUDY, "grpo_from_the_base_is_measured_without_the_steps_that_the_cold_starts_had_before")),
    ("an interval is that of single seeds", "bench/study_specs.py", "(samples, len(values))).mean(1)",
     "(samples, 1)).mean(1)", some(STUDY, "a_bootstrap_interval_is_that_of_means_of_samples_with_replacement")),
    ("a seed without a GF counts as nothing", "bench/study_specs.py",
     "    defined = [value for value in values if value is not None]",
     "    defined = [value or 0.0 for value in values]",
     some(STUDY, "a_cell_says_of_how_many_seeds_a_value_is")),
]  # fmt: skip
