"""What the scripts share and no ablation changes: errors, processes, return-to-go, data, models, output folders.

Shapes: B sequences, P prompt tokens (padded left), R response tokens (padded right), T = P + R. A value model's output
from column P - 1 on is `values (B, R + 1)`: column 0 is V(s_1), column t is Q(s_t, a_t), which is V(s_{t+1}).
"""

import contextlib
import hashlib
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import sys
import time
import traceback
import types
import zlib
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.state_dict as dcp_state
import transformers
import tyro
from transformers.modeling_outputs import BaseModelOutputWithPast
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
    """Turn errors of `kinds` into a `UserError`: `message` and, in brackets, what they say."""
    try:
        yield
    except kinds as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        raise UserError(f"{message} ({cause})") from error


def parse(args_class):
    """The command line as an `args_class`; of a machine's processes only the first prints help or errors."""
    return tyro.cli(args_class, console_outputs=os.environ.get("LOCAL_RANK", "0") == "0")


@contextlib.contextmanager
def one_line_errors():
    """Turn what is foreseen into one line `error: ...` on stderr, and leave: with 2 for a `UserError`, else with 1.
    A bug keeps its traceback. Of several processes only the first to fail speaks: the others fail because of it."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:
        line, text = None, str(error)
        if isinstance(error, UserError):
            line = text
        elif isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in text:
            line = "out of memory: lower --micro-batch-size, --rollout-micro-batch-size or a length, or add processes"
        elif isinstance(error, (OSError, dcp.CheckpointException)) or "os error" in text:
            line = f"a file cannot be written ({text.splitlines()[-1]}): make room or mend it, then use --resume"
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
        check(device.index < torch.cuda.device_count(), "--nproc_per_node: more processes than GPUs")
        torch.cuda.set_device(device)
        # The first choice on an H100, and under a padding mask its gradients can be NaN (pytorch/pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    store, rank, world_size = dist.HashStore(), 0, 1  # of a single process
    if os.environ.keys() & {"RANK", "WORLD_SIZE"}:  # torchrun, or a scheduler that does as it does
        with user_errors((ValueError, dist.DistError), "environment: the processes cannot meet; start with torchrun"):
            store, rank, world_size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)  # kept over restarts
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


# ---- Return-to-go ----------------------------------------------------------------------------------------------------
def discounted_sums(x: torch.Tensor, decay: float) -> torch.Tensor:
    """`S_t = sum over u >= t of decay^(u - t) x_u` of `x (B, N)`, `(B, N)`: no loop, but one product of N^2 numbers."""
    steps = torch.arange(x.shape[1], dtype=x.dtype, device=x.device)
    ahead = (steps[:, None] - steps).clamp_(min=0)  # (N, N) u - t, with u along the rows
    return x @ (decay**ahead).tril_()


def td_lambda_returns(values, rewards, mask, gamma: float, lam: float) -> torch.Tensor:
    """TD(lambda) targets of a token-level value model: `lam` = 0 is one-step TD, the paper's, and 1 Monte Carlo.

    `values (B, R + 1)`, `rewards (B, R)`, `mask (B, R)` True on response tokens; returns `(B, R + 1)`, zero after the
    last token T: `G_T = r_T`, `G_t = r_t + gamma ((1 - lam) values_{t+1} + lam G_{t+1})`, r_0 = 0 at the prompt.
    """
    rewards = torch.nn.functional.pad(rewards.masked_fill(~mask, 0.0), (1, 0))  # (B, R + 1)
    next_values = torch.nn.functional.pad(values[:, 1:].masked_fill(~mask, 0.0), (0, 1))  # (B, R + 1)
    return discounted_sums(rewards + gamma * (1 - lam) * next_values, gamma * lam)


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
    """What the task file `path` defines; None where `path` names anything else. See tests/tasks/lists.py."""
    if not path.endswith(".py"):
        return None
    file = Path(path).expanduser()
    file = file if file.is_file() else Path(__file__).parent / path  # the defaults are found from anywhere
    check(file.is_file(), f"{path}: no such file")
    task = types.SimpleNamespace(**runpy.run_path(str(file)))
    if hasattr(task, "score"):
        exact = task.score

        def score(prompt, answer: str) -> float:
            number = to_score(exact(prompt, answer))
            check(number is not None, f"{path}: score() gave no finite number for {answer!r}")
            return number

        task.score = score
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
    subset: str | None = None  # which part of a benchmark it is from, as in RewardBench


def to_messages(value, role: str = "user") -> list[dict]:
    """A text (`role` says whose), a message or a conversation, in the shapes people bring, as messages of texts."""
    value = str(value) if type(value) in (int, float) else value
    if isinstance(value, str):
        if value.lstrip().startswith(("[{", '{"role')):  # JSON in a string
            with contextlib.suppress(ValueError):
                return to_messages(json.loads(value))
        if not value.lstrip().startswith("Human:"):
            return [{"role": role, "content": value}]
        parts = re.split(r"(?:^|\n\n)(Human|Assistant):", value.strip())  # HH-RLHF's transcripts
        value = [{"role": who, "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2]) if said.strip()]
    value = [value] if isinstance(value, dict) else value
    check(isinstance(value, list) and value, "no prompt: neither a column 'prompt' nor a conversation or transcript")
    messages = []
    for message in value:
        unread = [key for key in ("tool_calls", "function_call", "reasoning_content", "thinking") if message.get(key)]
        check(not unread, f"a message with {' and '.join(unread)}, which is not read")
        who, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(part["text"] for part in content)
        check(isinstance(who, str) and isinstance(content, str), "a message without a role or a text")
        messages.append({"role": ROLES.get(who, who), "content": content})
    return messages


def split_answer(prompt: list[dict] | None, answer) -> tuple[list[dict], str]:
    """Prompt messages and answer text, of an answer given as text, as its message, or as a whole conversation."""
    messages = to_messages(answer, "assistant")
    check(messages[-1]["role"] == "assistant", "the last message is not the assistant's")
    if messages[0]["role"] == "assistant":  # it goes on from the prompt
        messages = to_messages(prompt) + messages
    # Else it carries its own prompt, which wins: UltraFeedback's `prompt` column is its first turn as a string.
    return messages[:-1], messages[-1]["content"]


def to_score(value) -> float | None:
    """A finite number (ratings often come as strings), or None."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None


