"""endpoint.py against a real server on this machine, which fails, stalls and lies; and what is kept and counted."""

import argparse
import base64
import email.utils
import io
import json
import subprocess
import sys
import threading
import time

import pytest
from commands import ROOT, environment
from PIL import Image
from server import KEY, completion

import endpoint
from endpoint import Answer, Endpoint
from files import DataError, StageError


def ask(text, **more):
    return {"messages": [{"role": "user", "content": text}], **more}


def echo(request):
    return completion(f"<{request['messages'][0]['content']}>")


def in_turn(*said):
    """Answers one after the other, the last one for ever."""
    left = list(said)
    return lambda request: left.pop(0) if len(left) > 1 else left[0]


# ---------------------------------------------------------------------------------------------------------------------
# A server that does as it should


def test_answers_come_in_the_order_of_the_questions_and_not_more_at_a_time_than_allowed(serve):
    three = threading.Barrier(3)

    def late(request):
        three.wait(20)  # for two others: fewer at a time would hang
        time.sleep(0.02 if request["messages"][0]["content"] == "0" else 0)
        return echo(request)

    server, asked = serve(late, concurrency=3)
    answers = asked.ask([ask(str(number)) for number in range(12)])
    assert [answer.texts for answer in answers] == [[f"<{number}>"] for number in range(12)]
    assert server.most == 3 and len(server.asked) == 12
    assert (asked.prompt_tokens, asked.completion_tokens, asked.answers) == (84, 24, 12)


def test_a_request_is_model_messages_and_parameters_and_null_leaves_one_out(serve):
    server, asked = serve(echo, parameters={"temperature": 0, "top_p": None, "thinking": {"budget": 3}})
    asked.ask([ask("a", seed=7, top_p=0.5)])
    assert server.asked == [
        {"model": "m", **ask("a"), "seed": 7, "temperature": 0, "thinking": {"budget": 3}},
    ]
    assert server.keys == [f"Bearer {KEY}"]


def test_only_a_reply_that_stopped_by_itself_is_finished():
    body = completion("a", "b", "c", "d")
    for choice, reason in zip(body["choices"], ("stop", "length", None, "content_filter"), strict=True):
        choice["finish_reason"] = reason
    assert endpoint.read_answer(json.dumps(body).encode()) == Answer(list("abcd"), [True, False, False, False], 7, 2)


def test_tokens_become_money_at_the_prices_of_a_million(serve):
    _, asked = serve(lambda request: completion("x", usage=(2_000_000, 500_000)), price_in=0.3, price_out=4.0)
    asked.ask([ask("a"), ask("b")])
    assert asked.cost() == pytest.approx(2 * (2 * 0.3 + 0.5 * 4.0))
    assert asked.cost(1_000_000, 0) == pytest.approx(0.3)


# ---------------------------------------------------------------------------------------------------------------------
# One that fails


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, "oh"), (503, {}, {"error": {"message": "busy"}}), (429, {"retry-after": "0.01"}, {}), (408, {}, ""),
        "close", "no JSON", b"\xff\xfe", {}, {"choices": []}, {"choices": None}, {"choices": {"a": 1}}, "[]", "null",
        {"choices": [{}]}, {"choices": [{"message": None}]}, {"choices": [{"message": {"content": 5}}]},
        {"choices": [{"message": {"content": ["a"]}}]}, "[" * 100_000, {"choices": "ab"},
        (200, {"content-encoding": "gzip"}, "no gzip"),
    ],
    ids=str,
)  # fmt: skip
def test_what_may_pass_is_asked_again_and_the_answer_is_the_later_one(serve, failure):
    server, asked = serve(in_turn(failure, failure, completion("fine")))
    assert asked.ask([ask("a")])[0].texts == ["fine"]
    assert len(server.asked) == 3


@pytest.mark.parametrize("failure, told", [
    ((500, {}, "oh no"), "500"), ("close", "Connection error"), ("{", "no chat completion"),
    ({"choices": []}, "no texts"),
])  # fmt: skip
def test_tries_are_counted_and_the_last_one_ends_the_run_in_one_line(serve, failure, told):
    server, asked = serve(lambda request: failure, retries=2)
    with pytest.raises(StageError, match=rf"m: .*{told}.*tried 3 times.*--resume") as caught:
        asked.ask([ask("a")])
    assert len(server.asked) == 3 and "\n" not in str(caught.value)


