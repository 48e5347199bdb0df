"""The peers of versus.py: TRL's trainers, transformers' generate, vLLM. Each function is one worker.

What they compute and we do not, read from the sources of TRL 1.16 and transformers 5.19 (grpo_trainer.py,
dpo_trainer.py, trainer/utils.py):

- GRPOTrainer's sampler repeats every prompt once per reply. The copies go through everything: each picture is
  preprocessed 2 x 8 times a step (once for generation, once for the loss), each copy's picture through the vision
  tower and each copy's prompt through prefill, then both again in the forward and backward pass of the loss.
- DPOTrainer repeats prompt and picture for the chosen and the rejected reply, in the policy's pass and in the
  reference's; it keeps a second model for the reference (precomputing it is refused for pictures).
- On a CPU, TRL's fused lm_head scores every position of the row, prompt and padding included, also for the entropy
  (on CUDA it keeps to the replies). It never holds all logits at once, nor do we.
- generate() with num_return_sequences encodes each picture once, but copies the prompt, its picture's tokens included,
  before prefill. (TRL does not use it: its copies are made earlier.)
- vLLM does about what we do: one prefill a prompt (its prefix cache), one picture through the tower. It is run as it
  comes, compiled by torch's inductor (minutes at its start, not counted), and eager.

What they were given, so that they lose by nothing else: pictures opened once per prompt, not once per copy; the
torchvision image processor, faster than the one we use; no gradient checkpointing in timed cells; no logging, no
saving; the micro-batches that were fastest (MICRO in versus.py); for vLLM, Intel's OpenMP.
"""

import functools
import importlib
import json
import os
import time
from collections import Counter
from pathlib import Path


def read(spec):
    """The records in the order in which our stages take them, with absolute picture paths."""
    folder = Path(spec["data"]).parent
    rows = [json.loads(line) for line in Path(spec["data"]).read_text().splitlines()]
    for row in rows:
        row["images"] = [str(folder / name) for name in row["images"]]
    return [rows[index] for index in spec["order"]]


@functools.lru_cache(64)
def opened(path):
    """A decoded picture, kept: the eight copies of a prompt ask for it one after the other."""
    from PIL import Image

    return Image.open(path).convert("RGB")


