"""Bugs of importers, SFT data and hours, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


COPY = some(
    "test_importers",
    "a_missing_column_and_a_missing_field_are_named_with_those_that_are_there",
    "a_wrong_type_is_named_with_the_right_one",
    "another_number_of_rows_than_the_published_one_is_refused_unless_it_is_said_to_be_a_part",
    "an_id_that_stands_twice_is_refused_with_both_places",
)
OUTSIDE = some("test_importers", "a_picture_outside_of_the_folder_is_refused")
CAUSES = some("test_importers", "what_no_rule_can_score_is_counted_by_cause")
QUESTIONS = some(
    "test_importers",
    "words_about_the_reply_are_taken_off_a_question",
    "a_question_that_cannot_be_told_from_them_is_left_out",
)
GOLDS = some(
    "test_importers",
    "a_gold_answer_has_the_type_that_scores_it_as_it_is_meant",
    "only_a_count_of_a_counting_question_is_a_digit",
    "options_are_read_where_they_stand_one_a_line_from_a_on",
)
BOXES = some(
    "test_importers",
    "a_box_becomes_pixels_by_its_scale",
    "a_picture_larger_than_the_trainers_is_saved_smaller_and_its_box_with_it",
)
ORSTA = some("test_importers", "orsta_becomes_records_that_a_trainer_reads")
LIMIT = some("test_importers", "the_same_command_writes_the_same_bytes_and_limit_reads_the_first_rows")
SFT = some(
    "test_distill",
    "without_a_rejected_reply_the_base_is_not_asked",
    "a_gold_reply_is_the_gold_in_the_records_format_and_earns_the_whole_reward",
    "a_format_with_a_reason_has_no_gold_reply",
    "for_sft_the_models_own_right_replies_are_kept_and_nothing_is_rejected",
)
HOURS = some("test_plan", "the_work_of_each_stage_is_what_the_trainers_would_log", "hours_by_hand")

BUGS = [
    ("a set's columns are not looked at inside of lists", "importers.py",
     "problems = (mismatch(expected[0], kind, name) for kind in found)", "problems = ()", COPY),
    ("a copy with other rows is taken", "importers.py", "total != published.rows and not part", "False", COPY),
    ("an id that stands twice is taken", "importers.py", "if row.id in where_of:", "if False:", COPY),
    ("a picture's path may lead out of the folder", "importers.py", 'or name.split("/")[0] == ".."', "", OUTSIDE),
    ("of several boxes the first is the gold", "importers.py", "if len(boxes) > 1:", "if False:", CAUSES),
    ("of several boxed answers the first is the gold", "importers.py",
     'if end is None or gold.count("\\\\boxed") > 1:', "if end is None:", CAUSES),
    ("a broken picture is taken", "importers.py",
     'raise LeftOut("image broken or too large")', "pass", CAUSES),
    ("half a question is taken for a whole one", "importers.py",
     'if "?" in removed or "<image>" in removed:', "if False:", QUESTIONS),
    ("a product of letters is equal in any order", "importers.py",
     'if MATHEMATICS.search(text) and', "if", GOLDS),
    ("every whole number is a digit", "importers.py", 'if "count" in category and', "if", GOLDS),
    ("options may begin at any letter", "importers.py",
     "and rewards.LETTERS.startswith(letters)", "", GOLDS),
    ("a box on the scale of 1000 stays there", "importers.py",
     'limits = (1000, 1000) if scale == "thousandths" else size', "limits = size", BOXES),
    ("a box has its width in its height", "importers.py",
     "zip(numbers, size * 2, limits * 2, strict=True)", "zip(numbers, size[::-1] * 2, limits * 2, strict=True)", BOXES),
    ("a picture is saved as large as it is", "importers.py",
     "picture.width * picture.height > self.max_pixels", "False", BOXES),
    ("a system prompt is the user's", "importers.py", 'if turn and turn["role"] != "system"]', "if turn]", ORSTA),
    ("a limit holds for each file", "importers.py", "rows = rows[: limit - number]", "rows = rows[: limit - in_file]",
     LIMIT),
    ("SFT data keeps wrong replies", "distill.py",
     "if reply.right:\n            why = objection", "if reply.well_formed:\n            why = objection", SFT),
    ("a gold point is the corner of its box", "distill.py",
     "answer = [(x1 + x2) / 2, (y1 + y2) / 2]", "answer = [x1 - 1, y1]", SFT),
    ("a gold answer is a reply to a prompt that asks for reasons", "distill.py",
     "if not rewards.format_called(form).reason_may_be_empty:", "if False:", SFT),
    ("hours leave out sampling", "recipes/plan.py",
     "one = forward(args.group) + args.updates", "one = args.updates", HOURS),
    ("hours count the longest reply", "recipes/plan.py", "length = min(mean_reply or longest, longest)",
     "length = longest", HOURS),
    ("hours of a pair forget the reference", "recipes/plan.py", "else learn(2) + forward(2)) or None",
     "else learn(2)) or None", HOURS),
    ("hours of all GPUs are those of one", "recipes/plan.py", "flops / (gpus * peak * 1e12)", "flops / (peak * 1e12)",
     HOURS),
]  # fmt: skip
