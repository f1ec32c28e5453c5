"""What the scripts share and no ablation changes: errors, processes, return-to-go, data, models, output folders.

Nothing happens at import. Shapes: B sequences, P prompt tokens, R response tokens, T = P + R. Prompts are padded on the
left and responses on the right, so column P - 1 is the last prompt token of every row, and `[:, P - 1:]` of a value
model's output is `values (B, R + 1)`: column 0 is V(s_1), column t is Q(s_t, a_t), which is V(s_{t+1}).
"""

import contextlib
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import jinja2
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import tyro
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers.utils import cached_file


# ---- Errors and processes --------------------------------------------------------------------------------------------
class UserError(Exception):
    """What a user can mend; its message names the thing and the way out."""


def check(condition, message: str) -> None:
    """Raise `UserError(message)` unless `condition` holds."""
    if not condition:
        raise UserError(message)


@contextlib.contextmanager
def user_errors(kinds, message: str):
    """Turn errors of `kinds` into a `UserError`: `message` and, in brackets, the first line of what they say."""
    try:
        yield
    except kinds as error:
        cause = next(iter(str(error.__cause__ or error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{message} ({cause})") from error


def parse(args_class):
    """The command line as an `args_class`; of a machine's processes only the first prints help or errors."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
    args = tyro.cli(args_class, console_outputs=os.environ.get("LOCAL_RANK", "0") == "0")
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    return args


@contextlib.contextmanager
def one_line_errors():
    """Turn what is foreseen into one line `error: ...` on stderr, and leave: with 2 for a `UserError`, else with 1.

    A bug keeps its traceback. Of several processes only the first to fail speaks: the others fail because of it.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (Exception, dcp.CheckpointException) as error:
        line, text = None, str(error)
        if isinstance(error, UserError):
            line = text
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
            line = ("out of memory: lower --micro-batch-size or --rollout-micro-batch-size (results stay the same), "
                    "--max-prompt-length or --response-length, add processes, or --gradient-checkpointing")  # fmt: skip
        elif isinstance(error, dcp.CheckpointException) or re.search(r"\b(Errno|os error) (27|28|122)\b", text):
            line = "an output file cannot be written: make room, then run it again with --resume"
        elif isinstance(error, dist.DistError) or "/gloo/" in text:
            line = f"lost another process, killed perhaps or out of memory ({text.splitlines()[0]})"
        try:
            store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None
            first = store is None or store.add("failed", 1) == 1
        except Exception:  # the store is gone with the process that held it, which may have been killed
            first = not isinstance(error, UserError)  # of which it, too, would have spoken
        if first:
            print(f"error: {printable(' '.join(line.split()))}" if line else traceback.format_exc(), file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def init_processes() -> torch.device:
    """Join the process group and return this rank's device: nccl on GPUs, gloo on CPUs, also for a single process."""
    transformers.logging.set_verbosity_error()  # what matters of a model's load report is checked below
    transformers.logging.disable_progress_bar()
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        count = torch.cuda.device_count()
        check(device.index < count, f"--nproc_per_node: process {device.index + 1}, but only {count} GPUs")
        torch.cuda.set_device(device)
        # The first choice on an H100, and under a padding mask its gradients can be NaN (pytorch/pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    store, rank, world_size = dist.HashStore(), 0, 1
    if os.environ.keys() & {"RANK", "WORLD_SIZE"}:  # torchrun, or a scheduler that does as it does
        with user_errors((ValueError, dist.DistError), "environment: the processes cannot meet; start with torchrun"):
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        # torchrun keeps one store over its restarts
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
    return device


def end_processes() -> None:
    """Leave the process group; the barrier keeps gloo from aborting while a slower rank still talks."""
    dist.barrier()
    dist.destroy_process_group()


def log(message: str) -> None:
    """Print on rank 0, control characters escaped: a model's or dataset's text must not command the terminal."""
    if dist.is_initialized() and dist.get_rank() > 0:
        return
    try:
        print(printable(message), flush=True)
    except OSError:  # nobody reads it any more: no reason to end a run
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """`text` with control characters, but for ends of lines, escaped."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Equal shards from all ranks, stacked along the first dimension in rank order."""
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, tensor.contiguous())
    return torch.cat(shards)


def rows_of_rank(count: int) -> list[int]:
    """Which of `count` rows this rank evaluates, as many as the others: `all_gather(...)[:count]` has all in order."""
    share = -(-count // dist.get_world_size())
    return [i % count for i in range(dist.get_rank() * share, (dist.get_rank() + 1) * share)]


def check_finite(update: int, what: str, numbers: torch.Tensor) -> None:
    """Stop before an optimizer step, by a `UserError`, when `numbers`, the same on all ranks, are not all finite."""
    check(numbers.isfinite().all(), f"update {update}: {what} not finite, so no step was made: lower --learning-rate?")


def clock(device: torch.device) -> float:
    """A clock in seconds, read when the device has finished all work it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_gb(device: torch.device) -> float:
    """Peak memory so far: what torch has allocated on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


SHARES = {"gamma", "gae_lambda", "td_lambda", "warmup_fraction", "reward_warmup_fraction"}  # settings from 0 to 1
MAY_BE_ZERO = {"seed", "num_context_trajectories", "learning_rate", "critic_learning_rate", "reward_learning_rate",
               "kl_coef", "bt_coef", "reward_center_coef", "missing_eos_penalty", *SHARES}  # fmt: skip


def check_settings(args) -> None:
    """Raise `UserError` for a number that cannot be meant."""
    for name, value in vars(args).items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            bound = ("at least 0" if name in MAY_BE_ZERO else "above 0") + " and at most 1" * (name in SHARES)
            right = (value > 0 or value == 0 and name in MAY_BE_ZERO) and value <= (1 if name in SHARES else 1e12)
            check(right, f"--{name.replace('_', '-')} {value} must be {bound}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if name == "auto" else name)


# ---- Return-to-go ----------------------------------------------------------------------------------------------------
def discounted_sums(x: torch.Tensor, decay: float) -> torch.Tensor:
    """`S_t = sum over u >= t of decay^(u - t) x_u` of `x (B, N)`, `(B, N)`: no loop, but one product of N^2 numbers."""
    steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    ahead = (steps[:, None] - steps).clamp_(min=0)  # (N, N) u - t, with u along the rows
    return x @ (decay**ahead).tril_()


def td_lambda_returns(values, rewards, mask, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of a token-level value model; at `lam` = 0 the paper's, arXiv:2502.16944v2.

    `values (B, R + 1)`, `rewards (B, R)` with r_t on its token, `mask (B, R)` True on response tokens; returns
    `(B, R + 1)`, zero after the last token. `lam` = 0 is one-step TD, 1 is Monte Carlo. With T the last token:
    `G_T = r_T`, `G_t = r_t + gamma ((1 - lam) values_{t+1} + lam G_{t+1})`, and r_0 = 0 at the last prompt token.
    """
    zero = values.new_zeros(len(values), 1)
    rewards = rewards.masked_fill(~mask, 0.0)
    next_values = values[:, 1:].masked_fill(~mask, 0.0)  # (B, R)
    steps = torch.cat([zero, rewards], 1) + gamma * (1 - lam) * torch.cat([next_values, zero], 1)  # (B, R + 1)
    return discounted_sums(steps, gamma * lam)


def gae(values, rewards, mask, gamma: float, lam: float) -> torch.Tensor:
    """Generalised advantage estimates, arXiv:1506.02438, for `values (B, R + 1)`, `rewards (B, R)`, `mask (B, R)`.

    `delta_t = r_t + gamma values_t - values_{t-1}` for every token, the last included, whose own column is its
    bootstrap: a caller with a true terminal reward zeroes it. Returns `(B, R)`, zero outside the mask.
    """
    deltas = (rewards + gamma * values[:, 1:] - values[:, :-1]).masked_fill(~mask, 0.0)
    return discounted_sums(deltas, gamma * lam)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of `x` where `mask` (same shape) is True; a scalar."""
    return x.masked_fill(~mask, 0.0).sum() / mask.sum()


def masked_whiten(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`x`, a global batch, with zero mean and unit variance where `mask` (same shape) is True, zero elsewhere."""
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return ((x - mean) / (std + 1e-8)).masked_fill(~mask, 0.0)


def last_values(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value `(B,)` of each finished answer, of `values (B, R + 1)` and `mask (B, R)`; a reward model's score."""
    return values.gather(1, mask.sum(1, keepdim=True))[:, 0]


# ---- Tasks: what can be scored exactly is one Python file ------------------------------------------------------------
def load_task(path: str):
    """The task file `path` as a module, None where `path` names anything else; tests/tasks/lists.py shows its shape."""
    if not path.endswith(".py"):
        return None
    places = Path(path).expanduser(), Path(__file__).parent / path  # the defaults are found from any working directory
    file = next((place for place in places if place.is_file()), None)
    check(file, f"{path}: no such file")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    task = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(task)
    return task


# ---- Datasets --------------------------------------------------------------------------------------------------------
@dataclass
class Example:
    """A row of any dataset: a preference pair, an answer (`rejected` is None) or a prompt (`chosen` is None)."""

    prompt: list[dict]  # chat messages, the last one not by the assistant
    chosen: str | None = None
    rejected: str | None = None
    score_chosen: float | None = None
    score_rejected: float | None = None
    chosen_policy: str | None = None  # who wrote it: what trajectory conditioning needs
    rejected_policy: str | None = None


def to_messages(value) -> list[dict]:
    """A string, or a list of chat messages, as chat messages with string contents."""
    value = [{"role": "user", "content": value}] if isinstance(value, str) else value
    found = isinstance(value, list) and value
    check(found, "no prompt: neither a column 'prompt' nor a conversation or transcript")
    for message in value:
        texts = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        check(texts, "a message without a role and a content that are texts")
    return [{"role": message["role"], "content": message["content"]} for message in value]


def split_answer(prompt, answer) -> tuple[list[dict], str]:
    """Prompt messages and answer text, of an answer given as text, as its message, or as a whole conversation."""
    if isinstance(answer, str) and prompt is None:  # HH-RLHF: a transcript, cut at the last "\n\nAssistant:"
        parts = re.split(r"\n\n(Human|Assistant):", answer)
        roles = {"Human": "user", "Assistant": "assistant"}
        answer = [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2])]
    if isinstance(answer, str):
        return to_messages(prompt), answer
    messages = to_messages(answer)
    check(messages[-1]["role"] == "assistant", "the last message is not the assistant's")
    if messages[0]["role"] == "assistant" and prompt is not None:  # it goes on from the prompt
        messages = to_messages(prompt) + messages
    # Else it carries its own prompt, which wins: UltraFeedback's `prompt` column is its first turn as a string.
    return messages[:-1] or to_messages(prompt), messages[-1]["content"]


def to_score(value) -> float | None:
    """A finite number (ratings often come as strings), or None."""
    try:
        return float(value) if math.isfinite(float(value)) else None
    except (TypeError, ValueError, OverflowError):
        return None


# Other names of the columns below: DVPO's released code, openbmb/UltraFeedback, TRL.
ALIASES = {
    "question": "prompt", "instruction": "prompt", "value_question": "prompt", "response_j": "chosen",
    "response_k": "rejected", "value_response": "response", "completion": "response", "messages": "response",
    "rewards": "score", "reward": "score", "model": "policy",
}  # fmt: skip
READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}  # by a file's ending
# What a dataset can be, and the columns it needs; the first that fits.
FORMATS = {
    "preference pairs": ("chosen", "rejected"),
    "rated completions": ("prompt", "completions"),
    "answers": ("response",),
    "prompts": ("prompt",),
}


def from_row(row: dict, kind: str) -> list[Example]:
    """The examples in a row of a dataset of `kind`, one of `FORMATS`; raises `UserError` where it cannot be used."""
    # Nulls are columns that are not there; of two names for a column, our own wins.
    row = {ALIASES.get(key, key): row[key] for key in sorted(row, key=lambda key: key not in ALIASES)
           if row[key] is not None}  # fmt: skip
    name = lambda key: str(row[key]) if key in row else None  # some datasets number their models
    if kind == "rated completions":  # openbmb/UltraFeedback: the best one against each worse one
        rated = [(to_score(c["overall_score"]), c["response"], c.get("model")) for c in row["completions"]]
        rated = sorted((c for c in rated if c[0] is not None and isinstance(c[1], str)), key=lambda c: -c[0])
        pairs = [(rated[0], worse) for worse in rated[1:] if worse[0] < rated[0][0]]
        check(pairs, "fewer than two completions of different score")
        prompt = to_messages(row["prompt"])
        return [Example(prompt, good[1], bad[1], good[0], bad[0], good[2], bad[2]) for good, bad in pairs]
    if kind == "preference pairs":
        prompt, chosen = split_answer(row.get("prompt"), row["chosen"])
        other_prompt, rejected = split_answer(row.get("prompt"), row["rejected"])
        check(prompt == other_prompt, "chosen and rejected answer different prompts")
        scores = to_score(row.get("score_chosen")), to_score(row.get("score_rejected"))
        return [Example(prompt, chosen, rejected, *scores, name("chosen_policy"), name("rejected_policy"))]
    if kind == "answers":
        prompt, answer = split_answer(row.get("prompt"), row["response"])
        return [Example(prompt, answer, score_chosen=to_score(row.get("score")), chosen_policy=name("policy"))]
    return [Example(to_messages(row["prompt"]))]


def read_rows(dataset: str, splits: tuple[str, ...]):
    """The rows of `NAME[:SPLIT]`: a hub dataset, a folder, or a file of one of the kinds of `READERS`."""
    path, _, split = dataset.partition(":")
    file = Path(path).expanduser()
    kind = READERS.get(Path(file.name.removesuffix(".gz")).suffix)
    check(kind or not file.is_file(), f"--dataset {path}: expected {', '.join(READERS)} or a task's .py")
    missing = not file.exists() and (kind or path.startswith((".", "/", "~")))
    check(not missing, f"--dataset {path}: no such file or folder")
    import datasets  # takes a second to import, and a task needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    # datasets, pyarrow and huggingface_hub raise a dozen kinds
    with user_errors(Exception, f"--dataset {path}: neither readable here nor on the hub"):
        if file.is_file():
            data = datasets.load_dataset(kind, data_files=str(file))
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            data = datasets.load_from_disk(str(file))
        else:
            data = datasets.load_dataset(path)
    data = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    wanted = split or next((s for s in splits if s in data), next(iter(data)))
    check(wanted in data, f"--dataset {dataset}: no split {wanted!r}; there are {', '.join(data)}")
    log(f"dataset {path}: split {wanted!r} of {', '.join(data)}")
    return data[wanted]


def load_examples(dataset: str, needs: str) -> tuple[list[Example], list[Example]]:
    """Train and held-out examples of `dataset`; `needs` is "prompts", "answers", "pairs" or "scores".

    Held-out prompts are a task's own, else chosen by hash, so every stage and every seed holds out the same ones.
    """
    task = load_task(dataset)
    if task:
        return tuple(to_examples(list(task.rows(split)), f"{dataset}:{split}", needs) for split in ("train", "heldout"))
    preferred = {"answers": ("train_sft", "train"), "prompts": ("train_gen", "train_prefs", "train")}
    rows = read_rows(dataset, preferred.get(needs, ("train_prefs", "train")))
    examples = to_examples(rows, dataset, needs)
    # random.Random seeds itself with the SHA-512 of a text; Python's own hash() differs from process to process.
    heldout = [random.Random(e.prompt[-1]["content"]).random() < 0.05 for e in examples]
    check(not all(heldout), f"--dataset {dataset}: too few prompts, all of them are held out")
    return [e for e, out in zip(examples, heldout) if not out], [e for e, out in zip(examples, heldout) if out]


def to_examples(rows, dataset: str, needs: str) -> list[Example]:
    """Rows (dicts, or a `datasets.Dataset`) of any of `FORMATS` as examples that have what `needs` asks for."""
    check(len(rows) > 0, f"--dataset {dataset}: no rows")
    found = dict.fromkeys(column for row in rows for column in row) if isinstance(rows, list) else rows.column_names
    columns = {ALIASES.get(column, column) for column in found}
    formats = [kind for kind in FORMATS if kind != "prompts" or needs == "prompts"]
    kind = next((kind for kind in formats if set(FORMATS[kind]) <= columns), None)
    known = "; ".join(" + ".join(FORMATS[kind]) for kind in formats)
    check(kind, f"--dataset {dataset}: its columns ({', '.join(found)}) fit none of: {known}; rename them")
    examples, dropped = [], Counter()
    for row in rows:
        try:
            # Of rated completions, an answer to learn is the best one, once, not once for every worse one.
            fresh = from_row(row, kind)[: 1 if needs == "answers" else None]
            for example in fresh:
                check_example(example, needs)
            examples += fresh
        except UserError as error:
            dropped[str(error)] += 1
        except (KeyError, TypeError, AttributeError) as error:
            dropped[f"malformed row, or a null ({type(error).__name__}: {error})"] += 1
    log(f"dataset {dataset}: {kind} ({', '.join(found)}), {len(rows)} rows, {len(examples)} examples")
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    if dropped:
        log(f"  dropped {dropped.total()} rows: {reasons}")
    check(examples, f"--dataset {dataset}: no row can be used here: {reasons}")
    return examples


def check_example(example: Example, needs: str) -> None:
    """Raise `UserError` where an example lacks what the stage needs."""
    answers = {"prompts": [], "pairs": [example.chosen, example.rejected]}.get(needs, [example.chosen])
    check(example.prompt[-1]["content"].strip(), "empty prompt")
    check(example.prompt[-1]["role"] != "assistant", "the prompt ends with the assistant")
    check(None not in answers, "no rejected answer")
    check(all(answer.strip() for answer in answers), "empty answer")
    check(not answers or example.chosen != example.rejected, "chosen and rejected are identical")
    scores = [example.score_chosen] if example.rejected is None else [example.score_chosen, example.score_rejected]
    check(needs != "scores" or None not in scores, "no score")


# ---- Tokens ----------------------------------------------------------------------------------------------------------
# For base models that come without one. An answer starts after a newline, so its first token is not fused to a colon.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'].capitalize() }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
# Llama 3's template writes today's date unless given one, SmolLM3's asks a function: a run must not depend on the day.
FIXED_DATE = "26 Jul 2024"
FIXED_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"
# Nor would answers start with thoughts, as Qwen3's template has them: no dataset holds any.
TEMPLATE_ARGUMENTS = {"date_string": FIXED_DATE, "enable_thinking": False}
Trajectory = tuple[list[int], list[int]]  # prompt and response token ids


def load_tokenizer(path: str, untrained: bool = False):
    """A tokenizer with a chat template and a pad token; of a task only where a model may be `untrained`."""
    task = load_task(path)
    if task:
        check(untrained, f"{path}: an untrained model, for sft.py alone; name the folder of a trained one")
        check(hasattr(task, "model"), f"{path}: defines no model(); name a folder or a hub id")
        return task.model()[1]
    tokenizer = load_pretrained(transformers.AutoTokenizer, path)
    check(tokenizer.eos_token_id is not None, f"{path}: the tokenizer has no end-of-sequence token")
    if tokenizer.chat_template is None:
        log(f"{path}: no chat template; using '### User: ... ### Assistant: ...', saved with the trained model")
        begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + DEFAULT_CHAT_TEMPLATE
    tokenizer.chat_template = tokenizer.get_chat_template()  # of several, the one that is used is saved
    if tokenizer.pad_token_id is None:  # what is padding is told by position, never by id, so EOS serves
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def end_of_turn_id(tokenizer) -> int:
    """The token that ends an answer: the special token the chat template writes there, else EOS."""
    turn = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "final-answer"}]
    text = tokenizer.apply_chat_template(turn, tokenize=False)
    tail = text[text.rindex("final-answer") + len("final-answer") :]
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    return next((i for i in ids if i in special), tokenizer.eos_token_id)


def tokenize_prompt(tokenizer, prompt: list[dict]) -> list[int]:
    """Token ids of a chat-formatted prompt, up to where the answer starts; empty where the template refuses it."""
    template = tokenizer.chat_template
    if "strftime_now" in template:
        template = FIXED_CLOCK + template
    try:  # Mistral's and Gemma's refuse system messages
        text = tokenizer.apply_chat_template(prompt, chat_template=template, tokenize=False, add_generation_prompt=True,
                                             **TEMPLATE_ARGUMENTS)  # fmt: skip
    except jinja2.TemplateError:
        return []
    return tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own BOS


def control_ids(tokenizer) -> set[int]:
    """Tokens that structure a chat and must not stand in a text: special ones, marks of roles, ends of turns."""
    prompt = tokenize_prompt(tokenizer, [{"role": "user", "content": "question"}])
    added = tokenizer.added_tokens_decoder
    ids = {i for i, token in added.items() if token.special or (i in prompt and token.content.strip())}
    return (ids - {tokenizer.unk_token_id}) | {end_of_turn_id(tokenizer), tokenizer.eos_token_id}


def tokenize_answers(tokenizer, answers: list[str], max_length: int) -> list[list[int]]:
    """Token ids of answers, each with its end-of-turn token, cut to `max_length`.

    They are apart from the prompt's: nothing merges across the border. Control tokens in their text are taken out.
    """
    end, controls = end_of_turn_id(tokenizer), control_ids(tokenizer)
    texts = tokenizer(answers, add_special_tokens=False).input_ids if answers else []
    tokens = [[i for i in ids if i not in controls] + [end] for ids in texts]
    unknown = sum(ids.count(tokenizer.unk_token_id) for ids in texts) / max(1, sum(map(len, texts)))
    if unknown:
        log(f"  {unknown:.1%} of the answers' tokens are unknown to the tokenizer")
    spoilt = sum(len(ids) <= len(text) for ids, text in zip(tokens, texts))
    cut = sum(len(ids) > max_length for ids in tokens)
    if spoilt:
        log(f"  {spoilt} of {len(tokens)} answers had control tokens such as {tokenizer.decode([end])!r} in their text")
    if cut:
        log(f"  {cut} of {len(tokens)} answers cut to --response-length {max_length} tokens")
    return [ids[:max_length] for ids in tokens]


def fit_prompts(tokenizer, examples: list[Example], max_length: int, heldout: bool = False):
    """Examples whose prompt has at most `max_length` tokens, and those tokens; of held-out ones none need be left.

    A prompt with a control token in its text is left out, too: it could end a turn, or speak in another role.
    """
    controls = re.compile("|".join(map(re.escape, tokenizer.convert_ids_to_tokens(list(control_ids(tokenizer))))))
    known, kept, tokens, dropped = {}, [], [], Counter()
    for example in examples:
        key = str(example.prompt)
        if key not in known:  # a prompt often stands in many examples
            known[key] = tokenize_prompt(tokenizer, example.prompt)
        ids, reason = known[key], None
        if controls.search(key):
            reason = "with a control token of the tokenizer in its text"
        elif not ids:
            reason = "refused by the chat template"
        elif len(ids) > max_length:
            reason = f"longer than --max-prompt-length {max_length}"
        if reason:
            dropped[reason] += 1
        else:
            kept.append(example)
            tokens.append(ids)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    if dropped:
        log(f"  dropped prompts: {reasons}")
    check(kept or heldout, f"no prompt is left: {reasons}")
    return kept, tokens


def pad(sequences: list[list[int]], value: int, side: str, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequences` padded on `side` to the longest, or to `width` if that is wider: ids, and a mask that is True on
    tokens; both `(B, W)`."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]  # (B, 1)
    columns = torch.arange(max(width, lengths.max()))  # (W,)
    mask = columns >= len(columns) - lengths if side == "left" else columns < lengths  # (B, W)
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    return torch.full(mask.shape, value).masked_scatter(mask, tokens), mask


def pad_batch(prompts, responses, pad_id: int, device, widths: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
    """Prompts padded left and responses right: `input_ids`, `attention_mask (B, P + R)`, `response_mask (B, R)`.

    `prompts` and `responses` are lists of token ids; P and R are those of the longest, or of `widths` where wider.
    """
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left", widths[0])
    response_ids, response_mask = pad(responses, pad_id, "right", widths[1])
    return {
        "input_ids": torch.cat([prompt_ids, response_ids], 1).to(device),
        "attention_mask": torch.cat([prompt_mask, response_mask], 1).to(device),
        "response_mask": response_mask.to(device),
    }


def crop(input_ids, attention_mask, response_mask):
    """The same rows `(B, P + R)`, `(B, P + R)`, `(B, R)`, without the columns in which none of them has a token."""
    start = attention_mask.any(0).int().argmax()
    P, R = input_ids.shape[1] - response_mask.shape[1], response_mask.sum(1).max()
    return input_ids[:, start : P + R], attention_mask[:, start : P + R], response_mask[:, :R]


def by_length(rows: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`rows (N,)` of a batch `(B, T)`, short ones first: cut into micro-batches, they need little padding."""
    return rows[attention_mask[rows].sum(1).argsort(stable=True).cpu()]


def shuffled_batch(size: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Indices of batch `step` (from 1) of an endless walk through `size` rows, shuffled anew in each pass by `seed`."""
    start = (step - 1) * batch_size
    first, last = start // size, (start + batch_size - 1) // size
    seeds = [torch.Generator().manual_seed(seed * 1_000_003 + p) for p in range(first, last + 1)]
    order = torch.cat([torch.randperm(size, generator=generator) for generator in seeds])
    return order[start - first * size :][:batch_size].tolist()


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens alone: what learned positions need under left padding. `(B, T)`."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


def draw_trajectories(rng: random.Random, pool: list[Trajectory], prompt_ids: list[int], k: int) -> list[Trajectory]:
    """At most `k` trajectories from one policy's `pool`, none of them on `prompt_ids`: none can leak its answer."""
    drawn = rng.sample(pool, min(len(pool), 8 + k))
    return [trajectory for trajectory in drawn if trajectory[0] != prompt_ids][:k]


def condition(prompt_ids: list[int], trajectories: list[Trajectory], max_length: int) -> list[int]:
    """The prompt with `trajectories` (tau in the paper) in front, each cut to `max_length` tokens."""
    context = []
    for before, answer in trajectories:
        context += (before[max(0, len(before) - max_length // 2) :] + answer)[:max_length]
    return context + prompt_ids


# ---- Models ----------------------------------------------------------------------------------------------------------
def load_pretrained(auto_class, path: str, **kwargs):
    """`auto_class.from_pretrained(path)` with one-line errors."""
    local = Path(path).expanduser()
    # "runs/sft" would pass for a hub id, so the project's own output folders are always local.
    missing = path.startswith((".", "/", "~", "runs/")) and not local.is_dir()
    check(not missing, f"{path}: no such folder; has the stage that makes it been run?")
    unfinished = (local / ".dvpo-run").exists() and not (local / "README.md").exists()
    check(not unfinished, f"{path}: an unfinished run, not yet a model; --resume it first")
    # transformers, huggingface_hub and safetensors raise a dozen kinds
    with user_errors(Exception, f"{path}: cannot load {auto_class.__name__}"):
        return auto_class.from_pretrained(str(local) if local.is_dir() else path, **kwargs)


def decoder_layers(model) -> torch.nn.ModuleList:
    """The list of transformer blocks that FSDP shards one by one."""
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    check(isinstance(layers, torch.nn.ModuleList), f"{type(model).__name__}: no list of decoder layers found")
    return layers


def load_config(path: str):
    """The model's config, every dropout off: policy ratios and value targets must not be noisy."""
    config = load_pretrained(transformers.AutoConfig, path)
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def load_policy(path: str, tokenizer, dtype: torch.dtype):
    """A causal language model whose log-probs are `log_softmax(hidden @ head.T / temperature)`, nothing more."""
    task = load_task(path)
    if task:
        model = transformers.AutoModelForCausalLM.from_config(task.model()[0], dtype=dtype)
    else:
        model, info = load_pretrained(transformers.AutoModelForCausalLM, path, config=load_config(path), dtype=dtype,
                                      use_safetensors=True, output_loading_info=True)  # fmt: skip
        judges = "score.weight" in info["unexpected_keys"]  # it may lack nothing: where embeddings are tied
        check(not judges, f"{path}: no language model, but a value or reward model")
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        check(not missing, f"{path}: no language model, it lacks {missing}")
    # What ends an answer travels with the checkpoint, whatever the base model's own generation settings were.
    ends = sorted({end_of_turn_id(tokenizer), tokenizer.eos_token_id})
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    head, kind = model.get_output_embeddings(), model.config.model_type
    capped = getattr(model.config, "final_logit_softcapping", None)  # too little at small logits to be measured below
    check(capped is None, f"{path}: {kind} uses final_logit_softcapping: not supported")
    check(getattr(head, "bias", None) is None, f"{path}: {kind}'s output head has a bias: not supported")
    size = head.weight.shape[0]
    check(len(tokenizer) <= size, f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {size}")
    with torch.no_grad():
        ids = torch.tensor([[tokenizer.eos_token_id] * 2])
        logits, plain = model(ids).logits, model.base_model(ids).last_hidden_state @ head.weight.T  # (1, 2, V)
    # bf16 rounds by less; a scale or a cap changes more.
    scaled = (logits - plain).abs().max() > 0.05 * plain.abs().max()
    check(not scaled, f"{path}: {kind} does more to its logits than its output head: not supported")
    return model


def load_value_model(path: str, tokenizer, dtype: torch.dtype, fresh_head: bool):
    """A sequence classifier whose bias-free `score` head of width 1 is read at every token: GVM, critic, reward model.

    `fresh_head` starts the head at zero where the checkpoint has none (a language model); else one must be there.
    """
    config, auto_class = load_config(path), transformers.AutoModelForSequenceClassification
    known = type(config) in auto_class._model_mapping
    check(known, f"{path}: {config.model_type} has no sequence classifier, so no value head; use another model")
    right = fresh_head or config.num_labels == 1
    check(right, f"{path}: the head has {config.num_labels} outputs, expected 1; is it a GVM or a reward model?")
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id  # transformers' own head finds an answer's end by it
    model, info = load_pretrained(auto_class, path, config=config, dtype=dtype, use_safetensors=True,
                                  output_loading_info=True)  # fmt: skip
    head, missing = getattr(model, "score", None), set(info["missing_keys"])
    plain = isinstance(head, torch.nn.Linear) and head.bias is None
    check(plain, f"{path}: the head of {type(model).__name__} is not a plain `score` layer; use another model")
    if fresh_head and "score.weight" in missing:
        torch.nn.init.zeros_(head.weight)
        missing.remove("score.weight")
    check(not missing, f"{path}: no value or reward model, it lacks {', '.join(sorted(missing)[:3])}")
    return model


def check_same_tokenizer(path: str, tokenizer, other_path: str) -> None:
    """Raise `UserError` unless the model at `other_path` reads tokens as `tokenizer`, that of `path`, writes them."""
    other = load_tokenizer(other_path)
    same = tokenizer.get_vocab() == other.get_vocab() and tokenizer.chat_template == other.chat_template
    check(same, f"{other_path} and {path} have different tokenizers or chat templates: train both from the same model")


# ---- Output folders and checkpoints ----------------------------------------------------------------------------------
# What may differ when a run is resumed: it does not change what is computed.
FREE_SETTINGS = {"output_dir", "reward_output_dir", "resume", "checkpoint_every", "track", "sample_every", "max_kl",
                 "micro_batch_size", "rollout_micro_batch_size", "gradient_checkpointing", "dp_replicate"}  # fmt: skip


class Run:
    """One run: its folder, which several machines must share, its metrics, and its checkpoints.

    Rank 0 writes `args.json`, a copy of the script, `metrics.jsonl` and, at the end, the model; the model card
    `README.md` comes last and tells a finished run. `.dvpo-run` tells the folder from others. `checkpoints/step_N`
    holds sharded weights and optimizers, `state.json` and, written last, `manifest.json`: the SHA-256 of every file.
    No random generator is saved, as every draw is a function of seed and update.
    """

    def __init__(self, args, script: str):
        """Look, before anything is loaded: is the folder free, finished (`self.finished`), or to be resumed?"""
        self.args, self.script, self.folder = args, Path(script), Path(args.output_dir).expanduser()
        self.started, self.printed, self.signal, self.writes = time.time(), 0.0, 0, dist.get_rank() == 0
        self.finished, self.source, self.done = False, None, 0
        check_settings(args)
        with user_errors(OSError, f"--output-dir {self.folder}: cannot be read or written"):
            if self.folder.exists() and any(self.folder.iterdir()):
                self.look()
        dist.barrier()  # before rank 0 writes there

    def look(self) -> None:
        """The run that stands in the folder; raises `UserError` where there is another thing, or it cannot go on."""
        ours = (self.folder / ".dvpo-run").exists()
        check(ours, f"--output-dir {self.folder} holds other files than a run's: choose another")
        self.finished = (self.folder / "README.md").exists()
        kind = "a finished" if self.finished else "an unfinished"
        check(self.args.resume, f"--output-dir {self.folder} holds {kind} run: --resume or remove it")
        file = self.folder / "args.json"
        with user_errors((OSError, ValueError, TypeError), f"{file}: cannot be read, so the run cannot go on"):
            before, now = dict(json.loads(file.read_text())), json.loads(json.dumps(asdict(self.args)))
        changed = [f"--{name.replace('_', '-')} was {before.get(name)}, now {now.get(name)}" for name in sorted(now)
                   if name not in FREE_SETTINGS and before.get(name) != now.get(name)]  # fmt: skip
        check(not changed, f"{self.folder}: cannot go on with other settings: {'; '.join(changed)}")
        if self.finished:
            return log(f"{self.folder} is finished already")
        found = self.checkpoints()
        for checkpoint in reversed(found):
            problem = damage(checkpoint)
            if not problem:
                self.source, self.done = checkpoint, int(checkpoint.name.removeprefix("step_"))
                break
            log(f"{checkpoint}: {problem}; trying the one before")
        check(self.source or not found, f"{self.folder}: none of its checkpoints can be used")
        log(f"{self.folder}: going on from {self.source.name if self.source else 'the start, with no checkpoint yet'}")

    def checkpoints(self) -> list[Path]:
        """This run's checkpoints, oldest first: what bears the name that we give, and nothing else."""
        return sorted((self.folder / "checkpoints").glob("step_" + 6 * "[0-9]"))

    def start(self, trained: list[tuple], num_updates: int, data: str, **carried):
        """Restore the checkpoint if the run goes on from one, and take the folder.

        `trained`: a (model, optimizer, scheduler) each; `data`: their `fingerprint`; `carried`: what else the loop
        carries from update to update. Returns the number of updates done, and `carried` as attributes of an object, as
        given or as restored, which every checkpoint saves.
        """
        self.trained, self.num_updates, self.data = trained, num_updates, data
        self.carried, self.writer = types.SimpleNamespace(**carried), None
        metrics, lines = self.folder / "metrics.jsonl", []
        if self.source:
            state = json.loads((self.source / "state.json").read_text())
            same = state["data"] == data
            check(same, f"{self.source}: --dataset {self.args.dataset} or a frozen model has changed since")
            tensors = self.tensors()
            dcp.load(tensors, checkpoint_id=self.source)
            for i, (model, optimizer, scheduler) in enumerate(trained):
                set_state_dict(model, optimizer, model_state_dict=tensors[str(i)]["model"],
                               optim_state_dict=tensors[str(i)]["optimizer"])  # fmt: skip
                scheduler.load_state_dict(state["schedulers"][i])
            vars(self.carried).update(state["carried"])
            lines = metrics.read_text().splitlines(keepends=True)[: self.done]
        if self.writes:
            with user_errors(OSError, f"--output-dir {self.folder}: cannot be written"):
                (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                (self.folder / ".dvpo-run").touch()
                (self.folder / "args.json").write_text(json.dumps(asdict(self.args), indent=2) + "\n")
                shutil.copy(self.script, self.folder / self.script.name)
                metrics.with_suffix(".tmp").write_text("".join(lines))
                os.replace(metrics.with_suffix(".tmp"), metrics)
        if self.writes and self.args.track:
            with user_errors(Exception, f"--track {self.args.track}: pip install -e '.[track]', for wandb log in"):
                from torch.utils.tensorboard import SummaryWriter

                if self.args.track == "wandb":  # which reads what TensorBoard's writer writes, as in CleanRL
                    import wandb

                    wandb.init(project="dvpo", name=self.folder.name, config=asdict(self.args), sync_tensorboard=True)
                self.writer = SummaryWriter(self.folder / "tensorboard", purge_step=self.done + 1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: setattr(self, "signal", number))  # seen by `checkpoint`
        self.begun = time.time()
        return self.done, self.carried

    def tensors(self) -> dict:
        """Weights and optimizer states of what is trained, as shards."""
        parts = [get_state_dict(model, optimizer) for model, optimizer, _ in self.trained]
        return {str(i): {"model": model, "optimizer": optimizer} for i, (model, optimizer) in enumerate(parts)}

    def log(self, update: int, metrics: dict, show: tuple[str, ...]) -> None:
        """Append one update's metrics to metrics.jsonl, and print those named in `show`, at most every five seconds."""
        if not self.writes:
            return
        with open(self.folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": update, **metrics}) + "\n")
        for name, value in metrics.items() if self.writer else ():
            self.writer.add_scalar(name, value, update)
        now = time.time()
        if now - self.printed > 5 or update == self.num_updates:
            self.printed = now
            left = (now - self.begun) / (update - self.done) * (self.num_updates - update)
            shown = "  ".join(f"{name} {metrics[name]:.3g}" for name in show if name in metrics)
            log(f"{update:>5}/{self.num_updates}  {now - self.started:.0f} s, {left:.0f} s left  {shown}")

    def checkpoint(self, update: int) -> None:
        """After an update: save every `--checkpoint-every` and after the last; when told to stop, save and leave."""
        told, last = torch.tensor(self.signal), update == self.num_updates
        dist.all_reduce(told, dist.ReduceOp.MAX)  # one rank may have been told alone
        if told or last or update % self.args.checkpoint_every == 0:
            self.save_checkpoint(self.folder / "checkpoints" / f"step_{update:06d}")
        if told and not last:
            name = signal.Signals(told.item()).name
            log(f"stopped by {name} after update {update}: the same command with --resume goes on")
            end_processes()
            sys.exit(128 + told.item())  # as a shell would report it

    def save_checkpoint(self, folder: Path) -> None:
        """Write a checkpoint, whole only with its manifest, and drop all but the newest two."""
        if self.writes:
            shutil.rmtree(folder, ignore_errors=True)  # one that was damaged
            folder.mkdir()
            schedulers = [scheduler.state_dict() for _, _, scheduler in self.trained]
            state = {"carried": vars(self.carried), "data": self.data, "schedulers": schedulers}
            (folder / "state.json").write_text(json.dumps(state))
        dist.barrier()
        dcp.save(self.tensors(), checkpoint_id=folder)
        written = list(folder.glob(f"__{dist.get_rank()}_*"))
        if self.writes:
            written += [folder / ".metadata", folder / "state.json"]
        digests = [None] * dist.get_world_size()
        dist.all_gather_object(digests, {path.name: sha256(path) for path in written})
        if self.writes:
            manifest = {name: digest for part in digests for name, digest in part.items()}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)

    def save(self, model, state_dict: dict, tokenizer, title: str) -> None:
        """Write model (safetensors), config, tokenizer, chat template and model card, and end the run."""
        if self.writes:
            if model.config.tie_word_embeddings:
                state_dict.pop("lm_head.weight", None)  # it is the embedding, stored once
            dtype = next(iter(state_dict.values())).dtype
            model.save_pretrained(self.folder, state_dict=state_dict)  # empties the dict
            model.config.dtype = dtype  # not that of the fp32 model that was trained
            model.config.save_pretrained(self.folder)
            tokenizer.save_pretrained(self.folder)
            for file in self.folder.glob("model*.safetensors"):  # which safetensors lets only their owner read
                shutil.copymode(self.folder / "config.json", file)
            ranks = dist.get_world_size()
            command = f"torchrun --nproc_per_node {ranks} " if ranks > 1 else "python "
            (self.folder / "README.md").write_text(
                f"# {title}\n\nMade by\n\n```\n{command}{shlex.join(sys.argv)}\n```\n\nas in arXiv:2502.16944, with "
                f"torch {torch.__version__}, transformers {transformers.__version__}; metrics: `metrics.jsonl`.\n",
                encoding="utf-8",
            )
            log(f"saved {self.folder} after {time.time() - self.started:.0f} s")
        dist.barrier()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, if anything: is every file what was written?"""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        changed = [name for name in sorted({".metadata", "state.json", *manifest})
                   if sha256(checkpoint / name) != manifest[name]]  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"not whole ({error})"
    return f"{changed[0]} is not what was written" if changed else None


def fingerprint(data: list, *models: str) -> str:
    """Tells whether a run goes on with the data (told apart by their `repr`) and the frozen models it began with."""
    digest = hashlib.sha256(repr(data).encode())
    for path in models:
        folder = Path(cached_file(str(Path(path).expanduser()), "config.json")).parent  # a hub id's is in the cache
        for file in sorted(folder.glob("model*.safetensors")):  # what is loaded, as transformers names it
            digest.update(sha256(file).encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