def test_no_server_at_all_is_one_line_too():
    asked = Endpoint("http://127.0.0.1:9/v1", "m", retries=1, pause=0.001)
    with pytest.raises(StageError, match="Connection error.*tried 2 times"):
        asked.ask([ask("a")])


def test_a_server_that_stalls_is_left_after_the_timeout(serve):
    server, asked = serve(in_turn("stall", completion("late")), timeout=0.1)
    began = time.monotonic()
    assert asked.ask([ask("a")])[0].texts == ["late"]
    assert 0.1 < time.monotonic() - began < 15  # the server would take 20
    _, asked = serve(lambda request: "stall", timeout=0.05, retries=0)
    with pytest.raises(StageError, match="no answer within 0.05 s|timed out"):
        asked.ask([ask("a")])


def test_a_server_that_drips_is_left_after_the_timeout(serve, monkeypatch):
    """No wait between two bytes is long, so that only a limit over all of them helps."""
    server, asked = serve(echo, timeout=0.2, retries=0)

    def drip(self, said):
        self.send_response(200)
        self.send_header("content-length", "200")
        self.end_headers()
        while not server.over.wait(0.02):
            self.wfile.write(b" ")

    monkeypatch.setattr(server.http.RequestHandlerClass, "send", drip)
    with pytest.raises(StageError, match="no answer within 0.2 s"):
        asked.ask([ask("a")])


