"""docs/learn.md tells the truth: its code prints what it shows, its sums are right, its glossary is complete.

`python tests/test_learn.py` writes what the code prints into the page, for whoever has changed the code of a block.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import attention  # noqa: E402
import dpo  # noqa: E402
import eval as evaluation  # noqa: E402
import grpo  # noqa: E402
import training  # noqa: E402

PAGE = ROOT / "docs/learn.md"
FLAGS = ROOT / "docs/from_trl_verl.md"
BLOCK = re.compile(r"```python\n(.*?)```\n```text\n(.*?)```", re.S)


# ---------------------------------------------------------------------------------------------------------------------
# Code


def printed(blocks: list[str]) -> list[str]:
    """What each of some code blocks prints, run in order in one namespace."""
    namespace, outputs = {}, []
    for code in blocks:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile(code, str(PAGE), "exec"), namespace)
        outputs.append(output.getvalue())
    return outputs


def test_every_block_of_code_prints_what_the_page_shows():
    text = PAGE.read_text()
    shown = BLOCK.findall(text)
    assert len(shown) == text.count("```python") == text.count("```text") >= 10
    assert printed([code for code, _ in shown]) == [output for _, output in shown]


# ---------------------------------------------------------------------------------------------------------------------
# Arithmetic


def evaluated(latex: str) -> float | None:
    """The value of a formula of numbers alone; None if it has letters."""
    text = latex.replace(r"\times", "*").replace("\\ ", " ")
    while r"\frac" in text:
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text, count=1)
        # What braces are left inside a fraction belong to an exponent.
        text = re.sub(r"e\^\{([^{}]*)\}", r"exp(\1)", text)
    text = re.sub(r"e\^\{([^{}]*)\}", r"exp(\1)", text)
    text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
    text = re.sub(r"\\ln\s*([\d.]+)", r"log(\1)", text)
    text = text.replace(r"\ln", "log").replace(r"\min", "min").replace("^", "**").replace(")(", ")*(")
    if re.sub(r"exp|sqrt|log|min", "", text).strip("0123456789.+-*/(), ") or not re.search(r"\d", text):
        return None
    return eval(text, {"exp": math.exp, "sqrt": math.sqrt, "log": math.log, "min": min})


def equations(text: str) -> list[tuple[str, float, str]]:
    """(equation, value of a side, the number on its right) of every equation of numbers in a page."""
    found = []
    for formula in re.findall(r"\$\$(.+?)\$\$|\$([^$]+?)\$", re.sub(r"```.*?```", "", text, flags=re.S), re.S):
        sides = "".join(formula).split("=")
        for left, right in zip(sides, sides[1:], strict=False):
            value = evaluated(left)
            if value is not None and evaluated(right) is not None:
                found.append(("=".join(sides), value, right.strip()))
    return found


def test_every_equation_of_the_page_is_right_to_its_last_digit():
    found = equations(PAGE.read_text())
    assert len(found) >= 18
    for equation, value, right in found:
        digits = len(right.partition(".")[2])
        assert abs(value - float(right)) <= 0.5 * 10**-digits + 1e-9, (equation, value)


def test_every_decimal_number_of_the_worked_examples_is_printed_or_calculated():
    text = PAGE.read_text()
    worked = text[text.index("# One group") : text.index("# How it works")]
    code = " ".join(code + output for code, output in BLOCK.findall(worked))
    checked = code + " ".join(equation for equation, _, _ in equations(worked))
    prose = re.sub(r"```.*?```", "", worked, flags=re.S)
    known = {float(number) for number in re.findall(r"\d+\.\d+", checked)}
    assert {float(number) for number in re.findall(r"\d+\.\d+", prose)} <= known


def test_a_wrong_sum_would_be_noticed():
    [(_, value, right)] = equations(r"so $1.28 \times \frac{0.625}{0.7501} = 1.068$ it is")
    assert value == pytest.approx(1.0665, abs=1e-4) and right == "1.068"
    assert evaluated(r"\ln\frac{0.5}{e^{2}}") == pytest.approx(math.log(0.5) - 2)
    assert evaluated(r"\frac{0.1}{1 + e^{0.35}}") == pytest.approx(0.1 / (1 + math.exp(0.35)))
    assert evaluated(r"\beta") is None


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


@pytest.fixture(scope="module")
def draw():
    spec = importlib.util.spec_from_file_location("draw", ROOT / "docs/draw.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_pictures_are_what_the_script_draws_twice_the_same(draw, tmp_path):
    draw.main(tmp_path / "one")
    draw.main(tmp_path / "two")
    for name in draw.PICTURES:
        one, committed = (tmp_path / "one" / name).read_text(), (ROOT / "docs/figures" / name).read_text()
        assert one == (tmp_path / "two" / name).read_text()
        version = re.compile(r"Matplotlib v[\d.]+")
        if version.search(one).group() == version.search(committed).group():
            assert one == committed, f"run python docs/draw.py: {name} is not what it draws"
        assert f"figures/{name}" in PAGE.read_text()


def test_the_picture_shows_whom_the_layout_lets_a_token_see(draw, monkeypatch):
    seen, segments = draw.who_attends_to_whom()
    assert segments == [(f"prompt {i}", n) for i, n in ((1, 4), (2, 3))] + [
        (f"reply {i}", n) for i, n in ((1, 3), (2, 2), (3, 2), (4, 4))
    ]
    owner = [name for name, size in segments for _ in range(size)]
    prompt_of = {"reply 1": "prompt 1", "reply 2": "prompt 1", "reply 3": "prompt 2", "reply 4": "prompt 2"}
    for i, mine in enumerate(owner):
        for j, other in enumerate(owner):
            expected = (mine == other and j <= i) or prompt_of.get(mine) == other
            assert seen[i, j] == expected, (i, j)

    # Other code, another picture: it is asked, not drawn by hand.
    monkeypatch.setattr(attention.Layout, "attend", lambda self, layer, q, k, v, scale: v)
    assert torch.equal(draw.who_attends_to_whom()[0], torch.eye(18, dtype=torch.bool))


# ---------------------------------------------------------------------------------------------------------------------
# Links


def names_in(file: Path) -> set[str]:
    """Functions, classes and methods of a file: "shard", "Run", "Run.save"."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{part.name}" for part in node.body if isinstance(part, ast.FunctionDef)}
    return names


