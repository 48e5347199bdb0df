"""Preference pairs by self-distillation, the data of the cold start (SPECS, arXiv 2510.25801, stage 1).

    python distill.py --policy runs/zero --base DIR --data records.jsonl --out pairs.jsonl
    torchrun --nproc_per_node=8 distill.py …

For each question, the policy (a short GRPO run on the base) and the base itself answer the same prompt:

    chosen    a policy reply that is well-formed, right, and not contradicted by its own reasoning
    rejected  a base reply that is right too, with its format broken in one of five ways

Both answers are right, so a pair differs in the shape of the reply only: it teaches the format and says nothing about
what to answer. Questions that give no pair are counted by reason.

SFT needs no rejected reply. The two baselines of Jigsaw-R1 (arXiv 2505.23590) are

    --policy MODEL --reject-from none    rejection sampling: the model's own replies that are well-formed and right
    --gold --reject-from none            the gold answer itself, where the prompt asks for no reasoning; no model runs

The policy may be a teacher behind an OpenAI-compatible server (--policy-url). Whether a chosen reply's reasoning leads
to its answer is judged by a rule that looks for a contradiction (judge.contradicts), or by a model as in the paper
(--judge model, --judge endpoint).

Choices where the paper is silent: the five corruptions are equally likely; a base reply that is malformed already, and
that no corruption changes, is rejected as it is. A reply truncated at --max-new-tokens is not used.

Replies are kept in FILE.jsonl.partial batch by batch, and a killed job goes on from there with --resume (journal.py).
"""

import gc
import hashlib
import json
import os
import random
from collections import Counter
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import torch
from tqdm import tqdm

import model
import rewards
import sampler
import scoring
import training
import vllm_sampler
from endpoint import Endpoint, add_endpoint_flags, add_role_flags, check_role_flags, connect, message_of
from files import DataError, check_output, digest, read_json, write_text
from journal import Journal, add_journal_flags
from judge import Judge, add_judge_flags, check_judge_flags, consistent, contradicts, find_answer, open_judge, summed
from pairs_page import edit_distance
from records import jsonl_text, read_records
from training import World, integer, real

# ---------------------------------------------------------------------------------------------------------------------
# Pairs: pure functions of text


CORRUPTIONS = ("all_tags", "answer_tags", "think_tags", "answer_tags_think_end", "answer_text")


def corrupt(reply: str, kind: str) -> str:
    """Break the format of `<think>R</think><answer>A</answer>` and keep every character of its content.

    all_tags               remove all four tags
    answer_tags            remove <answer> and </answer>
    think_tags             remove <think> and </think>
    answer_tags_think_end  remove <answer> and </answer>, move </think> to the very end of the reply
    answer_text            replace <answer> by "Answer:", drop </answer>
    A reply without the tags in question comes back unchanged.
    """
    if kind == "all_tags":
        return remove(reply, "<think>", "</think>", "<answer>", "</answer>")
    if kind == "answer_tags":
        return remove(reply, "<answer>", "</answer>")
    if kind == "think_tags":
        return remove(reply, "<think>", "</think>")
    if kind == "answer_tags_think_end":
        return remove(reply, "<answer>", "</answer>", "</think>") + "</think>" if "</think>" in reply else reply
    if kind == "answer_text":
        return remove(reply.replace("<answer>", "Answer:"), "</answer>") if "<answer>" in reply else reply
    raise ValueError(f"corruption {kind!r} is not one of {', '.join(CORRUPTIONS)}")


def remove(text: str, *parts: str) -> str:
    for part in parts:
        text = text.replace(part, "")
    return text


class Scored(NamedTuple):
    """One reply and all that pairing asks of it, so that it is read once."""

    text: str
    reason: str
    answer: rewards.Answer | None  # None: the reply is malformed
    right: bool

    @property
    def well_formed(self) -> bool:
        return self.answer is not None


def read(reply: str, record: dict) -> Scored:
    """A reply read strictly, as `rewards.score` reads it."""
    parts = rewards.read_reply(reply, rewards.reply_format(record))
    reason, answer_text = parts if parts is not None else ("", "")
    answer = rewards.read_answer(answer_text, record) if parts is not None else None
    return Scored(reply, reason, answer, is_right(answer, record))


