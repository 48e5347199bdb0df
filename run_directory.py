"""The run directory: log, lock, --resume, Ctrl-C, checkpoints, and the Hugging Face model at the end.

    args.json       every flag, and a digest of every input
    log.jsonl       one object a step; samples.jsonl: some replies; skipped.jsonl: what gave no finite gradient;
                    broken.jsonl: records whose picture could not be decoded
    checkpoints/    step_000050/: weights and optimizer state in safetensors, SHA256SUMS over all of it
    LATEST          the name of the last whole checkpoint
    config.json, …  the model. It is there only when the run has finished: a directory of a run is a model or is not

What a killed process may leave is never trusted: a checkpoint counts when its digests agree, a file when it has its
name. A `policy` here is any nn.Module with the weights; `hf` in it the Hugging Face model that is saved.
"""

import fnmatch
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn

import files
from files import DataError, write_text
from processes import StageError, World
from records import write_jsonl
from training import MAY_CHANGE, whole_tensor

PATIENCE = 2.0  # seconds between two signals that are two wishes
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # USR1: what sbatch --signal sends before a job's time is up

# What a run leaves in its directory beside the model, and what --overwrite removes.
RUN_FILES = ("args.json", "log.jsonl", "samples.jsonl", "skipped.jsonl", "broken.jsonl", "LATEST", "checkpoints")
# config.json first: without it the directory is no model, whatever else is still there.
MODEL_FILES = ("config.json", "generation_config.json", "model.safetensors.index.json", "model*.safetensors")

# ---------------------------------------------------------------------------------------------------------------------
# Inputs


# What of a model directory decides what the model computes.
IDENTIFYING = ("*.safetensors", "config.json", "*processor_config.json", "tokenizer*", "chat_template*", "vocab.json")


def input_digests(settings: dict) -> dict[str, str]:
    """{path: digest} of the files that a run reads: its data, held-out data, starting model, judge (not pictures).

    A hub id has no files here; a file that is missing is named by whoever reads it.
    """
    paths = [Path(name) for flag in ("data", "eval_data") for name in settings.get(flag) or []]
    for folder in [Path(settings[flag]) for flag in ("model", "judge_model") if settings.get(flag)]:
        names = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
        paths += [path for path in names if any(fnmatch.fnmatch(path.name, pattern) for pattern in IDENTIFYING)]
    return {str(path): files.identity(path) for path in paths if path.is_file()}


def check_inputs(everyone: list[dict[str, str]]) -> None:
    """DataError unless all ranks read the same. everyone: input_digests of each rank."""
    for rank, found in enumerate(everyone):
        for path in sorted(everyone[0].keys() | found.keys()):
            if everyone[0].get(path) != found.get(path):
                raise DataError(f"{path}: rank {rank} reads other bytes than rank 0; give all nodes the same files")


# ---------------------------------------------------------------------------------------------------------------------
# The directory


