"""toy/: scenes show what puzzles need, warm-up replies are as true and as loose as they claim, models are repeatable.

Replies are read by patterns of our own, deliberately not those of rewards.py.
"""

import collections
import random
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import CPU
from groups import every_family
from PIL import Image, ImageStat
from test_jigsaw import chi_square, files_in, photographs, read

import jigsaw
import model
import rewards
from toy import primer as warm_up
from toy import scenes, tiny_model
from toy.primer import render
from toy.scenes import scene
from toy.tiny_model import make_tiny


def run(*argv):
    warm_up.main([str(part) for part in argv])


# -------- scenes


@pytest.mark.parametrize("strips", [2, 3, 4])
def test_every_scene_darkens_downwards_and_cools_to_the_right(strips):
    for seed in range(200):
        picture = scene(random.Random(seed))
        side = picture.width // strips
        light, warm = [], []
        for i in range(strips):
            row = picture.crop((0, i * side, picture.width, i * side + side))
            column = picture.crop((i * side, 0, i * side + side, picture.height))
            light.append(ImageStat.Stat(row.convert("L")).mean[0])
            red, _, blue = ImageStat.Stat(column).mean
            warm.append(red - blue)
        assert all(upper - lower > 8 for upper, lower in zip(light, light[1:], strict=False)), (seed, light)
        assert all(left - right > 4 for left, right in zip(warm, warm[1:], strict=False)), (seed, warm)


def test_brightness_tint_and_both_slopes_differ_from_scene_to_scene():
    seen = []
    for seed in range(200):
        picture = scene(random.Random(seed), 56)
        gray, (red, _, blue) = picture.convert("L"), ImageStat.Stat(picture).mean
        top, bottom = (ImageStat.Stat(gray.crop((0, y, 56, y + 28))).mean[0] for y in (0, 28))
        left, right = (ImageStat.Stat(picture.crop((x, 0, x + 28, 56))).mean for x in (0, 28))
        seen.append([(top + bottom) / 2, top - bottom, red - blue, left[0] - left[2] - right[0] + right[2]])
    spread = np.std(seen, axis=0)
    assert (spread > [5, 4, 4, 3]).all(), spread


def test_scenes_are_reproducible_distinct_and_of_the_asked_size():
    assert scene(random.Random(7), 84).size == (84, 84)
    pictures = [scene(random.Random(seed)).tobytes() for seed in range(30)]
    assert len(set(pictures)) == 30
    assert scene(random.Random(11)).tobytes() == pictures[11]


def test_train_and_test_scenes_share_no_picture_whatever_the_seeds():
    train = [s for seed in range(4) for s in scenes.list_scenes(50, seed, "train", 0.1)]
    test = [s for seed in range(4) for s in scenes.list_scenes(50, seed, "test", 0.1)]
    assert len(set(train)) == len(set(test)) == 200 and not set(train) & set(test)
    both = scenes.list_scenes(50, 2, "all", 0.1)
    assert len(set(both)) == 50 and len(set(both) & set(test)) == 5 and len(set(both) & set(train)) == 45


# -------- replies and the primer

# Readers of our own, deliberately not those of rewards.py: form -> pattern with the reason (r) and the answer (a)
READERS = {
    "think": r"<think>(?P<r>[^<]+)</think><answer>(?P<a>[^<]+)</answer>",
    "bare": r"(?P<a>[A-H]|[0-9 ]+)",
    "tags": r"<reason>(?P<r>[^<]+)</reason><result>(?P<a>[^<]+)</result>",
    "boxed": r"(?P<r>[^<{}]+) \\boxed\{(?P<a>[^{}]+)\}",
    "json": r'\{"reason": "(?P<r>[^"]+)", "answer": "(?P<a>[^"]+)"\}',
    "line": r"(?P<r>[^<{}\n]+)\nAnswer: (?P<a>[^\n]+)",
}
REASON = r"(\d) looks (\w+), (\d) looks (\w+)\. so (\d) (was|is) (.+) [A-H]\."