def is_right(answer: rewards.Answer | None, record: dict) -> bool:
    """Whether an answer passes the filter: there is one, and it is right enough for its type (a box: half overlap)."""
    return answer is not None and rewards.is_right(answer, record)


def make_pair(
    record: dict,
    policy_replies: list[str],
    base_replies: list[str],
    rng: random.Random,
    *,
    judge: str | dict = "rule",
    coupled: bool = False,
    reject_from: str = "base",
    pick: str = "first",
) -> tuple[dict | None, str | None]:
    """One question's replies -> (record + chosen, rejected, corruption; None), or (None, why there is no pair).

    judge: as in `objection`. coupled: the rejected reply may be wrong, so that pairs also differ in correctness.
    reject_from "chosen": the rejected reply is the chosen one, corrupted, instead of a base reply; "none": there is
    none, for SFT. pick: which of the policy's replies that pass, a name of PICKS; of the base's the first.
    """
    chosen, why = choose(record, policy_replies, judge, pick, rng)
    if chosen is None:
        return None, why
    if reject_from == "none":
        return {**record, "chosen": chosen.text}, None
    if reject_from == "base" and not base_replies:
        return None, "base never finished"

    candidates = [chosen] if reject_from == "chosen" else (read(text, record) for text in base_replies)
    why = "base never right"
    for reply in candidates:
        if not (coupled or found_right(reply, record)):
            continue
        why = "rejected cannot be broken"
        rejected, corruption = break_format(reply, record, rng)
        if rejected is not None and rejected != chosen.text:
            return {**record, "chosen": chosen.text, "rejected": rejected, "corruption": corruption}, None
    return None, why


def gold_reply(record: dict) -> str:
    """The gold answer as a reply in the record's format. ValueError if that asks for a reason, which no gold has."""
    form = rewards.reply_format(record)
    if not rewards.format_called(form).reason_may_be_empty:
        raise ValueError(f"--gold: the reply format {form} asks for a reason, and a gold answer has none")
    answer, kind = record["answer"], record["answer_type"]
    if kind == "point":  # the gold is the box it must lie in
        x1, y1, x2, y2 = answer
        answer = [(x1 + x2) / 2, (y1 + y2) / 2]
    if kind in ("box", "point"):
        text = ", ".join(str(round(side, 2)) for side in answer)  # hundredths of a pixel
    elif kind == "grid":
        text = " ".join(map(str, answer))
    else:  # of several accepted texts the first
        text = str(answer[0] if isinstance(answer, list) else answer)
    return rf"\boxed{{{text}}}" if form == "boxed" else text


def choose(
    record: dict, replies: list[str], judge: str | dict, pick: str = "first", rng: random.Random | None = None
) -> tuple[Scored | None, str | None]:
    """A well-formed and right reply to which the judge does not object, or (None, what was missing)."""
    passing = []
    why = "policy never finished" if not replies else "policy never well-formed"
    for text in replies:
        reply = read(text, record)
        if reply.right:
            why = objection(judge, reply, record)
            if why is None:
                passing.append(reply)
                if pick == "first":
                    break
        elif reply.well_formed and why == "policy never well-formed":
            why = "policy never right"
    if passing:
        return PICKS[pick](passing, rng), None
    return None, why


def objection(judge: str | dict[str, bool | None], reply: Scored, record: dict) -> str | None:
    """Why a right reply is not chosen, or None.

    judge: "rule" looks for a reasoning that contradicts its answer, "none" does not look; a dict holds the verdict of a
    model on each reply's text: True, False, or None for no verdict.
    """
    if judge == "none":
        return None
    if judge == "rule":
        return "reasoning contradicts" if contradicts(reply.reason, reply.answer, record) else None
    return {True: None, False: "judge said no", None: "judge gave no verdict"}[judge[reply.text]]


