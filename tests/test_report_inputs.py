"""report.py and eval.py --baseline on damaged files: a page that names what it leaves out, or one line and status 2."""

import copy
import json
import os
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from test_report import Page

import eval as evaluation
import report
import training
from files import DataError

LIMIT = 60  # seconds until a command counts as hanging


@contextmanager
def no_hang():
    def give_up(number, frame):
        raise AssertionError(f"still running after {LIMIT} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(capsys, folder, *arguments):
    """Run report.py: -> ("page", its visible text) or ("error", the one line). Everything else fails."""
    out = folder / "page" / "r.html"
    command = ["--out", out, *arguments]
    with no_hang(), pytest.raises(SystemExit) as ended:
        training.run(lambda: report.main([str(argument) for argument in command]))
    err = capsys.readouterr().err
    assert "Traceback" not in err, err
    if ended.value.code == 0:
        assert err == ""
        return "page", check_page(out.read_text(encoding="utf-8"))
    assert ended.value.code == 2
    lines = err.strip().split("\n")
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 2000, lines
    assert not out.exists()
    return "error", lines[0]


def check_page(text):
    """The text of a page, and of its pictures, that holds no script, no foreign tag, and no address but its own."""
    page = Page(text)
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "iframe", "object", "embed", "link", "form", "svg", "b", "i", "u", "x"}
    for tag, attributes in page.tags:
        assert not any(key.startswith("on") for key in attributes), attributes
        for key in ("src", "href", "action", "data", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, value)
    return "".join([*page.text, *(attributes.get("alt", "") for _, attributes in page.tags)])


# ---------------------------------------------------------------------------------------------------------------------
# Run directories

STEPS = [{"step": step, "reward": step / 9, "accuracy": 0.5} for step in range(1, 5)]
GOOD_LOG = "".join(json.dumps(entry) + "\n" for entry in STEPS).encode()
HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(1)>"

# name, what is written after four good lines, what the page says (None: nothing about it)
LOGS = [
    ("half a line", b'{"step": 5, "rew', "1 lines of log.jsonl are left out: first, line 5 is not JSON"),
    ("not UTF-8", b'{"step": 5, "note": "\xff\xfe"}\n', "line 5 is not JSON"),
    ("zero bytes of a crash", b"\0" * 4096, "line 5 is not JSON"),
    ("a number alone", b"5\n", 'line 5 has no "step"'),
    ("a list", b"[1, 2]\n", 'line 5 has no "step"'),
    ("null", b"null\n", 'line 5 has no "step"'),
    ("no step", b'{"reward": 1.0}\n', 'line 5 has no "step"'),
    ("a step of text", b'{"step": "5", "reward": 1}\n', 'line 5 has no "step"'),
    ("a step that is true", b'{"step": true, "reward": 1}\n', 'line 5 has no "step"'),
    ("a step that is null", b'{"step": null}\n', 'line 5 has no "step"'),
    ("a step of 10^400", b'{"step": 1' + b"0" * 400 + b', "reward": 1}\n', 'line 5 has no "step"'),
    ("a step of 10^5000", b'{"step": 1' + b"0" * 5000 + b', "reward": 1}\n', "line 5 is not JSON"),
    ("a negative step", b'{"step": -1, "reward": 1}\n', 'line 5 has no "step"'),
    ("a step of NaN", b'{"step": NaN, "reward": 1}\n', 'line 5 has no "step"'),
    ("a repeated step", b'{"step": 4, "reward": 1}\n', None),
    ("a step that goes back", b'{"step": 2, "reward": 1}\n', None),
    ("deep nesting", b"[" * 100_000 + b"\n", "line 5 is not JSON"),
    ("NaN", b'{"step": 5, "reward": NaN}\n', "not drawn: 1 of reward"),
    ("Infinity", b'{"step": 5, "reward": -Infinity}\n', "not drawn: 1 of reward"),
    ("text for a number", b'{"step": 5, "reward": "high"}\n', "not drawn: 1 of reward"),
    ("a list for a number", b'{"step": 5, "reward": [1]}\n', "not drawn: 1 of reward"),
    ("a value of 10^400", b'{"step": 5, "reward": 1' + b"0" * 400 + b"}\n", "not drawn: 1 of reward"),
    ("a value of 1e308", b'{"step": 5, "reward": 1e308}\n', "not drawn: 1 of reward"),
    ("null for a number", b'{"step": 5, "reward": null}\n', None),
    ("the smallest number", b'{"step": 5, "reward": 5e-324}\n', None),
    ("a key of 10,000 characters", json.dumps({"step": 5, "k" * 10_000: 1}).encode(), "more characters"),
    ("a key of mathematics", json.dumps({"step": 5, r"$\foo$": 1, "$": 2, "$_{": 3}).encode(), r"$\foo$"),
    ("a key of half a surrogate", b'{"step": 5, "\\ud83d": 1}\n', "U+D83D"),
    ("a key of markup", json.dumps({"step": 5, HOSTILE: 1}).encode(), HOSTILE[:35]),
    ("a key of no characters", b'{"step": 5, "": 1}\n', None),
    ("a key of lines and bells", json.dumps({"step": 5, "a\nb\x07\x1b[2J": 1}).encode(), "U+0007"),
    ("a key with a leading _", b'{"step": 5, "_nolegend_": 1}\n', "_nolegend_"),
    ("a key of Chinese and emoji", json.dumps({"step": 5, "奖励🎉": 1}).encode(), "奖励🎉"),
    ("keys alike in files", json.dumps({"step": 5, "a/b": 1, "a b": 2, "../a": 3}).encode(), "a/b"),
    ("200 keys", json.dumps({"step": 5} | {f"key {n}": n for n in range(200)}).encode(), "more figures are left out"),
]


