"""What README.md, docs/ and recipes/ say is true: commands parse, runs fit, paths and links exist, tables are rebuilt.

A command is found by running the shell that stands on the page with stubs in place of python, torchrun, make and bash:
so variables, loops and continuations mean what they mean to a reader's shell, and nothing else is run.
"""

import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import distill
import records
import rewards

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "bench"), str(ROOT / "recipes")]

import house  # noqa: E402  (bench/house.py)
import plan  # noqa: E402  (recipes/plan.py)
import readme  # noqa: E402  (bench/readme.py)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# Most names on this one are those of TRL and verl. Its column of ours is held against the parsers in test_learn.py.
OUR_NAMES = [page for page in PAGES if page.name != "from_trl_verl.md"]
RECIPES = sorted((ROOT / "recipes").glob("*.sh"))

STAGES = ("grpo", "dpo", "distill", "eval", "jigsaw", "rewards", "judge")
MODULES = (*STAGES, "endpoint", "records", "training", "families", "attention", "model", "sampler", "vllm_sampler")
MODULES += ("report",)


def name_of(path):
    return str(path.relative_to(ROOT))


# ---------------------------------------------------------------------------------------------------------------------
# Commands

STUBBED = ("python", "python3", "torchrun", "make", "bash", "pip", "git", "diff")
# One JSON list a call. What a recipe reads back from a stage is made empty, so that its loops find something.
STUB = """#!{python} -IS
import json, os, shlex, sys
words = [os.path.basename(sys.argv[0]), *sys.argv[1:]]
calls = [words]
if words[-1].endswith("recipes/stages.py"):  # its input is command lines without "python"
    calls += [["python", *shlex.split(line)] for line in sys.stdin]
with open({noted!r}, "a") as file:
    file.writelines(json.dumps(call) + "\\n" for call in calls)
out = words[words.index("--out") + 1] if "--out" in words[:-1] else None
if any(word.endswith("stages.py") for word in words):
    sys.stdin.read()  # who writes to it must not find the pipe closed
if out and any(word.endswith("photos.py") for word in words):
    for folder in ("train/one", "test/two"):
        os.makedirs(os.path.join(out, folder), exist_ok=True)
elif out and any(word.endswith(("jigsaw.py", "primer.py")) for word in words):
    os.makedirs(out, exist_ok=True)
    open(os.path.join(out, "records.jsonl"), "a").close()
"""


def commands_of(shell, folder, stubbed=STUBBED, also=""):
    """The commands that a piece of shell would run, as lists of words, with its exit status.

    folder: an empty one to run in. stubbed: programs that only note what they are called with. also: a PATH of
    programs that do run; without it none does.
    """
    folder = folder.resolve()
    noted, programs = folder / "noted", folder / "programs"
    programs.mkdir()
    for name in stubbed:
        (programs / name).write_text(STUB.format(python=sys.executable, noted=str(noted)))
        (programs / name).chmod(0o755)
    for entry in ROOT.iterdir():  # what the page names is found under its own name, and nothing can be written to it
        if entry.name not in ("runs", ".git"):
            (folder / entry.name).symlink_to(entry)
    environment = {"PATH": f"{programs}:{also}", "HOME": str(folder)}
    done = subprocess.run(
        [shutil.which("bash"), "-c", shell], cwd=folder, env=environment, text=True, capture_output=True, timeout=60
    )
    lines = noted.read_text().splitlines() if noted.exists() else []
    commands = [json.loads(line) for line in lines]
    return [[word.removeprefix(f"{folder}/") for word in words] for words in commands], done


COMMAND = re.compile(r"^\s*(?:\$ )?(?:[A-Z]+=\S+ )*(?:exec )?(?:python3?|torchrun|make|bash) ", re.M)


def shell_of(page):
    """The pieces of shell on a page: fenced blocks that hold a command, and commands in a line of text."""
    text = page.read_text()
    pieces = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("", "bash", "sh", "shell", "console") and COMMAND.search(block):
            pieces.append(re.sub(r"^\$ ", "", block, flags=re.M))
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    pieces += [span for span in re.findall(r"`([^`\n]+)`", prose) if COMMAND.match(span)]
    return pieces