def test_an_answer_without_end_is_not_read_to_its_end(serve, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST_BODY", 10_000)
    server, asked = serve(in_turn(completion("x" * 20_000), completion("y" * 5_000)))
    assert asked.ask([ask("a")])[0].texts == ["y" * 5_000]
    assert len(server.asked) == 2


def test_a_server_is_not_asked_again_before_the_time_it_named(serve):
    moments = []

    def busy(request):
        moments.append(time.monotonic())
        return (429, {"retry-after": "0.2"}, {}) if len(moments) == 1 else completion("x")

    _, asked = serve(busy)
    asked.ask([ask("a")])
    assert 0.2 <= moments[1] - moments[0]


def test_retry_after_is_seconds_or_a_date_and_bounded():
    def named(text):
        return endpoint.retry_after({"retry-after": text})

    assert [named("3"), named("0.5"), named("-3"), named("soon"), named(""), named("nan"), named("inf")] == [
        3.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip
    assert named("1e9") == endpoint.LONGEST_WAIT
    assert 15 < named(email.utils.formatdate(time.time() + 20)) <= 20
    assert endpoint.retry_after({}) == 0.0


def test_pauses_double_up_to_a_bound_no_two_are_alike_and_long_ones_are_told(serve, monkeypatch, capsys):
    pauses = []

    async def sleep(seconds):
        pauses.append(seconds)

    capsys.readouterr()
    monkeypatch.setattr(endpoint.asyncio, "sleep", sleep)
    _, asked = serve(lambda request: (500, {}, ""), pause=1.0, retries=8)
    with pytest.raises(StageError):
        asked.ask([ask("a")])
    bounds = [1, 2, 4, 8, 16, 30, 30, 30]
    assert len(pauses) == 8 and all(bound / 2 <= p <= bound for p, bound in zip(pauses, bounds, strict=True)), pauses
    assert len(set(pauses)) == 8
    assert capsys.readouterr().err.count("asked again in") == sum(pause >= 5 for pause in pauses) >= 4


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_name_ends_the_run_at_once_and_no_one_sees_the_key(serve, status):
    server, asked = serve(lambda request: (status, {}, {"error": {"message": f"no: {KEY}\nat all"}}))
    with pytest.raises(DataError) as caught:
        asked.ask([ask(str(number)) for number in range(30)])
    assert KEY not in str(caught.value) and "***" in str(caught.value) and "\n" not in str(caught.value)
    assert ("OPENAI_API_KEY" in str(caught.value)) == (status != 404)
    assert len(server.asked) <= 16  # those under way; the others were not begun


def test_a_question_that_the_server_refuses_has_no_texts_and_the_others_do(serve):
    def answer(request):
        bad = request["messages"][0]["content"] == "b"
        return (400, {}, {"error": {"message": "too long"}}) if bad else echo(request)

    server, asked = serve(answer)
    found = asked.ask([ask("a"), ask("b"), ask("c")])
    assert [answer.texts for answer in found] == [["<a>"], [], ["<c>"]]
    assert "too long" in found[1].refused and found[0].refused is None
    assert len(server.asked) == 3


def test_a_check_finds_what_is_wrong_before_anything_is_asked(serve, tmp_path):
    server, asked = serve(lambda request: (400, {}, {"error": {"message": "no temperature"}}), cache=tmp_path / "c")
    with pytest.raises(DataError, match="refuses every request of m: .*no temperature"):
        asked.check()
    _, asked = serve(echo, cache=tmp_path / "c")
    asked.check()
    assert asked.answers == 0 and not list((tmp_path / "c").rglob("*.json"))


# ---------------------------------------------------------------------------------------------------------------------
# What is kept


def test_nothing_is_paid_for_twice(serve, tmp_path):
    server, first = serve(echo, cache=tmp_path / "c")
    assert first.ask([ask("a"), ask("b"), ask("a")]) == first.ask([ask("a"), ask("b"), ask("a")])
    assert len(server.asked) == 2  # equal questions of one call are one, and the second call asks nothing
    other, second = serve(lambda request: completion("new"), cache=tmp_path / "c")
    assert [answer.texts for answer in second.ask([ask("a"), ask("c")])] == [["<a>"], ["new"]]
    assert len(other.asked) == 1
    assert (second.answers, second.prompt_tokens) == (2, 14)  # what was used, paid for now or before


@pytest.mark.parametrize("change", [{"model": "n"}, {"parameters": {"temperature": 1}}])
def test_another_model_or_parameter_is_another_question(serve, tmp_path, change):
    serve(echo, cache=tmp_path)[1].ask([ask("a")])
    server, asked = serve(lambda request: completion("new"), cache=tmp_path, **change)
    assert asked.ask([ask("a")])[0].texts == ["new"]
    server, asked = serve(lambda request: completion("new"), cache=tmp_path)
    assert asked.ask([ask("a", seed=1)])[0].texts == ["new"] and asked.ask([ask("a")])[0].texts == ["<a>"]


def test_a_damaged_answer_is_asked_for_again(serve, tmp_path):
    server, asked = serve(echo, cache=tmp_path)
    asked.ask([ask("a")])
    (path,) = tmp_path.rglob("*.json")
    whole = path.read_text()
    for damaged in ("", whole[:40], whole.replace("<a>", "<b>"), "{}", "[1]", "null", '{"answer": {"x": 1}}'):
        path.write_text(damaged)
        before = len(server.asked)
        assert asked.ask([ask("a")])[0].texts == ["<a>"]
        assert len(server.asked) == before + 1
    assert path.read_text() == whole and not list(tmp_path.rglob("*.partial"))


def test_what_was_answered_before_the_end_is_kept(serve, tmp_path):
    def mostly(request):
        content = request["messages"][0]["content"]
        return (500, {}, "") if content == "9" and broken else echo(request)

    broken = True
    server, asked = serve(mostly, cache=tmp_path, retries=0, concurrency=1)
    with pytest.raises(StageError):
        asked.ask([ask(str(number)) for number in range(20)])
    before, broken = len(server.asked), False
    assert len(asked.ask([ask(str(number)) for number in range(20)])) == 20
    # Nine were answered; the tenth failed, and the next may have been under way.
    assert before in (10, 11) and len(server.asked) - before == 11


KILLED = """
import sys
from endpoint import Endpoint
asked = Endpoint(sys.argv[1], "m", cache=sys.argv[2], concurrency=1)
asked.ask([{"messages": [{"role": "user", "content": str(number)}]} for number in range(6)])
"""


def test_a_job_that_is_killed_finds_its_answers_again(serve, tmp_path):
    stop = threading.Event()

    def third_hangs(request):
        if len(server.asked) == 4 and not stop.is_set():
            stop.set()
            return "stall"
        return echo(request)

    server, asked = serve(third_hangs, cache=tmp_path)
    command = [sys.executable, "-c", KILLED, server.url, str(tmp_path)]
    process = subprocess.Popen(command, env=environment() | {"NO_PROXY": "127.0.0.1"}, cwd=ROOT)
    assert stop.wait(60)
    process.kill()
    process.wait()
    before = len(server.asked)
    answers = asked.ask([ask(str(number)) for number in range(6)])
    assert [answer.texts for answer in answers] == [[f"<{number}>"] for number in range(6)]
    assert (before, len(server.asked) - before) == (4, 3)


def test_files_of_the_cache_hold_no_key_and_no_picture(serve, tmp_path):
    _, asked = serve(lambda request: completion("a cat"), cache=tmp_path)
    url = "data:image/png;base64," + "A" * 1000
    asked.ask([{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]}])
    (path,) = tmp_path.rglob("*.json")
    assert KEY not in path.read_text() and len(path.read_text()) < 1000


def test_half_a_surrogate_pair_and_a_missing_count_do_no_harm(serve, tmp_path):
    body = completion("x\ud800y", None)
    body["usage"] = {"prompt_tokens": 10**400, "completion_tokens": -3}
    _, asked = serve(lambda request: body, cache=tmp_path)
    answer = asked.ask([ask("a")])[0]
    assert answer == asked.ask([ask("a")])[0] == Answer(["x?y", ""], [True, True], 0, 0)


def test_a_cache_that_cannot_be_made_is_a_mistake_of_the_user(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="answers cannot be kept here"):
        Endpoint("http://127.0.0.1:9/v1", "m", cache=tmp_path / "file")


# ---------------------------------------------------------------------------------------------------------------------
# Records as messages, and flags


def picture_of(part):
    head, data = part["image_url"]["url"].split(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_stand_first_or_where_their_markers_are_and_are_shrunk(tmp_path):
    for name, size in (("a", (40, 20)), ("b", (8, 8))):
        Image.new("RGB", size, "red" if name == "a" else "blue").save(tmp_path / f"{name}.png")
    paths = [str(tmp_path / "a.png"), str(tmp_path / "b.png")]
    first = endpoint.message_of({"prompt": "which?", "images": paths}, None, 10**6)["content"]
    assert [part["type"] for part in first] == ["image_url", "image_url", "text"]
    assert picture_of(first[0]).size == (40, 20) and picture_of(first[1]).getpixel((0, 0)) == (0, 0, 255)
    marked = {"prompt": "is <image> like <image>?", "images": paths}
    parts = endpoint.message_of(marked, 200, 10**6)["content"]
    assert [part.get("text") for part in parts] == ["is ", None, " like ", None, "?"]
    assert picture_of(parts[1]).size == (20, 10) and picture_of(parts[3]).size == (8, 8)
    assert endpoint.message_of({"prompt": "1 + 1?", "images": []}, 200, 10**6) == {"role": "user", "content": "1 + 1?"}


@pytest.mark.parametrize("url", [
    "localhost:8000", "ftp://a/v1", "http://", "http://a:b/v1", "http://a:99999/v1", "http://me:sk-1@a/v1", "http://[/v1",
    "http://a/v1?key=sk-1",
])  # fmt: skip
def test_an_address_that_is_none_or_holds_a_key_is_refused_without_being_repeated(url):
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        endpoint.server_url(url)
    assert "sk-1" not in str(caught.value)
    assert endpoint.server_url("https://api.example.com/v1") and endpoint.server_url("http://127.0.0.1:8000/v1")


def test_a_key_in_place_of_a_variables_name_is_refused_without_being_repeated():
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        endpoint.variable_name(KEY)
    assert KEY not in str(caught.value)
    assert endpoint.variable_name("GEMINI_API_KEY")


NO_OPTIONS = ["", "5", "[]", "{", '{"model": "n"}', '{"messages": []}', '{"stream": true}', "[" * 10**5]


@pytest.mark.parametrize("text", NO_OPTIONS)
def test_options_are_a_json_object_that_leaves_model_and_messages_alone(text):
    with pytest.raises(argparse.ArgumentTypeError):
        endpoint.json_object(text)
    assert endpoint.json_object('{"a": null}') == {"a": None}


def test_a_key_that_is_not_set_is_sent_as_a_word(serve, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    server, asked = serve(echo)
    asked.ask([ask("a")])
    assert server.keys == ["Bearer none"]


@pytest.mark.parametrize("key", ["sk-1\n", "sk-é", "sk\x1b1"])
def test_a_key_that_no_header_takes_is_a_mistake_of_the_user_and_is_not_shown(serve, monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    server, asked = serve(echo)
    with pytest.raises(DataError, match="OPENAI_API_KEY: holds a character") as caught:
        asked.ask([ask("a")])
    assert "sk" not in str(caught.value) and server.asked == []


def test_what_a_server_says_is_shown_without_what_a_terminal_would_obey(serve):
    _, asked = serve(lambda request: (404, {}, {"error": {"message": "\x1b[31mno\x07\nmore " + "x" * 5000}}))
    with pytest.raises(DataError) as caught:
        asked.ask([ask("a")])
    assert str(caught.value).isprintable() and "[31mno" in str(caught.value) and len(str(caught.value)) < 500
