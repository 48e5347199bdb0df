"""What tests of several processes run inside each of them: a stage that `commands.torchrun` starts like any other."""

import argparse
import json
import resource
from pathlib import Path

import torch.distributed as dist

import model
import run_directory
import training
from records import DataError


def export(args, world):
    """Write args.model again, in files of at most args.bytes, from shards; rank 0 notes who wrote which file."""
    policy, encoder = model.load(args.model, world, train=True)
    written, save = [], run_directory.save_file

    def watched(tensors, path, **options):
        written.append([Path(path).name, sum(tensor.nbytes for tensor in tensors.values())])
        save(tensors, path, **options)

    run_directory.save_file = watched
    try:
        run_directory.save_model(policy, encoder, args.out, world, args.bytes)
    finally:
        run_directory.save_file = save
    everybody = world.gather(written)
    if world.main:
        (Path(args.out) / "written.json").write_text(json.dumps(everybody))


def memory(args, world):
    """Load args.model in shards, and note by how many bytes each process has grown at most."""

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    model.load(f"{args.model}/../small", world, train=True)  # whatever is needed once, imports first of all
    before = peak()
    model.load(args.model, world, train=True)
    grown = world.gather(peak() - before)
    if world.main:
        Path(args.out).mkdir()
        (Path(args.out) / "grown.json").write_text(json.dumps(grown))


def refuse(args, world):
    """Load args.model, which one rank alone must find fault with; every rank notes what it raised."""
    problem = None
    try:
        model.load(args.model, world, train=True)
    except DataError as error:
        problem = str(error)
    everybody = world.gather(problem)
    if world.main:
        Path(args.out).write_text(json.dumps(everybody))


def fail(args, world):
    """The last rank fails while the others wait for it."""
    world.barrier()
    if world.rank == world.size - 1:
        raise ValueError("this is the cause")
    world.barrier()


CHECKS = {"export": export, "memory": memory, "refuse": refuse, "fail": fail}


def main(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--check", choices=CHECKS)
    parser.add_argument("--model")
    parser.add_argument("--out")
    parser.add_argument("--bytes", type=int, default=0)
    args = parser.parse_args(argv)
    CHECKS[args.check](args, training.setup())
    dist.barrier()