def usages(recipe):
    """The calls that a recipe's own header shows; those with placeholders only if there is no other."""
    header = recipe.read_text().split("\nset -")[0]
    lines = re.findall(r"^#\s+((?:[A-Z]+=\S+ )*bash recipes/\S+.*)$", header, re.M)
    lines = [re.split(r"\s{3,}", line)[0].strip() for line in lines]  # a remark may stand behind it
    ready = [line for line in lines if not re.search(r"\[|\b(SIZE|MODEL|RECORDS|OUT|SEED)\b|PLAN=1", line)]
    if ready:
        return ready
    words = {"SIZE": "7B", "SEED": "0"}
    filled = [re.sub(r"\b(SIZE|SEED)\b", lambda found: words[found[0]], line.split("[")[0]) for line in lines]
    return filled or [f"bash recipes/{recipe.name}"]


@functools.cache
def recipe_commands(call):
    """The commands of a recipe: it runs, with our programs stubbed and the system's own (mkdir, sed) real."""
    stubbed = [name for name in STUBBED if name != "bash"]
    with tempfile.TemporaryDirectory() as folder:
        found, done = commands_of(call, Path(folder), stubbed, also="/usr/bin:/bin")
    assert done.returncode == 0, f"{call}\n{done.stderr[-2000:]}"
    return found


def after_launcher(words):
    """`python x.py …` or `torchrun … x.py …` -> ("x.py", its words); (None, words) for python -m and the like."""
    for number, word in enumerate(words[1:], 1):
        if word.endswith(".py"):
            return word, words[number + 1 :]
        if not word.startswith("-"):
            break
    return None, words


def is_sketch(words):
    """Whether a command is not meant to be typed as it stands: it holds an ellipsis or brackets."""
    return any("…" in word or word == "..." or word.startswith("[") for word in words)


def problem(words, capsys):
    """What is wrong with a command, or None."""
    if words[0] == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        return next((f"no target {word}" for word in words[1:] if "=" not in word and word not in targets), None)
    if words[0] == "bash":
        return None if (ROOT / words[1]).is_file() else f"{words[1]} does not exist"
    if words[0] in ("pip", "git", "diff"):
        return None
    path, flags = after_launcher(words)
    if path is None:
        files = [word.split("::")[0] for word in words[1:] if word.startswith("tests/")]
        return next((f"{file} does not exist" for file in files if not (ROOT / file).exists()), None)
    if not (ROOT / path).is_file():
        return f"{path} does not exist"
    source = (ROOT / path).read_text()
    if is_sketch(flags) or "def parse_args" not in source:
        known = set(re.findall(r'"(--[a-z][a-z-]+)"', source + "".join(map(Path.read_text, shared_flags()))))
        return next((f"{path} has no flag {word}" for word in flags if word[:2] == "--" and word not in known), None)
    module = path.removesuffix(".py").replace("/", ".").removeprefix("recipes.").removeprefix("bench.")
    capsys.readouterr()
    try:
        importlib.import_module(module).parse_args(flags)
    except SystemExit as end:
        if end.code not in (None, 0):
            return capsys.readouterr().err.strip()
    return None


def shared_flags():
    return [ROOT / "training.py", ROOT / "vllm_sampler.py", ROOT / "report.py", ROOT / "jigsaw.py"]


# The commands of docs/change.md work after the page's diffs: tests/test_change.py applies them and runs the commands.
AS_IT_STANDS = [page for page in PAGES if page.name != "change.md"]


@pytest.mark.parametrize("page", AS_IT_STANDS, ids=name_of)
def test_every_command_of_a_page_is_one_that_its_own_stage_takes(page, tmp_path, capsys):
    problems = []
    for number, shell in enumerate(shell_of(page)):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, done = commands_of(shell, folder)
        assert found, f"{shell}\n{done.stderr}"
        for words in found:
            cause = problem(words, capsys)
            if cause:
                problems.append(f"{shlex.join(words)}\n    {cause}")
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_command_of_a_recipe_is_one_that_its_own_stage_takes(recipe, capsys):
    problems = []
    for call in usages(recipe):
        found = recipe_commands(call)
        assert found, call
        for words in found:
            cause = problem(words, capsys)
            if cause:
                problems.append(f"{call}\n  {shlex.join(words)}\n    {cause}")
    assert not problems, "\n".join(problems)