def readable_as(reply):
    return [form for form, pattern in READERS.items() if re.fullmatch(pattern, reply)]


@pytest.mark.parametrize("answer, text", [("B", "B"), ([3, 1, 2], "3 1 2")])
@pytest.mark.parametrize("form", list(READERS))
def test_a_rendered_reply_reads_back_in_its_own_form_and_in_no_other(form, answer, text):
    reply = render("1 looks dark, 2 looks light. so 1 was above.", answer, form)
    found = re.fullmatch(READERS[form], reply).groupdict()
    assert found["a"] == text
    assert (
        found.get("r", "1 looks dark, 2 looks light. so 1 was above.") == "1 looks dark, 2 looks light. so 1 was above."
    )
    assert readable_as(reply) == [form]


def test_an_unknown_form_cannot_be_rendered():
    with pytest.raises(ValueError, match="verse"):
        render("why", "A", "verse")


@pytest.fixture(scope="module")
def primer(tmp_path_factory):
    """2,000 primer items on 2x1 pictures, and their folder."""
    out = tmp_path_factory.mktemp("primer")
    run("--scenes", 500, "--count", 2000, "--swap", 0, "--seed", 3, "--out", out)
    return read(out / "primer.jsonl"), out


def read_reply(item):
    """(the letter, the reason's 7 parts or None), wherever they stand in the reply."""
    letter = re.search(r"(?<![A-Za-z])([AB])(?![A-Za-z])", item["chosen"].replace("Answer", "answer"))[1]
    reason = re.search(REASON, item["chosen"])
    return letter, reason and reason.groups()


def test_primer_replies_follow_the_asked_form_in_4_of_10_cases(primer):
    items, _ = primer
    followed = [item["reply_format"] in readable_as(item["chosen"]) for item in items]
    assert 0.36 < np.mean(followed) < 0.44  # sigma 0.011
    asked = collections.Counter(item["reply_format"] for item in items)
    assert abs(asked.pop("think") / 2000 - 2 / 7) < 0.05
    assert chi_square(asked, 5) < 22
    # what is not followed is another form, or readable as none of them
    for item, kept in zip(items, followed, strict=True):
        assert readable_as(item["chosen"]) == ([item["form"]] if item["form"] in READERS else [])
        assert kept == (item["form"] == item["reply_format"])
    assert len({item["form"] for item in items}) == 12


def test_rewards_and_the_primer_agree_on_what_is_well_formed(primer):
    for item in primer[0]:
        rewards.check_gold(item)
        assert rewards.score(item["chosen"], item)["format"] == (item["form"] == item["reply_format"])


def test_primer_puzzles_are_answered_at_chance_and_plain_questions_right(primer):
    items, _ = primer
    right = collections.defaultdict(list)
    for item in items:
        right[item["question"]].append(read_reply(item)[0] == item["answer"])
    assert 0.45 < len(right["pair"]) / 2000 < 0.55
    assert 0.44 < np.mean(right["pair"]) < 0.56  # about 1,000 coins: sigma 0.016
    assert all(right["look"])


def test_primer_verdicts_do_not_depend_on_what_is_seen_and_the_letter_belongs_to_the_verdict(primer):
    items, _ = primer
    verdicts = collections.Counter()
    for item in items:
        letter, reason = read_reply(item)
        if reason is None:
            assert item["form"] == "bare"
            continue
        k, seen, j, _, again, verb, verdict = reason
        assert [int(k), int(j)] == item["pair"] and again == k
        assert verb == ("was" if item["question"] == "pair" else "is")
        assert item["options"]["AB".index(letter)] == verdict
        if item["question"] == "pair":
            verdicts[seen, verdict] += 1
    assert set(verdicts) == {(a, b) for a in ("light", "dark") for b in ("above", "below")}
    assert chi_square(verdicts, 4) < 20


