"""Endpoint: questions to a model behind an OpenAI-compatible server, many at a time, and nothing is paid for twice.

    endpoint = Endpoint("http://localhost:8000/v1", "Qwen/Qwen2.5-VL-72B-Instruct", cache="runs/answers")
    endpoint.ask([{"messages": [{"role": "user", "content": "Is 7 prime?"}]}])      -> [Answer(…)]

A server may be away for a while, be busy, hang, or answer with something else than it should. All of that is tried
again a bounded number of times, with growing pauses, or as late as the server asks for (Retry-After). What remains ends
the run with one line (StageError); so does at once what no repetition mends: a wrong key, address or name (DataError).
A single question that the server refuses, because it is too long or breaks a rule there, is an Answer without texts.

Answers are kept on disk, one file each, named by the SHA-256 of model, messages and parameters. A job that is killed
finds them again; two jobs may share the folder. The key of an account comes from the environment and goes nowhere else.

judge.py asks for verdicts here, distill.py for the replies of a teacher. The client is the official `openai` package;
it is imported when the first question is asked.
"""

import argparse
import asyncio
import base64
import email.utils
import hashlib
import io
import json
import math
import os
import random
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from files import DataError, StageError, sync

LARGEST_BODY = 2**24  # bytes of a server's answer that are read
LONGEST_PAUSE = 30.0  # seconds between two tries, of our own choice
LONGEST_WAIT = 300.0  # seconds between two tries, if the server asks for it
TOLD_FROM = 5.0  # seconds of a pause that somebody who looks on should know of
TRY_AGAIN = {408, 409, 425, 429}  # HTTP statuses of a server that may answer later; so are all from 500 on
REFUSED = {400, 413, 422}  # statuses that speak of this one request


# ---------------------------------------------------------------------------------------------------------------------
# Answers


class Answer(NamedTuple):
    """What a server said to one question."""

    texts: list[str]  # one a choice
    finished: list[bool]  # whether each came to its end, and not to the limit of tokens
    prompt_tokens: int = 0  # as the server counts them; 0 if it does not say
    completion_tokens: int = 0
    refused: str | None = None  # why there are no texts


class BadAnswerError(Exception):
    """The server answered, and not with a completion."""


def read_answer(body: bytes) -> Answer:
    """The answer in the body of an HTTP response. BadAnswerError for everything that is no completion with texts."""
    try:
        found = json.loads(body)
        choices = found["choices"]
        texts = [choice["message"]["content"] for choice in choices]
        reasons = [choice.get("finish_reason") for choice in choices]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadAnswerError(f"the answer is no chat completion ({type(error).__name__})") from error
    # A model that thought to its limit may have no content at all.
    texts = ["" if text is None else text for text in texts]
    if not texts or not isinstance(choices, list) or not all(isinstance(text, str) for text in texts):
        raise BadAnswerError("the answer has no texts")
    usage = found.get("usage")
    counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
    counts = [count if type(count) is int and 0 <= count < 2**40 else 0 for count in counts]
    return Answer([writable(text) for text in texts], [reason == "stop" for reason in reasons], *counts)


def joined(one: Answer, other: Answer, most: int) -> Answer:
    """Two answers to one question as one, of at most so many choices."""
    texts, finished = (one.texts + other.texts)[:most], (one.finished + other.finished)[:most]
    prompt, completion = one.prompt_tokens + other.prompt_tokens, one.completion_tokens + other.completion_tokens
    return Answer(texts, finished, prompt, completion, other.refused)


