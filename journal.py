"""Journal: the finished items of a file that is being made, so that a job killed at any moment goes on where it was.

    FILE.partial/args.json          settings and digests of everything that the items depend on
    FILE.partial/NAME.RANK.jsonl    one item a line, appended and synced batch by batch by process RANK
    FILE                            appears whole, at the end; then the folder goes

eval.py and distill.py keep replies here. An item is known by its index alone, and follows from its index and the
settings alone. So a job may be resumed by any number of processes and ends with the same bytes.
"""

import fcntl
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
from files import DataError
from training import World

# Flags on which no item depends: where, how fast, and how the job was continued.
NO_MATTER = ("out", "batch", "vllm_memory", "resume", "overwrite", "report", "runs", "results", "table")

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
        cls, settings: dict, world: World, *, inputs: dict[str, list[str]], models: dict[str, str | None],
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
        everything = {key: value for key, value in sorted(settings.items()) if key not in NO_MATTER}
        read = {flag: {str(path): files.digest(path) for path in paths} for flag, paths in inputs.items()}
        for rank, theirs in enumerate(world.gather(read)):
            if theirs != read:
                raise DataError(f"rank {rank} reads other files than rank {world.rank}: {changed(read, theirs)}")

        # One process looks and all hear: otherwise one would go on where another has stopped.
        problem = None
        if world.main:
            try:
                journal._prepare(settings, everything, read, models, pictures, later)
            except DataError as error:
                problem = str(error)
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

    def _prepare(self, settings, everything, read, models, pictures, later):
        """On rank 0: check the output, take the lock, and make or trim the folder."""
        taken = [path for paths in read.values() for path in paths]
        for path in models.values():
            if path is not None and os.path.isdir(path):
                taken += [entry.path for entry in os.scandir(path)]
        try:
            files.check_output(self.out, [*taken, *pictures])
        except DataError as error:
            raise DataError(f"--out {error}") from error

        weights = {flag: {path: digest_model(path)} for flag, path in models.items() if path is not None}
        identity = {"settings": everything, "inputs": read, "models": weights, "pictures": digest_pictures(pictures)}
        self.fingerprint = hashlib.sha256(json.dumps(plain(identity)).encode()).hexdigest()
        for group in ("settings", "inputs"):
            identity[group] = {key: value for key, value in identity[group].items() if key not in later}
        identity = plain(identity)

        self._lock()
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

    def _lock(self):
        """Make the folder, if it is not there, and keep other jobs out of it until this process ends."""
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            raise DataError(f"{self.folder}: must be free: the replies of {self.out} are kept there until it is whole")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            strangers = [name for name in os.listdir(self.folder) if not OURS.fullmatch(name)]
            if strangers:
                raise DataError(f"{self.folder}: holds {strangers[0]!r}, which is not ours; move the folder away")
            self.lock = open(self.folder / "lock", "w")  # noqa: SIM115, held until this process ends
        except OSError as error:
            raise DataError(f"--out {self.out}: its folder cannot be written ({error})") from error
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{self.out}: another job is writing it at this moment") from error

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
        if kind is not None and issubclass(kind, KeyboardInterrupt) and not empty:
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
    for group in ("inputs", "models"):
        for name, digests in now[group].items():
            path = changed(before[group].get(name, {}), digests)
            if path:
                return f"--{name} {path} has changed since"
    path = changed(before["pictures"], now["pictures"])
    return f"the picture {path} has changed since" if path else ""


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


SAMPLE = 2**16  # bytes of each stretch of a large file that its digest reads
STRETCH = 2**24
# What a run directory holds beside the model.
NO_PART = ("args.json", "reference.json")


def digest_model(path: str) -> str:
    """A digest of a model directory: settings, tokenizer and weights; of a hub id its name.

    Small files count whole. Of a large one count the size, its first 16 MiB, which hold the header of a safetensors
    file, and 64 KiB of every 16 MiB after that: training moves weights everywhere, so that other weights show in 0.4 %
    of them, which are read in seconds where 100 GB would take minutes.
    """
    if not os.path.isdir(path):
        return str(path)
    total = hashlib.sha256()
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        kind = Path(entry.name).suffix
        if entry.name in NO_PART or kind not in (".json", ".txt", ".jinja", ".model", ".safetensors"):
            continue
        if not entry.is_file():
            continue
        total.update(f"{entry.name}\n{entry.stat().st_size}\n".encode(errors="surrogateescape"))
        with open(entry.path, "rb") as file:
            total.update(file.read(STRETCH))
            for start in range(STRETCH, entry.stat().st_size, STRETCH):
                file.seek(start)
                total.update(file.read(SAMPLE))
    return total.hexdigest()
