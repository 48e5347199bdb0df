"""A teacher and a judge behind vLLM's own OpenAI-compatible server, with a tiny model. `make test-vllm` runs it."""

import json
import os
import random
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
from commands import ROOT, call, environment, parrot
from conftest import CPU

import endpoint
import judge
import model
from records import read_records, write_jsonl
from toy.scenes import scene

SAID = "<think>1 looks dark.</think><answer>B</answer>"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with records.jsonl, three of its five with a picture, and the model "parrot", which says SAID."""
    folder, records = tmp_path_factory.mktemp("server"), []
    for number in range(5):
        images = [f"{number}.png"] if number < 3 else []
        if images:
            scene(random.Random(number)).resize((112 + 40 * number, 84)).save(folder / images[0])
        record = {"id": f"q{number}", "images": images, "prompt": f"Question {number}: A or B?", "answer": "B"}
        records.append(record | {"answer_type": "letter", "think": True, "source": "words"})
    write_jsonl(folder / "records.jsonl", records)
    parrot(folder / "parrot", SAID, read_records(folder / "records.jsonl"), updates=20)
    return folder


@pytest.fixture(scope="module")
def url(place):
    """The address of a server of the parrot, which is called "big" there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ["NO_PROXY"] = "127.0.0.1"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", place / "parrot", "--port", port,
               "--host", "127.0.0.1", "--served-model-name", "big", "--dtype", "float32", "--enforce-eager",
               "--max-model-len", 1024, "--block-size", 32, "--generation-config", "vllm",
               "--limit-mm-per-prompt", json.dumps({"image": 1, "video": 0})]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    with open(place / "server.log", "w") as log:
        words = list(map(str, command))
        server = subprocess.Popen(words, cwd=ROOT, env=environment() | settings, stdout=log, stderr=log)
    deadline = time.monotonic() + 300
    while True:
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
            break
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, (place / "server.log").read_text()[-3000:]
            time.sleep(0.5)
    yield f"http://127.0.0.1:{port}/v1"
    server.terminate()
    server.wait(60)


def test_the_server_sees_the_tokens_of_the_trainer_and_says_what_the_model_says(place, url):
    records = read_records(place / "records.jsonl")
    server = endpoint.Endpoint(url, "big", parameters={"temperature": 0, "max_completion_tokens": 60}, retries=0)
    answers = server.ask([{"messages": [endpoint.message_of(record, None, 10**6)]} for record in records])
    assert [(answer.texts, answer.finished) for answer in answers] == [([SAID], [True])] * 5
    _, encoder = model.load(str(place / "parrot"), CPU)
    assert [answer.prompt_tokens for answer in answers] == [encoder.length(record) for record in records]
    assert len({answer.prompt_tokens for answer in answers}) > 2  # pictures of three sizes, and none
    server.parameters["max_completion_tokens"] = 2
    assert server.ask([{"messages": [endpoint.message_of(records[0], None, 10**6)]}])[0].finished == [False]


def test_the_same_seed_gives_the_same_samples_and_another_seed_others(place, url):
    record = read_records(place / "records.jsonl")[4]
    server = endpoint.Endpoint(url, "big", parameters={"temperature": 2.0, "max_completion_tokens": 20}, retries=0)
    one, same, other = (server.sample([[endpoint.message_of(record, None, 1)]], 4, [seed])[0] for seed in (5, 5, 9))
    assert len(one.texts) == 4 and len(set(one.texts)) > 1
    assert one.texts == same.texts != other.texts
    (refused,) = server.ask([{"messages": [endpoint.message_of(record, None, 1)], "n": 0}])
    assert refused.texts == [] and refused.refused


def test_a_question_that_is_too_long_is_refused_and_the_others_are_answered(url):
    server = endpoint.Endpoint(url, "big", parameters={"max_completion_tokens": 8}, retries=0)
    long, short = ({"messages": [{"role": "user", "content": text}]} for text in ("again " * 3000, "Who?"))
    refused, answered = server.ask([long, short])
    assert refused.texts == [] and refused.refused and len(answered.texts) == 1
    wrong = endpoint.Endpoint(url, "small", retries=0)
    with pytest.raises(endpoint.DataError, match="small"):
        wrong.check()


def test_pairs_are_distilled_from_a_teacher_there_and_a_judge_that_says_neither_yes_nor_no_is_no_yes(place, url):
    given = {"policy": "big", "policy_url": url, "reject_from": "chosen", "data": place / "records.jsonl", "samples": 2,
             "temperature": 0.3, "max_new_tokens": 60}  # fmt: skip
    call("distill", **given, out=place / "pairs.jsonl")
    pairs = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    assert [pair["id"] for pair in pairs] == [f"q{number}" for number in range(5)]
    assert {pair["chosen"] for pair in pairs} == {SAID}
    told = json.loads((place / "pairs.account.json").read_text())["policy"]
    assert told["answers"] == 5 and told["completion_tokens"] > 5 * 2 * 10

    server = endpoint.Endpoint(url, "big", parameters={"max_completion_tokens": 60})
    asked = judge.Judge(judge.RemoteModel(server), "big")
    record = {"prompt": "A or B?", "answer_type": "letter", "answer": "B"}
    assert judge.consistent(asked, [(record, "1 looks dark", "B")]) == [None]
    assert asked.account()["unread"] == 1