def writable(text: str) -> str:
    """Half a surrogate pair is legal JSON, and no file takes it."""
    return text.encode("utf-8", "replace").decode("utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# The cache


class Cache:
    """Answers on disk, FOLDER/ab/abcd….json. A file appears whole or not at all; a damaged one counts as missing."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self.folder}: answers cannot be kept here ({error})") from error

    def path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.json"

    def get(self, key: str) -> Answer | None:
        try:
            entry = json.loads(self.path(key).read_bytes())
            answer = Answer(**entry["answer"])
            return answer if entry["sha256"] == digest(entry["answer"]) else None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def put(self, key: str, request: dict, answer: Answer) -> None:
        """Keep an answer; `request` stands beside it for people who look."""
        path, fields = self.path(key), answer._asdict()
        entry = {"request": without_pictures(request), "answer": fields, "sha256": digest(fields)}
        path.parent.mkdir(exist_ok=True)
        # A name of this thread's own: several processes may have asked the same.
        partial = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.partial")
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(entry, indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)


def digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def without_pictures(value: Any) -> Any:
    """A request as it is shown: of every data URL its beginning."""
    if isinstance(value, dict):
        return {name: without_pictures(part) for name, part in value.items()}
    if isinstance(value, list):
        return [without_pictures(part) for part in value]
    return f"{value[:40]}…" if isinstance(value, str) and value.startswith("data:") else value


# ---------------------------------------------------------------------------------------------------------------------
# Asking


class Endpoint:
    """One model behind one server.

    url: up to and with /v1. key_variable: the environment variable that holds the key; a server of one's own needs
    none. cache: folder of answers; None: none is kept. parameters: of every request ("temperature", …), None leaves
    one out. concurrency: requests under way at a time. retries: further tries of a request. timeout: seconds that a try
    may take, to the last byte. pause: seconds before the second try; it doubles, up to LONGEST_PAUSE.
    price_in, price_out: of a million tokens, in any currency.
    """

    def __init__(
        self, url: str, model: str, *, key_variable: str = "OPENAI_API_KEY", cache: str | Path | None = None,
        parameters: dict | None = None, concurrency: int = 8, retries: int = 8, timeout: float = 120.0,
        pause: float = 0.5, price_in: float = 0.0, price_out: float = 0.0,
    ):  # fmt: skip
        self.url, self.model, self.key_variable = url, model, key_variable
        self.cache = Cache(cache) if cache is not None else None
        self.parameters = parameters or {}
        self.concurrency, self.retries, self.timeout, self.pause = concurrency, retries, timeout, pause
        self.price_in, self.price_out = price_in, price_out
        self.jitter = random.Random()  # of the pauses; no result depends on it
        # Of all answers that were used, new ones and kept ones: a resumed job counts the same.
        self.answers = self.prompt_tokens = self.completion_tokens = 0

    def ask(self, requests: list[dict]) -> list[Answer]:
        """One answer to each request, {"messages": […], parameters of its own}. Equal requests are asked once.

        DataError and StageError as the head of this file says; what was answered until then is kept.
        """
        whole = [self.complete(request) for request in requests]
        keys = [digest(request) for request in whole]
        found = {key: self.cache.get(key) for key in dict.fromkeys(keys)} if self.cache else {}
        waiting = {key: request for key, request in zip(keys, whole, strict=True) if found.get(key) is None}
        if waiting:
            found |= asyncio.run(self.ask_server(waiting))
        answers = [found[key] for key in keys]
        for key in dict.fromkeys(keys):
            self.answers += 1
            self.prompt_tokens += found[key].prompt_tokens
            self.completion_tokens += found[key].completion_tokens
        return answers

    def check(self) -> None:
        """Ask something trivial, so that a wrong key, address, name or parameter is found before anything expensive."""
        request = self.complete({"messages": [{"role": "user", "content": "Say yes."}]})
        (answer,) = asyncio.run(self.ask_server({"": request}, keep=False)).values()
        if answer.refused:
            raise DataError(f"{self.url}: refuses every request of {self.model}: {answer.refused}")

    def cost(self, prompt_tokens: int | None = None, completion_tokens: int | None = None) -> float:
        """What so many tokens cost, by default those of all answers that were used."""
        prompt = self.prompt_tokens if prompt_tokens is None else prompt_tokens
        completion = self.completion_tokens if completion_tokens is None else completion_tokens
        return (prompt * self.price_in + completion * self.price_out) / 1e6

    def sample(self, messages: list[list[dict]], n: int, seeds: list[int]) -> list[Answer]:
        """n choices to each list of messages, as one Answer; reply g comes from about seed + g.

        A server that gives fewer at a time than it is asked for is asked again for the rest.
        """
        answers = [Answer([], []) for _ in messages]
        waiting = list(range(len(messages)))
        while waiting:
            requests = []
            for place in waiting:
                count = len(answers[place].texts)
                # The seed names the sample too: a server that takes no seed must still be asked anew.
                own = {"seed": seeds[place] + count, "_sample": seeds[place] + count}
                own["n"] = n - count if n - count > 1 else None  # not every server knows it
                requests.append({"messages": messages[place]} | own)
            for place, more in zip(waiting, self.ask(requests), strict=True):
                answers[place] = joined(answers[place], more, n)
            waiting = [place for place in waiting if not answers[place].refused and len(answers[place].texts) < n]
        return answers

    def complete(self, request: dict) -> dict:
        """A request with the model's name and all parameters, as its answer is kept under.

        "_sample" is part of the question and is not sent.
        """
        given = {"model": self.model} | request | self.parameters
        return {name: value for name, value in given.items() if value is not None}

    async def ask_server(self, waiting: dict[str, dict], keep: bool = True) -> dict[str, Answer]:
        """{key: whole request} -> {key: answer}. Every answer is kept as soon as it is there."""
        openai, gate, found = import_openai(), asyncio.Semaphore(self.concurrency), {}
        key = os.environ.get(self.key_variable) or "none"  # the client refuses to have none
        if not (key.isascii() and key.isprintable()):
            raise DataError(f"{self.key_variable}: holds a character that no key has, perhaps the end of a line")
        client = openai.AsyncOpenAI(base_url=self.url, api_key=key, max_retries=0, timeout=self.timeout)

        async def answer_one(name):
            async with gate:
                found[name] = await self.answer(client, waiting[name])
            if keep and self.cache and not found[name].refused:
                self.cache.put(name, waiting[name], found[name])

        async with client:
            tasks = [asyncio.create_task(answer_one(name)) for name in waiting]
            try:
                for task in asyncio.as_completed(tasks):
                    await task
            finally:
                # One that failed for good, or a signal, ends the others; nobody waits out their pauses.
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        return found

    async def answer(self, client, request: dict) -> Answer:
        """The answer to one request, after as many tries as it takes and as there may be."""
        openai = import_openai()
        for number in range(self.retries + 1):
            asked_for = 0.0
            try:
                return await self.attempt(client, request)
            except openai.APIStatusError as error:
                status = error.status_code
                problem = self.told(f"status {status}: {error.message}")
                if status in REFUSED:
                    return Answer([], [], refused=problem)
                if status not in TRY_AGAIN and status < 500:
                    hint = f"; the key is read from {self.key_variable}" if status in (401, 403) else ""
                    raise DataError(f"{self.url}, {self.model}: {problem}{hint}") from error
                asked_for = retry_after(error.response.headers)
            except TimeoutError:
                problem = f"no answer within {self.timeout:g} s"
            except (openai.APIConnectionError, BadAnswerError) as error:
                problem = self.told(" ".join(filter(None, (str(error), str(error.__cause__ or "")))))
            if number < self.retries:
                # Between half a pause and a whole one: many that failed together do not come back together.
                pause = min(LONGEST_PAUSE, self.pause * 2**number) * self.jitter.uniform(0.5, 1)
                pause = max(pause, asked_for)
                if pause >= TOLD_FROM:
                    print(f"\n{self.url}: {problem}; asked again in {pause:.0f} s", file=sys.stderr, flush=True)
                await asyncio.sleep(pause)
        raise StageError(
            f"{self.url}, {self.model}: {problem} (tried {self.retries + 1} times); what was answered is kept, "
            "go on with --resume when the server is back"
        )

    async def attempt(self, client, request: dict) -> Answer:
        """One try. TimeoutError, an error of the client, or BadAnswerError."""
        ours = ("model", "messages", "_sample")
        parameters = {name: value for name, value in request.items() if name not in ours}
        # Over all of it: a server that sends a byte now and then would never time out between two of them.
        async with asyncio.timeout(self.timeout):
            # As it came: the client would fill in what is missing in an answer.
            create = client.chat.completions.with_streaming_response.create
            async with create(model=self.model, messages=request["messages"], extra_body=parameters) as response:
                body = bytearray()
                parts = response.iter_bytes()
                while True:
                    try:
                        part = await anext(parts, None)
                    except Exception as error:  # of the client's transport, another package in each version of it
                        raise BadAnswerError(f"the connection broke off ({type(error).__name__})") from error
                    if part is None:
                        break
                    body += part
                    if len(body) > LARGEST_BODY:
                        raise BadAnswerError(f"the answer is longer than {LARGEST_BODY} bytes")
        return read_answer(bytes(body))

    def told(self, text: str) -> str:
        """A server's message as it may be shown: one line, not too long, without our key, should it repeat that."""
        key = os.environ.get(self.key_variable)
        text = "".join(letter if letter.isprintable() else "?" for letter in " ".join(str(text).split()))
        return (text.replace(key, "***") if key else text)[:300]


def retry_after(headers) -> float:
    """Seconds that a server asks to wait: as a number or as a date; 0 if it does not say so readably."""
    text = headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(text).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), LONGEST_WAIT) if math.isfinite(seconds) else 0.0


