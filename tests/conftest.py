"""What several test files share: a tiny model of every supported family, and a few records with their pictures.

All of it is made once and must not be changed; a test that needs other weights takes `scratch_model`.
"""

import random
import re
import signal

import flash
import pytest
import torch
from server import KEY, Server

import jigsaw
import model
import training
from endpoint import Endpoint
from records import read_records, write_jsonl
from toy.scenes import scene
from toy.tiny_model import make_tiny

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl")

# A shell lets what it starts with & ignore Ctrl-C, and so would every command that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CPU = training.World(rank=0, size=1, device=torch.device("cpu"))  # fp32, also on a machine with a GPU


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """What a failed test shows of a progress bar is its last state, not all of them."""
    report = yield
    report.sections = [(title, re.sub(r"[^\n]*\r", "", text)) for title, text in report.sections]
    return report


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """The models are so small that a second thread costs more than it helps."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def signals_as_before():
    """A stage's end ignores SIGTERM; tests that run one in this process must not."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def serve(monkeypatch):
    """serve(answer, …) -> (server, its endpoint with pauses of milliseconds)."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    servers = []

    def start(answer, model="m", **options):
        servers.append(Server(answer))
        return servers[-1], Endpoint(servers[-1].url, model, **{"pause": 0.001, "timeout": 5.0} | options)

    yield start
    for server in servers:
        server.close()


@pytest.fixture(scope="session")
def tiny_dirs(tmp_path_factory):
    """{family: model directory} of three-layer models: in Qwen3-VL the second of two would read no picture anew."""
    folder = tmp_path_factory.mktemp("tiny")
    for family in FAMILIES:
        make_tiny(folder / family, family, layers=3)
    return {family: folder / family for family in FAMILIES}


def load_rough(folder):
    """(policy, encoder) with noise on every weight: as made, biases are 0, norms 1, and little depends on positions."""
    policy, encoder = model.load(folder, CPU)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator), alpha=0.05)
    return policy, encoder


@pytest.fixture(scope="session")
def models(tiny_dirs):
    """{family: (policy, encoder)}, rough weights, fp32."""
    return {family: load_rough(folder) for family, folder in tiny_dirs.items()}


@pytest.fixture
def scratch_model(tiny_dirs):
    """A (policy, encoder) of Qwen2.5-VL that the test may change."""
    return load_rough(tiny_dirs["qwen2_5_vl"])


@pytest.fixture(scope="session")
def records(tmp_path_factory):
    """Four validated records: a puzzle, text only, three pictures between words, a puzzle on a wide picture."""
    folder, rng = tmp_path_factory.mktemp("records"), random.Random(3)
    sizes = {"square.png": (112, 112), "wide.png": (140, 56), "tall.png": (60, 100)}
    pictures = {name: scene(rng, 160).resize(size) for name, size in sizes.items()}
    rows = []
    for name, grid in (("square.png", (2, 1)), ("wide.png", (1, 2))):
        pictures[name], puzzle = jigsaw.make_puzzle(pictures[name], *grid, "pair", rng)
        rows.append({"id": name.split(".")[0], "images": [name], **puzzle})
    common = {"answer": "B", "answer_type": "letter", "think": False, "source": "words"}
    rows.insert(1, {"id": "text", "images": [], "prompt": "Which letter comes after A?", **common})
    words = "First <image> then <image> and last <image> which is the lightest?"
    rows.insert(2, {"id": "three", "images": ["tall.png", "square.png", "wide.png"], "prompt": words, **common})
    for name, picture in pictures.items():
        picture.save(folder / name)
    write_jsonl(folder / "records.jsonl", rows)
    return read_records(folder / "records.jsonl")


@pytest.fixture
def flash_kernels():
    """FlashAttention's kernels, which need CUDA, stood in for by the formula."""
    with flash.stand_in():
        yield
