"""chaos.py, briefly: six faults of different kinds are survived, and one that is not would be noticed."""

import json
import shutil
from pathlib import Path

import chaos
import pytest
from commands import Material, finish, start


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    return Material(tmp_path_factory.getbasetemp() / "material")


def test_runs_that_are_killed_damaged_and_disturbed_end_as_if_nothing_had_been(material, tmp_path):
    log = tmp_path / "chaos.jsonl"
    script = Path(chaos.__file__)
    try:
        finish(start(script, short=True, seed=0, log=log, material=material.folder, keep=tmp_path / "runs"))
    finally:
        told = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        print("\n".join(str(fault) for fault in told))
    assert sorted(fault["fault"] for fault in told) == sorted(kind for _, _, kind in chaos.SHORT)
    assert all(fault["survived"] for fault in told)
    assert sum(fault["kills"] for fault in told) >= 3
    # What was survived is removed, and nothing else is left of it.
    assert not list((tmp_path / "runs").glob("fault-*"))


def test_a_fault_is_known_by_its_seed_and_number_and_a_round_has_every_kind_once():
    table = chaos.cases(vllm=False)
    one_round = [chaos.plan(7, number, table) for number in range(1, len(table) + 1)]
    assert one_round[11] == chaos.plan(7, 12, table)
    found = sorted((fault.stage, fault.world, fault.fault) for fault in one_round)
    assert found == sorted(table)
    assert [fault.fault for fault in one_round] != [chaos.plan(8, number, table).fault for number in range(1, 10)]
    assert {(stage, world) for stage, world, _ in table} >= {("grpo", 4), ("dpo", 2), ("eval", 1), ("jigsaw", 1)}


@pytest.fixture
def two_ends(tmp_path):
    """Two directories as equal runs leave them."""
    for name in ("out", "whole"):
        folder = tmp_path / name
        folder.mkdir()
        row = {"step": 1, "loss": 0.5, "seconds": 0.1 if name == "out" else 0.2}
        (folder / "log.jsonl").write_text(json.dumps(row) + "\n")
        (folder / "samples.jsonl").write_text('{"step": 1, "reply": "A"}\n')
        (folder / "LATEST").write_text("step_000001")
        (folder / "model.safetensors").write_bytes(b"weights")
    return tmp_path / "out", tmp_path / "whole"


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("log.jsonl", '{"step": 1, "loss": 0.51, "seconds": 0.1}\n', "another log"),
        ("samples.jsonl", "", "other samples"),
        ("model.safetensors", "weightz", "other weights"),
        ("LATEST", "step_000002", "LATEST is step_000002"),
        ("step_000003.partial", "", "step_000003.partial is left"),
    ],
)
def test_an_end_that_differs_is_noticed(two_ends, name, text, words):
    out, whole = two_ends
    assert chaos.difference("dpo", out, whole, exact=True) == ""
    (out / name).write_text(text)
    assert chaos.difference("dpo", out, whole, exact=True) == words


def test_a_refusal_that_touches_the_directory_or_says_more_than_a_line_is_no_refusal(tmp_path):
    class Refused:
        world = 1
        printed = "error: no\n"

        def status(self):
            return 2

        def said(self):
            return self.printed

        error_lines = chaos.Start.error_lines

    (tmp_path / "log.jsonl").write_text("{}\n")
    before = chaos.snapshot(tmp_path)
    assert chaos.must_refuse(Refused(), before, tmp_path) == "error: no"
    (tmp_path / "LATEST").write_text("step_000001")
    with pytest.raises(chaos.NotSurvived, match="touched"):
        chaos.must_refuse(Refused(), before, tmp_path)
    shutil.rmtree(tmp_path)
    twice = Refused()
    twice.printed = "error: no\nerror: nor that\n"
    with pytest.raises(chaos.NotSurvived, match="2 error lines"):
        chaos.must_refuse(twice, {}, tmp_path)
