"""What the model computes: prompts (encoder.py) and replies become a packed row, the row log-probs.

    groups      prompt once: `[all prompts | all replies]` in one row without padding (attention.py has who sees whom)
    policy      the wrapped Hugging Face model: a packed row -> log-probs or logits (head.py has the last step)
    loading     a checkpoint directory -> policy and encoder, each process reading its own shards
    cost        FLOPs of all this by the formula

Nothing here knows a loss or a reward, and nothing branches on the size of the model; what differs between architectures
is in families.py. `model.sample`, `model.VLLM`, `model.Run` and others that live in files of their own now still answer
under these names (last lines).

Legend: P prompts, G replies each, B = P·G replies, T tokens of the longest reply, L tokens of a packed row, A position
axes, N reply tokens of a batch, M hidden states that predict them, H hidden size, V vocabulary. Log-probs are natural
logarithms (nats), fp32.
"""

import importlib
import sys
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

import model_directory
import training
from attention import Layout, Segments
from encoder import Encoder, Prompt, one_line
from families import Family, family_of, matrix_weights
from files import DataError, read_json_object
from head import StateEntropies, TokenFilter, TokenLogProbs, token_logits
from pictures import MAX_IMAGE_PIXELS
from run_directory import distributed_checkpoint
from training import DEFAULT_SHARDING, World

# ---------------------------------------------------------------------------------------------------------------------
# Groups: the prompt once
#
# A group is a prompt and its replies. A DPO pair is a group of two, an SFT example a group of one.


@dataclass
class Batch:
    """A packed row, ready for Policy.forward.

    ids (1, L); positions (A, 1, L); layout: who sees whom; pixels, grids: all pictures in order, or None; read (M,):
    the tokens whose hidden state somebody reads. targets (N,): the tokens to be predicted, or None when the caller
    wants logits; source (N,): which of the read states predicts each, ascending; cell (2, N): reply number and token
    number of each target, to lay the results out as (B, T).
    """

    ids: torch.Tensor
    positions: torch.Tensor
    layout: Layout
    pixels: torch.Tensor | None
    grids: torch.Tensor | None
    read: torch.Tensor
    targets: torch.Tensor | None = None
    source: torch.Tensor | None = None
    cell: torch.Tensor | None = None

    def to(self, device) -> "Batch":
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if hasattr(v, "to")})


def pack(groups: list[tuple[Prompt, list[torch.Tensor]]]) -> Batch:
    """Lay groups out as one row without padding, `[prompt 1 | … | prompt R | reply 1 | … | reply B]`.

    groups: list of (Prompt, list of reply ids (T,), each with its end token). A reply sees its prompt and itself; its
    positions continue from the prompt's end, so to the model it looks as if it stood there alone. The last token of a
    reply is only ever predicted, never read from, so it is not fed; the last of a prompt predicts the first token of
    all its replies. Without any reply the Batch has no targets, and the forward gives logits.
    """
    prompts = [prompt for prompt, _ in groups]
    replies = [reply for _, group in groups for reply in group]
    # The last token of a reply is predicted but predicts nothing.
    fed = [len(reply) - 1 for reply in replies]
    ids = torch.cat([prompt.ids for prompt in prompts] + [reply[:-1] for reply in replies])

    # Position of a fed token: that of its reply's first token, plus its number in the reply.
    first_position = torch.tensor([prompt.next for prompt, group in groups for _ in group]).long()
    number = torch.cat([torch.arange(size) for size in fed] or [first_position])
    sizes = torch.tensor(fed, dtype=torch.long)
    reply_positions = first_position.repeat_interleave(sizes) + number
    # A reply is text: all its position axes are equal.
    axes = len(prompts[0].positions)
    positions = torch.cat([prompt.positions for prompt in prompts] + [reply_positions.expand(axes, -1)], 1)

    layout = Layout(
        prompts=Segments.of([len(prompt.ids) for prompt in prompts]),
        replies=Segments.of(fed),
        by_prompt=Segments.of([sum(len(reply) - 1 for reply in group) for _, group in groups]),
    )
    prompt_ends = layout.prompts.bounds[1:].long() - 1
    batch = Batch(ids[None], positions[:, None], layout, *pictures_of(prompts), read=prompt_ends)
    if not replies:
        return batch

    # Hidden states that predict something: the end of every prompt, then every fed reply token.
    first = int(prompt_ends[-1]) + 1
    batch.read = torch.cat([prompt_ends, torch.arange(first, len(ids))])
    group_sizes = torch.tensor([len(group) for _, group in groups])
    owner = torch.arange(len(groups)).repeat_interleave(group_sizes)
    batch.source = torch.cat([owner, len(groups) + torch.arange(len(ids) - first)])
    # In the same order: the first token of every reply, then all others.
    batch.targets = torch.cat([torch.stack([reply[0] for reply in replies])] + [reply[1:] for reply in replies])
    reply_number = torch.arange(len(replies))
    which_reply = torch.cat([reply_number, reply_number.repeat_interleave(sizes)])
    which_token = torch.cat([torch.zeros_like(reply_number), number + 1])
    batch.cell = torch.stack([which_reply, which_token])
    return batch


