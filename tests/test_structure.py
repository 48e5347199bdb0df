"""The house: imports run one way, files stay short, importing does nothing, and names that moved are still found.

What may import what is written here once more, by hand: a new shared file fails these tests until it has its place.
"""

import ast
import importlib
import subprocess
import sys

import pytest
from commands import ROOT

import model

STAGES = {"distill", "dpo", "eval", "grpo", "importers", "jigsaw", "rewards"}
# Shared files, and what each may import of ours. Every entry names only files that stand above it.
SHARED = {
    "files": set(),
    "pictures": {"files"},
    "mixing": set(),
    "lazy_puzzles": {"mixing", "pictures"},
    "records": {"files", "lazy_puzzles", "pictures"},
    "processes": {"files"},
    "replies": set(),
    "questions": {"files", "mixing", "replies"},
    "picture_files": {"files", "pictures"},
    "prompt_stream": {"records"},
    "rollouts": set(),
    "attention": set(),
    "head": set(),
    "expressions": set(),
    "math_answers": {"expressions"},
    "training": {"pictures", "processes"},
    "run_directory": {"files", "processes", "records", "training"},
    "endpoint": {"files", "lazy_puzzles", "training"},
    "journal": {"endpoint", "files", "processes", "run_directory"},
    "model_directory": {"files"},
    "families": {"attention", "files", "model_directory", "records"},
    "encoder": {"families", "files", "lazy_puzzles", "model_directory", "pictures", "processes"},
    "model": {"attention", "encoder", "families", "files", "head", "model_directory", "pictures", "run_directory"}
    | {"training"},
    "exploration": {"model"},
    "sampler": {"attention", "head", "model", "training"},
    "vllm_sampler": {"model", "records", "sampler", "training"},
    "html_page": {"lazy_puzzles"},
    "pairs_page": {"files", "html_page", "records"},
    "report": {"files", "html_page", "pairs_page", "training"},
    "claims": {"rewards"},
    "judge": {"claims", "endpoint", "model", "rewards", "sampler", "training"},
    "scoring": {"judge", "rewards"},
}
FILES = sorted(path.stem for path in ROOT.glob("*.py"))
OURS = {*FILES, "toy", "bench", "recipes", "tests"}


def imports_of(tree, everywhere):
    """Names of our files that a file imports: everywhere in it, or only when it is imported itself."""
    nodes = ast.walk(tree) if everywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found & OURS


def tree_of(name):
    return ast.parse((ROOT / f"{name}.py").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# Imports run one way


def test_every_file_has_its_place():
    assert STAGES | set(SHARED) == set(FILES)
    above = {"rewards"}  # a stage of no command line, which everybody may ask
    for name, allowed in SHARED.items():
        assert allowed <= above, f"{name} stands above what it imports"
        above.add(name)


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_file_imports_only_what_stands_above_it_and_no_stage(name):
    assert imports_of(tree_of(name), everywhere=True) <= SHARED[name]


SPLIT_OFF = {
    "rewards": {"math_answers", "replies"},
    "jigsaw": {"lazy_puzzles", "mixing", "picture_files", "pictures", "questions"},
}


@pytest.mark.parametrize("name, allowed", SPLIT_OFF.items())
def test_rewards_and_jigsaw_import_nothing_of_ours_but_what_was_split_off_them(name, allowed):
    assert imports_of(tree_of(name), everywhere=False) <= allowed
    # Scenes are asked for by --scenes only.
    assert imports_of(tree_of(name), everywhere=True) <= allowed | {"toy"}


@pytest.mark.parametrize("name", sorted(STAGES))
def test_a_stage_imports_no_other_stage_but_rewards_and_nothing_that_measures_or_tests(name):
    found = imports_of(tree_of(name), everywhere=True)
    assert found <= {*SHARED, "rewards", "toy"}
    assert "toy" not in imports_of(tree_of(name), everywhere=False)


@pytest.mark.parametrize("path", sorted((ROOT / "toy").glob("*.py")), ids=lambda path: path.stem)
def test_toy_imports_neither_the_model_nor_what_trains_it(path):
    assert imports_of(ast.parse(path.read_text()), everywhere=True) <= {"toy", "jigsaw", "questions"}


# ---------------------------------------------------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py")]), ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_file_stays_below_1000_lines(path):
    assert len(path.read_text().splitlines()) < 1000


QUIET = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign, ast.AugAssign)


@pytest.mark.parametrize("name", FILES)
def test_a_file_consists_of_imports_constants_functions_and_its_main(name):
    docstring, *nodes = tree_of(name).body
    assert isinstance(docstring, ast.Expr) and isinstance(docstring.value.value, str), "a file begins with what it is"
    for node in nodes:
        is_main = isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"
        assert is_main or isinstance(node, QUIET), f"{name}.py:{node.lineno} does something when it is imported"


IMPORT_ALL = """
import argparse, importlib, os, sys
def fail(*args, **options):
    raise AssertionError("flags are read while a file is imported")
argparse.ArgumentParser.parse_args = argparse.ArgumentParser.parse_known_args = fail
before = set(os.environ.items())
for name in sys.argv[2:]:
    importlib.import_module(name)
    assert name not in TORCHLESS or "torch" not in sys.modules, name
assert set(os.environ.items()) == before
assert not {"transformers", "vllm", "matplotlib", "pyarrow", "openai"} & set(sys.modules)
"""
TORCHLESS = ("rewards", "jigsaw", "endpoint", "judge", "scoring")  # they are imported first


def test_importing_every_file_reads_no_flags_prints_nothing_and_writes_nothing(tmp_path):
    names = [*TORCHLESS, *(name for name in FILES if name not in TORCHLESS)]
    names += ["toy.scenes", "toy.primer", "toy.downstream", "toy.formats", "toy.tiny_model"]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "PATH": "", "HOME": str(tmp_path)}
    command = [sys.executable, "-c", f"TORCHLESS = {TORCHLESS}{IMPORT_ALL}", "--no-such-flag", *names]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Names that moved


MOVED = """
    files.DataError files.write_text records.read_jsonl records.read_records records.write_jsonl records.epoch_order
    run_directory.Run run_directory.save_model processes.setup processes.run training.adamw training.backward
    training.update training.learning_rate sampler.sample sampler.Reply vllm_sampler.VLLM toy.tiny_model.make_tiny
""".split()


@pytest.mark.parametrize("path", MOVED)
def test_a_name_that_moved_out_of_model_is_still_found_there(path):
    file, name = path.rsplit(".", 1)
    assert getattr(model, name) is getattr(importlib.import_module(file), name)


def test_a_name_that_nobody_has_is_an_attribute_error():
    assert not hasattr(model, "no_such_name")
    with pytest.raises(AttributeError, match="module 'model' has no attribute 'no_such_name'"):
        model.no_such_name  # noqa: B018
