"""Journal: the finished items of a file that is being made, so that a job killed at any moment goes on where it was.

    FILE.partial/args.json          settings and digests of everything that the items depend on
    FILE.partial/NAME.RANK.jsonl    one item a line, appended and synced batch by batch by process RANK
    FILE                            appears whole, at the end; then the folder goes

eval.py and distill.py keep replies here. An item is known by its index alone, and follows from its index and the
settings alone. So a job may be resumed by any number of processes and ends with the same bytes.
"""

import hashlib
import json
import os
import re
import shutil
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import files
from endpoint import MAY_CHANGE
from files import DataError
from processes import Terminated, World
from run_directory import check_inputs, input_digests

# Flags on which no item depends: where, how fast, and how the job was continued.
NO_MATTER = (
    "out",
    "batch",
    "vllm_memory",
    "timeout",
    "max_image_pixels",
    "resume",
    "overwrite",
    "report",
    "runs",
    "results",
    "pairs",
    "keep_pairs",
    "table",
    *MAY_CHANGE,
)

OURS = re.compile(r"args\.json(\.partial)?|lock|result|[a-z]+\.\d+\.jsonl")  # names of files in the folder


def add_journal_flags(add) -> None:
    """--resume and --overwrite of a stage that keeps a journal. add: a parser's add_argument."""
    add("--resume", action="store_true",
        help="go on from the replies in FILE.partial that a killed job left; a finished FILE stays")  # fmt: skip
    add("--overwrite", action="store_true", help="drop the replies that a killed job left, and start anew")