def import_openai():
    try:
        import openai
    except ImportError as error:
        raise DataError(f"an endpoint needs the package openai (requirements.txt): {error}") from error
    return openai


# ---------------------------------------------------------------------------------------------------------------------
# A record as a message


def message_of(record: dict, max_pixels: int | None, max_image_pixels: int) -> dict:
    """The user's turn of a record: pictures first, or where its <image> markers stand."""
    from lazy_puzzles import pictures_of  # who asks for verdicts only needs no Pillow

    shown, text = pictures_of(record), record["prompt"]
    count = len(shown)
    pieces = text.split("<image>") if "<image>" in text else [""] * count + [text]
    content = []
    for place, piece in enumerate(pieces):
        if piece:
            content.append({"type": "text", "text": piece})
        if place < count:
            url = picture_url(shown[place], max_pixels, max_image_pixels)
            content.append({"type": "image_url", "image_url": {"url": url}})
    return {"role": "user", "content": content if count else text}


def picture_url(shown, max_pixels: int | None, max_image_pixels: int) -> str:
    """A picture (lazy_puzzles.Shown) as a data URL (PNG, base64), shrunk to at most max_pixels width x height; None: as
    it is."""
    from lazy_puzzles import open_puzzle

    picture = open_puzzle(shown, max_image_pixels)[shown.number]
    width, height = picture.size
    if max_pixels is not None and width * height > max_pixels:
        scale = math.sqrt(max_pixels / (width * height))
        # Rounded down, so that the product stays below.
        picture = picture.resize((max(1, math.floor(width * scale)), max(1, math.floor(height * scale))))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------------------