ROLES = {"human": "user", "Human": "user", "gpt": "assistant", "Assistant": "assistant"}  # ShareGPT's, HH-RLHF's
# Other names of the columns below: DVPO's released code, TRL, Alpaca, ShareGPT.
ALIASES = {
    "question": "prompt", "instruction": "prompt", "value_question": "prompt", "response_j": "chosen",
    "response_k": "rejected", "value_response": "response", "completion": "response", "output": "response",
    "messages": "response", "conversations": "response", "rewards": "score", "reward": "score", "label": "score",
    "model": "policy",
}  # fmt: skip
COLUMNS = ("prompt", "chosen", "rejected", "response", "score", "score_chosen", "score_rejected", "policy",
           "chosen_policy", "rejected_policy", "subset", "system", "input", "context", "history", "tools")  # fmt: skip
# What a dataset can be, and the columns it needs; the first that fits.
FORMATS = {"preference pairs": ("chosen", "rejected"), "answers": ("response",), "prompts": ("prompt",)}


def from_row(row: dict, kind: str, needs: str) -> Example:
    """A row of a dataset of `kind`, one of `FORMATS`; raises `UserError` where it lacks what a stage `needs`."""
    # Nulls are columns that are not there; of two names for a column, our own wins.
    row = {ALIASES.get(key, key): row[key] for key in sorted(row, key=lambda key: key not in ALIASES)
           if row[key] is not None}  # fmt: skip
    for column in ("history", "tools"):
        check(not row.get(column), f"a column {column!r}, which is not read: write it into the prompt")
    name = lambda key: str(row[key]) if key in row else None  # some datasets number their models
    prompt = row.get("prompt", row.get("response") if kind == "preference pairs" else None)  # `messages` before answers
    prompt = None if prompt is None else to_messages(prompt)
    for column in ("input", "context"):  # Alpaca's and Dolly's: what the instruction is about
        if prompt and isinstance(row.get(column), str) and row[column].strip():
            prompt[-1]["content"] += "\n\n" + row[column]
    sides = [split_answer(prompt, row[side]) for side in FORMATS[kind] if kind != "prompts"]
    check(all(asked == sides[0][0] for asked, _ in sides), "chosen and rejected answer different prompts")
    prompt = sides[0][0] if sides else prompt
    chosen, rejected = [*(answer for _, answer in sides), None, None][:2]
    if isinstance(row.get("system"), str) and row["system"].strip() and prompt[0]["role"] != "system":
        prompt = [{"role": "system", "content": row["system"]}, *prompt]
    scores = to_score(row.get("score_chosen", row.get("score"))), to_score(row.get("score_rejected"))
    answers = {"prompts": [], "pairs": [chosen, rejected]}.get(needs, [chosen])
    check(prompt[-1]["content"].strip(), "empty prompt")
    check(prompt[-1]["role"] != "assistant", "the prompt ends with the assistant")
    check(None not in answers, "no rejected answer")
    check(all(answer.strip() for answer in answers), "empty answer")
    check(not answers or chosen != rejected, "chosen and rejected are identical")
    check(needs != "scores" or None not in (scores[:1] if rejected is None else scores), "no score")
    writers = name("chosen_policy") or name("policy"), name("rejected_policy")
    return Example(prompt, chosen, rejected, *scores, *writers, name("subset"))