@pytest.mark.parametrize("page", [PAGE, FLAGS], ids=lambda page: page.name)
def test_every_link_leads_to_a_file_and_every_named_function_is_there(page):
    links = re.findall(r"\[([^\]]+)\]\(([^)#\s]+)\)", page.read_text())
    assert len(links) >= 3
    for label, target in links:
        file = page.parent / target
        if target.startswith("http") or target == "exercises.md":
            continue
        assert file.exists(), target
        module, _, name = label.partition(".")
        if file.suffix == ".py" and module == file.stem and name != "py":
            assert name in names_in(file), label


# ---------------------------------------------------------------------------------------------------------------------
# Glossary


def glossary(*titles: str) -> list[str]:
    """The keys in the first column of the tables below some headings of the page."""
    keys = []
    for title in titles:
        section = PAGE.read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        assert section, title
        for cell in re.findall(r"^\| (`.+?) \|", section, re.M):
            keys += re.findall(r"`([^`]+)`", cell)
    return keys


def test_the_glossary_has_every_key_a_training_step_logs_and_no_other():
    # What tests/test_stages.py holds real rows against.
    from test_stages import DPO_KEYS, GRPO_KEYS

    optional = {key.replace("tflops", "mfu") for key in GRPO_KEYS if key.startswith("tflops")}
    optional |= {"staleness", "overlong", "prompts_sampled", "prompts_passed_over", "group_weight"}
    quality = {"loss_quality"}
    named = ("loss", "reward", "margin", "preference_accuracy")
    held_out = {f"eval_{key}" for key in DPO_KEYS | quality if any(name in key for name in named)}
    shared, of_grpo, of_dpo = (glossary(title) for title in ("Every stage", "grpo.py", "dpo.py"))
    assert sorted(shared + of_grpo) == sorted(GRPO_KEYS | optional)
    assert sorted(shared + of_dpo) == sorted(DPO_KEYS | {"mfu_learn", "seconds_eval"} | quality | held_out)


def test_the_glossary_has_every_key_of_a_result_file():
    row = {"id": "a", "source": "s", "role": "id", "file": "f"}
    row |= {key: [1.0] * 4 for key in ("accuracy", "format", "reward", "length", "parsed", "finished")}
    row |= {"distinct": 1, "entropy": [1.0] * 4, "rbf": [2.0] * 4}
    rows = [row, row | {"role": "ood", "source": "t"}]
    metrics = evaluation.summarise(rows)["overall"]
    gains = evaluation.format_gains(rows, {("f", "a"): row})
    assert sorted(glossary("eval.py's result file")) == sorted([*metrics, *gains, "baseline"])

    record = {"id": "a", "_source": "s", "_role": "id", "_file": "/f", "prompt": "?", "images": [], "answer": "B"}
    record |= {"answer_type": "letter", "think": False}
    stored = evaluation.score_row(record, ["B"], [2], [True], True, ROOT)
    end = PAGE.read_text().partition("\nEach of `rows` has")[2]
    assert set(stored) <= set(re.findall(r"`(\w+)`", end))


# ---------------------------------------------------------------------------------------------------------------------
# Coming from TRL or verl


def flags_of(stage, monkeypatch) -> set[str]:
    """All long flags of a stage's own parser."""
    seen = []

    def remember(parser, argv=None):
        seen.append(parser)
        return argparse.Namespace()

    monkeypatch.setattr(training.Parser, "parse_args", remember)
    with contextlib.suppress(AttributeError):  # the checks that follow find no flags
        stage.parse_args([])
    return {flag for flag in seen[0]._option_string_actions if flag.startswith("--")} - {"--help"}


@pytest.mark.parametrize("stage", [grpo, dpo], ids=["grpo", "dpo"])
def test_the_table_of_flags_has_every_flag_of_the_stage_and_no_other(stage, monkeypatch):
    section = FLAGS.read_text().partition(f"\n## {stage.__name__}.py\n")[2].partition("\n## ")[0]
    shared = FLAGS.read_text().partition("\n## Both\n")[2].partition("\n## ")[0]
    cells = re.findall(r"^\| (`--.+?) \|", section + shared, re.M)
    named = [flag for cell in cells for flag in re.findall(r"--[a-z-]+", cell)]
    assert sorted(set(named)) == sorted(flags_of(stage, monkeypatch))


# ---------------------------------------------------------------------------------------------------------------------


if __name__ == "__main__":
    page = PAGE.read_text()
    outputs = iter(printed([code for code, _ in BLOCK.findall(page)]))
    PAGE.write_text(BLOCK.sub(lambda match: f"```python\n{match[1]}```\n```text\n{next(outputs)}```", page))
