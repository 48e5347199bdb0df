"""report.py: the table, the curves, and a page that shows whatever a model wrote and runs none of it."""

import json
from html.parser import HTMLParser

import pytest
from PIL import Image

import eval as evaluation
import report
import training
from records import write_jsonl

# ---------------------------------------------------------------------------------------------------------------------
# The page


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


HOSTILE = (
    "<script>alert(1)</script></pre><img src=http://evil.example/x onerror='a()'> \" ' & \ud83d \x1b[2J \u202e end"
)


def hostile_result(folder, name, reply=HOSTILE, missing=False):
    Image.new("RGB", (300, 150), (200, 30, 30)).save(folder / "picture.png")
    record = {"id": "<b>id</b>", "source": "s<i>", "_source": "s<i>", "_role": "data", "_file": str(folder / "d.jsonl"),
              "images": [str(folder / ("gone.png" if missing else "picture.png"))], "prompt": "Which? <u>A</u> or B",
              "answer": "B", "answer_type": "letter", "think": True}  # fmt: skip
    rows = [evaluation.score_row(record, [reply], [9], [True], True, folder)]
    result = {"model": "m", "files": {}, "args": {}, **evaluation.summarise(rows), "gf": None, "rows": rows}
    (folder / name).write_text(evaluation.result_text(result))
    return folder / name


def make_run(folder, rows):
    folder.mkdir()
    write_jsonl(folder / "log.jsonl", rows)
    (folder / "args.json").write_text(json.dumps({"lr": 0.002, "note": "<script>"}))


def test_nothing_a_model_wrote_becomes_markup(tmp_path):
    hostile_result(tmp_path, "one.json")
    report.main(["--out", str(tmp_path / "r.html"), "--results", f"<em>x={tmp_path / 'one.json'}"])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "em", "u", "b", "i"}
    sources = [attributes.get("src", "") for tag, attributes in page.tags if tag == "img"]
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert not any(key.startswith("on") for _, attributes in page.tags for key in attributes)
    text = "".join(page.text)
    shown = HOSTILE.replace("\ud83d", "⟨U+D83D⟩").replace("\x1b", "⟨U+001B⟩").replace("\u202e", "⟨U+202E⟩")
    assert shown in text and "Which? <u>A</u> or B" in text and "<em>x" in text


def test_the_page_loads_nothing_and_every_picture_has_words(tmp_path):
    hostile_result(tmp_path, "one.json")
    make_run(tmp_path / "run", [{"step": s, "reward": s / 9, "accuracy": 0.1, "format": 0.3} for s in range(1, 9)])
    report.main(["--out", str(tmp_path / "r.html"), "--runs", str(tmp_path / "run"),
                 "--results", str(tmp_path / "one.json")])  # fmt: skip
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert all(attributes.get("alt") for tag, attributes in page.tags if tag == "img")
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "video", "audio", "form"}
    links = [value for _, attributes in page.tags for key, value in attributes.items() if key in ("href", "src")]
    assert links and all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text


def test_the_same_question_is_shown_with_every_stages_reply(tmp_path):
    paths = [hostile_result(tmp_path, f"{name}.json", f"<think>x</think><answer>{name}</answer>") for name in "ABC"]
    report.main(["--out", str(tmp_path / "r.html"), "--results", *map(str, paths)])
    page = Page((tmp_path / "r.html").read_text(encoding="utf-8"))
    assert [attributes.get("class") for tag, attributes in page.tags].count("puzzle") == 1
    text = "".join(page.text)
    assert "answer read: “A”, not right" in text and "answer read: “B”, right" in text and "reward 1.50" in text
    assert text.index("<answer>A</answer>") < text.index("<answer>B</answer>") < text.index("<answer>C</answer>")


def test_a_long_reply_and_many_questions_keep_the_page_small(tmp_path):
    hostile_result(tmp_path, "one.json")
    result = json.loads((tmp_path / "one.json").read_text())
    result["rows"] = [
        result["rows"][0] | {"id": str(i), "source": str(i % 3), "replies": ["<" * 2_000_000]} for i in range(20)
    ]
    (tmp_path / "one.json").write_text(evaluation.result_text(result))
    report.main(["--out", str(tmp_path / "r.html"), "--results", str(tmp_path / "one.json")])
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(text) < 300_000 and "1998500 more characters" in text
    assert text.count('class="puzzle"') == report.MOST_PUZZLES