def read_rows(dataset: str, splits: tuple[str, ...]):
    """The rows of `NAME`, `NAME:SPLIT` or `NAME:CONFIG:SPLIT`: a hub dataset, a folder, or a file."""
    path, *config = os.path.expanduser(dataset).split(":")
    split, file = config.pop() if config else "", Path(path)
    check(file.exists() or not path.startswith((".", "/", "~")), f"--dataset {path}: no such file or folder")
    import datasets  # takes a second to import, and a task needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    with user_errors(Exception, f"--dataset {path}: neither readable here nor on the hub as NAME[[:CONFIG]:SPLIT]"):
        if file.is_file():  # read for what it holds, whatever its name
            with open(file, "rb") as stream:
                head = stream.read(100_000)
            if head.startswith(b"\x1f\x8b"):  # gzip
                head = zlib.decompressobj(wbits=31).decompress(head)
            text = head.decode("utf-8-sig", errors="replace").lstrip()
            kind = "parquet" if text.startswith("PAR1") else "json" if text[:1] in ("[", "{") else "csv"
            table = {"sep": max(",;\t", key=text.partition("\n")[0].count), "keep_default_na": False}
            data = datasets.load_dataset(kind, data_files=str(file), **table if kind == "csv" else {})
            surplus = "__index_level_0__" in data["train"].column_names  # where pandas puts it
            check(not surplus, "more fields in a row than columns: quote texts that hold a comma")
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            data = datasets.load_from_disk(str(file))
        else:
            found = datasets.load_dataset_builder(path, *config).config.data_files if file.is_dir() else None
            for one in sum((found or {}).values(), []):  # a folder's README may name any
                check(Path(os.path.abspath(one)).is_relative_to(file.absolute()), f"its README leads out to {one}")
            data = datasets.load_dataset(path, *config)
    data = data if isinstance(data, datasets.DatasetDict) else {"train": data}
    wanted = split or next((s for s in splits if s in data), next(iter(data)))
    check(wanted in data, f"--dataset {dataset}: no split {wanted!r}; there are {', '.join(data)}")
    log(f"dataset {path}: split {wanted!r} (there are {', '.join(data)})")
    return data[wanted]


def load_examples(dataset: str, needs: str) -> tuple[list[Example], list[Example]]:
    """Train and held-out examples of `dataset`; `needs` is "prompts", "answers", "pairs" or "scores". Held-out prompts
    are a task's own, else chosen by hash, so every stage and every seed holds out the same ones."""
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
    ours = {ALIASES.get(column, column): column for column in sorted(found, key=lambda column: column not in ALIASES)}
    kinds = [kind for kind in FORMATS if kind != "prompts" or needs == "prompts"]
    kind = next((kind for kind in kinds if set(FORMATS[kind]) <= ours.keys()), None)
    check(kind, f"--dataset {dataset}: its columns ({', '.join(found)}) fit none of: "
          f"{'; '.join(' + '.join(FORMATS[kind]) for kind in kinds)}; rename them")  # fmt: skip
    read = [ours[column] for column in COLUMNS if column in ours]
    if not isinstance(rows, list):
        rows = rows.select_columns(read)  # what is not read is not decoded, either, such as images
    examples, dropped = [], Counter()
    for row in rows:
        try:
            check(needs != "answers" or row.get("label") is not False, "labelled false")
            examples.append(from_row(row, kind, needs))
        except (UserError, KeyError, TypeError, AttributeError) as error:
            malformed = f"malformed row, or a null ({type(error).__name__}: {error})"
            dropped[str(error) if isinstance(error, UserError) else malformed] += 1
    unread = "; not read: " * (len(read) < len(found)) + ", ".join(column for column in found if column not in read)
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common())
    lost = f"\n  dropped {dropped.total()} rows: {reasons}" * bool(dropped)
    log(f"dataset {dataset}: {kind} ({', '.join(read)}{unread}), {len(rows)} rows, {len(examples)} examples{lost}")
    check(examples, f"--dataset {dataset}: no row can be used here: {reasons}")
    return examples


# ---- Tokens ----------------------------------------------------------------------------------------------------------
# For base models that come without one. An answer starts after a newline, so its first token is not fused to a colon.
DEFAULT_CHAT_TEMPLATE = """{% for message in messages %}
### {{ message.role | capitalize }}:
{{ message.content }}{{ eos_token if message.role == 'assistant' }}
{% endfor %}{{ '### Assistant:\\n' if add_generation_prompt }}"""
# Llama 3's template writes today's date unless given one, SmolLM3's asks a function: a run must not depend on the day.
# Nor would answers start with thoughts, as Qwen3's template has them: no dataset holds any.
TEMPLATE_ARGUMENTS = {"date_string": "26 Jul 2024", "enable_thinking": False}
FIXED_CLOCK = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}"
TURN = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "final-answer"}]  # a probe
Trajectory = tuple[array, array]  # prompt and response token ids
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"  # of transformers


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