def judge_replies(judge: Judge, records: list[dict], groups: list[list[str]], pick: str) -> list[dict]:
    """{text: verdict} for the replies of each question, as `choose` will ask for them.

    Only right replies are judged, and with pick "first" none after one that passes: a verdict may cost money. All
    questions are asked at once, round by round.
    """
    right = []
    for record, texts in zip(records, groups, strict=True):
        replies = [read(text, record) for text in dict.fromkeys(texts)]
        right.append([reply for reply in replies if reply.right])
    verdicts = [{} for _ in records]
    while True:
        asked = []
        for place, replies in enumerate(right):
            open_ones = [reply for reply in replies if reply.text not in verdicts[place]]
            if pick == "first":
                open_ones = [] if True in verdicts[place].values() else open_ones[:1]
            asked += [(place, reply) for reply in open_ones]
        if not asked:
            return verdicts
        found = consistent(judge, [(records[place], reply.reason, reply.answer) for place, reply in asked])
        for (place, reply), verdict in zip(asked, found, strict=True):
            verdicts[place][reply.text] = verdict


def shortest(replies: list[Scored]) -> Scored:
    """The reply of the fewest characters; of equals the first."""
    return min(replies, key=lambda reply: len(reply.text))


def typical(replies: list[Scored]) -> Scored:
    """The reply that has most in common with the others; of equals the first."""
    phrases = [phrases_of(reply.text) for reply in replies]

    def likeness(place):
        others = [other for number, other in enumerate(phrases) if number != place]
        return sum(overlap(phrases[place], other) for other in others)

    return replies[max(range(len(replies)), key=likeness)]


def phrases_of(text: str) -> set[tuple[str, ...]]:
    """Every three words that stand beside each other."""
    words = ["", *text.split(), ""]
    return set(zip(words, words[1:], words[2:], strict=False))


def overlap(one: set, other: set) -> float:
    """Jaccard index: what two sets share of all they hold, 0 … 1."""
    return len(one & other) / len(one | other) if one | other else 1.0


# Which of the policy's replies that pass becomes the chosen one.
PICKS = {
    "first": lambda replies, rng: replies[0],
    "random": lambda replies, rng: rng.choice(replies),
    "shortest": lambda replies, rng: shortest(replies),
    "typical": lambda replies, rng: typical(replies),
}


def found_right(reply: Scored, record: dict) -> bool:
    """Whether a reply is right as it stands, or a reader would take the right answer from it."""
    return reply.right or is_right(find_answer(reply.text, record), record)


def break_format(reply: Scored, record: dict, rng: random.Random) -> tuple[str | None, str | None]:
    """(malformed reply, corruption): one of the kinds that change the reply and break its format, all equally likely.

    (reply, None) if no kind does but the reply is malformed as it is; (None, None) if it is well-formed.
    """
    broken = {}
    for kind in CORRUPTIONS:
        text = corrupt(reply.text, kind)
        if text != reply.text and text.strip() and not read(text, record).well_formed:
            broken[kind] = text
    if broken:
        kind = rng.choice(list(broken))
        return broken[kind], kind
    if reply.text.strip() and not reply.well_formed:
        return reply.text, None
    return None, None


def summary(outcomes: list[tuple[dict | None, str | None]]) -> str:
    """How many questions gave a pair, why the others did not, and how the rejected replies were broken."""
    total = len(outcomes)
    pairs = [pair for pair, _ in outcomes if pair is not None]
    reasons = Counter(reason for _, reason in outcomes if reason is not None)
    kinds = Counter(pair["corruption"] or "malformed already" for pair in pairs if "rejected" in pair)

    def line(count, whole, name):
        return f"{count:7d}  {100 * count / whole:5.1f} %  {name}"

    lines = [f"{total} questions", line(len(pairs), total, "gave a pair")]
    lines += [line(count, total, f"none: {reason}") for reason, count in reasons.most_common()]
    if kinds:
        lines.append("rejected replies, broken by")
    for kind in (*CORRUPTIONS, "malformed already"):
        if kinds[kind]:
            lines.append(line(kinds[kind], len(pairs), kind))
    return "\n".join(lines)