def pictures_of(prompts: list[Prompt]) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(pixels, grids) of all prompts in order, (None, None) when none has a picture."""
    seen = [prompt for prompt in prompts if prompt.pixels is not None]
    if not seen:
        return None, None
    return torch.cat([prompt.pixels for prompt in seen]), torch.cat([prompt.grids for prompt in seen])


def unpack(values: torch.Tensor, cell: torch.Tensor, fill=0.0) -> torch.Tensor:
    """Per-token values (N,) at their (reply, token) cells: -> (B, T). Differentiable."""
    shape = int(cell[0].max()) + 1, int(cell[1].max()) + 1
    # index_put, not assignment: gradients flow through it.
    return values.new_full(shape, fill).index_put((cell[0], cell[1]), values)


def group_sizes(groups: list[tuple[Prompt, list[torch.Tensor]]]) -> list[int]:
    """Tokens and patches of each group: what training.micro_batches divides by."""
    sizes = []
    for prompt, replies in groups:
        fed = sum(len(reply) - 1 for reply in replies)
        sizes.append(prompt.patches + len(prompt.ids) + fed)
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Policy


class Policy(nn.Module):
    """A Hugging Face vision language model behind one forward, so that FSDP's hooks see every use of its weights.

    hf: a …ForConditionalGeneration of one of the FAMILIES. end_ids: tokens that end a reply. forbidden: tokens that are
    never sampled (they stand for pictures: one of them in a reply would ask for pixels that do not exist). chunk_bytes:
    fp32 logits that may exist at a time. flash: use FlashAttention's kernels (CUDA only). half: whether it computes in
    bf16. trains: whether it is loaded to learn.
    """

    def __init__(
        self, hf, family: Family, end_ids: list, forbidden: list, *,
        chunk_bytes=2**26, flash=False, half=False, trains=False, sharding=DEFAULT_SHARDING,
    ):  # fmt: skip
        super().__init__()
        self.hf, self.family = hf, family
        self.end_ids, self.chunk_bytes, self.flash, self.half = tuple(end_ids), chunk_bytes, flash, half
        self.trains, self.sharding = trains, sharding
        self.register_buffer("forbidden", torch.tensor(forbidden), persistent=False)
        # 4-D, so that transformers builds no mask of its own.
        self.register_buffer("no_mask", torch.zeros(1, 1, 1, 1), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.half else torch.float32

    def units(self) -> list[nn.Module]:
        """What FSDP shards one by one: the decoder's blocks and the vision tower. The root holds the rest."""
        return [*self.family.decoder(self.hf).layers, self.family.vision(self.hf)[0]]

    def forward(
        self, batch: Batch, temperature: float = 1.0, entropy: bool = False, token_filter: TokenFilter | None = None,
        statistics: Callable | None = None,
    ):  # fmt: skip
        """Log-probs (N,) of batch.targets at `temperature`; without targets, logits (M, V) of the states read.

        token_filter: log-probs among the tokens it keeps. entropy: -> (log-probs, entropies (N,) of the whole
        distributions that the targets come from). statistics, a function of some rows of logits (n, V) -> (n, K): ->
        instead what it says of those distributions, (N, K).
        """
        # In training the vision tower runs in every forward, on a blank picture where a batch has none: sharded ranks
        # must gather it together, and AdamW must move its weights alike however a batch is divided.
        blind = self.trains and batch.pixels is None and batch.targets is not None
        blank = 0.0 * self.blank_features() if blind else None  # first, where pictures are: FSDP keeps an order
        pictures = {} if batch.pixels is None else self.family.picture_arguments(batch.pixels, batch.grids)
        batch.layout.flash = self.flash
        outputs = self.hf.model(
            input_ids=batch.ids,
            position_ids=self.family.position_ids(batch.positions),
            attention_mask=self.no_mask,
            use_cache=False,
            layout=batch.layout,
            **pictures,
        )
        hidden = outputs.last_hidden_state[0].index_select(0, batch.read)  # (M, H)
        if blind:
            hidden = hidden + blank
        weight = self.hf.lm_head.weight
        if batch.targets is None:
            return token_logits(hidden, weight, temperature, self.forbidden)
        # As many rows of fp32 logits as the budget allows: with 151,936 tokens a row is 0.6 MB.
        rows = max(1, self.chunk_bytes // (4 * len(weight)))
        if statistics is not None:
            chunks = (token_logits(part, weight, temperature, self.forbidden) for part in hidden.split(rows))
            return torch.cat([statistics(logits) for logits in chunks])[batch.source]
        states = hidden, weight, batch.source, batch.targets, temperature, self.forbidden, rows
        kept = None if token_filter is None else token_filter.keep(*states)
        values = TokenLogProbs.apply(*states, kept)
        if not entropy:
            return values
        entropies = StateEntropies.apply(hidden, weight, temperature, self.forbidden, rows)
        return values, entropies[batch.source]

    def blank_features(self) -> torch.Tensor:
        """The sum of all features of the smallest black picture."""
        pixels, grids = self.family.blank_picture(self.forbidden.device)
        return sum(part.float().sum() for part in self.family.picture_features(self.hf, pixels, grids))


def log_probs(
    policy: Policy, groups: list, temperature: float = 1.0, token_filter: TokenFilter | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of all replies of some groups: -> (logp (B, T), mask (B, T) bool).

    groups as for `pack`. mask is True on every token of a reply, its end token included; logp is 0 elsewhere.
    token_filter: among the tokens that it keeps, not the whole vocabulary; its first use decides which those are.
    """
    batch = pack(groups).to(policy.forbidden.device)
    values = policy(batch, temperature=temperature, token_filter=token_filter)
    mask = unpack(torch.ones_like(values, dtype=torch.bool), batch.cell, False)
    return unpack(values, batch.cell), mask


def log_probs_and_entropies(
    policy: Policy, groups: list, temperature: float = 1.0, token_filter: TokenFilter | None = None
):
    """As log_probs: -> (logp, mask, entropy), all (B, T); entropy in nats, of the whole distribution at each token."""
    batch = pack(groups).to(policy.forbidden.device)
    values, entropies = policy(batch, temperature=temperature, entropy=True, token_filter=token_filter)
    mask = unpack(torch.ones_like(entropies, dtype=torch.bool), batch.cell, False)
    return unpack(values, batch.cell), mask, unpack(entropies, batch.cell)


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def load(
    path: str, world: World, *, dtype="auto", attn="auto", max_pixels=None, max_image_pixels=MAX_IMAGE_PIXELS,
    train=False, freeze_vision=False, gradient_checkpointing="auto", sharding=DEFAULT_SHARDING,
) -> tuple[Policy, Encoder]:  # fmt: skip
    """Load a checkpoint directory or hub id: -> (Policy on world.device, Encoder). Only safetensors are read.

    dtype: "fp32", "bf16" or "auto" (bf16 on CUDA, fp32 on CPU). A model that is trained keeps fp32 master weights; with
    bf16 its compute is cast (FSDP mixed precision). attn: "flash", "sdpa" or "auto" (flash on CUDA in bf16). train:
    shard with FSDP2 when there is more than one process (or CUDA). gradient_checkpointing: "on", "off" or "auto" (on
    CUDA). The model is built without memory, sharded, and then filled: each process reads only its shards from the
    files. Raises DataError, on all processes together, when it cannot be loaded or holds NaN or inf.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    cuda = world.device.type == "cuda"
    if dtype == "auto":
        dtype = "bf16" if cuda else "fp32"
    half = dtype == "bf16"
    if attn == "flash" and not (cuda and half):
        raise DataError("--attn flash needs a CUDA GPU and --dtype bf16; use --attn sdpa, which is exact everywhere")
    # Before anything is read: HSDP needs equal groups of processes.
    if world.size % sharding.replicas:
        raise DataError(f"--replicas {sharding.replicas} does not divide the {world.size} process(es)")
    weight_dtype = torch.float32 if train or not half else torch.bfloat16
    with together(world):
        folder = check_folder(path)
        policy, encoder = build(
            folder, weight_dtype, max_pixels, max_image_pixels, chunk_bytes=2**29 if cuda else 2**26,
            flash=attn != "sdpa" and cuda and half, half=half, trains=train, sharding=sharding,
        )  # fmt: skip
        names = stored_names(policy, folder)
    if world.main and encoder.tokenizer.chat_template is None:
        print(f"{path}: no chat template, so prompts read User: … Assistant:", file=sys.stderr)

    hf, family = policy.hf, policy.family
    family.use_kernels(hf, windows=policy.flash or not cuda)
    if freeze_vision:
        for part in family.vision(hf):
            part.requires_grad_(False)
    if train and (gradient_checkpointing == "on" or (gradient_checkpointing == "auto" and cuda)):
        hf.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        hf.train()  # transformers checkpoints in training mode only; nothing here drops out
    sharded = train and (world.size > 1 or cuda)
    if sharded:
        training.shard(policy, world, torch.bfloat16 if half else None, sharding)
    give_memory(policy, world.device, sharding.offload and sharded)
    with together(world):
        read_weights(policy, folder, names)
        check_finite(policy, folder)
    return policy, encoder


@contextmanager
def together(world: World):
    """A DataError of one process becomes one of all: nobody may wait in a collective for a process that has left."""
    problem = None
    try:
        yield
    except DataError as error:
        problem = str(error)
    for first in filter(None, world.gather(problem)):
        raise DataError(first)


def check_folder(path: str, flag: str = "--model") -> str:
    """Find a model and check all its files without loading it: -> its directory. Seconds even for a large one.

    path: a directory, or a hub id, which is downloaded. flag: what a message calls it. Raises DataError, one line that
    names the file: every stage asks this before anything expensive.
    """
    folder = model_directory.find(path, flag)
    model_directory.check_finished(folder)
    family_in(folder)
    model_directory.read_settings(folder)
    model_directory.read_headers(folder)
    return folder


def family_in(folder: str) -> type[Family]:
    """The class of a directory's model_type. DataError."""
    config = read_json_object(Path(folder) / "config.json")
    try:
        return family_of(config.get("model_type"))
    except DataError as error:
        raise DataError(f"{folder}: {error}") from error


def load_reference(path: str, world: World, *, sharding=DEFAULT_SHARDING, **options) -> Policy:
    """The frozen starting model, for the KL; options as for `load`."""
    if sharding.mode == "grad":
        # Nobody goes backward through it, so nothing would ever release the weights that mode "grad" keeps gathered.
        sharding = replace(sharding, mode="full")
    policy, _ = load(path, world, train=True, sharding=sharding, **options)
    return policy.requires_grad_(False)


def build(
    folder: str, dtype: torch.dtype, max_pixels: int | None = None, max_image_pixels: int = MAX_IMAGE_PIXELS, **options
) -> tuple[Policy, Encoder]:  # fmt: skip
    """A policy without memory (on the meta device) and its encoder. options: those of Policy. DataError, OSError."""
    from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

    # Before AutoConfig, which asks on the terminal whether to run code of the checkpoint's own.
    kind = family_in(folder)
    model_directory.read_settings(folder)
    with one_line(f"{folder}: config.json describes no model"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
    with one_line(f"{folder}: no image processor can be made of its settings"):
        family = family_for(kind, config, folder, max_pixels)
    windows = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    if getattr(text, "use_sliding_window", False) or windows:
        raise DataError(f"{folder}: sliding-window attention is not supported (use_sliding_window)")
    with one_line(f"{folder}: config.json describes no model"):
        if config.tie_word_embeddings and has_own_head(folder):
            # Otherwise its lm_head would be ignored: transformers ties what the config says is tied.
            config.tie_word_embeddings = text.tie_word_embeddings = False
        with torch.device("meta"):
            hf = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()

    encoder = Encoder(folder, family, hf, max_image_pixels=max_image_pixels)
    # A model without generation_config.json ends on the tokenizer's end token alone.
    end_ids = {encoder.end_id, *model_directory.end_tokens(folder)}
    if max(end_ids) >= text.vocab_size:
        raise DataError(f"{folder}: generation_config.json: eos_token_id {max(end_ids)} is beyond the vocabulary")
    if (Path(folder) / "generation_config.json").exists():
        with one_line(f"{folder}: generation_config.json cannot be used"):
            hf.generation_config = GenerationConfig.from_pretrained(folder)
    return Policy(hf, family, sorted(end_ids), encoder.forbidden, **options), encoder


def family_for(kind: type[Family], config, folder: str, max_pixels: int | None) -> Family:
    """The answers of a family for one checkpoint; its own complaints begin with the directory."""
    try:
        return kind(config, folder, max_pixels)
    except DataError as error:
        named = str(error).startswith(str(folder))
        raise error if named else DataError(f"{folder}: {error}") from error


def has_own_head(folder: str) -> bool:
    """Whether the files hold an lm_head that differs from the embeddings."""
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118, a safe_open has no other way
                for end in ("lm_head.weight", "embed_tokens.weight"):
                    if key.endswith(end):
                        found[end] = tensors.get_tensor(key)
    return len(found) == 2 and not torch.equal(*found.values())


def give_memory(policy: Policy, device: torch.device, offload: bool = False) -> None:
    """Give a policy built on the meta device its memory: weights that hold nothing yet, buffers as they are made."""
    forbidden = policy.forbidden
    policy.to_empty(device="cpu" if offload else device)
    if not training.fsdp_units(policy):
        policy.hf.tie_weights()  # FSDP keeps tied weights together by itself
    for module in policy.modules():
        if module is not policy and next(module.buffers(recurse=False), None) is not None:
            policy.hf._init_weights(module)  # rotary frequencies
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))
    policy.forbidden, policy.no_mask = forbidden.to(device), torch.zeros(1, 1, 1, 1, device=device)


def stored_names(policy: Policy, folder: str) -> dict[str, str]:
    """{name of a weight: its name in the files}. DataError unless the files hold exactly the weights of the model."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    stored = model_directory.read_headers(folder)
    # Files carry the names of the year they were written in; transformers knows what they are called now.
    renamings = [rule for rule in get_model_conversion_mapping(policy.hf) if isinstance(rule, WeightRenaming)]
    names = {}
    for key, tensor in stored.items():
        name = rename_source_key(key, renamings, [])[0]
        if name in names:
            raise DataError(f"{folder}/{tensor.file}: {key} and {names[name]} are the same weight")
        names[name] = key

    weights = {name.removeprefix("hf."): weight for name, weight in policy.named_parameters()}
    missing = sorted(weights.keys() - names.keys())
    if missing:
        raise DataError(f"{folder}: its safetensors lack {', '.join(missing[:3])}")
    for name, weight in weights.items():
        tensor = stored[names[name]]
        if tensor.shape != tuple(weight.shape):
            says = f"has the shape {list(tensor.shape)}, config.json asks for {list(weight.shape)}"
            raise DataError(f"{folder}/{tensor.file}: {names[name]} {says}")
    # A tied head may be stored a second time.
    further = sorted(names.keys() - weights.keys() - {"lm_head.weight"})
    if further:
        raise DataError(f"{folder}: its safetensors hold what the model has not: {', '.join(further[:3])}")
    return {name: names[name] for name in weights}


def read_weights(policy: Policy, folder: str, names: dict[str, str]) -> None:
    """Fill a policy from a directory's safetensors, each process reading the slices that are its own. DataError.

    names: as from `stored_names`.
    """
    from torch.distributed.checkpoint.api import CheckpointException

    dcp, storage, _ = distributed_checkpoint()
    weights = {name.removeprefix("hf."): weight.detach() for name, weight in policy.named_parameters()}
    # dcp reads only the slices that a process holds.
    wanted = {names[name]: weight for name, weight in weights.items()}
    try:
        dcp.load(wanted, storage_reader=storage(str(folder)), no_dist=not torch.distributed.is_initialized())
    except (OSError, ValueError, RuntimeError, SafetensorError, CheckpointException) as error:
        # What checkpoint reading collects of all processes; the first cause is enough.
        causes = getattr(error, "failures", {})
        cause = next((str(failure[0]) for failure in causes.values()), str(error))
        cause = (cause.splitlines() or [type(error).__name__])[0]
        raise DataError(f"{folder}: no model could be loaded ({cause})") from error


def check_finite(policy: Policy, folder: str) -> None:
    """Raise DataError if a weight holds NaN or inf. Each process looks at the shards that it holds."""
    names, extremes = [], []
    for name, weight in policy.named_parameters():
        part = weight.detach()
        part = part.to_local() if hasattr(part, "to_local") else part
        if part.numel():
            names.append(name.removeprefix("hf."))
            # NaN passes through; a sum of many finite numbers might not be finite.
            extremes.append(torch.stack(torch.aminmax(part)).float())
    if not names:
        return
    finite = torch.stack(extremes).isfinite().all(1).tolist()
    bad = [name for name, good in zip(names, finite, strict=True) if not good]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise DataError(f"{folder}: {bad[0]}{more} holds NaN or inf: the run that wrote it has diverged")


# ---------------------------------------------------------------------------------------------------------------------
# Cost


class Cost:
    """FLOPs of a model by the formula: 2 per weight and token, and 4 per query, key and width in attention.

    What the algorithm needs is counted, not what a way of computing it may repeat (gradient checkpointing) or waste
    (padding), so that a share of the peak means the same everywhere.
    """

    def __init__(self, policy: Policy):
        self.hf, self.family = policy.hf, policy.family
        decoder = self.family.decoder(self.hf)
        self.decoder = matrix_weights(decoder.layers)
        self.head = matrix_weights(self.hf.lm_head)
        self.width = len(decoder.layers) * decoder.layers[0].self_attn.q_proj.out_features
        vision = (weight for part in self.family.vision(self.hf) for weight in part.parameters())
        self.frozen = not any(weight.requires_grad for weight in vision)

    def forward(self, groups: list) -> tuple[float, float]:
        """(FLOPs of decoder and head, FLOPs of the vision tower) of one forward over groups."""
        text = vision = 0
        for prompt, replies in groups:
            length = len(prompt.ids)
            sizes = [len(reply) - 1 for reply in replies]
            pairs = length * (length + 1) / 2  # of query and key
            pairs += sum(size * (size + 1) / 2 + size * length for size in sizes)
            # The prompt once, whatever the number of replies.
            text += 2 * self.decoder * (length + sum(sizes))
            text += 2 * self.head * (1 + sum(sizes))
            text += 4 * self.width * pairs
            for grid in [] if prompt.grids is None else prompt.grids.tolist():
                vision += self.family.vision_flops(self.hf, grid)
        return text, vision

    def learn(self, groups: list, reference: bool = False) -> float:
        """FLOPs of forward and backward (twice the forward), and of a reference's forward if there is one."""
        text, vision = self.forward(groups)
        total = 3 * text + (1 if self.frozen else 3) * vision
        return total + (text + vision if reference else 0)


# ---------------------------------------------------------------------------------------------------------------------
# Names that this file had before it was divided; found on demand, for those files import this one.

MOVED = {
    "files": ("DataError", "write_text"),
    "records": ("read_jsonl", "read_records", "write_jsonl", "epoch_order"),
    "processes": ("setup", "run"),
    "run_directory": ("Run", "save_model"),
    "training": ("adamw", "backward", "update", "learning_rate"),
    "sampler": ("sample", "Reply"),
    "vllm_sampler": ("VLLM",),
    "toy.tiny_model": ("make_tiny",),
}


def __getattr__(name):
    for module, names in MOVED.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(f"module 'model' has no attribute {name!r}")