def test_a_flag_of_another_stage_a_bad_number_and_a_missing_file_are_noticed(tmp_path, capsys):
    shell = "RL='--model m --data d --out o'\npython grpo.py $RL --beta 0.1\npython dpo.py $RL \\\n  --lr fast\n"
    found, _ = commands_of(shell + "torchrun --nproc_per_node=8 nowhere.py\nmake sense\n", tmp_path)
    causes = [problem(words, capsys) for words in found]
    assert len(causes) == 4 and all(causes), causes
    assert "--beta" in causes[0] and "--lr" in causes[1]


# ---------------------------------------------------------------------------------------------------------------------
# Memory

# What stands for a model whose name says no size.
SIZES = {"BASE": "7B", "MODEL": "7B"}
LONG_REPLY = 2048  # tokens of a pair's replies, which no flag of dpo.py tells


def verdicts(found):
    """(command, fits, why) of those of the commands, in order, that run a real model, on GPUs of 80 GB."""
    out, models = [], dict(SIZES)
    for words in found:
        path, flags = after_launcher(words) if words[0] in ("python", "python3", "torchrun") else (None, [])
        if path not in ("grpo.py", "dpo.py", "distill.py", "eval.py") or is_sketch(flags):
            continue
        given = dict(zip(flags, flags[1:], strict=False))
        name = given.get("--base" if "--policy-url" in given else "--policy") or given.get("--model", "")
        if name not in {*models, *plan.HUB}:  # a tiny model
            continue
        models[given["--out"]] = models.get(name, name)
        plain = shlex.join(nameless(words))
        out.append((shlex.join(words), *judge(plain, models.get(name, name))))
    return out


NAMELESS = {"--model": "MODEL", "--policy": "MODEL", "--base": "MODEL", "--data": "d", "--out": "o", "--steps": "1"}


def nameless(words):
    """A command with its files and models renamed, so that commands that differ in nothing else are judged once."""
    out, flag = [], ""
    for word in words:
        if word.startswith("--"):
            flag = word
            out.append(word)
            if flag in NAMELESS:
                out.append(NAMELESS[flag])
        elif flag not in NAMELESS:
            out.append(word)
    return out


@functools.cache
def judge(command, size):
    """(fits, why) of a command whose model is called MODEL."""
    fits, _, why = plan.judge(command, models={"MODEL": size}, reply=LONG_REPLY)
    return fits, why


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_run_of_a_page_with_a_real_model_fits_into_80_gb(page, tmp_path):
    for number, shell in enumerate(shell_of(page)):
        folder = tmp_path / str(number)
        folder.mkdir()
        for command, fits, why in verdicts(commands_of(shell, folder)[0]):
            assert fits, f"{command}\n    {why}"


@pytest.mark.parametrize("recipe", RECIPES, ids=name_of)
def test_every_run_of_a_recipe_with_a_real_model_fits_into_80_gb(recipe):
    found = [command for call in usages(recipe) for command in recipe_commands(call)]
    judged = verdicts(found)
    problems = [f"{command}\n    {why}" for command, fits, why in judged if not fits]
    assert not problems, "\n".join(problems)
    # Otherwise a recipe whose model nobody knows would pass.
    assert judged or "torchrun" not in recipe.read_text()


def test_a_run_that_does_not_fit_is_noticed():
    run = "torchrun --nproc_per_node=8 grpo.py --model BASE --data d --out o --prompts 64 --kl 0.04 --shard none"
    ((_, fits, _),) = verdicts([run.split()])
    assert not fits


# ---------------------------------------------------------------------------------------------------------------------
# Paths, names, links

# Names of what a run writes or a reader brings: no file of the repository.
NOT_OURS = re.compile(r"^(runs|exercises|data|coco|puzzles|images|checkpoints|test|train)/|\.jsonl$|\*")