def cost_lines(told: dict[str, dict]) -> list[str]:
    """A line about each model that was asked elsewhere. told: {"policy" or "judge": numbers of its account}."""
    lines = []
    for name, numbers in told.items():
        counts = [key for key in ("asked", "yes", "no", "unread", "refused") if key in numbers]
        said = ", ".join(f"{numbers[key]} {key}" for key in counts)
        if "cost" in numbers:
            tokens = f"{numbers['prompt_tokens']} + {numbers['completion_tokens']} tokens"
            said += f"; {numbers['answers']} answers, {tokens}, cost {numbers['cost']:.4g}"
        lines.append(f"{name}: {said}")
    return lines


def account(records: list[dict], outcomes: list[tuple[dict | None, str | None]]) -> dict:
    """What became of every question: how many gave a pair, how their rejected replies were broken, who dropped why."""
    corruptions, dropped = Counter(), {}
    for record, (pair, reason) in zip(records, outcomes, strict=True):
        if pair is None:
            dropped.setdefault(reason, []).append(record["id"])
        elif "rejected" in pair:
            corruptions[pair["corruption"] or "malformed already"] += 1
    pairs = [pair for pair, _ in outcomes if pair is not None]
    told = {"questions": len(records), "pairs": len(pairs), "corruptions": dict(corruptions)}
    for side in ("chosen", "rejected"):
        lengths = sorted(len(pair[side]) for pair in pairs if side in pair)
        if lengths:
            told[f"{side}_characters"] = {"least": lengths[0], "mean": fmean(lengths), "most": lengths[-1]}
    both = [pair for pair in pairs if "rejected" in pair]  # none for SFT
    if both:
        told["edit_distance"] = fmean(edit_distance(pair["chosen"], pair["rejected"]) for pair in both)
        alike = [overlap(phrases_of(pair["chosen"]), phrases_of(pair["rejected"])) for pair in both]
        told["overlap"] = fmean(alike)
    return told | {"dropped": dropped}


# ---------------------------------------------------------------------------------------------------------------------
# The stage


def parse_args(argv=None):
    parser = training.Parser(__doc__)
    add = parser.add_argument
    add("--policy",
        help="model of the chosen replies (directory or hub id, or its name at --policy-url): GRPO-zero, a teacher, …")
    add("--base", help="model of the rejected replies: the one the cold start trains; only with --reject-from base")
    add("--data", required=True, nargs="+", help="records.jsonl files: prompts, images and gold answers")
    add("--skip-bad", action="store_true",
        help="leave out records whose gold answer cannot be scored, and say how many, instead of stopping")  # fmt: skip
    add("--out", required=True, help="pairs.jsonl to write: records with chosen and rejected")
    add_journal_flags(add)
    add("--limit", type=integer("[0, 1e9]"), default=0, help="use the first N records only; 0: all")
    add("--seed", type=integer("[0, 4294967295]"), default=0,
        help="fixes every sample, whatever --batch and the number of processes")  # fmt: skip

    add = parser.add_argument_group("pairs").add_argument
    add("--gold", action="store_true",
        help="the chosen reply is the gold answer, of prompts that ask for no reasoning; without --policy")  # fmt: skip
    add("--reject-from", default="base", choices=["base", "chosen", "none"],
        help="what is corrupted: a reply of the base, or the chosen one; none: no rejected reply, for SFT")  # fmt: skip
    add("--coupled", action="store_true", help="the rejected reply may be wrong: pairs also differ in correctness")
    add("--pick", default="first", choices=list(PICKS),
        help="which policy reply is chosen, of those that pass: the first, a random one, the shortest, or the one that "
        "shares most phrases of three words with the others")  # fmt: skip

    add = parser.add_argument_group("sampling").add_argument
    add("--samples", type=integer("[1, 1e5]"), default=4,
        help="replies per question from each model; more samples, fewer lost questions")  # fmt: skip
    add("--temperature", type=real("0 or [1e-4, 1e4]"), default=1.0,
        help="sampling temperature of both models; 0: greedy, --samples 1 only")  # fmt: skip
    add("--max-new-tokens", type=integer("[1, 1e6]"), default=512,
        help="longest reply in tokens; a reply truncated there is not used")  # fmt: skip
    add("--batch", type=integer("[1, 1e6]"), default=64,
        help="questions encoded at a time; the memory of sampling is bounded by itself")  # fmt: skip

    add_judge_flags(parser, ["rule", "none", "model", "endpoint"], "rule",
        "refuse chosen replies whose reasoning does not lead to their answer: by a rule that looks for contradictions, "
        "a model of this machine, or one behind a server; none: take them")  # fmt: skip
    add = parser.add_argument_group("teacher, and servers").add_argument
    add_role_flags(add, "policy", "the policy, a teacher")
    add_endpoint_flags(add)
    vllm_sampler.add_sampler_flags(parser)
    training.add_model_flags(parser)
    args = parser.parse_args(argv)
    check_judge_flags(parser, args)
    check_role_flags(parser, args, "policy")
    if args.temperature == 0 and args.samples > 1:
        parser.error("--temperature 0 gives the same reply each time: it needs --samples 1")
    if args.gold == (args.policy is not None):
        parser.error("one of --policy and --gold is needed: where the chosen replies come from")
    if args.gold and args.policy_url:
        parser.error("--policy-url needs --policy, the model's name there")
    if args.reject_from == "base" and args.base is None:
        parser.error("--base is required, unless --reject-from chosen or none")
    if args.reject_from != "base" and args.coupled:
        parser.error("--coupled needs --reject-from base: no other rejected reply has an answer of its own")
    return args