def test_a_picture_that_was_deleted_is_said_to_be_gone(tmp_path):
    path = hostile_result(tmp_path, "one.json", missing=True)
    report.main(["--out", str(tmp_path / "r.html"), "--results", str(path)])
    assert "The picture gone.png is no longer there." in (tmp_path / "r.html").read_text(encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# Curves and table


def test_curves_are_drawn_for_the_keys_there_are_and_written_beside_the_page(tmp_path):
    rows = [{"step": s, "reward": 0.5 + s / 50, "accuracy": s / 100, "format": 1.0, "kl": None, "lr": 1e-3, "extra": s,
             "loss": float("nan")} for s in range(1, 81)]  # fmt: skip
    make_run(tmp_path / "run", rows)
    report.main(["--out", str(tmp_path / "out" / "r.html"), "--runs", f"my run={tmp_path / 'run'}"])
    written = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert written == {"r-my-run-reward.png", "r-my-run-lr.png", "r-my-run-extra.png"}  # one panel for the first three
    assert all(Image.open(tmp_path / "out" / name).width > 400 for name in written)
    page = Page((tmp_path / "out" / "r.html").read_text(encoding="utf-8"))
    alts = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(alts) == 3
    # 80 points are shown as means over 3, over 2 at the ends: (0.52 + 0.54) / 2 and (2.08 + 2.10) / 2
    assert "to step 80: reward from 0.53 to 2.09; accuracy" in alts[0]
    assert "lr = 0.002" in "".join(page.text)


def test_a_step_that_was_logged_twice_counts_as_logged_last():
    log = [{"step": 2, "x": 5}, {"step": 1, "x": 3}, {"step": 2, "x": 7}, {"step": 3, "x": True}, {"step": 4}]
    assert report.curve(log, "x") == ("x", [1, 2], [3.0, 7.0])


def test_smoothing_is_a_centred_mean():
    assert report.smooth([1, 2, 6, 0, 4], 3) == pytest.approx([1.5, 3, 8 / 3, 10 / 3, 2])
    assert report.smooth([1, 2, 6], 1) == [1, 2, 6]


def test_the_table_has_a_column_a_stage_a_row_a_source_and_gf_where_there_is_one():
    first = {"sources": {"a": {"accuracy": 0.25, "accuracy_read": 0.5, "format": 0.75}}, "gf": None}
    second = {
        "sources": {"b": {"accuracy": 1.0, "accuracy_read": 1.0, "format": 0.125}},
        "gf": {"gain_id": 50, "gain_ood": 20, "gf": 22.7272},
    }
    assert len(report.stage_table({"one": first})) == 2  # no rows about a GF that nobody measured
    table = report.stage_table({"one": first, "two": second})
    assert table == [
        ["set of questions", "one", "two"],
        ["a", "25.0 / 50.0 / 75.0", "–"],
        ["b", "–", "100.0 / 100.0 / 12.5"],
        ["gain ID", "–", "50.0"],
        ["gain OOD", "–", "20.0"],
        ["GF", "–", "22.7"],
    ]
    second["gf"] = {"gain_id": 50, "gain_ood": -20, "gf": None}
    assert report.stage_table({"one": first, "two": second})[-2:] == [["gain OOD", "–", "-20.0"], ["GF", "–", "–"]]
    row = report.markdown_table(table).splitlines()[3]
    assert row == "| b                | –                  | 100.0 / 100.0 / 12.5 |"


# ---------------------------------------------------------------------------------------------------------------------
# Command lines


def test_eval_makes_the_same_page_and_table(tmp_path, capsys):
    hostile_result(tmp_path, "one.json")
    make_run(tmp_path / "run", [{"step": s, "reward": s / 9, "kl": 0.1} for s in range(1, 9)])
    shared = ["--runs", str(tmp_path / "run"), "--results", f"first={tmp_path / 'one.json'}"]
    printed = []
    for program, flag in ((report, "--out"), (evaluation, "--report")):
        folder = tmp_path / program.__name__
        folder.mkdir()
        program.main([flag, str(folder / "r.html"), "--table", str(folder / "table.md"), *shared])
        printed.append(capsys.readouterr().out.replace(str(folder), ""))
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("report", "eval")]
    assert files[0] == files[1] and set(files[0]) == {"r.html", "table.md", "r-run-reward.png", "r-run-kl.png"}
    assert printed[0] == printed[1]