def spans(page):
    """The inline code of a page."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    return re.findall(r"`([^`\n]+)`", prose)


@pytest.mark.parametrize("page", OUR_NAMES, ids=name_of)
def test_every_path_named_on_a_page_exists(page):
    named = [span for span in spans(page) if re.fullmatch(r"[\w.-]+(/[\w.-]*)*", span) and not NOT_OURS.search(span)]
    ours = [n for n in named if "/" in n or n.endswith((".py", ".sh", ".md"))]
    # "nanochat `gpt.py`" is somebody else's file.
    others = {"chat_rl.py", "gpt.py", "ppo.py"} if page.name == "house.md" else set()
    folders = [ROOT, page.parent, ROOT / "tests", ROOT / "recipes", ROOT / "bench"]
    missing = [n for n in ours if n not in others and not any((folder / n).exists() for folder in folders)]
    # A run's own model names (Qwen/…) are no paths either.
    assert [n for n in missing if not n[0].isupper()] == []


@pytest.mark.parametrize("page", OUR_NAMES, ids=name_of)
def test_every_function_named_on_a_page_exists(page):
    missing = []
    for span in spans(page):
        found = re.fullmatch(r"([a-z_]+)((?:\.[A-Za-z_]\w*)+)(?:\(.*\))?", span)
        if not found or found[1] not in MODULES or span.endswith((".py", ".json", ".jsonl", ".html", ".safetensors")):
            continue
        thing = importlib.import_module(found[1])
        for name in found[2].strip(".").split("."):
            thing = getattr(thing, name, None)
        if thing is None:
            missing.append(span)
    assert missing == []


@pytest.mark.parametrize("page", OUR_NAMES, ids=name_of)
def test_every_flag_named_on_a_page_is_one_of_ours(page):
    files = [file for folder in (".", "toy", "bench", "recipes", "tests") for file in ROOT.glob(f"{folder}/*.py")]
    known = set(re.findall(r'"(--[a-z][a-z-]+)"', "".join(path.read_text() for path in files)))
    roles = re.findall(r'f"--\{role\}(-[a-z-]+)"', (ROOT / "endpoint.py").read_text())
    known |= {f"--{role}{rest}" for role in ("judge", "policy") for rest in roles}
    known |= {"--no-think", "--help", "--nproc_per_node"}
    named = {word for span in spans(page) for word in re.findall(r"(?<!\S)(--[a-z][a-z_-]+)", span)}
    assert named - known == set()


def anchors(page):
    """The #names of a page's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    names = set()
    for heading in re.findall(r"^#+ (.+)$", prose, re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        name = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        names.add(name if name not in names else f"{name}-1")
    return names


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)
    dead = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        target, _, anchor = link.partition("#")
        if re.match(r"https?:", link):
            continue
        file = (page.parent / target).resolve() if target else page
        if not file.exists():
            dead.append(link)
        elif anchor and file.suffix == ".md" and anchor not in anchors(file):
            dead.append(link)
        elif re.fullmatch(r"L\d+", anchor) and int(anchor[1:]) > len(file.read_text().splitlines()):
            dead.append(link)
    assert dead == []


def test_the_front_page_links_to_every_page():
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in PAGES[0].read_text()] == []


def test_the_front_page_is_short():
    assert len(PAGES[0].read_text().splitlines()) <= 220


# ---------------------------------------------------------------------------------------------------------------------
# Numbers


def test_the_result_tables_are_those_of_the_committed_logs():
    assert readme.main(["--check"]) == 0


def test_a_changed_number_is_noticed(monkeypatch, tmp_path):
    page = tmp_path / "speed.md"
    text = (ROOT / "docs/speed.md").read_text()
    number = re.search(r"<!-- speed: .*?\*\*(\d+\.\d+)\*\*", text, re.S)
    page.write_text(text[: number.start(1)] + "0.001" + text[number.end(1) :])
    monkeypatch.setattr(readme, "PAGES", [page])
    assert readme.main(["--check"]) == 1


def test_the_tables_of_the_house_are_those_of_the_commits_they_name():
    try:
        status = house.main(["--check"])
    except subprocess.CalledProcessError:
        pytest.skip("the commits that docs/house.md names are not in this clone")
    assert status == 0


def test_a_file_is_measured_by_hand():
    source = '"""Says\nwhat."""\n\n# why\nadd("--flag")\n\n\ndef f(x):\n    """Half."""\n    return x / 2  # so\n'
    found = house.measure(source)
    assert (found.lines, found.functions, found.longest, found.flags) == (10, 1, 3, 1)
    assert (found.comments, found.docstrings) == (0.2, 0.3)
    assert found.tokens == (4 + 6 + 4) / 3  # add ( "--flag" ); def f ( x ) :; return x / 2