def chat_text(tokenizer, messages: list[dict], **arguments) -> str:
    """`messages` as the chat template writes them; raises `UserError` where it refuses, changes or omits a text."""
    template = (FIXED_CLOCK if "strftime_now" in tokenizer.chat_template else "") + tokenizer.chat_template
    with user_errors(Exception, "refused by the chat template"):  # Mistral's and Gemma's refuse system messages
        text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False,
                                             **TEMPLATE_ARGUMENTS, **arguments)  # fmt: skip
    check(all(m["content"].strip() in text for m in messages), "changed or omitted by the chat template")
    return text


def tokenize_prompt(tokenizer, prompt: list[dict]) -> list[int]:
    """Token ids of a chat-formatted prompt, up to where the answer starts; raises as `chat_text` does."""
    text = chat_text(tokenizer, prompt, add_generation_prompt=True)
    if text.rstrip().endswith("<think>"):  # forced by some: no dataset holds any thoughts
        text = text.rstrip() + "\n\n</think>\n\n"
    return tokenizer(text, add_special_tokens=False).input_ids  # the template writes its own BOS


def chat_marks(tokenizer) -> tuple[str, int, set[int]]:
    """How a chat frames an answer: what to put before its text to get the tokens that it has there, as some tokenizers
    add a space of their own; the token that ends it; and all tokens that structure a chat, which no text may hold."""
    prompt, before, tail = [], "", ""
    with contextlib.suppress(UserError):
        prompt = tokenize_prompt(tokenizer, TURN[:1])
        before, _, tail = chat_text(tokenizer, TURN).rpartition("final-answer")
    alone, inside, after = (tokenizer(text, add_special_tokens=False).input_ids for text in ("x", "\nx", tail))
    lead = "\n" if alone[-1:] != inside[-1:] and not before.endswith(" ") else ""
    added = tokenizer.added_tokens_decoder
    end = next((i for i in after if i in added or i in tokenizer.all_special_ids), tokenizer.eos_token_id)
    controls = {i for i, token in added.items() if token.special or (i in prompt and token.content.strip())}
    return lead, end, (controls - {tokenizer.unk_token_id}) | {end, tokenizer.eos_token_id}


def tokenize_answers(tokenizer, answers: list[str], max_length: int) -> list[array]:
    """Token ids of answers without control tokens, each with its end-of-turn token, cut to `max_length`."""
    lead, end, controls = chat_marks(tokenizer)
    skip, tokens = len(tokenizer(lead, add_special_tokens=False).input_ids), []
    unknown, cut = "have parts unknown to the tokenizer", f"cut to --response-length {max_length} tokens"
    spoilt, counts = f"had control tokens such as {tokenizer.decode([end])!r} in their text", Counter()
    for start in range(0, len(answers), 1000):  # all at once would take 168 bytes a token; an array takes 4
        part = [lead + answer for answer in answers[start : start + 1000]]
        for ids in tokenizer(part, add_special_tokens=False).input_ids:
            kept = [i for i in ids[skip:] if i not in controls] + [end]
            counts[unknown] += tokenizer.unk_token_id in ids
            counts[spoilt] += skip + len(kept) <= len(ids)
            counts[cut] += len(kept) > max_length
            tokens.append(array("i", kept[:max_length]))
        if len(tokens) % 20_000 == 0:
            log(f"  {len(tokens)} of {len(answers)} answers tokenised")
    for what, count in (+counts).items():
        log(f"  {count} of {len(tokens)} answers {what}")
    return tokens


def fit_prompts(tokenizer, examples: list[Example], max_length: int, heldout: bool = False):
    """Examples whose prompt has at most `max_length` tokens, and no control token in its text, which could speak in
    another role; and the prompts' tokens. Of held-out examples none need be left."""
    controls = re.compile("|".join(map(re.escape, tokenizer.convert_ids_to_tokens(list(chat_marks(tokenizer)[2])))))
    known, kept, tokens, dropped = {}, [], [], Counter()
    for example in examples:
        key = str(example.prompt)
        try:
            check(not controls.search(key), "with a control token of the tokenizer in its text")
            if key not in known:  # a prompt often stands in many examples
                known[key] = array("i", tokenize_prompt(tokenizer, example.prompt))
            check(len(known[key]) <= max_length, f"longer than --max-prompt-length {max_length}")
            kept.append(example)
            tokens.append(known[key])
        except UserError as error:
            dropped[str(error)] += 1
    reasons = "; ".join(f"{count} x {reason}" for reason, count in dropped.most_common(9))
    if dropped:
        log(f"  dropped prompts: {reasons}")
    check(kept or heldout, f"no prompt is left: {reasons}")
    return kept, tokens