def says(capsys, *arguments):
    """Run the program on bad input: the one line it prints; it must end with status 2."""
    with pytest.raises(SystemExit) as ended:
        training.run(lambda: report.main([str(argument) for argument in arguments]))
    assert ended.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_flags_that_do_not_fit_together_are_refused(capsys):
    assert "--out" in says(capsys, "--runs", "runs/grpo")
    assert "--runs or --results" in says(capsys, "--out", "r.html")
    assert "called the same" in says(capsys, "--out", "r.html", "--runs", "a/run", "b/run")
    assert "--resul" in says(capsys, "--out", "r.html", "--resul", "one.json")  # no abbreviations


def test_bad_files_are_refused_by_name_and_no_page_is_written(capsys, tmp_path):
    (tmp_path / "list.json").write_text("[]")
    rowless = {"model": "m", "overall": {}, "sources": {}, "gf": None, "rows": [{"id": "x"}]}
    (tmp_path / "rowless.json").write_text(json.dumps(rowless))
    make_run(tmp_path / "stepless", [{"reward": 1.0}])
    make_run(tmp_path / "settings", [{"step": 1, "reward": 1.0}])
    (tmp_path / "settings/args.json").write_text("{")
    out = ["--out", tmp_path / "r.html"]
    assert "no log.jsonl" in says(capsys, *out, "--runs", tmp_path)
    assert "stepless/log.jsonl" in says(capsys, *out, "--runs", tmp_path / "stepless")
    assert "settings/args.json" in says(capsys, *out, "--runs", tmp_path / "settings")
    assert "nothing.json" in says(capsys, *out, "--results", tmp_path / "nothing.json")
    assert "list.json: is not a result" in says(capsys, *out, "--results", tmp_path / "list.json")
    assert "rowless.json: is not a result" in says(capsys, *out, "--results", tmp_path / "rowless.json")
    assert not (tmp_path / "r.html").exists()


def test_a_result_from_before_cut_was_called_truncated_is_still_read(tmp_path):
    path = hostile_result(tmp_path, "one.json")
    old = json.loads(path.read_text())
    for numbers in (old["overall"], *old["sources"].values()):
        numbers["cut"] = numbers.pop("truncated")
    path.write_text(json.dumps(old))
    report.main(["--out", str(tmp_path / "r.html"), "--results", str(path)])
    assert report.read_result(path)["overall"]["replies"] == 1


# ---------------------------------------------------------------------------------------------------------------------
# Several runs side by side, and one run along its steps


def alts_of(folder, *arguments):
    """The words under which a page shows its pictures."""
    report.main(["--out", str(folder / "r.html"), *map(str, arguments)])
    page = Page((folder / "r.html").read_text(encoding="utf-8"))
    return [attributes["alt"] for tag, attributes in page.tags if tag == "img"]