# Tables with numbers that no script rebuilds: facts, definitions, settings. By page, the first words of their header.
BY_HAND = {
    "deviations.md": ["paper"],
    "formats.md": ["`answer_type`", "`--question`", "`--set`", "field", "file"],
    "from_trl_verl.md": ["ours"],
    "gpus.md": ["status"],
    "learn.md": ["key"],  # what is normal in a log; the worked numbers above it are printed by test_learn.py
}


def by_hand(page):
    """Header lines of tables with a number in a cell, outside marked blocks and those of BY_HAND."""
    text = re.sub(r"<!-- (\w+): .*?<!-- end of \1 -->", "", page.read_text(), flags=re.S)
    text = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    found = []
    for header, body in re.findall(r"^(\|.*)\n\|[-| :]+\|\n((?:\|.*\n?)*)", text, re.M):
        cells = [cell.strip() for row in body.splitlines() for cell in row.split("|")[2:-1]]
        first = header.split("|")[1].strip()
        numbers = [cell for cell in cells if re.match(r"[-+~≈]?\d", cell)]
        if numbers and first not in BY_HAND.get(page.name, []):
            found.append(header)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_table_of_numbers_is_rebuilt_by_a_script_or_known_as_one_by_hand(page):
    assert by_hand(page) == []


def test_a_table_of_numbers_without_a_marker_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("| run | accuracy |\n|---|---|\n| ours | 98.2 |\n")
    assert by_hand(page) == ["| run | accuracy |"]


# ---------------------------------------------------------------------------------------------------------------------
# The worked examples of docs/formats.md


def example(heading):
    """The JSON under a heading of docs/formats.md."""
    text = (ROOT / "docs/formats.md").read_text()
    part = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.M)[1]
    return json.loads(re.search(r"^```json\n(.*?)^```", part, re.S | re.M)[1])


def fields(heading):
    """The names in the first column of the tables under a heading of docs/formats.md."""
    text = (ROOT / "docs/formats.md").read_text()
    part = re.split(rf"^#+ {re.escape(heading)}$", text, flags=re.M)[1]
    part = re.split(r"^#+ ", part, flags=re.M)[0]
    part = re.sub(r"^\|.*\n(?=\|[-|]+\|$)", "", part, flags=re.M)  # the headers
    firsts = re.findall(r"^\| (`.*?) \|", part, re.M)
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def test_the_example_of_a_record_is_one():
    record = example("records.jsonl")
    records.check_fields(record, "docs/formats.md", ())
    rewards.check_gold(record)
    assert set(records.FIELDS) <= fields("records.jsonl")


def test_the_example_of_a_pair_is_one():
    pair = example("pairs.jsonl")
    records.check_fields(pair, "docs/formats.md", ("chosen", "rejected"))
    assert rewards.score(pair["chosen"], pair)["reward"] == 1.5
    assert rewards.score(pair["rejected"], pair)["format"] == 0
    whole = "<think>2 looks light, so it was above.</think><answer>A</answer>"
    assert distill.corrupt(whole, pair["corruption"]) == pair["rejected"]
    added = set(pair) - set(example("records.jsonl"))
    assert added <= fields("pairs.jsonl")


def test_the_tables_of_answer_types_and_reply_formats_are_those_of_the_code():
    assert fields("Answer types") == set(rewards.ANSWER_TYPES)
    assert fields("Reply formats") == set(rewards.REPLY_FORMATS)


def test_the_example_of_a_step_has_the_fields_of_the_table():
    assert set(example("log.jsonl")) <= fields("log.jsonl")


def test_the_example_of_a_result_is_what_eval_computes_of_its_rows():
    evaluation = importlib.import_module("eval")
    result = example("Result file")
    assert evaluation.summarise(result["rows"]) == {name: result[name] for name in ("overall", "sources")}
    assert set(result["args"]) == set(evaluation.SETTINGS)
    assert evaluation.files_by_role(result["rows"]) == result["files"]
    assert set(result) <= fields("Result file")