def make_run(folder, log=GOOD_LOG, args=b'{"lr": 0.1}'):
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_bytes(log)
    (folder / "args.json").write_bytes(args)
    return folder


@pytest.mark.parametrize("name, more, words", LOGS, ids=[entry[0] for entry in LOGS])
def test_a_damaged_log_is_shown_as_far_as_it_goes(tmp_path, capsys, monkeypatch, name, more, words):
    monkeypatch.setattr(report, "MOST_FIGURES", 5)
    kind, text = outcome(capsys, tmp_path, "--runs", make_run(tmp_path / "run", GOOD_LOG + more))
    assert kind == "page" and "Training curves" in text
    assert "left out" not in text if words is None else words in text
    names = {path.name for path in (tmp_path / "page").iterdir()}
    assert "r-run-reward.png" in names and not any("partial" in name for name in names)


ALONE = [
    ("an empty log", b"", "must hold at least one step"),
    ("a log of empty lines", b"\n\n \n", "must hold at least one step"),
    ("only half a line", b'{"step": 1, "rew', "line 1 is not JSON"),
    ("a picture", b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40, "is not JSON"),
]


@pytest.mark.parametrize("name, log, words", ALONE, ids=[entry[0] for entry in ALONE])
def test_a_log_without_a_step_is_one_line(tmp_path, capsys, name, log, words):
    kind, line = outcome(capsys, tmp_path, "--runs", make_run(tmp_path / "run", log))
    assert kind == "error" and "run/log.jsonl" in line and words in line