def steps_callback(gate, numbers):
    """A TrainerCallback that waits at the gate before the first step and after each. numbers: a Counter to report."""
    from transformers import TrainerCallback

    class Steps(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            gate.wait()

        def on_step_end(self, *args, **kwargs):  # before the next batch is fetched: that counts as the next step's
            gate.wait(**numbers)
            numbers.clear()

    return Steps()


def without_vllm():
    """TRL imports vLLM when it finds it, used or not: spare it that memory."""
    importlib.import_module("trl.import_utils").is_vllm_available = lambda *args, **kwargs: False


def common(spec, replies):
    """Settings shared by both of TRL's trainers. replies: samples of one optimizer step."""
    return {
        "output_dir": spec["out"],
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["micro"],
        "gradient_accumulation_steps": replies // spec["micro"],
        "gradient_checkpointing": spec.get("checkpointing", False),
        "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "use_cpu": True,
        "bf16": False,
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": "sdpa"},
        "report_to": "none",
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }


def trl_grpo(gate, spec, reward):
    without_vllm()
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import GRPOConfig, GRPOTrainer

    records, size = read(spec), spec["group"]

    def rows(batch):
        chosen = [records[index] for index in batch["index"]]
        prompts = [[{"role": "user", "content": row["prompt"]}] for row in chosen]
        return {"prompt": prompts, "images": [[opened(path) for path in row["images"]] for row in chosen]}

    def score(completions, **kwargs):
        return [reward(completion[0]["content"]) for completion in completions]

    config = GRPOConfig(
        **common(spec, spec["prompts"] * size),
        num_generations=size,
        max_completion_length=spec["reply"],
        generation_kwargs={"min_new_tokens": spec["reply"]},
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        beta=0.0,
        num_iterations=1,
        loss_type="grpo",
        shuffle_dataset=False,
    )
    processor = AutoProcessor.from_pretrained(spec["model"], padding_side="left")
    numbers = Counter()
    trainer = GRPOTrainer(
        spec["model"], score, config, processing_class=processor, callbacks=[steps_callback(gate, numbers)],
        train_dataset=Dataset.from_dict({"index": list(range(len(records)))}).with_transform(rows),
    )  # fmt: skip
    generate, image_id = trainer._generate, trainer.model.config.image_token_id

    def counted(prompts):
        begun = time.perf_counter()
        out = generate(prompts)
        numbers["seconds_generate"] += time.perf_counter() - begun
        numbers["prompt_tokens"] += sum(len(ids) for ids in out[0][::size])
        numbers["image_tokens"] += sum(ids.count(image_id) for ids in out[0][::size])
        numbers["reply_tokens"] += sum(len(ids) for ids in out[1])
        return out

    trainer._generate = counted
    trainer.train()


def trl_dpo(gate, spec, reward):
    without_vllm()
    from datasets import Dataset
    from transformers import AutoProcessor
    from trl import DPOConfig, DPOTrainer

    records = read(spec)
    processor = AutoProcessor.from_pretrained(spec["model"], padding_side="left")
    end = processor.tokenizer.eos_token

    def rows(batch):
        """Prompts as text, not as messages: the template would put a line break behind the end token, ours does not."""
        chosen = [records[index] for index in batch["index"]]
        out = {"images": [[opened(path) for path in row["images"]] for row in chosen]}
        out["prompt"] = [chat(processor, row) for row in chosen]
        return out | {name: [row[name] + end for row in chosen] for name in ("chosen", "rejected")}

    config = DPOConfig(
        **common(spec, spec["prompts"]),
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        beta=0.1,
        max_length=None,
        train_sampling_strategy="sequential",
    )
    numbers = Counter()
    trainer = DPOTrainer(
        spec["model"], args=config, processing_class=processor, callbacks=[steps_callback(gate, numbers)],
        train_dataset=Dataset.from_dict({"index": list(range(len(records)))}).with_transform(rows),
    )  # fmt: skip
    compute, image_id = trainer.compute_loss, trainer.model.config.image_token_id

    def counted(model, inputs, *args, **kwargs):
        prompt = (inputs["attention_mask"] - inputs["completion_mask"]).chunk(2)[0]
        numbers["prompt_tokens"] += int(prompt.sum())
        numbers["image_tokens"] += int((inputs["input_ids"].chunk(2)[0] == image_id).sum())
        numbers["reply_tokens"] += int(inputs["completion_mask"].sum())
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = counted
    trainer.train()


def chat(processor, row):
    content = [{"type": "image"}, {"type": "text", "text": row["prompt"]}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def generate_sample(gate, spec, reward):
    """transformers' generate on left-padded prompts; from picture files to replies."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoProcessor

    records = read(spec)
    processor = AutoProcessor.from_pretrained(spec["model"], padding_side="left")
    model = AutoModelForImageTextToText.from_pretrained(spec["model"], dtype=torch.float32).eval()
    settings = {
        "num_return_sequences": spec["group"], "do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0,
        "min_new_tokens": spec["reply"], "max_new_tokens": spec["reply"],
        "suppress_tokens": [model.config.image_token_id, model.config.video_token_id],
    }  # fmt: skip
    numbers = {}
    for step in range(spec["steps"]):
        gate.wait(**numbers)
        begun = time.perf_counter()
        batch = records[step * spec["prompts"] : (step + 1) * spec["prompts"]]
        texts, images = [chat(processor, row) for row in batch], [opened(row["images"][0]) for row in batch]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        encoded = time.perf_counter()
        out = model.generate(**inputs, **settings)
        numbers = {
            "seconds_encode": encoded - begun,
            "seconds_sample": time.perf_counter() - encoded,
            "prompt_tokens": int(inputs["attention_mask"].sum()),
            "reply_tokens": out[:, inputs["input_ids"].shape[1] :].numel(),
        }
    gate.wait(**numbers)


def vllm_sample(gate, spec, reward):
    """vLLM in this process. Its caches are emptied before each step: in RL the weights are new ones then."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ["VLLM_CACHE_ROOT"] = str(Path(spec["out"]) / "cache")
    from transformers import AutoProcessor
    from vllm import LLM, SamplingParams

    records = read(spec)
    processor = AutoProcessor.from_pretrained(spec["model"])
    llm = LLM(
        spec["model"], dtype="float32", enforce_eager=not spec["compile"], max_model_len=1024, seed=0,
        limit_mm_per_prompt={"image": 1, "video": 0}, max_num_seqs=spec["prompts"] * spec["group"],
    )  # fmt: skip
    settings = SamplingParams(
        n=spec["group"], temperature=1.0, top_k=0, top_p=1.0, max_tokens=spec["reply"], ignore_eos=True,
    )  # fmt: skip
    numbers = {}
    for step in range(spec["steps"]):
        llm.reset_prefix_cache()
        llm.llm_engine.reset_mm_cache()
        llm.llm_engine.reset_encoder_cache()
        gate.wait(**numbers)
        batch = records[step * spec["prompts"] : (step + 1) * spec["prompts"]]
        prompts = []
        for row in batch:  # one image token per picture: vLLM expands it
            ids = processor.tokenizer(chat(processor, row), add_special_tokens=False)["input_ids"]
            prompts.append({"prompt_token_ids": ids, "multi_modal_data": {"image": opened(row["images"][0])}})
        out = llm.generate(prompts, settings, use_tqdm=False)
        numbers = {
            "prompt_tokens": sum(len(request.prompt_token_ids) for request in out),
            "reply_tokens": sum(len(reply.token_ids) for request in out for reply in request.outputs),
        }
    gate.wait(**numbers)