# Flags

# What a resumed run may be given anew: no answer depends on it. A model is known by its name, wherever its server is.
MAY_CHANGE = ("concurrency", "retries", "endpoint_timeout")
MAY_CHANGE += ("judge_url", "judge_key", "judge_cache", "judge_price_in", "judge_price_out")
MAY_CHANGE += ("policy_url", "policy_key", "policy_cache", "policy_price_in", "policy_price_out")


def server_url(text: str) -> str:
    """A flag's type: http(s)://HOST…, without a name or key in it."""
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and parts.hostname and (parts.port or 1) and not parts.query
    except ValueError:
        sound = False
    if not sound:
        raise argparse.ArgumentTypeError("must be like http://localhost:8000/v1")
    if "@" in parts.netloc:
        raise argparse.ArgumentTypeError("must not hold a name or a key: that comes from the environment")
    return text


def variable_name(text: str) -> str:
    """A flag's type: the name of an environment variable. Not shown if it is none: it may be a key."""
    if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]{0,63}", text):
        raise argparse.ArgumentTypeError("must be the name of an environment variable, not the key itself")
    return text


def json_object(text: str) -> dict:
    """A flag's type: a JSON object."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict) or {"model", "messages", "stream"} & found.keys():
        raise argparse.ArgumentTypeError('must be a JSON object of parameters, like {"reasoning_effort": "low"}')
    return found


def add_role_flags(add, role: str, who: str) -> None:
    """Where one model behind a server is asked. add: a parser's add_argument; who: the model in words."""
    from training import real

    add(f"--{role}-url", type=server_url, metavar="URL", help=f"OpenAI-compatible server of {who}, up to and with /v1")
    add(f"--{role}-key", type=variable_name, default="OPENAI_API_KEY", metavar="VARIABLE",
        help="environment variable that holds the server's key; not set: none is needed")  # fmt: skip
    add(f"--{role}-cache", metavar="DIR",
        help="folder where its answers are kept, so that none is paid for twice (default: OUT.answers)")  # fmt: skip
    add(f"--{role}-price-in", type=real("[0, 1e6]"), default=0.0, metavar="X",
        help="price of a million prompt tokens, for the account; 0: not counted")  # fmt: skip
    add(f"--{role}-price-out", type=real("[0, 1e6]"), default=0.0, metavar="X",
        help="price of a million tokens of answers; 0: not counted")  # fmt: skip
    add(f"--{role}-options", type=json_object, default={}, metavar="JSON",
        help='further parameters of every request, or other values of ours: {"reasoning_effort": "low", "temperature": '
        "null}; null leaves one out")  # fmt: skip


def check_role_flags(parser, args, role: str) -> None:
    """An error for what only a server can use, where there is none."""
    for name in ("cache", "options"):
        if getattr(args, f"{role}_{name}") and not getattr(args, f"{role}_url"):
            parser.error(f"--{role}-{name} needs --{role}-url")


def add_endpoint_flags(add) -> None:
    """How servers are asked, whoever stands behind them."""
    from training import integer, real

    add("--concurrency", type=integer("[1, 1000]"), default=16, help="requests to a server at a time, of each process")
    add("--retries", type=integer("[0, 100]"), default=8,
        help="further tries of a request that failed, with growing pauses; then the run ends")  # fmt: skip
    add("--endpoint-timeout", type=real("[0.01, 1e5]"), default=300.0, metavar="S",
        help="seconds that an answer may take, before it is asked for again")  # fmt: skip


def connect(args, role: str, model: str, parameters: dict) -> Endpoint:
    """The Endpoint that a role's flags describe. parameters: our own, of which --ROLE-options may change any."""
    names = ("url", "key", "cache", "price_in", "price_out", "options")
    given = {name: getattr(args, f"{role}_{name}") for name in names}
    return Endpoint(
        given["url"], model, key_variable=given["key"], cache=given["cache"] or f"{args.out}.answers",
        parameters=parameters | given["options"], concurrency=args.concurrency, retries=args.retries,
        timeout=args.endpoint_timeout, price_in=given["price_in"], price_out=given["price_out"],
    )  # fmt: skip