def pad(sequences: list[list[int]], value: int, side: str, width: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`sequences` padded on `side` to the longest or to `width`: ids, and a mask, True on tokens; `(B, W)` each."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])[:, None]  # (B, 1)
    columns = torch.arange(max(width, lengths.max()))  # (W,)
    mask = columns >= len(columns) - lengths if side == "left" else columns < lengths  # (B, W)
    tokens = torch.tensor([token for sequence in sequences for token in sequence], dtype=torch.long)
    return torch.full(mask.shape, value).masked_scatter(mask, tokens), mask


def pad_batch(prompts, responses, pad_id: int, device, widths: tuple[int, int] = (0, 0)) -> dict[str, torch.Tensor]:
    """Prompts padded left and responses right, lists of token ids, to the longest or to `widths` where that is wider:
    `input_ids`, `attention_mask (B, P + R)`, `response_mask (B, R)`."""
    prompt_ids, prompt_mask = pad(prompts, pad_id, "left", widths[0])
    response_ids, response_mask = pad(responses, pad_id, "right", widths[1])
    ids, mask = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "response_mask": response_mask.to(device)}


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


def condition(rng: random.Random, prompt_ids, pool: list[Trajectory], k: int, max_length: int) -> list[int]:
    """`prompt_ids` behind at most `k` trajectories (tau in the paper) of one policy's `pool`, each cut to `max_length`;
    none of them is on the same prompt, so none can leak its answer."""
    drawn = [other for other in rng.sample(pool, min(len(pool), 8 + k)) if other[0] != prompt_ids][:k]
    context = []
    for before, answer in drawn:
        context += [*before[max(0, len(before) - max_length // 2) :], *answer][:max_length]
    return [*context, *prompt_ids]


# ---- Models ----------------------------------------------------------------------------------------------------------
def load_pretrained(auto_class, path: str, **kwargs):
    """`auto_class.from_pretrained(path)` with one-line errors."""
    local = Path(path).expanduser()
    # "runs/sft" would pass for a hub id, so the project's own output folders are always local.
    whole = local.is_dir() and ((local / "README.md").exists() or not (local / ".dvpo-run").exists())
    missing = path.startswith((".", "/", "~", "runs/")) and not whole
    check(not missing, f"{path}: no such folder, or an unfinished run: run the stage that makes it, or --resume it")
    lone = auto_class is transformers.AutoTokenizer and [*local.glob("tokenizer.*")] == [local / "tokenizer.model"]
    with user_errors(Exception, f"{path}: cannot load {auto_class.__name__}{', which needs sentencepiece' * lone}"):
        return auto_class.from_pretrained(str(local) if local.is_dir() else path, trust_remote_code=False, **kwargs)


def decoder_layers(model) -> torch.nn.ModuleList:
    """The list of transformer blocks that FSDP shards one by one."""
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    check(isinstance(layers, torch.nn.ModuleList), f"{type(model).__name__}: no list of decoder layers found")
    return layers


def load_config(path: str):
    """The model's config, every dropout off: policy ratios and value targets must not be noisy."""
    check(not Path(path, "adapter_config.json").exists(), f"{path}: an adapter: merge it with its base model first")
    config = load_pretrained(transformers.AutoConfig, path)
    check(not hasattr(config, "quantization_config"), f"{path}: quantised weights cannot be trained: dequantise them")
    config.output_attentions = False
    config._attn_implementation = None  # ours to name: a config may ask for code from the hub
    text = config.get_text_config()  # itself, but for models that see, too
    scaled = set(re.findall("'rope_type': '(.*?)'", str(getattr(text, "rope_parameters", None))))
    scaled -= {"default", "linear", "llama3", "proportional", "yarn"}  # others depend on a batch's longest answer
    check(not scaled, f"{path}: positions of the type {', '.join(sorted(scaled))} are not supported")
    for name, value in vars(text).items():
        if name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate")) and isinstance(value, float):
            setattr(text, name, 0.0)
    return config


def load_weights(auto_class, path: str, config, dtype: torch.dtype):
    """The model, the names of its weights that the checkpoint lacks, and those of the checkpoint that it has not."""
    model, info = load_pretrained(auto_class, path, config=config, dtype=dtype, use_safetensors=True,
                                  ignore_mismatched_sizes=True, output_loading_info=True)  # fmt: skip
    sizes = [f"{name} is {[*there]}, not {[*wanted]}" for name, there, wanted in sorted(info["mismatched_keys"])]
    check(not sizes, f"{path}: weights of another size than needed: {'; '.join(sizes[:3])}")
    unread = {name for name in info["unexpected_keys"] if not name.startswith("lm_head.")}  # a value model has none
    if unread:
        log(f"warning: {path}: {len(unread)} of its weights are not read, such as {min(unread)}")
    return model, set(info["missing_keys"]), unread


def settle(args, path: str, **small):
    """`args` with the values `small`, tuned on the embedded task, for what is not named; a larger model, at `path`,
    gets none of them. Raises `UserError` for a number that is negative, not finite, or a size of 0."""
    missing = {name: value for name, value in small.items() if getattr(args, name) is None}
    flags = ", ".join("--" + name.replace("_", "-") for name in missing)
    large = missing and load_task(path) is None and getattr(load_config(path).get_text_config(), "hidden_size", 0) > 256
    check(not large, f"{flags}: name what suits {path}; the defaults suit small models alone")
    args = replace(args, **missing)
    if args.dtype == "auto":
        args = replace(args, dtype="bfloat16" if torch.cuda.is_available() else "float32")
    for name, value in vars(args).items():
        if isinstance(value, (int, float)):
            least = int(type(value) is int and name not in ("seed", "lora_rank", "num_context_trajectories"))
            check(least <= value < 2**62, f"--{name.replace('_', '-')} {value} must be at least {least} and finite")
    return args


def check_positions(path: str, model, num_tokens: int) -> None:
    """Raise `UserError` where a model's learned positions do not reach; rotary ones may, and it is only told."""
    limit = getattr(model.config, "max_position_embeddings", None) or num_tokens
    learned = any("wpe" in name or "position" in name for name, _ in model.named_parameters())
    text = f"{path}: prompt and answer take up to {num_tokens} tokens, and it was made for {limit}"
    check(num_tokens <= limit or not learned, f"{text}: lower --max-prompt-length or --response-length")
    if num_tokens > limit:
        log(f"warning: {text}")


def load_policy(path: str, tokenizer, dtype: torch.dtype):
    """A causal language model whose log-probs are `log_softmax(hidden @ head.T / temperature)`, nothing more."""
    task = load_task(path)
    if task:
        model = transformers.AutoModelForCausalLM.from_config(task.model()[0], dtype=dtype)
    else:
        model, missing, unread = load_weights(transformers.AutoModelForCausalLM, path, load_config(path), dtype)
        wrong = missing or "score.weight" in unread  # nothing is missing where tied
        check(not wrong, f"{path}: no language model: it lacks an output head, or is a value or reward model")
    given = model.generation_config.eos_token_id  # of its generation settings, what ends an answer goes on with it
    given = given if isinstance(given, list) else [given]
    ends, pad_id = {chat_marks(tokenizer)[1], tokenizer.eos_token_id, *given} - {None}, tokenizer.pad_token_id
    model.generation_config = transformers.GenerationConfig(eos_token_id=sorted(ends), pad_token_id=pad_id)
    head, kind = model.get_output_embeddings(), model.config.model_type
    model.config.tie_word_embeddings = head.weight is model.get_input_embeddings().weight  # whatever the config said
    check(getattr(model.config, "final_logit_softcapping", None) is None,  # too little to be measured below
          f"{path}: {kind} uses final_logit_softcapping: not supported")  # fmt: skip
    check(getattr(head, "bias", None) is None, f"{path}: {kind}'s output head has a bias: not supported")
    check(max(tokenizer.get_vocab().values()) < len(head.weight), f"{path}: the model lacks tokens of its tokenizer")
    check(all(p.isfinite().all() for p in model.parameters()), f"{path}: its weights are not finite")
    with torch.no_grad(), user_errors(Exception, f"{path}: {kind} does not compute as the scripts need it"):
        ids = torch.arange(6)[None]
        logits, hidden = model(ids).logits, model.base_model(ids).last_hidden_state  # (1, 6, V), (1, 6, H)
        cache = {CACHE: transformers.DynamicCache(config=model.config)}
        model.base_model(ids[:, :3], use_cache=True, **cache)
        cached = model.base_model(ids[:, 3:], use_cache=True, **cache).last_hidden_state  # (1, 3, H)
    plain = hidden @ head.weight.T  # bf16 rounds by less than what is allowed below
    check((logits - plain).abs().max() <= 0.05 * plain.abs().max(),
          f"{path}: {kind} does more to its logits than its output head: not supported")  # fmt: skip
    rounding = 0.01 if dtype == torch.float32 else 0.05
    check((cached - hidden[:, 3:]).abs().max() <= rounding * hidden.abs().max(),
          f"{path}: {kind} does not go on from a key-value cache: not supported")  # fmt: skip
    return model


def load_value_model(path: str, tokenizer, dtype: torch.dtype, fresh_head: bool):
    """A sequence classifier, its bias-free `score` head to be read at every token; `fresh_head`: zero where none is."""
    config, auto_class = load_config(path), transformers.AutoModelForSequenceClassification
    config.num_labels, config.pad_token_id = 1, tokenizer.pad_token_id  # by which transformers finds an answer's end
    model, missing, unread = load_weights(auto_class, path, config, dtype)
    head = getattr(model, "score", None)
    plain = isinstance(head, torch.nn.Linear) and head.bias is None and not any("score." in name for name in unread)
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


def dry_run(args, prompts, answers, bytes_each: int, context: int = 0) -> None:
    """What `--dry-run` adds to what is told of the data anyway: token counts, and an estimate of the memory of models
    as large as that at `--model-path`, which take `bytes_each` per parameter together, on prompts behind `context`."""
    for name, rows in (("prompts", prompts), ("answers", answers)):
        for bits, count in sorted(Counter(len(row).bit_length() for row in rows).items()):
            log(f"  {count:>8} {name} of {2**bits // 2} to {2**bits - 1} tokens {'#' * (50 * count // len(rows))}")
    config = load_task(args.model_path).model()[0] if load_task(args.model_path) else load_config(args.model_path)
    with torch.device("meta"), user_errors(ValueError, f"{args.model_path}: no language model"):  # without weights
        size = transformers.AutoModelForCausalLM.from_config(config).num_parameters()
    state, text = bytes_each * size * args.dp_replicate / dist.get_world_size() / 1e9, config.get_text_config()
    tokens = args.micro_batch_size * (context + max(map(len, prompts)) + args.response_length)
    layer = (2 if args.gradient_checkpointing else 34) * tokens * text.hidden_size / 1e9  # arXiv:2205.05198, in 16 bits
    log(f"memory per process, roughly: {state:.3f} GB of weights, gradients and optimizer states, and of activations "
        f"{layer * text.num_hidden_layers:.3f} GB")  # fmt: skip
    end_processes()


# ---- LoRA, arXiv:2106.09685 ------------------------------------------------------------------------------------------
def prepare(model, args):
    """`model`, to be trained as `args` say: with LoRA its weights are frozen, but for a value head's, and a pair beside
    each linear layer of the decoder layers is trained in fp32: `y = W x + B A x`, where B starts at zero."""
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank == 0:
        return model
    layers = [layer for layer in decoder_layers(model).modules() if isinstance(layer, torch.nn.Linear)]
    check(layers, f"--lora-rank: {model.config.model_type}'s decoder layers hold no nn.Linear: leave it at 0")

    def add_pair(layer, inputs, output):  # a forward hook
        if model.lora_on:
            return output + inputs[0] @ layer.lora_a.T @ layer.lora_b.T

    model.requires_grad_(False)
    model.lora_on, generator = True, torch.Generator().manual_seed(args.seed)
    for layer in layers:
        a = torch.empty(args.lora_rank, layer.in_features).uniform_(-1, 1, generator=generator)
        layer.lora_a = torch.nn.Parameter(a / layer.in_features**0.5)
        layer.lora_b = torch.nn.Parameter(torch.zeros(layer.out_features, args.lora_rank))
        layer.register_forward_hook(add_pair)
    if hasattr(model, "score"):
        model.score.float().requires_grad_(True)
    return model


# ---- Output folders and checkpoints ----------------------------------------------------------------------------------
# What may differ when a run is resumed: it does not change what is computed.
FREE_SETTINGS = {"output_dir", "reward_output_dir", "resume", "checkpoint_every", "track", "dry_run", "max_kl",
                 "micro_batch_size", "rollout_micro_batch_size", "gradient_checkpointing", "dp_replicate"}  # fmt: skip
TRAINED = dcp_state.StateDictOptions(ignore_frozen_params=True, strict=False)  # what a checkpoint holds of a model


class Run:
    """One run: its folder, which several machines must share, its metrics, and its checkpoints.

    Rank 0 writes `args.json`, a copy of the script, `metrics.jsonl` and, at the end, the model; the model card
    `README.md` comes last and tells a finished run. `.dvpo-run` tells the folder from others. `checkpoints/step_N`
    holds sharded weights and optimizers, `state.json` and, written last, `manifest.json`: the SHA-256 of every file.
    """

    def __init__(self, args, script: str):
        """Look, before anything is loaded: is the folder free, finished (`self.finished`), or to be resumed?"""
        self.args, self.script, self.folder = args, Path(script), Path(args.output_dir).expanduser()
        self.started, self.printed, self.signal, self.writes = time.time(), 0.0, 0, dist.get_rank() == 0
        self.finished, self.source, self.done = False, None, 0
        check(str(self.folder).isprintable(), f"--output-dir {self.folder}: has a character that cannot be saved to")
        with user_errors(OSError, f"--output-dir {self.folder}: cannot be read or written"):
            if self.folder.exists() and any(self.folder.iterdir()):
                self.look()
        dist.barrier()  # before rank 0 writes there

    def look(self) -> None:
        """The run that stands in the folder; raises `UserError` where there is another thing, or it cannot go on."""
        ours = (self.folder / ".dvpo-run").exists()
        check(ours, f"--output-dir {self.folder} holds other files than a run's: choose another")
        self.finished = (self.folder / "README.md").exists()
        check(self.args.resume, f"--output-dir {self.folder} holds a run: --resume or remove it, or choose another")
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
            problem = [damage(checkpoint) if self.writes else None]  # rank 0 reads it, for all
            dist.broadcast_object_list(problem)
            if not problem[0]:
                self.source, self.done = checkpoint, int(checkpoint.name.removeprefix("step_"))
                break
            log(f"{checkpoint}: {problem[0]}; trying the one before")
        damaged = any((path / "manifest.json").exists() for path in found)  # others were never whole
        check(self.source or not damaged, f"{self.folder}: none of its checkpoints can be used")
        log(f"{self.folder}: going on from {self.source.name if self.source else 'the start, with no checkpoint yet'}")

    def checkpoints(self) -> list[Path]:
        """This run's checkpoints, oldest first: what bears the name that we give, and nothing else."""
        return sorted((self.folder / "checkpoints").glob("step_" + 6 * "[0-9]"))

    def start(self, trained: list[tuple], num_updates: int, data: str, **carried):
        """Restore the checkpoint if the run goes on from one, and take the folder.

        `trained`: a (model, optimizer, scheduler) each; `data`: their `fingerprint`; `carried`: what else the loop
        carries on. Returns the number of updates done, and `carried` as an object's attributes, given or restored.
        """
        self.trained, self.num_updates, self.data = trained, num_updates, data
        self.carried, self.writer = types.SimpleNamespace(**carried), None
        logged = ""
        if self.source:
            state = json.loads((self.source / "state.json").read_text())
            check(state["data"] == data, f"{self.source}: --dataset or a frozen model has changed since")
            tensors = self.tensors()
            dcp.load(tensors, checkpoint_id=self.source)
            for i, (model, optimizer, scheduler) in enumerate(trained):
                dcp_state.set_state_dict(model, optimizer, **tensors[str(i)], options=TRAINED)
                scheduler.load_state_dict(state["schedulers"][i])
            vars(self.carried).update(state["carried"])
            logged = state["logged"]
        if self.writes:
            with user_errors(OSError, f"--output-dir {self.folder}: cannot be written"):
                (self.folder / "checkpoints").mkdir(parents=True, exist_ok=True)
                (self.folder / ".dvpo-run").touch()
                (self.folder / "args.json").write_text(json.dumps(asdict(self.args), indent=2) + "\n")
                shutil.copy(self.script, self.folder / self.script.name)
                (self.folder / "metrics.jsonl").write_text(logged)
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
        parts = [dcp_state.get_state_dict(*pair, options=TRAINED) for *pair, _ in self.trained]
        return {str(i): {"model_state_dict": m, "optim_state_dict": o} for i, (m, o) in enumerate(parts)}

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
            logged = (self.folder / "metrics.jsonl").read_text()  # so that it cannot be lost, or go on twice
            state = {"carried": vars(self.carried), "data": self.data, "schedulers": schedulers, "logged": logged}
            (folder / "state.json").write_text(json.dumps(state))
        dist.barrier()
        dcp.save(self.tensors(), checkpoint_id=folder)  # on rank 0 it returns when all have written
        if self.writes:
            manifest = {path.name: sha256(path) for path in folder.iterdir()}
            (folder / "manifest.json").write_text(json.dumps(manifest, indent=2))
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old)

    def save(self, model, dtype: torch.dtype, tokenizer, title: str) -> None:
        """Write the whole model, pairs merged, in `dtype`, its tokenizer and a model card; every rank must call."""
        whole = dcp_state.StateDictOptions(full_state_dict=True, cpu_offload=True)
        state_dict = dcp_state.get_model_state_dict(model, options=whole)  # empty but on rank 0
        if self.writes:
            for layer in [name.removesuffix("lora_a") for name in state_dict if name.endswith("lora_a")]:
                update = state_dict.pop(layer + "lora_b") @ state_dict.pop(layer + "lora_a")
                state_dict[layer + "weight"] = state_dict[layer + "weight"].float() + update
            state_dict = {name: x.to(dtype) if x.is_floating_point() else x for name, x in state_dict.items()}
            if model.config.tie_word_embeddings:
                state_dict.pop("lm_head.weight", None)  # it is the embedding, stored once
            bad = [name for name, tensor in state_dict.items() if not tensor.isfinite().all()]
            check(not bad, f"{self.folder}: not saved, as {', '.join(bad[:3])} is not finite")
            model.save_pretrained(self.folder, state_dict=state_dict)  # empties the dict
            model.config.dtype = dtype  # not that of the fp32 model that was trained
            model.config.save_pretrained(self.folder)
            tokenizer.save_pretrained(self.folder)
            start = f"torchrun --nproc_per_node {dist.get_world_size()}" if dist.get_world_size() > 1 else "python"
            card = (f"# {title}\n\nMade by\n\n```\n{start} {shlex.join(sys.argv)}\n```\n\nas in arXiv:2502.16944, with "
                    f"torch {torch.__version__} and transformers {transformers.__version__}.\n")  # fmt: skip
            (self.folder / "README.md").write_text(card, encoding="utf-8")
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
    digest = hashlib.sha256()
    for row in data:
        digest.update(repr(row).encode())
    for path in models:
        folder = Path(cached_file(str(Path(path).expanduser()), "config.json")).parent  # a hub id's is in the cache
        for file in sorted([folder / "config.json", *folder.glob("model*.safetensors")]):  # what is loaded
            digest.update(sha256(file).encode())
    return digest.hexdigest()


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