def test_stability_is_shown_side_by_side_for_runs_of_one_kind(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_FIGURES", 0)  # of each run by itself
    for name, slope in (("a", 1), ("b", 3)):
        rows = [{"step": s, "reward": 0.5, "format": slope * s / 9, "loss": slope * s} for s in (1, 2)]
        make_run(tmp_path / f"grpo-{name}", [row | {"grad_norm": 2.0} for row in rows])
        rows = [{"step": s, "loss": 7.0, "chosen_reward": slope * s, "rejected_reward": -slope * s} for s in (1, 2)]
        make_run(tmp_path / f"dpo-{name}", rows)
    alts = alts_of(tmp_path, "--runs", *sorted(tmp_path.glob("*-?")))
    shared = [alt for alt in alts if " runs, to step" in alt]
    assert "Format, all runs, to step 2: grpo-a from 0.111 to 0.222; grpo-b from 0.333 to 0.667." in alts
    # The loss of DPO is no policy loss.
    assert "Policy loss, GRPO runs, to step 2: grpo-a from 1 to 2; grpo-b from 3 to 6." in alts
    assert "Gradient norm, GRPO runs, to step 2: grpo-a from 2 to 2; grpo-b from 2 to 2." in alts
    assert "Reward of chosen replies, DPO runs, to step 2: dpo-a from 1 to 2; dpo-b from 3 to 6." in alts
    assert any(alt.startswith("Reward of rejected replies") and "dpo-b from -3 to -6" in alt for alt in alts)
    assert len(shared) == 5
    assert (tmp_path / "r-all-loss.png").exists()


def point(step, gain_id, gain_ood, factor, form):
    metrics = {"accuracy": 0.5, "accuracy_read": 0.5, "format": form}
    gains = {"gain_id": gain_id, "gain_ood": gain_ood, "gf": factor, "ood_gains": {"s:json": gain_ood}}
    return {"step": step, "model": "m", "overall": {}, "sources": {"s": metrics}, "gf": gains}


def write_curve(path, points):
    shown = {key: points[-1][key] for key in ("model", "overall", "sources", "gf")}
    path.write_text(json.dumps(shown | {"rows": [], "curve": points}))
    return path


def test_a_result_that_follows_a_run_is_drawn_by_step(tmp_path):
    points = [point(0, 0, 0, 0.0, 0.25), point(10, 40, -5, None, 0.5), point(30, 60, 20, 23.0, 0.75)]
    one = write_curve(tmp_path / "one.json", points)
    alts = alts_of(tmp_path, "--results", one)
    # Where GF is not defined its curve has no point.
    assert alts[0] == "Gains and GF, to step 30: gf from 0 to 23; gain_id from 0 to 60; gain_ood from 0 to 20."
    assert [alt.split(",")[0] for alt in alts[1:]] == ["Format by source", "Accuracy by source"]
    assert alts[1].endswith("s from 0.25 to 0.75.") and (tmp_path / "r-one-steps-gains.png").exists()
    last = points[2] | {"sources": {name: points[2]["sources"]["s"] for name in ("s", "s:json")}}
    two = write_curve(tmp_path / "two.json", [points[0], last])
    alts = alts_of(tmp_path, "--results", one, two)
    titles = [alt.split(",")[0] for alt in alts]
    assert titles[:3] == ["Generalization factor (GF)", "Gain ID", "Gain OOD"]
    assert titles.count("Gain OOD by source") == 1
    assert "one from 0 to 23; two from 0 to 23." in alts[0]


def test_of_many_sources_the_first_are_drawn_and_the_others_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "MOST_SOURCES", 2)
    metrics = point(0, 0, 0, 0, 0.5)["sources"]["s"]
    points = [point(step, 1, 1, 1, 0.5) | {"sources": dict.fromkeys("abcde", metrics)} for step in (0, 10)]
    alts = alts_of(tmp_path, "--results", write_curve(tmp_path / "one.json", points))
    assert alts[1].endswith("a from 0.5 to 0.5; b from 0.5 to 0.5.")
    assert "3 more sources are left out." in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_a_curve_without_gains_shows_metrics_only(tmp_path):
    points = [point(step, 1, 1, 1, 0.5) | {"gf": None} for step in (0, 10)]
    alts = alts_of(tmp_path, "--results", write_curve(tmp_path / "one.json", points))
    assert [alt.split(",")[0] for alt in alts] == ["Format by source", "Accuracy by source"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"step": -1}, '"curve" must be null or a list of objects with a step'),
        ({"step": "1"}, '"curve" must be null or a list of objects with a step'),
        ({"sources": [1]}, '"sources" must be dict'),
        ({"sources": {"s": {"accuracy": 1}}}, "source 's' must have the numbers"),
        ({"gf": {"gf": 1}}, '"gf" must be null or have the numbers'),
    ],
)
def test_a_damaged_curve_is_refused(tmp_path, capsys, change, words):
    path = write_curve(tmp_path / "one.json", [point(0, 0, 0, 0, 0.5) | change, point(1, 0, 0, 0, 0.5)])
    assert words in says(capsys, "--out", tmp_path / "r.html", "--results", path)
    for damaged in ("x", 3, {"step": 1}, [1], []):
        result = json.loads(write_curve(path, [point(1, 0, 0, 0, 0.5)]).read_text())
        path.write_text(json.dumps(result | {"curve": damaged}))
        if damaged:
            assert '"curve" must be' in says(capsys, "--out", tmp_path / "r.html", "--results", path)
