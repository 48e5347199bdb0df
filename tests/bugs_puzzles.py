"""Bugs of puzzles for plant_bugs.py: (name, file, old text, new text, tests)."""

PUZZLES = "tests/test_puzzles.py"
SETS = "tests/test_puzzle_sets.py"
LAZY = "tests/test_lazy_puzzles.py"


def some(file, *names):
    return " ".join(f"{file}::test_{name}" for name in names)


BUGS = [
    # ---- mixing.py
    ("identical pieces are asked about", "mixing.py", "if np.array_equal(piece, pieces[other - 1]):", "if False:",
     some(PUZZLES, "a_flat_picture_is_refused_by_name_of_what_is_identical")),
    ("pieces that only the frame tells apart pass", "mixing.py", "found = twins(visible)", "found = twins(pieces)",
     some(PUZZLES, "two_identical_pieces_are_enough_and_they_are_named")),
    ("rectangles may all stay", "mixing.py", "while order == sorted(order):", "while False:",
     some(PUZZLES, "the_rectangle_was_where_the_box_says")),
    ("rectangles go the wrong way", "mixing.py", "picture.paste(parts[original - 1], box)",
     "picture.paste(parts[order.index(original)], box)", some(PUZZLES, "the_rectangle_was_where_the_box_says")),
    ("clockwise is anticlockwise", "mixing.py", "90: Image.Transpose.ROTATE_270", "90: Image.Transpose.ROTATE_90",
     some(PUZZLES, "turned_back_by_the_answer_the_picture_is_upright")),
    ("odd angles turn the other way", "mixing.py", "square.rotate(-angle", "square.rotate(angle",
     some(PUZZLES, "turned_back_by_the_answer_the_picture_is_upright")),
    ("the decoys can be seen", "mixing.py", "picture.paste(BLACK if position == asked else GREY, box)",
     "picture.paste(BLACK, box) if position == asked else None",
     some(PUZZLES, "the_right_patch_fits_the_hole_and_no_decoy_can_be_seen_elsewhere")),
    ("patches are not mixed", "mixing.py", "order = shuffled(len(boxes), rng, derange=False)",
     "order = list(range(1, len(boxes) + 1))",
     some(PUZZLES, "the_asked_hole_and_the_moved_rectangle_are_equally_likely_everywhere")),

    ("what the frame hides is compared", "mixing.py", "crop((x + left, y, x + w - left, y + 1))",
     "crop((x, y, x + w, y + 1))", some(PUZZLES, "two_identical_pieces_are_enough_and_they_are_named")),

    # ---- lazy_puzzles.py
    ("a lazy puzzle has no frame", "lazy_puzzles.py", 'if "mask_ratio" in puzzle:', "if False:",
     some(LAZY, "a_lazy_puzzle_shows_the_pixels_that_would_have_been_saved")),
    ("a lazy puzzle is always shrunk sharply", "lazy_puzzles.py", 'puzzle.get("resample", "lanczos"))', '"lanczos")',
     some(LAZY, "a_lazy_puzzle_shows_the_pixels_that_would_have_been_saved")),
    ("boxes may lie below the photograph", "lazy_puzzles.py",
     "x2 > trimmed[0] or y2 > trimmed[1] for", "x2 > trimmed[0] for",
     some(LAZY, "a_picture_that_does_not_fit_its_puzzle_is_named_before_anything_is_decoded")),
    ("all puzzles of a photograph are one to the encoder", "encoder.py", "key = shown.whole",
     'key = shown._replace(puzzle="", number=0)',
     some(LAZY, "puzzles_of_one_photograph_are_told_apart_and_each_is_made_once_and_ahead")),
    ("a piece may come twice", "lazy_puzzles.py", "if not sound or len(set(order)) < n:", "if not sound:",
     some(LAZY, "a_puzzle_that_cannot_be_made_is_named_with_file_line_and_cause")),

    # ---- questions.py
    ("the inverse is not inverted", "questions.py", "mixed.order.index(original) + 1 for original in positions",
     "mixed.order[original - 1] for original in positions",
     some(PUZZLES, "the_answer_puts_the_pieces_back_for_every_grid_up_to_5x5")),
    ("wrong lists are sampled unlike the right one", "questions.py", "other = shuffled(n, rng, mixed.deranged)",
     "other = shuffled(n, rng, False)",
     some(PUZZLES, "the_wrong_lists_of_multiple_are_derangements_where_the_right_one_must_be")),
    ("a rectangle that stayed is asked about", "questions.py", "if position != original]", "]",
     some(PUZZLES, "no_constant_box_overlaps_much_with_where_the_rectangle_was")),
    ("a placeholder may be missing", "questions.py", "for name in sorted(known - optional - found):",
     "for name in []:", some(SETS, "words_that_would_break_a_prompt_end_with_one_line_that_names_file_and_entry")),

    # ---- jigsaw.py, picture_files.py
    ("another picture follows from the process, not from the puzzle", "jigsaw.py",
     "number = rng.randrange(len(job.pictures))", "number = random.randrange(len(job.pictures))",
     some(SETS, "a_picture_with_identical_pieces_is_replaced_by_another_and_that_is_said")),
    ("half a file is left", "picture_files.py", "        unfinished.unlink(missing_ok=True)", "        pass",
     some(SETS, "a_signal_ends_all_processes_and_leaves_nothing_unfinished")),
    ("each share begins one late", "jigsaw.py", "if index % shares == share:", "if (index + 1) % shares == share:",
     some(SETS, "the_bytes_do_not_depend_on_the_number_of_processes")),
    ("what a child was writing is left", "jigsaw.py",
     "        # What a child was writing when it was ended.\n        for process, _ in started:",
     "        for process, _ in ():",
     some(SETS, "a_process_that_is_killed_ends_the_run_with_one_line")),
    ("a mixture ignores its weights", "jigsaw.py", "rng.choices(kinds, weights)[0]", "rng.choice(kinds)",
     some(SETS, "a_mixture_has_its_weights_and_every_record_is_of_its_kind")),
    ("a stage begins one late", "jigsaw.py", "sum(start <= index for", "sum(start < max(index, 1) for",
     some(SETS, "a_curriculum_is_written_in_order_and_each_record_names_its_stage")),
]  # fmt: skip
