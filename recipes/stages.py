"""Run the command lines of a recipe one after the other, and import torch and transformers once for all of them.

    printf '%s\n' "dpo.py --loss sft … --out runs/sft" "eval.py --model runs/sft … --out runs/sft.json" |
        python recipes/stages.py

A study runs dozens of short stages, and every Python spends eight seconds on imports before it begins. Here each line
runs in a forked child of one process that has imported already, exactly as `python LINE` would: the child's state ends
with it. A line that fails ends the recipe, with the last lines that it printed.

Of every line OUT, its --out (or its first word after the script), two files stand beside what it writes: OUT.log, what
it printed, and, once it has succeeded, OUT.done, the line itself. A line that its OUT.done repeats word for word is
skipped: the same recipe goes on where it was killed, and a line that was edited runs again. Give lines that take long
--resume (they go on in the middle) or --overwrite.
"""

import os
import runpy
import shlex
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TAIL = 15  # lines of a failed stage's log that are shown


def out_of(words: list[str]) -> Path:
    """Where a line writes. ValueError if it does not say."""
    if "--out" in words[:-1]:
        return Path(words[words.index("--out") + 1])
    if len(words) < 2 or words[1].startswith("-"):
        raise ValueError(f"this line names no --out: {shlex.join(words)}")
    return Path(words[1])


def beside(out: Path, suffix: str) -> Path:
    return out.with_name(out.name + suffix)


def is_done(line: str, out: Path) -> bool:
    done = beside(out, ".done")
    return out.exists() and done.exists() and done.read_text() == line + "\n"


def import_once() -> None:
    """What the stages import, and what they import late: the tokenizer's and the model's own files."""
    sys.path.insert(0, str(ROOT))
    import torch
    from transformers.models.qwen2 import tokenization_qwen2  # noqa: F401
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl  # noqa: F401
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl  # noqa: F401

    import distill  # noqa: F401
    import dpo  # noqa: F401
    import eval  # noqa: F401
    import grpo  # noqa: F401
    import toy.tiny_model  # noqa: F401

    # A thread pool of the parent would not exist in its children; without one they start their own.
    assert not torch.cuda.is_initialized(), "CUDA cannot be used in the children of a process that has used it"


def run_child(words: list[str], log: Path) -> None:
    """In the child: be `python words…`, printing to the log. Does not return."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    script = ROOT / words[0]
    sys.path.insert(0, str(script.parent))
    sys.argv = [str(script), *words[1:]]
    status = 1
    try:
        runpy.run_path(str(script), run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        else:
            status = end.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # not sys.exit: what the parent would do at its end is not the child's to do


def run(line: str) -> int:
    """Run one line, or skip it: -> its exit status."""
    words = shlex.split(line)
    out = out_of(words)
    if is_done(line, out):
        print(f"       done  {words[0]} {out}", flush=True)
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    beside(out, ".done").unlink(missing_ok=True)
    began, log = time.monotonic(), beside(out, ".log")
    child = os.fork()
    if child == 0:
        run_child(words, log)
    try:
        _, ended = os.waitpid(child, 0)
    except KeyboardInterrupt:  # the terminal has told the child too: it saves a checkpoint first
        _, ended = os.waitpid(child, 0)
    status = os.waitstatus_to_exitcode(ended)
    print(f"{time.monotonic() - began:9.1f} s  {words[0]} {out}", flush=True)
    if status == 0:
        beside(out, ".done").write_text(line + "\n")
        return 0
    tail = log.read_text(errors="replace").replace("\r", "\n").splitlines()[-TAIL:]
    print("\n".join([*tail, f"error: exit status {status} of: {line}"]), file=sys.stderr)
    return status if 0 < status < 128 else 1


def main(argv: list[str] | None = None) -> int:
    if sys.argv[1:] if argv is None else argv:
        print(__doc__)
        return 0
    lines = [" ".join(line.split()) for line in sys.stdin]
    lines = [line for line in lines if line and not line.startswith("#")]
    try:
        outs = [out_of(shlex.split(line)) for line in lines]
    except ValueError as cause:
        print(f"error: {cause}", file=sys.stderr)
        return 2
    if not all(map(is_done, lines, outs)):
        import_once()
    for line in lines:
        status = run(line)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main())