def gold_replies(records: list[dict]) -> list[str]:
    """gold_reply of each record. DataError names the first that can have none."""
    replies = []
    for record in records:
        try:
            replies.append(gold_reply(record))
        except ValueError as error:
            raise DataError(f"{record['_where']}: {error}") from error
    return replies


def check_models(models: dict[str, str | None]) -> None:
    """DataError if one of {flag's name: model path} names neither a sound model nor a hub id."""
    for name, path in models.items():
        hub_id = path is not None and path.count("/") == 1 and not Path(path).exists()
        if path is not None and not hub_id:  # the base is loaded hours after the policy: what is wrong is said now
            model.check_folder(path, f"--{name.replace('_', '-')}")


def sample_missing(
    name: str, path: str, world: World, records: list[dict], journal: Journal, *, first_seed: int, samples: int,
    temperature: float, max_new_tokens: int, batch: int, engine: str, vllm_memory: float, **loading,
) -> None:  # fmt: skip
    """Add to the journal, under `name`, the finished replies of the model at `path` to each record it lacks, as text.

    engine: "builtin" or "vllm". loading: keyword arguments of model.load. No model is loaded when nothing is missing,
    and none is left in memory.
    """
    if not journal.missing(name, len(records)):
        return
    mine = journal.mine(name, len(records))
    policy, encoder = model.load(path, world, **loading)
    sample = sampler.sample
    if engine == "vllm":
        sample = vllm_sampler.VLLM(
            path, policy.requires_grad_(False), encoder, world, [records[place] for place in mine],
            max_new_tokens=max_new_tokens, memory=vllm_memory,
        )  # fmt: skip
    bar = tqdm(total=len(mine), desc=name, disable=not world.main)
    for start in range(0, len(mine), batch):
        places = mine[start : start + batch]
        replies = sample(
            policy, encoder.prompts([records[place] for place in places]), samples,
            # A function of the record's place alone: batches, processes and restarts change no reply.
            seeds=[first_seed + 2 * place for place in places],
            temperature=temperature, max_new_tokens=max_new_tokens,
        )  # fmt: skip
        items = {}
        for place, group in zip(places, replies, strict=True):
            items[place] = {"texts": [encoder.decode(reply.ids) for reply in group if reply.finished]}
        journal.add(name, items)
        bar.update(len(places))
    bar.close()
    if engine == "vllm":
        sample.close()
    # A module tree holds cycles: without a collection it would stay while the next model is loaded.
    del policy, encoder, sample
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def ask_teacher(args, world: World, records: list[dict], journal: Journal, first_seed: int) -> dict:
    """As sample_missing for the policy, from a model behind a server: -> its part of the account.

    An item also has "tokens" [of prompts, of replies], as the server counts them; "refused" says why it has no texts.
    """
    own = {"temperature": args.temperature, "max_completion_tokens": args.max_new_tokens}
    server = connect(args, "policy", args.policy, own)
    mine = journal.mine("policy", len(records))
    if mine:
        server.check()
    bar = tqdm(total=len(mine), desc="policy", disable=not world.main)
    for start in range(0, len(mine), args.batch):
        places = mine[start : start + args.batch]
        turns = [[message_of(records[place], args.max_pixels, args.max_image_pixels)] for place in places]
        # Servers sample reply g from seed + g, and take 31 bits.
        seeds = [(first_seed + 2 * place) * args.samples % 2**31 for place in places]
        items = {}
        for place, answer in zip(places, server.sample(turns, args.samples, seeds), strict=True):
            texts = [text for text, finished in zip(answer.texts, answer.finished, strict=True) if finished]
            items[place] = {"texts": texts, "tokens": [answer.prompt_tokens, answer.completion_tokens]}
            if answer.refused:
                items[place]["refused"] = answer.refused
        journal.add("policy", items)
        bar.update(len(places))
    bar.close()
    world.barrier()  # until every process has added its last batch
    return account_of_teacher(server, list(journal.items("policy").values()))