@dataclass
class Run:
    """A training run's directory. Open it before anything expensive; it refuses to mix two runs.

    step: finished steps. extra: what the checkpoint of that step keeps beside weights (see end_step).
    """

    out: Path
    world: World
    step: int = 0
    extra: dict = field(default_factory=dict)
    settings: dict = field(default_factory=dict)  # what args.json holds; each checkpoint has a copy
    stop: bool = False  # somebody asked for it: a signal to this process, or to another rank
    asked: float | None = None  # when this process itself got its first signal, by time.monotonic
    skipped: int = 0  # steps in a row without a finite gradient
    broken: dict = field(default_factory=dict)  # {"file:line": row of broken.jsonl} of records that others stand in for
    named: set = field(default_factory=set)  # those of `broken` that all ranks know and broken.jsonl has
    lock: object = None  # the open lock file
    group: object = None  # process group of the thread that writes checkpoints
    writer: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))
    writing: object = None  # future of that thread's present task

    @classmethod
    def open(cls, settings: dict, world: World, may_change: tuple = ()) -> "Run":
        """Create or reopen settings["out"]. settings: all flags of the stage, by name.

        may_change: flags of the stage's own that a resumed run may be given anew. DataError if the directory holds a
        run and neither "resume" nor "overwrite" is set; if a resumed run is asked to change its settings or finds its
        inputs changed; if another process is at work in it; if no checkpoint of it is whole.
        """
        run = cls(Path(settings["out"]), world)
        if world.size > 1:
            run.group = dist.new_group(backend="gloo")
        inputs = input_digests(settings)
        check_inputs(world.gather(inputs))
        # How a run was continued is no setting of it.
        recorded = {key: settings[key] for key in sorted(settings) if key not in ("resume", "overwrite")}
        run.settings = json.loads(json.dumps(recorded | {"inputs": inputs}, default=str))
        # Rank 0 looks, all ranks hear: otherwise one would go on where another has stopped.
        problem = run._prepare(settings, MAY_CHANGE + may_change) if world.main else None
        problem = world.gather(problem)[0]
        if problem:
            raise DataError(problem)
        if settings["resume"]:
            run._find_checkpoint()
        if world.main:
            write_text(run.out / "args.json", json.dumps(run.settings, indent=1) + "\n")
            run._drop_unfinished()
        run.skipped, run.broken = world.gather((run.skipped, run.broken))[0]
        run.named = set(run.broken)
        for number in SIGNALS:
            signal.signal(number, run._ask_to_stop)
        return run

    def _prepare(self, settings, may_change) -> str | None:
        """On rank 0: make the directory and lock it, or say in one line why not."""
        reads = {"--model": [settings.get("model") or ""], "--data": settings.get("data") or []}
        reads["--eval-data"] = settings.get("eval_data") or []
        try:
            files.check_output(self.out, "--out", reads, directory=True)
            self.out.mkdir(parents=True, exist_ok=True)
            self.lock = files.lock(self.out / ".lock", str(self.out))
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"{self.out}: cannot be made ({error})"

        log = self.out / "log.jsonl"
        used = (self.out / "LATEST").exists() or (log.exists() and log.stat().st_size > 0)
        used = used or (self.out / "checkpoints").exists()
        if not used:
            foreign = (self.out / "config.json").exists() and not (self.out / "args.json").exists()
            return f"{self.out}: holds a model that no run made; choose another --out" if foreign else None
        if settings["overwrite"]:
            self._remove_all()
        elif not settings["resume"]:
            return f"{self.out}: holds a run already; add --resume to go on with it or --overwrite to start anew"
        else:
            return self._compare(may_change)
        return None

    def _remove_all(self):
        """Remove a run and its model: the model's config first, so that no kill leaves an old model in a new run."""
        for pattern in (*MODEL_FILES, *RUN_FILES):
            for path in self.out.glob(pattern):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    def _compare(self, may_change) -> str | None:
        """Why a run with these settings is not the one that is here, or None."""
        before = self._settings_before()
        if before is None:
            warn(f"{self.out}: no readable args.json: what the run was started with cannot be compared")
            return None
        for key, value in self.settings.items():
            if key not in (*may_change, "inputs") and before.get(key, value) != value:
                flag = f"--{key.replace('_', '-')}"
                return f"{self.out}: {flag} was {before[key]}, now {value}; a resumed run keeps its settings"
        for path, digest in before.get("inputs", {}).items():
            if self.settings["inputs"].get(path, digest) != digest:
                return f"{path}: has changed since {self.out} was started; a resumed run needs the same files"
        return None

    def _settings_before(self) -> dict | None:
        """What args.json said, from the newest checkpoint if the file itself is damaged."""
        checkpoints = sorted((self.out / "checkpoints").glob("step_*/args.json"), reverse=True)
        for path in (self.out / "args.json", *checkpoints):
            try:
                return files.read_json_object(path)
            except DataError:
                continue
        return None

    def _drop_unfinished(self):
        """Remove what a killed run wrote after its last checkpoint: those steps are repeated."""
        for name in ("log.jsonl", "samples.jsonl", "skipped.jsonl", "broken.jsonl"):
            path = self.out / name
            if name in ("skipped.jsonl", "broken.jsonl") and not path.exists():
                continue
            rows, damaged = whole_rows(path)
            kept = [row for row in rows if row["step"] <= self.step]
            lost = self.step - len(kept) if name == "log.jsonl" else 0
            if damaged or lost > 0:
                warn(f"{path}: {damaged} damaged lines left out" + (f", {lost} steps are missing" if lost > 0 else ""))
            write_jsonl(path, kept)
            if name == "broken.jsonl":
                self.broken = {row["where"]: row for row in kept}
            if name == "log.jsonl":
                for row in kept:
                    self.skipped = self.skipped + 1 if row.get("skipped") else 0
        for unfinished in (self.out / "checkpoints").glob("*.partial"):
            shutil.rmtree(unfinished)

    # -----------------------------------------------------------------------------------------------------------------
    # During the run

    def _ask_to_stop(self, number, frame):
        # Asked twice means by a person, seconds apart: then the step is not waited for. A launcher and a scheduler may
        # send the same wish together, and another rank may have passed it on before the signal arrives here.
        now = time.monotonic()
        if self.asked is not None and now - self.asked > PATIENCE:
            raise KeyboardInterrupt
        self.asked = now if self.asked is None else self.asked
        self.stop = True

    def log(self, row: dict, samples: list[dict] = ()) -> None:
        """Append one step's numbers (and some decoded replies) to the logs; rank 0 only writes.

        A number that is not finite is written as null: NaN is no JSON.
        """
        if not self.world.main:
            return
        numbers = {key: value if is_finite(value) else None for key, value in row.items()}
        append(self.out / "log.jsonl", [numbers])
        append(self.out / "samples.jsonl", [{"step": row["step"], **sample} for sample in samples])

    def count_skipped(self, step: int, skipped: bool, records: list[dict], most: int) -> None:
        """Book whether `step` had an update without a finite gradient; StageError after `most` such steps in a row.

        records: what this rank computed it on, kept in skipped.jsonl for whoever looks for the cause. most 0: never.
        """
        self.skipped = self.skipped + 1 if skipped else 0
        if not skipped:
            return
        everything = [row for part in self.world.gather(records) for row in part]
        if self.world.main:
            append(self.out / "skipped.jsonl", [{"step": step, **row} for row in everything])
            warn(f"step {step}: the gradient is no finite number; its update is skipped, see skipped.jsonl")
        if most and self.skipped >= most:
            self.finish()
            raise StageError(
                f"{self.out}: {self.skipped} steps in a row without a finite gradient (--max-skipped {most}). They "
                "changed no weight. Look at skipped.jsonl; start anew with a lower --lr or with --dtype fp32"
            )

    def share_broken(self, step: int) -> int:
        """Tell all ranks which records each has found broken during `step`, name them, and count all so far.

        From then on all ranks replace them without looking, and so does a resumed run, whatever happens to the files.
        """
        found = {where: row for where, row in self.broken.items() if where not in self.named}
        for part in self.world.gather(found):
            for where in sorted(part.keys() - self.named):
                row = {"step": step, **part[where]}
                self.broken[where] = row
                self.named.add(where)
                if self.world.main:
                    append(self.out / "broken.jsonl", [row])
                    warn(f"{where}: {row['cause']}; the next record takes the place of {json.dumps(row['id'])}")
        return len(self.named)

    def end_step(self, step, steps, policy, optimizer, *, save_every, keep, extra=dict) -> None:
        """After `step` of `steps`: write a checkpoint if one is due; leave (KeyboardInterrupt) if asked to.

        extra(): {text: JSON} of this process, kept in the checkpoint.
        """
        if self.checkpoint_due(step, steps, save_every):
            self.save(step, policy, optimizer, keep, extra())
        if self.stop and step < steps:
            self.finish()
            raise KeyboardInterrupt(f"stopped after step {step} of {steps}; --resume goes on from there")

    def checkpoint_due(self, step: int, steps: int, every: int) -> bool:
        """Is a checkpoint to be written after this step: the last one, every so many, or when asked to stop?

        The wish to stop (Ctrl-C or SIGTERM on any rank) is shared here, so that all ranks act on it together.
        """
        self.stop = self.world.sum(self.stop)[0] > 0
        return self.stop or step == steps or (every > 0 and step % every == 0)

    # -----------------------------------------------------------------------------------------------------------------
    # Checkpoints

    def save(self, step: int, policy: nn.Module, optimizer, keep: int = 2, extra: dict | None = None) -> None:
        """Write checkpoints/step_000123 (weights and AdamW's state as safetensors, each process its shards), then point
        LATEST at it. The shards are copied at once and written in the background, while the next steps go on.
        extra: {text: JSON} of each process, which restore gives back to all, put together."""
        self.finish()
        extra = {name: value for part in self.world.gather(extra or {}) for name, value in part.items()}
        folder = self.out / "checkpoints" / f"step_{step:06d}"
        if self.world.main:
            for leftover in (folder, partial_of(folder)):
                shutil.rmtree(leftover, ignore_errors=True)
        self.world.barrier()
        # The optimizer changes weights in place, so the writer gets copies.
        state = checkpoint_state(policy, optimizer)
        copied = {name: value.to("cpu", copy=True) for name, value in state.items()}
        self.writing = self.writer.submit(self._write, folder, copied, keep, extra)

    def _write(self, folder, state, keep, extra):
        dcp, _, storage = distributed_checkpoint()
        partial, world = partial_of(folder), self.world
        writer = storage(str(partial), save_distributed=True)
        dcp.save(state, storage_writer=writer, process_group=self.group, no_dist=not dist.is_initialized())
        # Every process has written its shards by now. They digest the files together: hashing takes as long as writing.
        if world.main:
            write_text(partial / "extra.json", json.dumps(extra))
            write_text(partial / "args.json", json.dumps(self.settings, indent=1) + "\n")
        parts = [None] * world.size
        if world.size > 1:
            dist.barrier(group=self.group)
            dist.all_gather_object(parts, digests_of(partial, world), group=self.group)
        else:
            parts = [digests_of(partial, world)]
        for found in parts:
            if isinstance(found, str):
                raise OSError(found)
        if not world.main:
            return
        sums = dict(sorted(item for found in parts for item in found.items()))
        write_text(partial / "SHA256SUMS", "".join(f"{digest}  {name}\n" for name, digest in sums.items()))
        for name in ("log.jsonl", "samples.jsonl", "broken.jsonl"):
            if (self.out / name).exists():
                files.sync(self.out / name)
        partial.replace(folder)
        files.sync(folder.parent)
        write_text(self.out / "LATEST", folder.name)
        # A later checkpoint, of a run killed before it named it in LATEST, must not count.
        saved = [path for path in checkpoints_in(self.out) if path.name <= folder.name]
        for old in saved[:-keep]:
            shutil.rmtree(old)

    def finish(self) -> None:
        """Wait until the last checkpoint is written. StageError when it could not be (a full disk, say)."""
        # CheckpointException is no Exception: without this nobody would catch it.
        from torch.distributed.checkpoint.api import CheckpointException

        writing, self.writing = self.writing, None
        try:
            if writing is not None:
                writing.result()
        except (CheckpointException, OSError) as error:
            causes = getattr(error, "failures", {}).values()
            cause = next((str(failure[0]) for failure in causes), str(error))
            message = f"{self.out}: a checkpoint could not be written, the last one is good ({cause})"
            raise StageError(message) from error

    def _find_checkpoint(self) -> None:
        """Set step and extra from the newest whole checkpoint, at most the one LATEST names. A collective."""
        names = self.world.gather(self._candidates() if self.world.main else None)[0]
        first_problem = None
        for name in names:
            folder = self.out / "checkpoints" / name
            problems = self.world.gather(damage(folder, self.world))
            problem = next((problem for problem in problems if problem), None)
            if problem is None:
                self.step = int(name.removeprefix("step_"))
                self.extra = files.read_json_object(folder / "extra.json")
                if self.world.main:
                    if first_problem:
                        warn(f"{first_problem}; going on from {name}")
                    # It may be damaged, or name what is; a finished run writes no other.
                    write_text(self.out / "LATEST", name)
                return
            first_problem = first_problem or problem
        if first_problem:
            raise DataError(f"{first_problem}; no other checkpoint is whole, --overwrite starts anew")

    def _candidates(self) -> list[str]:
        """On rank 0: names of the checkpoints that may be gone on from, newest first."""
        names = [path.name for path in checkpoints_in(self.out)]
        latest = self.out / "LATEST"
        if not latest.exists() and not names:
            return []
        try:
            text = files.read_text(latest).strip()
        except DataError:
            text = ""
        if not re.fullmatch(r"step_\d{6,}", text):
            warn(f"{latest}: names no checkpoint; taking the newest that is whole")
            return names[::-1]
        # A later one was being written when the run was killed: nobody vouches for it.
        return sorted({text, *(name for name in names if name <= text)}, reverse=True)

    def restore(self, policy: nn.Module, optimizer) -> dict:
        """Load the checkpoint that was found into policy and optimizer, if this run has one (step > 0): -> its extra.

        It may have been written by another number of processes: each reads the slices that are its own now. From here
        on weights move, so a model of an earlier end (a run that is given more steps) is no model any more."""
        if self.world.main:
            (self.out / "config.json").unlink(missing_ok=True)
        if not self.step:
            return {}
        dcp, storage, _ = distributed_checkpoint()
        folder = self.out / "checkpoints" / f"step_{self.step:06d}"
        reader = storage(str(folder))
        known = reader.read_metadata().state_dict_metadata
        for name, weight in policy.named_parameters():
            if f"{name}/step" in known:  # AdamW makes its state in a weight's first update
                moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
                clock = torch.zeros((), device=weight.device)
                optimizer.state[weight] = {"step": clock, **moments}
        # It shares the memory of what it names, which is filled now.
        state = checkpoint_state(policy, optimizer)
        dcp.load(state, storage_reader=reader, no_dist=not dist.is_initialized())
        return self.extra

    def export(self, policy: nn.Module, encoder) -> None:
        """Make the run directory a Hugging Face model directory: config, safetensors, tokenizer, image settings."""
        self.finish()
        save_model(policy, encoder, self.out, self.world)
        if self.named and self.world.main:
            count = len(self.named)
            warn(f"{count} record{'s' * (count > 1)} with a broken picture left out: see {self.out / 'broken.jsonl'}")
        if self.lock is not None:
            self.lock.close()