def reply_is_true(item, folder):
    """Is what the reply says about the two pieces true of the saved image? None for a reply without reason."""
    puzzle, reason = Image.open(folder / item["images"][0]), read_reply(item)[1]
    if reason is None:
        return None
    h, w = puzzle.height // item["rows"], puzzle.width // item["cols"]
    measured = []
    for position in item["pair"]:
        row, col = divmod(position - 1, item["cols"])
        piece = puzzle.crop((col * w, row * h, col * w + w, row * h + h))
        red, _, blue = ImageStat.Stat(piece).mean
        measured.append({"light": ImageStat.Stat(piece.convert("L")).mean[0], "warm": red - blue})
    first, second = reason[1], reason[3]
    cue = "light" if first in ("light", "dark") else "warm"
    assert {first, second} == ({"light", "dark"} if cue == "light" else {"warm", "cool"})
    more = measured[0][cue] > measured[1][cue]
    if (
        reason[5] == "is"
        and reason[6] != {"light": "lighter", "dark": "darker", "warm": "warmer", "cool": "cooler"}[first]
    ):
        return False
    return (first == cue) == more


def test_primer_words_are_true_of_the_saved_pictures(primer):
    items, folder = primer
    told = [reply_is_true(item, folder) for item in items[:600]]
    assert told.count(False) == 0 and told.count(True) > 450


def test_a_primer_on_a_row_speaks_of_warm_and_cool(tmp_path):
    run("--scenes", 40, "--count", 160, "--rows", 1, "--cols", 2, "--swap", 0, "--out", tmp_path)
    items = read(tmp_path / "primer.jsonl")
    told = [reply_is_true(item, tmp_path) for item in items]
    assert told.count(False) == 0 and told.count(True) > 100
    assert all({"left", "right"} == set(i["options"]) or {"warmer", "cooler"} == set(i["options"]) for i in items)


def test_primer_questions_share_a_picture_and_every_line_is_a_whole_sft_record(primer):
    items, folder = primer
    assert len({item["id"] for item in items}) == 2000
    for start in range(0, 2000, 4):
        assert len({item["images"][0] for item in items[start : start + 4]}) == 1
    for item in items:
        assert item["source"] == "primer" and "rejected" not in item
        assert item["think"] == (item["reply_format"] == "think")
        assert item["answer"] == "AB"[item["options"].index(item["direction"])]
    assert all((folder / item["images"][0]).is_file() for item in items)


def test_the_question_names_the_pieces_that_the_reply_speaks_of(primer):
    for item in primer[0]:
        k, j = item["pair"]
        words = {"pair": "relative to the piece", "look": "compared with the piece"}[item["question"]]
        question = rf"position {k}( look)?, {words} now at position {j}\?\nA\. "
        assert re.search(question, item["prompt"]), item["prompt"]


def test_follow_0_and_1_mean_never_and_always(tmp_path):
    for follow in (0, 1):
        run("--scenes", 20, "--count", 50, "--follow", follow, "--per-picture", 3, "--out", tmp_path)
        items = read(tmp_path / "primer.jsonl")
        assert len(items) == 50
        assert {item["reply_format"] in readable_as(item["chosen"]) for item in items} == {bool(follow)}


def test_the_forms_of_replies_are_those_that_prompts_ask_for():
    assert list(warm_up.WELL_FORMED) == list(jigsaw.REPLY_FORMAT_SENTENCE)
    assert set(warm_up.MALFORMED).isdisjoint(warm_up.WELL_FORMED)


def test_a_json_reply_quotes_what_json_must_quote():
    record = {"answer": "B", "answer_type": "letter", "think": False, "reply_format": "json"}
    assert rewards.score(render('1 looks "light"\n', "B", "json"), record)["reward"] == 1.5


# -------- tiny models


@every_family
def test_a_tiny_model_has_heads_of_32(models, family):
    policy, _ = models[family]
    layers = policy.family.decoder(policy.hf).layers
    assert {layer.self_attn.head_dim for layer in layers} == {32}
    assert layers[0].self_attn.q_proj.weight.shape == (2 * 32, 64)