@dataclass
class Journal:
    """The items of the file `out`. Open it before anything expensive; `with journal:` around what may be stopped."""

    out: Path
    folder: Path
    world: World
    fingerprint: str = ""  # of settings and inputs: equal means that the finished file would be equal
    before: dict[str, set[int]] = field(default_factory=dict)  # name -> indices that an earlier start has finished
    lock: object = None  # an open file, as long as this process lives

    @classmethod
    def open(
        cls, settings: dict, world: World, *, inputs: dict[str, list], models: dict[str, str | None],
        pictures: list[str], later: tuple[str, ...] = (),
    ) -> "Journal":  # fmt: skip
        """Check settings["out"], and begin or resume its journal. A collective: all processes must call it.

        settings: all flags of the stage, by name. inputs: {flag's name: files that are read}; models: {flag's name:
        directory or hub id}; pictures: paths. later: flags that are used only when all items are there: a resumed job
        may change them.
        DataError if the file cannot be written, if there is a journal and neither "resume" nor "overwrite" is set, or
        if a resumed job has other settings or inputs.
        """
        out = Path(settings["out"])
        journal = cls(out, out.parent / f"{out.name}.partial", world)
        digests = {str(path): files.digest(path) for paths in inputs.values() for path in paths}
        for path in models.values():
            digests |= input_digests({"model": path})
        check_inputs(world.gather(digests))

        # One process looks and all hear: otherwise one would go on where another has stopped.
        problem = None
        if world.main:
            try:
                journal._check_output(inputs, models, pictures)
                free = [str(path) for name in later for path in inputs.get(name, [])]
                free += [path for name in later for path in input_digests({"model": models.get(name)})]
                journal._prepare(settings, digests | digest_pictures(pictures), later, free)
            except DataError as error:
                problem = str(error)
            except OSError as error:
                problem = f"--out {out}: its folder cannot be written ({error})"
        problem, journal.fingerprint = world.gather((problem, journal.fingerprint))[0]
        if problem:
            journal.unlock()
            raise DataError(problem)
        if journal.folder.exists():
            names = {path.name.split(".")[0] for path in journal.folder.glob("*.jsonl")}
            journal.before = {name: set(journal.items(name)) for name in names}
        # Nobody may add items while another still looks which there are.
        world.barrier()
        return journal

    def _check_output(self, inputs, models, pictures):
        """On rank 0: DataError unless FILE and its folder can be written and are nothing that is read."""
        read = {f"--{name.replace('_', '-')}": paths for name, paths in inputs.items()}
        for name, path in models.items():
            if path is not None and os.path.isdir(path):
                read[f"--{name.replace('_', '-')}"] = [entry.path for entry in os.scandir(path)]
        files.check_output(self.out, "--out", read | {"the picture of a record": pictures})
        if self.folder.is_symlink():
            raise DataError(f"{self.folder}: is a link; the replies of {self.out} are kept there until it is whole")
        files.check_output(self.folder, "--out", directory=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        strangers = [name for name in os.listdir(self.folder) if not OURS.fullmatch(name)]
        if strangers:
            raise DataError(f"{self.folder}: holds {strangers[0]!r}, which is not ours; move the folder away")
        self.lock = files.lock(self.folder / "lock", str(self.out))

    def _prepare(self, settings, digests, later, free):
        """On rank 0: compare with the journal that is there, or begin one. free: files that may change, of `later`."""
        everything = {key: value for key, value in sorted(settings.items()) if key not in NO_MATTER}
        identity = plain({"settings": everything, "inputs": digests})
        self.fingerprint = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        for group, names in (("settings", later), ("inputs", free)):
            for name in names:
                identity[group].pop(name, None)

        args_file = self.folder / "args.json"
        used = any(path.stat().st_size for path in self.folder.glob("*.jsonl"))
        if used and settings["resume"] and not settings["overwrite"]:
            problem = difference(files.read_json(args_file), identity)
            if problem:
                raise DataError(
                    f"{self.folder}: {problem}; --resume keeps settings and inputs, --overwrite starts anew"
                )
            for path in self.folder.glob("*.jsonl"):
                drop_half_line(path)
        elif used and not settings["overwrite"]:
            raise DataError(
                f"{self.folder}: holds the replies of a job that was stopped; add --resume to go on with it or "
                "--overwrite to start anew"
            )
        else:
            for path in self.folder.glob("*.jsonl"):
                path.unlink()
            files.write_text(args_file, json.dumps(identity, indent=1) + "\n")

    def unlock(self) -> None:
        if self.lock is not None:
            self.lock.close()

    def drop(self) -> None:
        """Remove the folder. One process calls it."""
        # Items first: without their settings they would be of no use, and in the way.
        for path in self.folder.glob("*.jsonl"):
            path.unlink()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -----------------------------------------------------------------------------------------------------------------
    # Items

    def missing(self, name: str, count: int) -> list[int]:
        """Which of `count` items no earlier start has finished, for all processes together."""
        done = self.before.get(name, set())
        return [index for index in range(count) if index not in done]

    def mine(self, name: str, count: int) -> list[int]:
        """This process's share of what is missing, dealt like cards: long items are shared by all."""
        return self.missing(name, count)[self.world.rank :: self.world.size]

    def add(self, name: str, items: dict[int, dict]) -> None:
        """Append {index: item} and wait until they are on the disk."""
        lines = []
        for index, item in items.items():
            lines.append(json.dumps({"index": index, "item": item, "crc32": checksum(index, item)}) + "\n")
        path = self.folder / f"{name}.{self.world.rank}.jsonl"
        try:
            with open(path, "a", encoding="utf-8") as file:
                file.write("".join(lines))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DataError(
                f"{path}: cannot be written ({error}); what is there already is kept for --resume"
            ) from error

    def items(self, name: str) -> dict[int, dict]:
        """{index: item} of all processes so far. A line that is half or damaged counts as missing."""
        found = {}
        for path in sorted(self.folder.glob(f"{name}.*.jsonl")):
            for line in path.read_bytes().split(b"\n"):
                try:
                    entry = json.loads(line)
                    if entry["crc32"] == checksum(entry["index"], entry["item"]):
                        found[entry["index"]] = entry["item"]
                except (ValueError, KeyError, TypeError, RecursionError):
                    continue
        return found

    def finish(self, text: str) -> None:
        """Give the file its name, whole, and drop the items. One process calls it, when all have read them."""
        result = self.folder / "result"
        try:
            with open(result, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            result.replace(self.out)
            files.sync(self.out.parent)
        except OSError as error:
            raise DataError(f"{self.out}: cannot be written ({error}); --resume tries again") from error
        self.drop()

    # -----------------------------------------------------------------------------------------------------------------
    # Stopping

    def __enter__(self):
        return self

    def __exit__(self, kind, stop, trace):
        self.unlock()
        empty = not any(self.folder.glob("*.jsonl"))
        if empty and self.world.main:
            self.drop()
        # The status of a signal stays what training.run makes of it; only its words are ours.
        if kind is not None and issubclass(kind, KeyboardInterrupt | Terminated) and not empty:
            raise kind(f"stopped; the replies so far are in {self.folder}, --resume goes on from there") from None


# ---------------------------------------------------------------------------------------------------------------------
# What items depend on


def plain(value: dict) -> dict:
    """As JSON gives it back: tuples are lists, paths are text."""
    return json.loads(json.dumps(value, default=str))


def checksum(index: int, item: dict) -> int:
    return zlib.crc32(json.dumps([index, item]).encode())


def difference(before: dict, now: dict) -> str:
    """A sentence about the first thing in which two jobs differ, "" if they do not."""
    if not isinstance(before, dict) or before.keys() != now.keys():
        return "its args.json is damaged"
    for name, value in now["settings"].items():
        was = before["settings"].get(name)
        if was != value:
            return f"--{name.replace('_', '-')} was {was}, now {value}"
    path = changed(before["inputs"], now["inputs"])
    return f"{path} has changed since" if path else ""


def changed(before: dict, now: dict) -> str | None:
    """The first key whose value differs, or None."""
    return next((key for key in {**before, **now} if before.get(key) != now.get(key)), None)


def drop_half_line(path: Path) -> None:
    """Remove what a killed process wrote of its last line, so that the next line begins at a line's beginning."""
    data = path.read_bytes()
    whole = data.rfind(b"\n") + 1
    if whole < len(data):
        os.truncate(path, whole)


def digest_pictures(paths: list[str]) -> dict[str, str]:
    """{path: sha256}, each picture once."""
    paths = sorted(set(paths))
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(paths, pool.map(files.digest, paths), strict=True))