def account_of_teacher(server: Endpoint, items: list[dict]) -> dict:
    """What a teacher has answered, and what it costs. DataError if it refused every question."""
    refusals = [item["refused"] for item in items if "refused" in item]
    if len(refusals) == len(items):
        raise DataError(f"{server.url}: {server.model} refused every question, the first: {refusals[0]}")
    prompt, completion = (sum(item["tokens"][side] for item in items) for side in (0, 1))
    told = {"answers": len(items) - len(refusals), "refused": len(refusals)}
    return told | {"prompt_tokens": prompt, "completion_tokens": completion, "cost": server.cost(prompt, completion)}


JUDGED_TOGETHER = 256  # questions


def verdicts_of(judge: Judge, world: World, records: list[dict], groups: list[list[str]], pick: str) -> list[dict]:
    """judge_replies in parts, with a progress bar. Verdicts of a server are kept, those of a model here are not."""
    verdicts = []
    bar = tqdm(total=len(records), desc="judge", disable=not world.main)
    for start in range(0, len(records), JUDGED_TOGETHER):
        part = slice(start, start + JUDGED_TOGETHER)
        verdicts += judge_replies(judge, records[part], groups[part], pick)
        bar.update(len(records[part]))
    bar.close()
    return verdicts


# What is made of the replies, not how they are sampled: a resumed job may change it.
LATER = ("judge", "judge_model", "judge_tokens", "judge_options", "coupled", "pick")


def account_path(out: Path) -> Path:
    """pairs.jsonl -> pairs.account.json"""
    return out.parent / f"{out.stem}.account.json"


def is_finished(out: Path, fingerprint: str) -> bool:
    """Whether the pairs are there, whole, and those that this job would write again."""
    try:
        told = read_json(account_path(out))
        return isinstance(told, dict) and (told.get("fingerprint"), told.get("sha256")) == (fingerprint, digest(out))
    except DataError:
        return False


