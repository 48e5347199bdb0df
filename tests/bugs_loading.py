"""Bugs of pictures and model directories, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


SHOWN = some("test_pictures", "it_is_shown_as_a_viewer_shows_it")
REFUSED = some("test_pictures", "it_is_refused_in_one_line_that_names_file_and_line")
ODD = some("test_pictures", "what_is_no_file_is_refused_without_being_opened")
TURNED = some("test_pictures", "every_format_is_turned_once_and_its_header_says_the_same_size")
VALUES = some("test_model_directories", "a_value_that_cannot_be_is_refused_by_name")
WEIGHTS = some("test_model_directories", "weights_that_are_not_the_models_are_refused_by_name")
TEMPLATES = some("test_model_directories", "a_chat_template")
UNFINISHED = some(
    "test_model_directories",
    "a_run_that_has_not_finished_says_where_it_stopped",
    "the_model_of_a_run_that_went_on_and_stopped_is_not_that_of_its_last_step",
)
FIELDS = some("test_model_directories", "a_json_file_that_is_none_is_refused_or_not_needed")
LIMITS = some("test_families", "limits_in_every_spelling_give_the_sizes_of_transformers_own_processor")
TOGETHER = some("test_loading", "what_one_process_cannot_load_is_refused_by_all_before_they_wait_for_each_other")
FINITE = some("test_loading", "every_way_to_load_looks_for_nan")

BROKEN = some("test_broken_pictures", "a_run_goes_on_with_the_next_record_in_the_broken_ones_place")
SIZE = some("test_pictures", "a_size_is_known_before_any_pixel_is_decoded")

# fmt: off
BUGS = [
    # ---- pictures that are broken behind their header
    ("a PNG is decoded to learn its size", "pictures.py",
     'header_only = image.format == "PNG" and', "header_only = 0 and", SIZE),
    ("what stands behind the pixels of a PNG is overlooked", "pictures.py",
     "if pixels and kind in", "if 0 and kind in", SIZE),
    ("the answer of the broken record is rewarded", "grpo.py",
     "mine = [prompt.record for prompt in prompts]", "mine = chosen", BROKEN),
    ("the replies of the broken pair are learned", "dpo.py",
     "encode_reply(prompt.record[name])", "encode_reply(pair[name])", BROKEN),
    ("a resumed run tries what was broken again", "run_directory.py",
     'self.broken = {row["where"]: row for row in kept}', "pass", some(
         "test_broken_pictures", "a_resumed_run_knows_what_was_broken_up_to_its_checkpoint")),
    ("what is broken is named at every step", "run_directory.py",
     "sorted(part.keys() - self.named)", "sorted(part)", some(
         "test_broken_pictures", "what_one_rank_found_all_ranks_know_and_it_is_named_once")),
    ("a picture of another size is taken", "encoder.py", "!= count:\n", "!= count < 0:\n", some(
         "test_broken_pictures", "a_picture_that_changed_its_size_is_broken")),

    # ---- pictures.py
    ("a picture's size is not bounded", "pictures.py", "if width * height > max_pixels:", "if False:", REFUSED),
    ("a pipe is opened like a picture", "pictures.py", "if not stat.S_ISREG(kind):", "if stat.S_ISDIR(kind):", ODD),
    ("a TIFF is turned twice", "pictures.py", 'image.format != "TIFF" and orientation', "orientation", TURNED),
    ("broken EXIF breaks the picture", "pictures.py",
     "    except Exception:\n        # Viewers", "    except KeyError:\n        # Viewers", SHOWN),
    ("PostScript runs a program", "pictures.py", "Image.open(path, formats=known)", "Image.open(path)", REFUSED),

    # ---- model_directory.py, model.py, encoder.py, families.py
    ("the scales of quantised weights are ignored", "model_directory.py",
     'if name.endswith(SCALES) or "quant_state" in name:', "if False:", WEIGHTS),
    ("integers are taken for weights", "model_directory.py",
     "if tensor.dtype not in FLOATS and not name.endswith(TABLES):", "if False:", WEIGHTS),
    ("an index may lead out of the directory", "model_directory.py",
     "Path(file).name != file or", "", WEIGHTS),
    ("numbers in a file may overlap", "model_directory.py",
     "begin == end and begin <= after <= size", "begin <= after <= size", WEIGHTS),
    ("a quantised config is believed", "model_directory.py", "if part.get(key) is not None:", "if False:", VALUES),
    ("code of the checkpoint's own is overlooked", "model_directory.py",
     'if settings.get("auto_map") is not None:', "if False:", VALUES),
    ("the end token may be missing", "model_directory.py", 'for key in ("eos_token", "tokenizer_class"):',
     'for key in ("tokenizer_class",):', some(
         "test_model_directories", "a_field_that_is_missing_or_wrong_is_refused_or_changes_nothing")),
    ("a run that stopped counts as a model", "model_directory.py",
     "(done is None or planned is None or done >= planned)", "True", UNFINISHED),
    ("NaN among the weights is loaded", "model.py", "finite = torch.stack(extremes).isfinite().all(1)",
     "finite = torch.stack(extremes).isnan().logical_not().any(1) | True", FINITE),
    ("inf among the weights is loaded", "model.py", "finite = torch.stack(extremes).isfinite().all(1)",
     "finite = torch.stack(extremes).isnan().logical_not().all(1)", WEIGHTS),
    ("a problem of another rank is not heard", "model.py", "world.gather(problem)):", "[problem]):", TOGETHER),
    ("weights that the model has not are dropped", "model.py", "    if further:\n", "    if False:\n", WEIGHTS),
    ("a chat template may run for hours", "encoder.py", "    if left < 0:", "    if False:", TEMPLATES),
    ("a chat template may hide the picture", "encoder.py",
     "if words not in text or shown !=", "if words not in text and shown !=", TEMPLATES),
    ("a limit inside of size is not read", "families.py",
     'size.get("longest_edge"), size.get("max_pixels"))', 'size.get("longest_edge"))', LIMITS),
    ("the older spelling of a limit loses", "families.py",
     '(settings.get("max_pixels"), size.get("longest_edge"), ',
     '(size.get("longest_edge"), settings.get("max_pixels"), ', LIMITS),
]
# fmt: on
