"""Bugs of files, processes and run directories, for plant_bugs.py: (name, file, old text, new text, tests)."""


def some(file, *names):
    return " ".join(f"tests/{file}.py::test_{name}" for name in names)


DAMAGED = some("test_run_directory", "a_damaged_checkpoint_is_named_and_the_one_before_is_taken")
INPUTS = some("test_run_directory", "a_resumed_run_refuses_inputs_that_have_changed")
PLACE = some(
    "test_run_directory",
    "an_output_that_is_an_input_is_refused",
    "a_model_that_no_run_made_is_not_written_over",
    "overwrite_leaves_nothing_that_is_a_model",
    "a_run_that_is_given_more_steps_is_no_model_until_it_has_made_them",
)
SKIPPED = some(
    "test_run_directory",
    "skipped_steps_are_kept_and_too_many_in_a_row_end_the_run",
    "a_resumed_run_knows_how_many_were_skipped_before_it",
)
FILES = "tests/test_files.py"
PROCESSES = "tests/test_processes.py"

BUGS = [
    ("a pipe is waited for", "files.py", "os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC", "os.O_RDONLY", FILES),
    ("a file has its name before it is on the disk", "files.py", "        os.fsync(file.fileno())\n", "", FILES),
    ("a link is written over", "files.py", "if not directory and path.is_symlink():", "if False:", FILES),
    ("an input is written over", "files.py",
     "if os.path.realpath(name) == os.path.realpath(path):", "if name == path:", f"{FILES} {PLACE}"),
    ("digests of a checkpoint are not compared", "run_directory.py",
     "if files.digest(folder / name) != sums[name]:", "if not files.digest(folder / name):", DAMAGED),
    ("a checkpoint without digests is trusted", "run_directory.py",
     "    except DataError as error:\n        return str(error)\n    sums",
     "    except DataError:\n        return None\n    sums", DAMAGED),
    ("changed inputs go unnoticed", "run_directory.py",
     'if self.settings["inputs"].get(path, digest) != digest:', "if False:", INPUTS),
    ("--overwrite keeps the old model", "run_directory.py",
     "for pattern in (*MODEL_FILES, *RUN_FILES):", "for pattern in RUN_FILES:", PLACE),
    ("a run that goes on is still a model", "run_directory.py",
     '(self.out / "config.json").unlink(missing_ok=True)', "pass", PLACE),
    ("a downloaded model is written over", "run_directory.py",
     'foreign = (self.out / "config.json").exists() and', "foreign = False and", PLACE),
    ("two processes share a directory", "files.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB",
     some("test_run_directory", "two_processes_cannot_write_to_one_directory_and_the_lock_ends_with_its_process")),
    ("skipped steps in a row are counted over the whole run", "run_directory.py",
     "self.skipped = self.skipped + 1 if skipped else 0", "self.skipped += skipped", SKIPPED),
    ("a resumed run forgets what it skipped", "run_directory.py",
     'self.skipped = self.skipped + 1 if row.get("skipped") else 0', "pass", SKIPPED),
    ("ranks outlive their launcher", "processes.py", "        end_with_launcher()\n", "", PROCESSES),
    ("a silent rank is not named", "processes.py",
     "if silence[other] > SILENT and other not in self.named:", "if False:", PROCESSES),
    ("those who wait never give up", "processes.py",
     "if since is not None and now - since > self.timeout:", "if False:", PROCESSES),
    ("SIGTERM kills without a word", "processes.py", "signal.signal(signal.SIGTERM, terminate)\n", "pass\n", PROCESSES),
]