ARGS = [
    ("half", b"{", "not JSON"),
    ("a list", b"[1]", "a JSON object is needed"),
    ("null", b"null", "a JSON object is needed"),
    ("nothing", b"", "not JSON"),
    ("not UTF-8", b'{"a": "\xff"}', "no UTF-8 text"),
    ("deep nesting", b"[" * 100_000, "not JSON"),
    ("a number of 5,000 digits", b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
]


@pytest.mark.parametrize("name, args, words", ARGS, ids=[entry[0] for entry in ARGS])
def test_damaged_settings_are_one_line(tmp_path, capsys, name, args, words):
    kind, line = outcome(capsys, tmp_path, "--runs", make_run(tmp_path / "run", args=args))
    assert kind == "error" and "run/args.json" in line and words in line


def test_settings_of_any_content_are_text(tmp_path, capsys):
    args = {"lr": float("nan"), HOSTILE: [HOSTILE, {"a": None}], "\ud83d": "\ud83d", "long": "x" * 10**6}
    kind, text = outcome(capsys, tmp_path, "--runs", make_run(tmp_path / "run", args=json.dumps(args).encode()))
    assert kind == "page" and HOSTILE in text and len(text) < 50_000


RUN_NAMES = ["$", r"$\foo$", "<script>", "..", ".", "n" * 250, "_x", "a b", "%s {0}", "\u202e", "C:\\x"]


@pytest.mark.parametrize("name", RUN_NAMES, ids=[repr(name[:12]) for name in RUN_NAMES])
def test_a_run_of_any_name_gets_its_curves(tmp_path, capsys, name):
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    kind, text = outcome(capsys, tmp_path, "--runs", f"{name}={one}", f"{name}2={other}")
    assert kind == "page" and "Side by side" in text
    written = sorted(tmp_path.rglob("*.png"))
    assert len(written) == 3 and all(path.parent == tmp_path / "page" for path in written)


def test_folders_of_strange_names_are_run_directories(tmp_path, capsys):
    names = ("$x$", "<b>", "a=b", "x" * 250)
    folders = [make_run(tmp_path / name) for name in names]
    kind, text = outcome(capsys, tmp_path, "--runs", *folders)
    assert kind == "page" and text.count("Settings of this run") == 4


@pytest.mark.parametrize("name", ["a\nb", "n" * 3000, os.fsdecode(b"\xff\xfe"), "\0"])
def test_what_can_be_no_name_on_a_command_line_is_one_line(tmp_path, capsys, name):
    kind, line = outcome(capsys, tmp_path, "--runs", f"{name}={make_run(tmp_path / 'run')}")
    assert kind == "error" and line.startswith("error: argument --runs: ")


def test_of_thousands_of_runs_the_first_are_shown_and_the_others_counted(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(report, "MOST_RUNS", 5)
    run = make_run(tmp_path / "run")
    names = [f"r{number}={run}" for number in range(3000)]
    kind, text = outcome(capsys, tmp_path, "--runs", *names)
    assert kind == "page" and "Only the first 5 of 3000 runs are shown." in text


def test_a_log_of_200_000_steps_is_drawn_in_seconds(tmp_path, capsys):
    lines = (json.dumps({"step": step, "reward": step % 7}) + "\n" for step in range(200_000))
    kind, text = outcome(capsys, tmp_path, "--runs", make_run(tmp_path / "run", "".join(lines).encode()))
    assert kind == "page"


def test_a_long_curve_keeps_its_mean_and_its_last_step():
    points = report.Curve("x", list(range(1, 10_001)), [float(step % 2) for step in range(1, 10_001)])
    thinned = report.thin(points)
    assert len(thinned.steps) <= report.MOST_POINTS and thinned.steps[-1] == 10_000
    assert sum(thinned.values) / len(thinned.values) == pytest.approx(0.5, abs=0.01)
    short = points._replace(steps=points.steps[:50], values=points.values[:50])
    assert report.thin(short) == short


# ---------------------------------------------------------------------------------------------------------------------
# What is no regular file


def no_file(path, kind):
    """Put a directory, a FIFO, an endless device, a dead link or nothing where a file belongs."""
    if kind == "directory":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "dead link":
        path.symlink_to("nowhere")
    return path


KINDS = ("directory", "FIFO", "device", "dead link", "missing")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["log.jsonl", "args.json"])
def test_a_run_whose_file_is_none_is_one_line(tmp_path, capsys, name, kind):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    no_file(run / name, kind)
    what, text = outcome(capsys, tmp_path, "--runs", run)
    assert (what == "page") if (name, kind) == ("args.json", "missing") else (what == "error" and "run" in text)


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_that_is_no_file_is_one_line(tmp_path, capsys, kind):
    path = no_file(tmp_path / "result.json", kind)
    what, line = outcome(capsys, tmp_path, "--results", path)
    assert what == "error" and "result.json" in line
    with no_hang(), pytest.raises(DataError, match="result.json"):
        evaluation.read_baseline(path, [], tmp_path)


@pytest.mark.parametrize("flag", ["--out", "--table"])
@pytest.mark.parametrize("kind", ["directory", "FIFO", "device", "an input", "folder is a file"])
def test_a_page_is_written_only_where_a_file_belongs(tmp_path, capsys, flag, kind):
    run = make_run(tmp_path / "run")
    if kind == "an input":
        target = run / "log.jsonl"
    elif kind == "folder is a file":
        target = run / "log.jsonl" / "x.html"
    else:
        target = no_file(tmp_path / "target", kind)
    more = [] if flag == "--out" else ["--out", tmp_path / "other.html"]
    with no_hang(), pytest.raises(SystemExit) as ended:
        training.run(lambda: report.main([str(part) for part in [*more, flag, target, "--runs", run]]))
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1
    assert (run / "log.jsonl").read_bytes() == GOOD_LOG and not (tmp_path / "other.html").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Result files


def make_result(folder):
    """A result of two rows whose replies are stored, with two replies each."""
    Image.new("RGB", (30, 20), "red").save(folder / "picture.png")
    rows = []
    for name in ("a", "b"):
        record = {"id": name, "_source": "s", "_role": "id", "_file": str(folder / "d.jsonl"), "prompt": "Which?"}
        record |= {"images": [str(folder / "picture.png")], "answer": "B", "answer_type": "letter", "think": True}
        texts = ["<think>x</think><answer>B</answer>", "A"]
        rows.append(evaluation.score_row(record, texts, [9, 1], [True, False], True, folder))
    result = {"model": "m", "files": {}, "args": {}, **evaluation.summarise(rows), "rows": rows}
    return result | {"gf": {"gain_id": 1.0, "gain_ood": 2.0, "gf": None, "ood_gains": {}, "beta": 2.0}}


GONE = object()
LONG = "x" * 100_000
NAN, INF, HUGE = float("nan"), float("inf"), 10**400

# where in the result, what is put there, what is said: "page: …" or "error: …"
RESULTS = [
    *[((key,), GONE, "error: are expected") for key in ("model", "overall", "sources", "gf", "rows")],
    (("model",), 3, 'error: "model" must be str'),
    (("sources",), [], 'error: "sources" must be dict'),
    (("overall",), None, 'error: "overall" must be dict'),
    (("rows",), {}, 'error: "rows" must be list'),
    (("rows",), [], "page: Results"),
    (("rows", 1), 7, "error: row 2 lacks"),
    (("rows", 1), [], "error: row 2 lacks"),
    (("sources",), {}, "page: Questions and replies"),
    (("sources", "s"), 1, "error: source 's' must have the numbers"),
    (("sources", "s", "accuracy"), GONE, "error: source 's'"),
    (("sources", "s", "accuracy"), NAN, "error: source 's'"),
    (("sources", "s", "accuracy"), HUGE, "error: source 's'"),
    (("sources", "s", "format"), "1", "error: source 's'"),
    (("sources", "s", "accuracy_read"), True, "error: source 's'"),
    (("sources", HOSTILE), {"accuracy": 1, "accuracy_read": 1, "format": 1}, f"page: {HOSTILE}"),
    (("sources", LONG), {"accuracy": 1, "accuracy_read": 1, "format": 1}, "page: more characters"),
    (("sources", "\ud83d\x1b[2J|"), {"accuracy": 1, "accuracy_read": 1, "format": 1}, "page: U+D83D"),
    (("gf",), None, "page: Results"),
    (("gf",), {}, 'error: "gf" must be null'),
    (("gf",), 3, 'error: "gf" must be null'),
    (("gf", "gf"), GONE, 'error: "gf" must be null'),
    (("gf", "gf"), "22", 'error: "gf" must be null'),
    (("gf", "gain_id"), None, 'error: "gf" must be null'),
    (("gf", "gain_ood"), INF, 'error: "gf" must be null'),
    *[(("rows", 0, key), GONE, "error: row 1 lacks") for key in ("id", "source", "file", *report.SCORES)],
    *[(("rows", 0, key), 3, "error: row 1 must have text") for key in ("id", "source", "file")],
    *[(("rows", 0, key), "x", "error: row 1 must have one value") for key in report.SCORES],
    (("rows", 0, "accuracy"), [], "error: row 1 must have one value"),
    (("rows", 0, "accuracy"), [1], "error: row 1 must have one value"),
    (("rows", 0, "accuracy"), [1, None], "error: row 1 must have one value"),
    (("rows", 0, "accuracy"), [1, NAN], "error: row 1 must have one value"),
    (("rows", 0, "reward"), [1, HUGE], "error: row 1 must have one value"),
    (("rows", 0, "length"), [1, 2, 3], "error: row 1 must have one value"),
    (("rows", 0, "parsed"), [1, 0], "error: row 1 must have one value"),
    (("rows", 0, "finished"), ["yes", "no"], "error: row 1 must have one value"),
    (("rows", 1, "id"), "a", "error: row 2 has the file and the id of a row before it"),
    *[(("rows", 0, key), GONE, "error: row 1 has replies, but") for key in ("prompt", "images", "gold", "answers")],
    (("rows", 0, "replies"), GONE, "page: Questions and replies"),
    (("rows", 0, "replies"), [], "error: row 1 must have a text"),
    (("rows", 0, "replies"), ["one"], "error: row 1 must have a text"),
    (("rows", 0, "replies"), ["one", 2], "error: row 1 must have a text"),
    (("rows", 0, "replies"), [HOSTILE, HOSTILE], f"page: {HOSTILE}"),
    (("rows", 0, "replies"), ["\ud83d\x00", LONG], "page: U+D83D"),
    (("rows", 0, "answers"), None, "error: row 1 must have a text"),
    (("rows", 0, "answers"), [{"a": [None]}, HUGE], "page: Questions"),
    (("rows", 0, "prompt"), None, "error: row 1 must have text as its prompt"),
    (("rows", 0, "prompt"), HOSTILE, f"page: {HOSTILE}"),
    (("rows", 0, "gold"), {"a": NAN}, "page: NaN"),
    (("rows", 0, "gold"), HOSTILE, f"page: {HOSTILE}"),
    (("rows", 0, "id"), HOSTILE, f"page: {HOSTILE}"),
    (("rows", 0, "source"), HOSTILE, f"page: {HOSTILE}"),
    (("rows", 0, "file"), "\0", "page: Results"),
    (("rows", 0, "file"), LONG, "page: Results"),
    (("rows", 0, "images"), None, "error: row 1 must have text as its prompt and paths"),
    (("rows", 0, "images"), [1], "error: row 1 must have text as its prompt and paths"),
    (("rows", 0, "images"), [], "page: Questions"),
    (("rows", 0, "images"), ["gone.png"], "page: The picture gone.png is no longer there."),
    (("rows", 0, "images"), ["\0"], "page: no longer there"),
    (("rows", 0, "images"), ["\ud83d"], "page: no longer there"),
    (("rows", 0, "images"), [LONG], "page: no longer there"),
    (("rows", 0, "images"), ["."], "page: no longer there"),
    (("rows", 0, "images"), ["/dev/zero"], "page: no longer there"),
    (("rows", 0, "images"), ["http://evil.example/x.png"], "page: no longer there"),
    (("rows", 0, "images"), ["fifo"], "page: The picture fifo is no longer there."),
    (("rows", 0, "images"), ["broken.png"], "page: The picture broken.png cannot be read."),
    (("rows", 0, "images"), ["text.png"], "page: The picture text.png cannot be read."),
    (("rows", 0, "images"), ["empty.png"], "page: The picture empty.png cannot be read."),
    (("rows", 0, "images"), ["large.png"], "page: The picture large.png is too large to be shown."),
    (("rows", 0, "images"), ["enormous.png"], "page: enormous.png"),
    (("rows", 0, "images"), ["picture.png"] * 1000, "page: Questions"),
]


def make_pictures(folder):
    os.mkfifo(folder / "fifo")
    good = (folder / "picture.png").read_bytes()
    (folder / "broken.png").write_bytes(good[: len(good) // 2])
    (folder / "text.png").write_text("no picture")
    (folder / "empty.png").touch()
    Image.new("1", (13_000, 13_000)).save(folder / "large.png")
    # A header that promises more pixels than any memory holds.
    sized = bytearray(good)
    sized[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    (folder / "enormous.png").write_bytes(sized)


def damage(result, where, value):
    """The result with `value` put at the path `where`, or with nothing left there."""
    result = copy.deepcopy(result)
    *folders, last = where
    place = result
    for key in folders:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    return result


RESULT_NAMES = [f"{'.'.join(map(str, where))[:40]}={value!r:.12}" for where, value, _ in RESULTS]


@pytest.mark.parametrize("where, value, expected", RESULTS, ids=[ascii(name) for name in RESULT_NAMES])
def test_a_damaged_result_is_shown_or_refused_by_name(tmp_path, capsys, where, value, expected):
    result = damage(make_result(tmp_path), where, value)
    make_pictures(tmp_path)
    path = tmp_path / "result.json"
    path.write_text(json.dumps(result))
    kind, text = outcome(capsys, tmp_path, "--results", path, "--table", tmp_path / "table.md")
    wanted, _, words = expected.partition(": ")
    assert (kind, words in text) == (wanted, True), text
    # The same reader stands behind --baseline.
    if kind == "error":
        assert "result.json" in text
        with pytest.raises(DataError, match="result.json: is not a result"):
            evaluation.read_baseline(path, [], tmp_path)
    else:
        table = (tmp_path / "table.md").read_text(encoding="utf-8")
        assert "<script" not in table and "\x1b" not in table
        assert len({line.count("|") for line in table.strip().split("\n")}) == 1


TEXTS = [
    ("nothing", b""),
    ("half", b'{"model": "m", "rows": ['),
    ("not UTF-8", b'{"model": "\xff"}'),
    ("UTF-16", '{"model": "m"}'.encode("utf-16")),
    ("a list", b"[]"),
    ("a number", b"7"),
    ("null", b"null"),
    ("deep nesting", b"[" * 100_000),
    ("a number of 5,000 digits", b'{"model": ' + b"9" * 5000 + b"}"),
    ("lines", b'{"step": 1}\n{"step": 2}\n'),
]


@pytest.mark.parametrize("name, data", TEXTS, ids=[entry[0] for entry in TEXTS])
def test_a_file_that_is_no_result_is_one_line(tmp_path, capsys, name, data):
    (tmp_path / "result.json").write_bytes(data)
    kind, line = outcome(capsys, tmp_path, "--results", tmp_path / "result.json")
    assert kind == "error" and "result.json" in line


def test_a_good_result_beside_a_bad_one_is_refused_by_the_bad_ones_name(tmp_path, capsys):
    (tmp_path / "good.json").write_text(json.dumps(make_result(tmp_path)))
    (tmp_path / "bad.json").write_text("{}")
    kind, line = outcome(capsys, tmp_path, "--results", tmp_path / "good.json", tmp_path / "bad.json")
    assert kind == "error" and "bad.json" in line and "good.json" not in line


# ---------------------------------------------------------------------------------------------------------------------
# Whatever JSON holds

SMALL = settings(
    derandomize=True, deadline=None, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
TEXT = st.one_of(
    st.text(st.characters(), max_size=8), st.sampled_from([HOSTILE, r"$\foo$", "step", "reward", "\ud83d"])
)
SCALARS = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT, st.sampled_from([HUGE, -HUGE]))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


def places(value, path=()):
    """Every path in a JSON value."""
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found += places(inner, (*path, key))
    return found


@given(data=st.data())
@settings(SMALL, max_examples=150)
def test_any_value_anywhere_in_a_result_gives_a_page_or_one_error(tmp_path, data):
    result = make_result(tmp_path)
    where = data.draw(st.sampled_from(places(result)))
    result = damage(result, where, data.draw(st.one_of(VALUES, st.just(GONE))))
    (tmp_path / "result.json").write_text(json.dumps(result))
    try:
        read = report.read_result(tmp_path / "result.json")
    except DataError:
        return
    page = report.page_html({}, {"name": read}, lambda part, png: None)
    check_page(page.encode("utf-8").decode("utf-8"))
    report.markdown_table(report.stage_table({"name": read})).encode("utf-8")


LINES = st.one_of(
    st.binary(max_size=20),
    st.dictionaries(TEXT, VALUES, max_size=3).map(lambda row: json.dumps(row).encode()),
    st.builds(lambda step, row: json.dumps(row | {"step": step}).encode(), st.integers(0, 9),
              st.dictionaries(TEXT, VALUES, max_size=2)),
)  # fmt: skip


@given(lines=st.lists(LINES, max_size=6))
@settings(SMALL, max_examples=30)
def test_any_lines_of_a_log_give_a_page_or_one_error(tmp_path, lines):
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_bytes(b"\n".join(lines))
    try:
        run = report.read_run(folder)
    except DataError:
        return
    check_page(report.page_html({"name": run}, {}, lambda part, png: None).encode("utf-8").decode("utf-8"))


def test_the_program_itself_ends_with_status_2_and_one_line(tmp_path):
    import subprocess

    make_run(tmp_path / "run", b'{"step": 1, "rew')
    command = [sys.executable, Path(report.__file__), "--out", tmp_path / "r.html", "--runs", tmp_path / "run"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