@every_family
def test_the_same_seed_makes_the_same_bytes(tiny_dirs, tmp_path, family):
    state = torch.random.get_rng_state()
    make_tiny(tmp_path / "same", family, layers=3)
    assert torch.equal(torch.random.get_rng_state(), state), "nobody else's random numbers are touched"
    make_tiny(tmp_path / "other", family, layers=3, seed=1)
    files = sorted(path.name for path in tiny_dirs[family].iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= set(files)
    for name in files:
        assert (tmp_path / "same" / name).read_bytes() == (tiny_dirs[family] / name).read_bytes(), name
    other_weights = (tmp_path / "other/model.safetensors").read_bytes()
    assert other_weights != (tiny_dirs[family] / "model.safetensors").read_bytes()


def test_a_tiny_model_of_another_size_has_it(tmp_path, capsys):
    tiny_model.main([str(tmp_path / "t"), "--hidden", "96", "--heads", "3", "--layers", "1", "--vocab", "2000"])
    assert "tiny qwen2_5_vl" in capsys.readouterr().out
    policy, encoder = model.load(tmp_path / "t", CPU)
    assert policy.hf.get_input_embeddings().weight.shape == (2000, 96)
    assert len(policy.hf.model.language_model.layers) == 1
    assert encoder.decode([1999]) == "", "a row that no token has"


# -------- command lines


def test_the_same_seed_writes_the_same_bytes_and_another_seed_does_not(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run("--scenes", 6, "--count", 24, "--seed", seed, "--out", tmp_path / name)
    assert files_in(tmp_path / "a") == files_in(tmp_path / "b")
    assert files_in(tmp_path / "a") != files_in(tmp_path / "c")


SCENES = ["--scenes", 2, "--count", 2]
BAD = {
    "nothing to compare": (["--images", "in", "--count", 1], "photo000.png"),
    "neither source": (["--count", 3], "required"),
    "one piece": ([*SCENES, "--rows", 1], "one piece"),
    "another question": ([*SCENES, "--question", "full"], "--question"),
    "a bare answer": ([*SCENES, "--no-think"], "--no-think"),
    "not a probability": ([*SCENES, "--follow", 1.5], "argument --follow: must lie in [0, 1], not 1.5"),
    "nothing on a picture": ([*SCENES, "--per-picture", 0], "--per-picture"),
    "abbreviated flag": ([*SCENES, "--foll", 1], "--foll"),
    "max side of scenes": ([*SCENES, "--max-side", 50], "--max-side"),
}


@pytest.mark.parametrize("argv, cause", BAD.values(), ids=BAD)
def test_bad_input_ends_with_status_2_and_one_line_that_names_the_cause(tmp_path, monkeypatch, capsys, argv, cause):
    monkeypatch.chdir(tmp_path)
    photographs(tmp_path / "in", [(1, 2, 3)], flat=True)
    with pytest.raises(SystemExit) as stopped:
        run(*argv, "--out", "out")
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and cause in error, error
    assert not (tmp_path / "out" / "primer.jsonl").exists()


@pytest.mark.parametrize("argv", [["--family", "mamba"], ["--hidden", "72"], ["--layers", "0"], ["--seed", "-1"]])
def test_a_tiny_model_that_cannot_be_is_refused_in_one_line_before_anything_is_written(tmp_path, capsys, argv):
    with pytest.raises(SystemExit) as stopped:
        tiny_model.main([str(tmp_path / "t"), *argv])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and argv[0] in error
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("script", ["primer", "tiny_model"])
def test_a_script_runs_from_any_folder_and_explains_itself(tmp_path, script):
    path = tiny_model.__file__.replace("tiny_model.py", f"{script}.py")
    done = subprocess.run([sys.executable, path, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert "--seed" in done.stdout


# -------- what the study asks for besides


def items_of(count=400, size=112, rows=3, cols=1, **manner):
    mixed = jigsaw.mix(scene(random.Random(5), size), rows, cols, random.Random(4), swap=0, derange=False)
    return mixed, warm_up.primer_items(mixed, count, random.Random(6), warm_up.Manner(**manner))


def test_levels_are_the_light_of_every_piece_and_once_more_of_the_two_asked_about():
    assert [warm_up.level(value) for value in (0, 65, 78.9, 79, 205, 255)] == [0, 0, 0, 1, 9, 9]
    assert warm_up.levels_of_pair([140.0, 90.0, 180.0], 3, 1) == "1 5, 2 1, 3 8. 3 8, 1 5."
    mixed, items = items_of(follow=1, reply_format="think", levels=True)
    light = warm_up.look(mixed.picture, 3, 1)["light"]
    for item in items:
        found = re.fullmatch(r"<think>(.+?\. .+?\.) (\d) looks (\w+), (\d) looks \w+\. so .*", item["chosen"])
        k, word, j = int(found[2]), found[3], int(found[4])
        assert found[1] == warm_up.levels_of_pair(light, k, j) and (word == "light") == (light[k - 1] > light[j - 1])


def test_a_second_look_is_true_and_the_first_is_wrong_half_of_the_time():
    _, items = items_of(2000, follow=1, reply_format="think", ask=("look",), recheck=0.25)
    twice = [re.findall(r"(\d looks \w+), (\d looks \w+)\.", item["chosen"]) for item in items]
    twice = [looks for looks in twice if len(looks) == 2]
    assert 0.2 < len(twice) / len(items) < 0.3
    assert 0.4 < sum(first == second for first, second in twice) / len(twice) < 0.6
    assert not any("recheck" in item["chosen"] for item in items_of(follow=1, reply_format="think")[1])


def test_a_slip_answers_something_else_than_the_reason_concludes():
    _, items = items_of(1000, follow=1, reply_format="think", ask=("pair", "inverse"), slip=0.3)
    ends = r" (?:so )?([A-H1-9 ]+)\.</think><answer>(.*)</answer>"
    same = [re.search(ends, item["chosen"]).groups() for item in items]
    assert 0.25 < sum(said.strip() != answer for said, answer in same) / len(same) < 0.35


def test_a_ranking_lists_the_pieces_from_light_to_dark_and_the_puzzle_is_answered_at_random():
    mixed, items = items_of(1200, follow=1, reply_format="bare", ask=("rank", "inverse"))
    light = warm_up.look(mixed.picture, 3, 1)["light"]
    ranks = {item["chosen"] for item in items if item["question"] == "rank"}
    assert ranks == {" ".join(map(str, sorted((1, 2, 3), key=lambda place: -light[place - 1])))}
    guesses = collections.Counter(item["chosen"] for item in items if item["question"] == "inverse")
    assert len(guesses) == 6 and min(guesses.values()) > 60
    for item in items[:50]:
        assert rewards.score(" ".join(map(str, item["answer"])), item)["accuracy"] == 1
        if item["question"] == "inverse":  # by the definition: where the piece of each original position lies now
            assert [mixed.order[place - 1] for place in item["answer"]] == [1, 2, 3]


def test_pieces_may_be_pictures_of_their_own_and_prompts_have_other_words(tmp_path):
    words = tmp_path / "words.json"
    words.write_text('{"task": {"separate pieces": "{n} pieces."}, "reply": {"bare": "Just {it}."}}')
    run("--scenes", 2, "--count", 4, "--rows", 3, "--swap", 0, "--separate", "--follow", 1, "--reply-format", "bare",
        "--prompts", words, "--look-text", "Is {pair[0]} like {pair[1]}?", "--ask", "look",
        "--out", tmp_path / "p")  # fmt: skip
    for item in read(tmp_path / "p" / "primer.jsonl"):
        assert len(item["images"]) == 3 and item["prompt"].count("<image>") == 3
        assert "\n3 pieces. Is {} like {}?\n".format(*item["pair"]) in item["prompt"]
        assert item["prompt"].endswith("\nJust the letter.")
    with pytest.raises(SystemExit) as stop:
        run("--scenes", 2, "--count", 4, "--look-text", "Is {pair[0]}?", "--out", tmp_path / "q")
    assert stop.value.code == 2 and not (tmp_path / "q").exists()