def main(argv=None):
    args = parse_args(argv)
    world = training.setup(args.timeout)

    # 1. Read: everything that can be wrong is found before a model is loaded
    out = Path(args.out)
    models = {
        "policy": None if args.policy_url else args.policy,
        "base": args.base if args.reject_from == "base" else None,
        "judge_model": args.judge_model if args.judge == "model" else None,
    }
    check_models(models)
    check_output(account_path(out), "--out", {"--data": args.data})
    records = read_records(
        args.data, rewards.check_gold, skip_bad=args.skip_bad, max_image_pixels=args.max_image_pixels
    )
    records = records[: args.limit or None]
    golds = gold_replies(records) if args.gold else []
    served = {"policy": f"{args.policy} behind a server"} if args.policy_url else {}  # wherever that is
    journal = Journal.open(
        vars(args) | served,
        world,
        inputs={"data": args.data},
        models=models,
        pictures=[image for record in records for image in record["images"]],
        later=LATER,
    )
    if args.resume and is_finished(out, journal.fingerprint):
        if world.main:
            journal.drop()
            print(f"{out}: is finished already")
        return
    with journal:
        # 2. Sample the policy, then the base, unless nothing of it is needed
        options = {name: getattr(args, name) for name in ("samples", "temperature", "max_new_tokens", "batch")}
        options |= {"engine": args.sampler, "vllm_memory": args.vllm_memory}
        options |= {"dtype": args.dtype, "attn": args.attn, "max_pixels": args.max_pixels}
        options |= {"max_image_pixels": args.max_image_pixels}
        # Even and odd seeds: the two models must not use the same random numbers.
        first_seed = 2 * args.seed * 10**9
        told = {}  # of the models behind servers, and the judge
        judge = open_judge(args, world) if args.judge == "endpoint" else None
        if args.policy_url:
            told["policy"] = ask_teacher(args, world, records, journal, first_seed)
        elif not args.gold:
            sample_missing("policy", args.policy, world, records, journal, first_seed=first_seed, **options)
        if args.reject_from == "base":
            sample_missing("base", args.base, world, records, journal, first_seed=first_seed + 1, **options)

        # 3. Pair: each process its share of the questions
        world.barrier()  # until every process has added its last batch
        policy_items, base_items = journal.items("policy"), journal.items("base")
        if args.gold:
            policy_items = {place: {"texts": [gold]} for place, gold in enumerate(golds)}
        choices = {name: getattr(args, name) for name in ("coupled", "reject_from", "pick")}
        scorer, mine = scoring.Scorer(), range(world.rank, len(records), world.size)
        texts = [scorer.readable(policy_items[place]["texts"], records[place]) for place in mine]
        judges = [args.judge] * len(mine)
        if args.judge == "model":  # not above: only now the others have left the memory
            judge = open_judge(args, world)
        if judge is not None:
            judges = verdicts_of(judge, world, [records[place] for place in mine], texts, args.pick)
            told["judge"] = summed(world.gather(judge.account()))
        found = []
        for place, policy_texts, verdicts in zip(mine, texts, judges, strict=True):
            base_texts = base_items[place]["texts"] if args.reject_from == "base" else []
            groups = policy_texts, scorer.readable(base_texts, records[place])
            rng = random.Random(f"{args.seed}/{place}")
            pair, why = make_pair(records[place], *groups, rng, judge=verdicts, **choices)
            if pair is None and "refused" in policy_items[place]:
                why = "policy refused by its server"
            found.append((pair, why))
        outcomes = [None] * len(records)
        for rank, part in enumerate(world.gather(found)):
            outcomes[rank :: world.size] = part

        # 4. Record
        origin = {"chosen_from": args.policy or "gold", "judge": judge.name if judge is not None else args.judge}
        if args.reject_from != "none":
            origin["rejected_from"] = args.base if args.reject_from == "base" else origin["chosen_from"]
        pairs = [pair | origin for pair, _ in outcomes if pair is not None]
        for pair in pairs:
            pair["images"] = [os.path.relpath(image, out.resolve().parent) for image in pair["images"]]
        if world.main:
            print("\n".join([summary(outcomes), *cost_lines(told)]), flush=True)
        if not pairs:
            raise DataError(
                f"no pairs: none of the {len(records)} questions gave one, {out} is not written; "
                f"the replies are in {journal.folder}, for --resume with another --judge or --coupled"
            )
        if world.main:
            # First the account: a finished file is known by it.
            text = jsonl_text(pairs)
            sha256 = hashlib.sha256(text.encode()).hexdigest()
            told = account(records, outcomes) | told | {"sha256": sha256, "fingerprint": journal.fingerprint}
            write_text(account_path(out), json.dumps(told, indent=1) + "\n")
            journal.finish(text)
            print(f"{out}: {len(pairs)} pairs written")


if __name__ == "__main__":
    training.run(main)