# ---------------------------------------------------------------------------------------------------------------------
# Files of a run


def warn(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def is_finite(value) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def append(path: Path, rows: list[dict]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def whole_rows(path: Path) -> tuple[list[dict], int]:
    """(the rows of a log that are whole, how many lines are not). The half line of a killed process is not counted."""
    rows, damaged = [], 0
    if not path.exists():
        return rows, damaged
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            whole = isinstance(row, dict) and type(row.get("step")) is int
        except (ValueError, RecursionError):
            whole = False
        if whole:
            rows.append(row)
        elif line and number < len(lines):
            damaged += 1
    return rows, damaged


def checkpoints_in(out: Path) -> list[Path]:
    """The named checkpoints of a run, oldest first; those still being written have another name."""
    folders = (out / "checkpoints").glob("step_*")
    return sorted(path for path in folders if re.fullmatch(r"step_\d{6,}", path.name))


def partial_of(folder: Path) -> Path:
    """Where a checkpoint is written before it gets its name."""
    return folder.with_name(folder.name + ".partial")


def digests_of(folder: Path, world: World) -> dict[str, str] | str:
    """{name: SHA-256} of this rank's share of a folder's files, which are on the disk then; or what went wrong.

    Returned, not raised: the other ranks are waiting to hear it.
    """
    try:
        found = {}
        for path in sorted(folder.iterdir())[world.rank :: world.size]:
            files.sync(path)
            found[path.name] = files.digest(path)
        return found
    except (OSError, DataError) as error:
        return str(error)


def damage(folder: Path, world: World) -> str | None:
    """What is wrong with a checkpoint, or None. Every rank looks at its share of the files."""
    try:
        lines = files.read_text(folder / "SHA256SUMS").splitlines()
    except DataError as error:
        return str(error)
    sums = dict(line.split("  ", 1)[::-1] for line in lines if "  " in line)
    found = {path.name for path in folder.iterdir()} - {"SHA256SUMS"}
    if "extra.json" not in sums:
        return f"{folder / 'SHA256SUMS'}: is damaged"
    for name in sorted(sums.keys() ^ found):
        return f"{folder / name}: " + ("is missing" if name in sums else "does not belong to the checkpoint")
    for name in sorted(sums)[world.rank :: world.size]:
        try:
            if files.digest(folder / name) != sums[name]:
                return f"{folder / name}: is damaged, its digest is not the one in SHA256SUMS"
        except DataError as error:
            return str(error)
    return None


def distributed_checkpoint():
    """torch's distributed checkpoints, in safetensors (its own format holds pickles): (module, reader, writer)."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: that is how it is meant
    return dcp, HuggingFaceStorageReader, HuggingFaceStorageWriter


def checkpoint_state(policy: nn.Module, optimizer) -> dict[str, torch.Tensor]:
    """{name: tensor or shards} of everything a run goes on from: weights, and AdamW's state as "name/exp_avg", …"""
    state = {}
    for name, weight in policy.named_parameters():
        state[name] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            state[f"{name}/{key}"] = value.reshape(1) if key == "step" else value
    return state


# ---------------------------------------------------------------------------------------------------------------------
# The Hugging Face model a run ends as


ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def save_model(policy, encoder, folder, world: World = ALONE, file_bytes: int = 2**32) -> None:
    """Write a directory that from_pretrained, vLLM and the next stage load; a large model in files of file_bytes.

    The processes gather one tensor at a time and write files in turns, so none ever holds more than a file.
    """
    folder = Path(folder)
    weights = {name.removeprefix("hf."): weight for name, weight in policy.named_parameters()}
    parts = divide_into_files(policy.hf, weights, file_bytes)
    # The naming that from_pretrained and vLLM expect.
    names = [f"model-{i:05d}-of-{len(parts):05d}.safetensors" for i in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = ["model.safetensors"]
    if world.main:
        folder.mkdir(parents=True, exist_ok=True)
        # config.json goes first and comes last: without it a directory is no model.
        for pattern in MODEL_FILES:
            for old in folder.glob(pattern):
                old.unlink()
        policy.hf.generation_config.save_pretrained(folder)
        encoder.save(folder)
        if len(parts) > 1:
            total = sum(weight.numel() * weight.element_size() for weight in weights.values())
            file_of = {key: name for name, part in zip(names, parts, strict=True) for key, _ in part}
            index = {"metadata": {"total_size": total}, "weight_map": file_of}
            write_text(folder / "model.safetensors.index.json", json.dumps(index, indent=1) + "\n")
    world.barrier()
    for number, (name, part) in enumerate(zip(names, parts, strict=True)):
        tensors = {}
        mine = number % world.size == world.rank
        for key, weight in part:
            whole = whole_tensor(weights[weight])  # a collective, also for ranks that drop it
            if mine:
                tensors[key] = whole.cpu().contiguous()
        if mine:
            partial = folder / f"{name}.partial"
            save_file(tensors, partial, metadata={"format": "pt"})
            files.sync(partial)
            partial.replace(folder / name)
    world.barrier()
    if world.main:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".config") as beside:
            policy.hf.config.save_pretrained(beside)
            os.replace(Path(beside, "config.json"), folder / "config.json")
        files.sync(folder)
    world.barrier()


def divide_into_files(hf: nn.Module, weights: dict, file_bytes: int) -> list[list[tuple[str, str]]]:
    """Files of about file_bytes, each a list of (name in the file, name of the weight).

    The names in files are those that public checkpoints of this family carry, which transformers may have renamed.
    """
    from transformers.core_model_loading import revert_weight_conversion

    order = list(weights)
    # transformers maps names through tensors; numbers in tensors come back with the new names.
    numbers = revert_weight_conversion(hf, {name: torch.tensor(number) for number, name in enumerate(order)})
    parts, left = [], 0
    for key, number in numbers.items():
        weight = weights[order[number]]
        size = weight.numel() * weight.element_size()
        if not parts or size > left:
            parts.append([])
            left = file_bytes
        parts[-1].append((key, order[number]))
        left -= size
    return parts
