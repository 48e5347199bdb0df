"""files.py: only ordinary files are read, all of a file or nothing is written, what must stay is not replaced."""

import os
import socket

import pytest

import files
from files import DataError


@pytest.fixture
def strange(tmp_path):
    """{what it is: path} of things that are no ordinary file."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "socket"))
    yield {"pipe": tmp_path / "pipe", "directory": tmp_path / "folder", "socket": tmp_path / "socket",
           "device": "/dev/zero"}  # fmt: skip
    listener.close()


@pytest.mark.parametrize("kind", ["pipe", "directory", "socket", "device"])
def test_what_is_no_ordinary_file_is_neither_read_nor_waited_for(strange, kind):
    for read in (files.read_bytes, files.read_text, files.read_json, files.digest):
        with pytest.raises(DataError, match=str(strange[kind])) as caught:
            read(strange[kind])
        assert "\n" not in str(caught.value)
    assert files.kind_of(strange[kind]) == kind


@pytest.mark.parametrize("name", ["missing", "missing/deeper", "nul\0", "n" * 300])
def test_a_file_that_cannot_be_opened_is_named(tmp_path, name):
    with pytest.raises(DataError, match="cannot be read"):
        files.read_bytes(tmp_path / name)


def test_a_file_larger_than_the_bound_is_not_read(tmp_path):
    with open(tmp_path / "large", "wb") as file:
        file.truncate(2**40)  # a hole: no disk is needed for it
    with pytest.raises(DataError, match="1099511627776 bytes are too many"):
        files.read_bytes(tmp_path / "large")


@pytest.mark.parametrize(
    "content, said",
    [
        (b"\xff{}", "is no UTF-8 text (invalid start byte at byte 0)"),
        (b"", "not JSON"),
        (b"[" * 10**6, "not JSON"),
        (b"[]", "a JSON object is needed, this is list"),
    ],
)
def test_what_is_no_json_object_is_named(tmp_path, content, said):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError) as caught:
        files.read_json_object(tmp_path / "a.json")
    assert str(caught.value).startswith(f"{tmp_path / 'a.json'}: {said}")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    seen, sync = [], os.fsync

    def watch(descriptor):
        seen.append(sorted(path.name for path in tmp_path.iterdir()))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    files.write_text(tmp_path / "a", "text")
    assert seen == [["a.partial"], ["a"]]  # the bytes, then the name
    assert (tmp_path / "a").read_text() == "text"


def test_an_output_is_an_ordinary_file_or_nothing_yet_and_no_input(strange, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text("precious")
    (tmp_path / "link").symlink_to(data)
    for path in (tmp_path / "new.json", tmp_path / "new/folder/new.json"):
        files.check_output(path, "--out", {"--data": [data]})
    refused = {
        strange["pipe"]: "is a pipe; a file is needed",
        strange["directory"]: "is a directory; a file is needed",
        strange["device"]: "is a device; a file is needed",
        tmp_path / "link": "is a link; name the file it leads to",
        tmp_path / "folder/../data.jsonl": "is what --data reads; choose another place",
        data / "below": f"{data} is no directory",
        tmp_path / "nul\0": "cannot be written",
        tmp_path / ("n" * 300): "cannot be written",
    }
    for path, said in refused.items():
        with pytest.raises(DataError) as caught:
            files.check_output(path, "--out", {"--data": [data]})
        assert str(caught.value).startswith(f"--out {path}: {said}")


def test_a_directory_may_be_reached_by_a_link_and_must_be_one(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    files.check_output(tmp_path / "link", "--out", directory=True)
    for path in (tmp_path / "file", "/dev/null"):
        with pytest.raises(DataError, match="a directory is needed"):
            files.check_output(path, "--out", directory=True)
