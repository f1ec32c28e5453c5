"""What the scripts share and no ablation changes: errors, processes, return-to-go, data, models, output folders.

Nothing happens at import. Shapes: B sequences, P prompt tokens, R response tokens, T = P + R. Prompts are padded on the
left and responses on the right, so column P - 1 is the last prompt token of every row, and `[:, P - 1:]` of a value
model's output is `values (B, R + 1)`: column 0 is V(s_1), column t is Q(s_t, a_t), which is V(s_{t+1}).
"""

import contextlib
import fcntl
import gzip
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
import zlib
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated

import jinja2
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
import tyro
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import cached_file


# ---- Errors and processes --------------------------------------------------------------------------------------------
class UserError(Exception):
    """A mistake the user can mend; its message names the thing and the way out."""


def check(condition, message: str, error: type[Exception] = UserError) -> None:
    """Raise `error(message)` unless `condition` holds."""
    if not condition:
        raise error(message)


class RunError(Exception):
    """What stops a run that was set up rightly: numbers that are not finite, a full disk, a lost process."""


@contextlib.contextmanager
def user_errors(kinds, message: str):
    """Turn errors of `kinds` into a `UserError`: `message` and, in brackets, the cause."""
    try:
        yield
    except kinds as error:
        if out_of_memory(error):  # `explain` knows the way out
            raise
        raise UserError(f"{message} ({cause(error)})") from error


def out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def cause(error: BaseException) -> str:
    """The first line of what an error says; where several ranks could not save or load, the first one's."""
    if isinstance(error, dcp.CheckpointException):
        error, _traceback = next(iter(error.failures.values()))
    text = getattr(error, "strerror", None) or str(error)
    return next(iter(text.strip().splitlines()), type(error).__name__)


def parse(args_class):
    """The command line as an `args_class`; of a machine's processes only the first prints help or errors."""
    return tyro.cli(args_class, console_outputs=os.environ.get("LOCAL_RANK", "0") == "0")


@contextlib.contextmanager
def one_line_errors():
    """Turn what is foreseen into one line `error: ...` on stderr; anything else keeps its traceback.

    Exit code 2 for a `UserError`, 1 otherwise. Of several processes only the first to fail speaks: the others fail
    because of it.
    """
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        message = explain(error)
        if first_to_fail():
            line = f"error: {printable(' '.join(message.split()))}" if message else traceback.format_exc()
            print(line, file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)


def explain(error: Exception) -> str | None:
    """One line on an error that is foreseen, with the way out; None for a bug."""
    text = str(error)
    if isinstance(error, (UserError, RunError)):
        return text
    if out_of_memory(error):
        running = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
        if running & {"load_policy", "load_value_model", "shard"}:
            return "out of memory while loading the models: use more processes (each holds a share) or a smaller model"
        if "generate" in running:
            return "out of memory while sampling: lower --rollout-micro-batch-size (evaluate.py: --micro-batch-size), "\
                   "--max-prompt-length or --response-length"  # fmt: skip
        return "out of memory while computing a batch: lower --micro-batch-size, --max-prompt-length or "\
               "--response-length, add processes or, in training, --gradient-checkpointing"  # fmt: skip
    if re.search(r"\b(Errno|os error) (27|28|122)\b", text):  # no room, as Python and as safetensors tell it
        return f"an output file cannot be written ({text}): make room, then run it again, in training with --resume"
    if isinstance(error, dist.DistError) or "/gloo/" in text:
        return f"lost another process, killed perhaps or out of memory ({text.splitlines()[0]})"
    return None


_store = None  # the process group's key-value store, once the processes have met


def first_to_fail() -> bool:
    """Is this the first process of the run to ask?"""
    try:
        return _store is None or _store.add("failed", 1) == 1
    except Exception:  # the store is gone, and with it the process that held it: it has spoken
        return False


TIMEOUT = timedelta(minutes=10)  # how long a process waits for one that stays silent


def init_processes() -> torch.device:
    """Join the process group and return this rank's device: nccl on GPUs, gloo on CPUs, also for a single process."""
    transformers.logging.set_verbosity_error()  # what matters of a model's load report is checked below
    transformers.logging.disable_progress_bar()
    global _store
    _store = None
    if "RANK" in os.environ or "WORLD_SIZE" in os.environ:  # torchrun, or a scheduler that does as it does
        with user_errors((ValueError, dist.DistError), "environment: the processes cannot meet; start with torchrun"):
            inside = 0 <= int(os.environ.get("RANK", 0)) < int(os.environ.get("WORLD_SIZE", 1))
            check(inside, "environment: RANK must be from 0 to below WORLD_SIZE")  # or it would wait in vain
            _store, rank, world_size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        _store = dist.PrefixStore(f"attempt {attempt}", _store)  # torchrun keeps one store over its restarts
    else:
        _store, rank, world_size = dist.HashStore(), 0, 1
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        count = torch.cuda.device_count()
        check(device.index < count, f"--nproc_per_node: process {device.index + 1}, but only {count} GPUs")
        torch.cuda.set_device(device)
        # The first choice on an H100, and under a padding mask its gradients can be NaN (pytorch/pytorch#196678).
        torch.backends.cuda.enable_cudnn_sdp(False)
    dist.init_process_group(backend, store=_store, rank=rank, world_size=world_size, timeout=TIMEOUT)
    return device


def end_processes() -> None:
    """Leave the process group; the barrier keeps gloo from aborting while a slower rank still talks."""
    dist.barrier()
    dist.destroy_process_group()


def log(message: str) -> None:
    """Print on rank 0, control characters escaped: a model's or dataset's text must not command the terminal."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(printable(message), flush=True)


def printable(text: str) -> str:
    """`text` with control characters, but for ends of lines, escaped."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def all_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place."""
    dist.all_reduce(tensor)
    return tensor


def all_gather(tensor: torch.Tensor) -> torch.Tensor:
    """Equal shards from all ranks, stacked along the first dimension in rank order."""
    shards = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(shards, tensor.contiguous())
    return torch.cat(shards)


def rows_of_rank(count: int) -> list[int]:
    """Which of `count` rows this rank evaluates, equally many on each: `all_gather(...)[:count]` has them in order.

    Sharded ranks must run equally many forward passes, so the last repeats some rows.
    """
    share = -(-count // dist.get_world_size())
    return [i % count for i in range(dist.get_rank() * share, (dist.get_rank() + 1) * share)]


def check_finite(update: int, what: str, totals: torch.Tensor, rows: list[int], per_row: torch.Tensor) -> None:
    """Stop all ranks alike, before an optimizer step, when something in `totals` is not finite.

    `totals` (any shape) must be the same on all ranks. `rows (N,)` are this rank's rows of the batch, `per_row (N,)` a
    number of each that shows whether the trouble began there. Raises `RunError` naming update, ranks and rows.
    """
    if totals.isfinite().all():
        return
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, [row for row, ok in zip(rows, per_row.isfinite().tolist()) if not ok])
    where = "; ".join(f"rank {rank}, rows {', '.join(map(str, bad))}" for rank, bad in enumerate(found) if bad)
    raise RunError(
        f"update {update}: {what} not finite ({where or 'from the backward pass on, all rows'}); no step was made "
        "of it. Is the learning rate too high, or a model damaged?"
    )


def check_kl(update: int, kl: float, max_kl: float, judge: str) -> None:
    """Raise `RunError` when a policy is further than `max_kl` nats per answer from the reference."""
    check(kl <= max_kl, f"update {update}: {kl:.0f} nats per answer to the reference, above --max-kl: the policy has "
          f"collapsed or exploits the {judge}; lower --learning-rate or raise --kl-coef", RunError)  # fmt: skip


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


def check_positive(args, *names: str) -> None:
    """Raise `UserError` for a setting that is not above zero."""
    for name in names:
        value = getattr(args, name)
        check(value is None or 0 < value < math.inf, f"--{name.replace('_', '-')} {value} must be above 0")


def check_between(low: float, high: float, args, *names: str) -> None:
    """Raise `UserError` for a setting that is below `low` or above `high`, or no number."""
    for name in names:
        value = getattr(args, name)
        bound = f"from {low:g} to {high:g}" if high < math.inf else f"at least {low:g}"
        check(low <= value <= high and value < math.inf, f"--{name.replace('_', '-')} {value} must be {bound}")


def check_multiple(name: str, value: int, divisor: int, meaning: str) -> None:
    """Raise `UserError` unless `value` is a multiple of `divisor`; `meaning` says what that is."""
    check(value % divisor == 0, f"{name} {value} must be a multiple of {divisor}, {meaning}")


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on a CPU."""
    auto = "bfloat16" if device.type == "cuda" else "float32"
    return getattr(torch, auto if name == "auto" else name)


# ---- Return-to-go ----------------------------------------------------------------------------------------------------
def discounted_sums(x: torch.Tensor, decay: float) -> torch.Tensor:
    """`S_t = sum over u >= t of decay^(u - t) x_u`, for `x (B, N)`; returns `(B, N)`.

    One product with a triangular matrix: no loop over time, but some N^2 numbers (64 MB each at N = 4,096).
    """
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
    """`x` with zero mean and unit variance where `mask` (same shape) is True, zero elsewhere.

    Statistics are of what is given: give it the global batch, not a rank's share.
    """
    mean = masked_mean(x, mask)
    std = masked_mean((x - mean) ** 2, mask).sqrt()
    return ((x - mean) / (std + 1e-8)).masked_fill(~mask, 0.0)


# ---- How good is a value model? --------------------------------------------------------------------------------------
PERCENTILES = (1, 5, 10, 90, 95, 99)
FRACTIONS = (0.0, 0.25, 0.5, 0.75, 1.0)


def token_statistics(values: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Per-answer statistics of the token values (Table 4 of arXiv:2502.16944v1) and values by fraction of the answer.

    `values (B, R + 1)`, `mask (B, R)`. Returns `mean last p1 p5 ... p99` over the response tokens and `at_0 ... at_1`,
    the value once that fraction of the answer has been seen (`at_0`: the prompt alone); each `(B,)`.
    """
    tokens = values[:, 1:].double().masked_fill(~mask, math.nan)  # (B, R)
    lengths = mask.sum(1)  # (B,)
    statistics = {"mean": tokens.nanmean(1), "last": last_values(values.double(), mask)}
    for p in PERCENTILES:
        statistics[f"p{p}"] = tokens.nanquantile(p / 100, dim=1)
    for f in FRACTIONS:
        column = (f * lengths).round().long()[:, None]  # (B, 1)
        statistics[f"at_{f:g}"] = values.double().gather(1, column)[:, 0]
    return statistics


def last_values(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The value `(B,)` of each finished answer, of `values (B, R + 1)` and `mask (B, R)`; a reward model's score."""
    return values.gather(1, mask.sum(1, keepdim=True))[:, 0]


def wins(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """1 where `x` is above `y`, 1/2 where they are equal, 0 where it is below; the mean is a win rate or accuracy."""
    return (x > y).double() + 0.5 * (x == y).double()


def correlation(x: torch.Tensor, y: torch.Tensor) -> float:
    """Pearson's; 0 where either side is constant."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return (x @ y).item() / scale if scale > 0 else 0.0


def explained_variance(predicted: torch.Tensor, actual: torch.Tensor) -> float:
    """`1 - Var(actual - predicted) / Var(actual)`: 1 perfect, 0 no better than a constant; 0 for a constant outcome."""
    variance = actual.var(correction=0).item()
    return 1 - (actual - predicted).var(correction=0).item() / variance if variance > 0 else 0.0


def value_report(statistics: dict[str, torch.Tensor], outcomes: torch.Tensor, pairs: torch.Tensor) -> dict:
    """Held-out quality of a value model, from `token_statistics` of N answers.

    `outcomes (N,)` is what came of each answer (label or score); `pairs (M, 2)` indexes good and bad answers. Returns
    `pair_accuracy` by statistic (ties count half), `explained_variance` and `correlation` of the last value with the
    outcome, and all three `by_fraction` of the answer seen.
    """

    def quality(values):
        return {
            "pair_accuracy": wins(*values[pairs].unbind(1)).mean().item() if len(pairs) else None,
            "explained_variance": explained_variance(values, outcomes.double()),
            "correlation": correlation(values, outcomes.double()),
        }

    names = ["mean", "last", *(f"p{p}" for p in PERCENTILES)]
    return {
        **quality(statistics["last"]),
        "pair_accuracy": {name: quality(statistics[name])["pair_accuracy"] for name in names},
        "by_fraction": {f"{f:g}": quality(statistics[f"at_{f:g}"]) for f in FRACTIONS},
    }


def value_tables(report: dict) -> str:
    """`value_report` as two readable tables."""
    accuracy = report["pair_accuracy"]
    show = lambda x: "     -" if x is None else f"{x:6.3f}"
    lines = ["(p5: the 5th percentile of an answer's token values)"]
    lines.append(f"{'pair accuracy by':<20}" + " ".join(f"{name:>6}" for name in accuracy))
    lines.append(" " * 20 + " ".join(show(x) for x in accuracy.values()))
    lines.append(f"{'answer seen':<20}" + " ".join(f"{float(f):6.0%}" for f in report["by_fraction"]))
    names = {"pair_accuracy": "pair accuracy", "explained_variance": "explained variance",
             "correlation": "label correlation", "gold_correlation": "gold correlation"}  # fmt: skip
    for key, name in names.items():
        if all(key in row for row in report["by_fraction"].values()):
            lines.append(f"{name:<20}" + " ".join(show(row[key]) for row in report["by_fraction"].values()))
    return "\n".join(lines)


# ---- The embedded task: list so many things of a kind, without the ones excluded, and stop ---------------------------
TOY_CATEGORIES = {
    "animals": "dog cat horse cow sheep goat lion tiger bear wolf".split(),
    "fruits": "apple pear plum peach cherry grape lemon mango melon fig".split(),
    "tools": "hammer saw drill wrench chisel file plane clamp shovel rake".split(),
    "colors": "red green blue yellow purple pink brown black white grey".split(),
    "metals": "iron copper gold silver tin lead zinc nickel cobalt chrome".split(),
    "sports": "tennis golf rugby hockey boxing rowing judo squash polo cricket".split(),
    "trees": "oak pine birch maple cedar willow elm ash beech larch".split(),
    "cities": "paris london rome berlin madrid tokyo cairo delhi oslo lima".split(),
}
TOY_NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
# Fault rates of the behaviour policies: item of another kind, repetition, excluded item, wrong number of items.
TOY_POLICIES = {
    "expert": (0.01, 0.01, 0.02, 0.04),
    "careful": (0.02, 0.03, 0.06, 0.12),
    "hasty": (0.04, 0.03, 0.10, 0.45),
    "forgetful": (0.03, 0.20, 0.40, 0.20),
    "careless": (0.20, 0.08, 0.40, 0.35),
}
TOY_FAULT = 0.5  # what one fault costs
TOY_NOISE = 0.12  # scale of the annotators' Gumbel noise: their preferences are Bradley-Terry in gold / TOY_NOISE


def toy_gold(prompt: str, answer: str) -> float:
    """The exact score in [-1, 1] of an answer: 1 less half a point for every fault.

    Faults: an item of another kind, excluded, or named before; each item too many or too few; anything not written
    as "a, b and c.". Every prompt has perfect answers, and no answer is perfect for all prompts.
    """
    number, category = re.match(r"list (\w+) (\w+)", prompt).groups()
    excluded = re.findall(r"the (\w+)", prompt)
    items = [item for item in re.split(r", | and ", answer.removesuffix(".")) if item]
    allowed = [item in TOY_CATEGORIES[category] and item not in excluded for item in items]
    wrong = sum(not ok or item in items[:i] for i, (item, ok) in enumerate(zip(items, allowed)))
    faults = wrong + abs(len(items) - TOY_NUMBERS[number]) + (answer != toy_sentence(items))
    return max(-1.0, 1.0 - TOY_FAULT * faults)


def toy_sentence(items: list[str]) -> str:
    """`["a", "b", "c"]` as "a, b and c."."""
    return (", ".join(items[:-1]) + " and " if len(items) > 1 else "") + "".join(items[-1:]) + "."


def toy_answer(rng: random.Random, prompt: str, policy: str) -> str:
    """An answer to `prompt` as the named behaviour policy gives it."""
    wrong, repeat, forbidden, miscount = TOY_POLICIES[policy]
    number, category = re.match(r"list (\w+) (\w+)", prompt).groups()
    excluded = re.findall(r"the (\w+)", prompt)
    length = TOY_NUMBERS[number]
    if rng.random() < miscount:  # the hasty stop early, the others err both ways
        length = max(1, length + rng.choice([-2, -1, -1] if policy == "hasty" else [-1, 1, 2]))
    items = []
    for _ in range(length):
        fault = rng.random()
        fresh = [item for item in TOY_CATEGORIES[category] if item not in items and item not in excluded]
        if fault < wrong or not fresh:
            items.append(rng.choice(TOY_CATEGORIES[rng.choice([c for c in TOY_CATEGORIES if c != category])]))
        elif fault < wrong + repeat and items:
            items.append(rng.choice(items))
        else:
            items.append(rng.choice(fresh))
    if excluded and rng.random() < forbidden:
        items[rng.randrange(len(items))] = rng.choice(excluded)
    return toy_sentence(items)


def toy_examples(num_train: int = 16_000, num_heldout: int = 2_000) -> tuple[list, list]:
    """Preference pairs between random behaviour policies, train and held-out, over disjoint prompts.

    An annotator sees the gold score through Gumbel noise and prefers the higher: Bradley-Terry preferences. The noisy
    scores are kept as `score_chosen` and `score_rejected`.
    """
    rng = random.Random(0)
    prompts = []
    for number in TOY_NUMBERS:
        for category, items in TOY_CATEGORIES.items():
            prompts.append(f"list {number} {category}")
            prompts += [f"list {number} {category}, not the {a}" for a in items]
            prompts += [f"list {number} {category}, not the {a} or the {b}" for a in items for b in items if a < b]
    rng.shuffle(prompts)
    cut = len(prompts) // 5
    splits = []
    for pool, size in ((prompts[cut:], num_train), (prompts[:cut], num_heldout)):
        examples = []
        while len(examples) < size:
            prompt = pool[len(examples) % len(pool)]
            judged = []
            for policy in rng.choices(list(TOY_POLICIES), k=2):
                answer = toy_answer(rng, prompt, policy)
                score = toy_gold(prompt, answer) - TOY_NOISE * math.log(-math.log(rng.random()))
                judged.append((score, answer, policy))
            scores, answers, policies = zip(*sorted(judged, reverse=True))  # the preferred one first
            if answers[0] != answers[1]:
                examples.append(Example(to_messages(prompt), *answers, *scores, *policies))
        splits.append(examples)
    return tuple(splits)


TOY_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def toy_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """One token per word of the embedded task; decoding gives back the text exactly."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    words = ["list", *TOY_NUMBERS, *TOY_CATEGORIES, *sum(TOY_CATEGORIES.values(), []), "not", "the", "or", "and"]
    vocabulary = {token: i for i, token in enumerate([*special, *words, ",", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no space before a comma or a full stop
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"], chat_template=TOY_CHAT_TEMPLATE,
    )  # fmt: skip


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


SURROGATE = re.compile("[\ud800-\udfff]")  # half of a character: JSON may hold it, a tokenizer refuses it


class Drop(Exception):
    """This row cannot be used; the message is the reason that is counted."""


def to_messages(value) -> list[dict]:
    """A string, or a list of chat messages, as chat messages with string contents."""
    value = [{"role": "user", "content": value}] if isinstance(value, str) else value
    found = isinstance(value, list) and value
    check(found, "no prompt: neither a column 'prompt' nor a conversation or transcript", Drop)
    for message in value:
        texts = isinstance(message, dict) and all(isinstance(message.get(k), str) for k in ("role", "content"))
        check(texts, "a message without a role and a content that are texts", Drop)
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
    check(messages[-1]["role"] == "assistant", "the last message is not the assistant's", Drop)
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


def to_name(value) -> str | None:
    """Who wrote an answer, as text: some datasets number their models."""
    return None if value is None else str(value)


def from_pair(row: dict) -> list[Example]:
    prompt, chosen = split_answer(row.get("prompt"), row["chosen"])
    other_prompt, rejected = split_answer(row.get("prompt"), row["rejected"])
    check(prompt == other_prompt, "chosen and rejected answer different prompts", Drop)
    scores = to_score(row.get("score_chosen")), to_score(row.get("score_rejected"))
    policies = to_name(row.get("chosen_policy")), to_name(row.get("rejected_policy"))
    return [Example(prompt, chosen, rejected, *scores, *policies)]


def from_rated(row: dict) -> list[Example]:
    """openbmb/UltraFeedback: the best completion against each worse one."""
    rated = [(to_score(c["overall_score"]), c["response"], to_name(c.get("model"))) for c in row["completions"]]
    rated = sorted((c for c in rated if c[0] is not None and isinstance(c[1], str)), key=lambda c: -c[0])
    prompt = to_messages(row["prompt"])
    pairs = [(rated[0], worse) for worse in rated[1:] if worse[0] < rated[0][0]]
    check(pairs, "fewer than two completions of different score", Drop)
    return [Example(prompt, good[1], bad[1], good[0], bad[0], good[2], bad[2]) for good, bad in pairs]


def from_answer(row: dict) -> list[Example]:
    prompt, answer = split_answer(row.get("prompt"), row["response"])
    score, policy = to_score(row.get("score")), to_name(row.get("policy"))
    return [Example(prompt, answer, score_chosen=score, chosen_policy=policy)]


# Other names of the columns below: DVPO's released code, openbmb/UltraFeedback, TRL.
ALIASES = {
    "question": "prompt", "instruction": "prompt", "value_question": "prompt", "response_j": "chosen",
    "response_k": "rejected", "value_response": "response", "completion": "response", "messages": "response",
    "rewards": "score", "reward": "score", "model": "policy",
}  # fmt: skip
# Name, columns it needs, adapter; the first whose columns are there.
FORMATS = [
    ("preference pairs", ("chosen", "rejected"), from_pair),
    ("rated completions", ("prompt", "completions"), from_rated),
    ("answers", ("response",), from_answer),
    ("prompts", ("prompt",), lambda row: [Example(to_messages(row["prompt"]))]),
]


def renamed(row: dict) -> dict:
    """A row without its nulls, its columns named as the adapters know them; a column of that very name wins."""
    aliases_first = sorted(row, key=lambda column: column not in ALIASES)
    return {ALIASES.get(column, column): row[column] for column in aliases_first if row[column] is not None}


def read_rows(dataset: str, splits: tuple[str, ...]):
    """The rows (dicts) of `NAME[:SPLIT]`: a hub dataset, a local .jsonl, .json (.gz) or .parquet file or folder."""
    path, _, split = dataset.partition(":")
    file = Path(path).expanduser()
    name = file.name.removesuffix(".gz")
    looks_local = path.startswith((".", "/", "~")) or name.endswith((".jsonl", ".json", ".parquet"))
    check(not file.is_file() or split in ("", "train"), f"--dataset {dataset}: no split {split!r}; a file is 'train'")
    check(file.exists() or not looks_local, f"--dataset {path}: no such file or folder")
    if file.is_file() and name.endswith((".jsonl", ".json")):
        return read_json(file, lines=name.endswith(".jsonl"))
    check(not file.is_file() or name.endswith(".parquet"), f"--dataset {path}: expected .jsonl, .json or .parquet")
    import datasets  # takes a second to import and the embedded task needs none of it

    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what goes wrong is said below, once
    # datasets, pyarrow and huggingface_hub raise a dozen kinds
    with user_errors(Exception, f"--dataset {path}: neither readable here nor on the hub"):
        if file.is_file():
            data = datasets.load_dataset("parquet", data_files=str(file), split="train")
        elif (file / "dataset_dict.json").exists() or (file / "state.json").exists():
            data = datasets.load_from_disk(str(file))
        else:
            data = datasets.load_dataset(path)
    if not isinstance(data, datasets.DatasetDict):
        check(split in ("", "train"), f"--dataset {dataset}: no split {split!r}; {path} is 'train'")
    else:
        wanted = split or next((s for s in splits if s in data), next(iter(data)))
        check(wanted in data, f"--dataset {dataset}: no split {wanted!r}; there are {', '.join(data)}")
        log(f"dataset {path}: split {wanted!r} of {', '.join(data)}")
        data = data[wanted]
    return data


def read_json(file: Path, lines: bool) -> list[dict]:
    """The rows of a JSON-lines file or of a JSON list, gzipped or not; errors name the line."""
    number = 0
    try:
        with (gzip.open if file.suffix == ".gz" else open)(file, "rt", encoding="utf-8") as stream:
            if not lines:
                rows = json.load(stream)
            else:
                rows = []
                for line in stream:
                    number += 1
                    if line.strip():
                        rows.append(json.loads(line))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})") from error
    except (ValueError, RecursionError) as error:
        line, problem = number or getattr(error, "lineno", 1), getattr(error, "msg", error)
        raise UserError(f"{file}, line {line}: malformed JSON ({problem})") from error
    check(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), f"{file}: rows must be JSON objects")
    return rows


HELDOUT_FRACTION = 0.05  # of the prompts


def load_examples(dataset: str, needs: str) -> tuple[list[Example], list[Example]]:
    """Train and held-out examples of `dataset`, split by prompt; says which format was found and what was dropped.

    `needs` is "prompts", "answers", "pairs" or "scores". Held-out prompts are chosen by hash, so every stage and every
    seed holds out the same ones. Raises `UserError` when columns are missing or nothing is left.
    """
    if dataset == "toy":
        return toy_examples()
    preferred = {"answers": ("train_sft", "train"), "prompts": ("train_gen", "train_prefs", "train")}
    rows = read_rows(dataset, preferred.get(needs, ("train_prefs", "train")))
    check(len(rows) > 0, f"--dataset {dataset}: no rows")
    found = dict.fromkeys(column for row in rows for column in row) if isinstance(rows, list) else rows.column_names
    columns = {}  # the adapters' name -> the dataset's
    for column in found:
        columns.setdefault(ALIASES.get(column, column), []).append(column)
    formats = FORMATS if needs == "prompts" else FORMATS[:-1]
    fitting = [(name, wanted, adapter) for name, wanted, adapter in formats if set(wanted) <= set(columns)]
    known = "; ".join(" + ".join(wanted) for _, wanted, _ in formats)
    check(fitting, f"--dataset {dataset}: its columns ({', '.join(found)}) fit none of: {known}; rename them")
    name, wanted, adapter = fitting[0]
    for ours in {"prompt", *wanted} & columns.keys():
        names = columns[ours]
        clear = ours in names or len(names) == 1
        check(clear, f"--dataset {dataset}: {' and '.join(names)} could all be {ours!r}: rename one to that")
    examples, dropped = [], {}  # reason -> numbers of rows
    for number, row in enumerate(rows, 1):
        try:
            row = renamed(row)
            # Of rated completions, an answer to learn is the best one, once, not once for every worse one.
            fresh = adapter(row)[: 1 if needs == "answers" else None]
            for example in fresh:
                check_example(example, needs)
            examples += fresh
        except (Drop, KeyError, TypeError, AttributeError) as error:
            prompt = row.get("prompt")
            if needs == "prompts" and isinstance(prompt, str) and prompt.strip() and not SURROGATE.search(prompt):
                examples.append(Example(to_messages(prompt)))  # bad answers do not spoil a prompt
                continue
            reason = f"malformed row ({type(error).__name__}: {error})"
            if isinstance(error, Drop):
                reason = str(error)
            elif isinstance(error, KeyError):
                reason = f"{error.args[0]} is missing or null"
            dropped.setdefault(reason, []).append(number)
    log(f"dataset {dataset}: {name} ({', '.join(columns)}), {len(rows)} rows, {len(examples)} examples")
    dropped = sorted(dropped.items(), key=lambda item: -len(item[1]))
    for reason, numbers in dropped:
        log(f"  dropped {len(numbers)}: {reason} (the first is row {numbers[0]})")
    reasons = "; ".join(f"{len(numbers)} x {reason}" for reason, numbers in dropped[:3])
    check(examples, f"--dataset {dataset}: no row can be used here: {reasons}")
    # random.Random seeds itself with the SHA-512 of a text; Python's own hash() differs from process to process.
    heldout = [random.Random(e.prompt[-1]["content"]).random() < HELDOUT_FRACTION for e in examples]
    check(not all(heldout), f"--dataset {dataset}: too few prompts, all of them are held out")
    return [e for e, out in zip(examples, heldout) if not out], [e for e, out in zip(examples, heldout) if out]


def check_example(example: Example, needs: str) -> None:
    """Raise `Drop` where an example lacks what the stage needs."""
    answers = {"prompts": [], "pairs": [example.chosen, example.rejected]}.get(needs, [example.chosen])
    check(example.prompt[-1]["content"].strip(), "empty prompt", Drop)
    check(example.prompt[-1]["role"] != "assistant", "the prompt ends with the assistant", Drop)
    check(None not in answers, "no rejected answer", Drop)
    check(all(answer.strip() for answer in answers), "empty answer", Drop)
    check(not answers or example.chosen != example.rejected, "chosen and rejected are identical", Drop)
    texts = [text for message in example.prompt for text in message.values()]
    halves = any(SURROGATE.search(text) for text in (*texts, example.chosen or "", example.rejected or ""))
    check(not halves, "half a character (a lone surrogate): cut in UTF-16?", Drop)
    scores = [example.score_chosen] if example.rejected is None else [example.score_chosen, example.score_rejected]
    check(needs != "scores" or None not in scores, "no score", Drop)


# ---- Tokens ----------------------------------------------------------------------------------------------------------
# For base models that come without one. An answer starts after a newline, so its first token is not fused to a colon.
DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}### {{ message['role'].capitalize() }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)


def load_tokenizer(path: str):
    """The tokenizer of a local folder or hub id, with a chat template and a pad token."""
    check(path != "toy", "toy: an untrained model, for sft.py alone; name the folder of a trained one")
    tokenizer = load_pretrained(transformers.AutoTokenizer, path)
    foreign = type(tokenizer).__name__ == "MistralCommonBackend"  # knows no chat templates, and takes all of Mistral's
    check(not foreign, f"{path}: the package mistral-common has taken over its tokenizer: uninstall it")
    check(tokenizer.eos_token_id is not None, f"{path}: the tokenizer has no end-of-sequence token")
    if tokenizer.chat_template is None:
        log(f"{path}: no chat template; using '### User: ... ### Assistant: ...', saved with the trained model")
        begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + DEFAULT_CHAT_TEMPLATE
    with user_errors(ValueError, f"{path}: none of its chat templates is the default"):
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


# Llama 3's template writes today's date unless given one, SmolLM3's asks a function: a run must not depend on the day.
FIXED_DATE = "26 Jul 2024"
FIXED_CLOCK = "{% macro strftime_now(format) %}" + FIXED_DATE + "{% endmacro %}"
# Nor would answers start with thoughts, as Qwen3's template has them: no dataset holds any.
TEMPLATE_ARGUMENTS = {"date_string": FIXED_DATE, "enable_thinking": False}


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

    Answers are tokenised after and apart from the prompt's ids: nothing merges across the border. Control tokens in
    their text are taken out, so that each ends once.
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


def fit_prompts(
    tokenizer, examples: list[Example], max_length: int, heldout: bool = False
) -> tuple[list[Example], list[list[int]]]:
    """Examples whose prompt has at most `max_length` tokens, and those tokens; counts the others, with reasons.

    A prompt with a control token in its text is left out, too: it could end a turn, or speak in another role. Raises
    `UserError` when none is left, but for held-out examples.
    """
    marks = tokenizer.convert_ids_to_tokens(list(control_ids(tokenizer)))
    controls = re.compile("|".join(map(re.escape, marks)))
    known = {}  # a prompt often stands in many examples
    kept, tokens, dropped = [], [], Counter()
    for example in examples:
        key = str(example.prompt)
        if key not in known:
            ids, reason = tokenize_prompt(tokenizer, example.prompt), None
            if any(controls.search(message["role"] + " " + message["content"]) for message in example.prompt):
                reason = "with a control token of the tokenizer in its text"
            if len(ids) > max_length:
                reason = f"longer than --max-prompt-length {max_length}"
            known[key] = ids, reason if ids else "refused by the chat template"
        ids, reason = known[key]
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


def show_example(tokenizer, prompt_ids: list[int], response_ids: list[int]) -> None:
    """Print one example as the model sees it; control characters stay escaped."""
    log(f"  prompt: {tokenizer.decode(prompt_ids)!r}")
    log(f"  answer: {tokenizer.decode(response_ids)!r}")


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
    batch = {
        "input_ids": torch.cat([prompt_ids, response_ids], 1),
        "attention_mask": torch.cat([prompt_mask, response_mask], 1),
        "response_mask": response_mask,
    }
    return {key: tensor.to(device) for key, tensor in batch.items()}


def crop(input_ids, attention_mask, response_mask):
    """The same rows `(B, P + R)`, `(B, P + R)`, `(B, R)`, without the columns in which none of them has a token."""
    start = attention_mask.any(0).int().argmax()
    P, R = input_ids.shape[1] - response_mask.shape[1], response_mask.sum(1).max()
    return input_ids[:, start : P + R], attention_mask[:, start : P + R], response_mask[:, :R]


def by_length(rows: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """`rows (N,)` of a batch `(B, T)`, short ones first: cut into micro-batches, they need little padding."""
    return rows[attention_mask[rows].sum(1).argsort(stable=True).cpu()]


def shuffled_batch(size: int, step: int, batch_size: int, seed: int) -> list[int]:
    """Indices of batch `step` (from 1) of an endless walk through `size` rows, shuffled anew each pass.

    A function of its arguments alone: every rank and every resumed run sees the same order.
    """
    start = (step - 1) * batch_size
    first, last = start // size, (start + batch_size - 1) // size
    seeds = [torch.Generator().manual_seed(seed * 1_000_003 + p) for p in range(first, last + 1)]
    order = torch.cat([torch.randperm(size, generator=generator) for generator in seeds])
    return order[start - first * size :][:batch_size].tolist()


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions that count real tokens alone: what learned positions need under left padding. `(B, T)`."""
    return (attention_mask.cumsum(1) - 1).clamp(min=0)


Trajectory = tuple[list[int], list[int]]  # prompt and response token ids


def draw_trajectories(rng: random.Random, pool: list[Trajectory], prompt_ids: list[int], k: int) -> list[Trajectory]:
    """`k` trajectories of one policy from `pool`, all on prompts other than `prompt_ids`, so none can leak its answer.

    Fewer where the pool hardly has other prompts.
    """
    drawn, tries = {}, 0
    while len(drawn) < min(k, len(pool)) and tries < 20 * k:
        tries += 1
        i = rng.randrange(len(pool))
        if pool[i][0] != prompt_ids:
            drawn[i] = pool[i]
    return list(drawn.values())


def condition(prompt_ids: list[int], trajectories: list[Trajectory], max_length: int) -> list[int]:
    """The prompt with `trajectories` (tau in the paper) in front, each cut to `max_length` tokens."""
    context = []
    for before, answer in trajectories:
        context += (before[max(0, len(before) - max_length // 2) :] + answer)[:max_length]
    return context + prompt_ids


# ---- Models ----------------------------------------------------------------------------------------------------------
# The name of a model's key-value cache, in its arguments and outputs: transformers 5.24 has changed it.
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


def key_value_cache(model, length: int) -> DynamicCache | StaticCache:
    """An empty cache for `length` tokens: static where a CUDA graph can repeat the model's step for one token.

    That is on a GPU, where nothing in a step is for Python to decide or to count: no place in a sliding window, no
    length that a rotary embedding is scaled to, no choice of experts, and the mask a plain one of SDPA.
    """
    config, rope = model.config, getattr(model.config, "rope_parameters", None) or {}
    if (
        model.device.type == "cuda"
        and model._can_compile_fullgraph
        and config._attn_implementation == "sdpa"
        and rope.get("rope_type") not in ("dynamic", "longrope")
        and not any("expert" in name for name, _ in model.named_modules())
    ):
        cache = StaticCache(config, max_cache_len=length)
        if all(type(layer) is StaticLayer for layer in cache.layers):
            return cache
    return DynamicCache(config=config)


def cuda_graph(step):
    """Record what `step()` does, in place, to tensors on the GPU; returns a function that does it again in one launch.

    One by one, the hundreds of kernels of a decoding step take longer to launch than to run.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads may go on meanwhile
        step()
    return graph.replay


def load_pretrained(auto_class, path: str, **kwargs):
    """`auto_class.from_pretrained(path)` with one-line errors."""
    local = Path(path).expanduser()
    # "runs/sft" would pass for a hub id, so the project's own output folders are always local.
    made_by = {"runs/sft": "sft.py", "runs/gvm": "train_gvm.py", "runs/dvpo": "train_dvpo.py",
               "runs/rm": "train_ppo_baseline.py", "runs/ppo": "train_ppo_baseline.py"}  # fmt: skip
    hint = f"; `python {made_by[path]}` makes it" if path in made_by else ""
    check(local.is_dir() or not path.startswith((".", "/", "~", "runs/")), f"{path}: no such folder{hint}")
    unfinished = (local / "metrics.jsonl").exists() and not (local / "config.json").exists()
    check(not unfinished, f"{path}: an unfinished run, not yet a model; --resume it first")
    # transformers, huggingface_hub and safetensors raise a dozen kinds
    with user_errors(Exception, f"{path}: cannot load {auto_class.__name__}"):
        return auto_class.from_pretrained(str(local) if local.is_dir() else path, **kwargs)


def load_config(path: str, tokenizer):
    """The model's config, every dropout off: policy ratios and value targets must not be noisy."""
    if path == "toy":
        config = transformers.LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=8, max_position_embeddings=512, initializer_range=0.05, bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    else:
        config = load_pretrained(transformers.AutoConfig, path)
    for name, value in vars(config).items():
        if name.endswith(("dropout", "pdrop", "dropout_prob", "dropout_rate")) and isinstance(value, float):
            setattr(config, name, 0.0)
    return config


def decoder_layers(model) -> torch.nn.ModuleList:
    """The list of transformer blocks that FSDP shards one by one."""
    layers = getattr(model.base_model, "layers", None) or getattr(model.base_model, "h", None)
    check(isinstance(layers, torch.nn.ModuleList), f"{type(model).__name__}: no list of decoder layers found")
    return layers


def load_policy(path: str, tokenizer, dtype: torch.dtype):
    """A causal language model whose log-probs are `log_softmax(hidden @ head.T / temperature)`, nothing more.

    Raises `UserError` for heads that scale, cap or shift their logits, or that are smaller than the tokenizer.
    """
    config = load_config(path, tokenizer)
    capped = getattr(config, "final_logit_softcapping", None)  # too little at small logits to be measured below
    check(capped is None, f"{path}: {config.model_type} uses final_logit_softcapping: not supported")
    if path == "toy":
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model, info = load_pretrained(transformers.AutoModelForCausalLM, path, config=config, dtype=dtype,
                                      use_safetensors=True, output_loading_info=True)  # fmt: skip
        judges = "score.weight" in info["unexpected_keys"]  # it may lack nothing: where embeddings are tied
        check(not judges, f"{path}: no language model, but a value or reward model")
        missing = ", ".join(sorted(info["missing_keys"])[:3])
        check(not missing, f"{path}: no language model, it lacks {missing}")
    # What ends an answer travels with the checkpoint, whatever the base model's own generation settings were.
    ends = sorted({end_of_turn_id(tokenizer), tokenizer.eos_token_id})
    model.generation_config = transformers.GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    head = model.get_output_embeddings()
    check(getattr(head, "bias", None) is None, f"{path}: {config.model_type}'s output head has a bias: not supported")
    size = head.weight.shape[0]
    check(len(tokenizer) <= size, f"{path}: the tokenizer has {len(tokenizer)} tokens, the model only {size}")
    with torch.no_grad():
        ids = torch.tensor([[tokenizer.eos_token_id] * 2])
        logits, plain = model(ids).logits, model.base_model(ids).last_hidden_state @ head.weight.T  # (1, 2, V)
    # bf16 rounds by less; a scale or a cap changes more.
    scaled = (logits - plain).abs().max() > 0.05 * plain.abs().max()
    check(not scaled, f"{path}: {config.model_type} does more to its logits than its output head: not supported")
    return model


def load_value_model(path: str, tokenizer, dtype: torch.dtype, fresh_head: bool,
                     auto_class=transformers.AutoModelForTokenClassification):  # fmt: skip
    """A model with a bias-free head of width 1: a token classifier (GVM, critic) or, by `auto_class`, a reward model.

    `fresh_head` starts the head at zero where the checkpoint has none (a language model); without it there must be one.
    Either kind loads from the other's checkpoint. Raises `UserError` for architectures without such a head, a wrong
    width, or a missing head.
    """
    config = load_config(path, tokenizer)
    families = "use a Llama, Qwen2, Qwen3, Mistral or Gemma model"
    known = type(config) in auto_class._model_mapping
    check(known, f"{path}: {config.model_type} has no {auto_class.__name__}; {families}")
    right = fresh_head or config.num_labels == 1
    check(right, f"{path}: the head has {config.num_labels} outputs, expected 1; is it a GVM or a reward model?")
    config.num_labels, config.classifier_dropout, config.token_classification_bias = 1, 0.0, False
    config.pad_token_id = tokenizer.pad_token_id  # transformers' own head finds an answer's end by it
    model, info = load_pretrained(auto_class, path, config=config, dtype=dtype,
                                  use_safetensors=True, output_loading_info=True)  # fmt: skip
    head = getattr(model, "score", None)
    plain = isinstance(head, torch.nn.Linear) and head.bias is None
    check(plain, f"{path}: the head of {type(model).__name__} is not a plain `score` layer; {families}")
    if fresh_head and "score.weight" in info["missing_keys"]:
        torch.nn.init.zeros_(head.weight)
        info["missing_keys"].remove("score.weight")
    missing = ", ".join(sorted(info["missing_keys"])[:3])
    check(not missing, f"{path}: no value or reward model, it lacks {missing}")
    return model


def check_same_tokenizer(path: str, tokenizer, other_path: str) -> None:
    """Raise `UserError` unless the model at `other_path` reads tokens as `tokenizer`, that of `path`, writes them."""
    other, pair = load_tokenizer(other_path), f"{other_path} and {path} have different"
    same = tokenizer.get_vocab() == other.get_vocab()
    sizes = f"{len(other)} and {len(tokenizer)} tokens"
    check(same, f"{pair} tokenizers ({sizes}): train both from the same model")
    same = tokenizer.chat_template == other.chat_template
    check(same, f"{pair} chat templates: train both from the same model")


# ---- Output folders and checkpoints ----------------------------------------------------------------------------------
# `--resume` alone is (), the newest checkpoint; `--resume PATH` is (PATH,).
Resume = Annotated[tuple[str, ...] | None, tyro.conf.arg(metavar="[PATH]")]
# What may differ when a run is resumed: it does not change what is computed.
FREE_SETTINGS = {"output_dir", "reward_output_dir", "resume", "overwrite", "checkpoint_every", "track", "sample_every",
                 "micro_batch_size", "rollout_micro_batch_size", "gradient_checkpointing", "dp_replicate",
                 "max_kl"}  # fmt: skip


class Run:
    """One run: its folder, its metrics, and the checkpoints from which it goes on after an interruption.

    Rank 0 writes `args.json`, a copy of the script, `metrics.jsonl` and, at the end, the model; `config.json` comes
    last and tells a finished run. `checkpoints/step_N` holds sharded weights and optimizers
    (torch.distributed.checkpoint), `state.json` and `manifest.json`, the SHA-256 of every file; it is written aside and
    renamed when whole. There is no random generator's state in it: every draw is a function of seed and update. Several
    machines must share the folder.
    """

    def __init__(self, args, script: str):
        """Look, before anything is loaded: is the folder free, finished (`self.finished`), or to be resumed?

        Raises `UserError` for a folder that holds a run nobody said to resume or overwrite, that another run is using,
        for a run with other settings, and where no checkpoint is whole.
        """
        self.args, self.script, self.folder = args, Path(script), Path(args.output_dir).expanduser()
        self.checkpoints = self.folder / "checkpoints"
        self.started, self.printed, self.signal = time.time(), 0.0, 0
        self.lock, self.metrics, self.tracker = None, None, None
        self.taken = contextlib.ExitStack()  # what must be given back so that another run can follow in this process
        self.writes = dist.get_rank() == 0
        check_positive(args, "checkpoint_every", "micro_batch_size", "max_prompt_length", "response_length",
                       "max_grad_norm", "dp_replicate")  # fmt: skip
        check_between(0, 10**9, args, "seed")
        check_between(0, math.inf, args, "learning_rate")
        check(args.output_dir.strip(), "--output-dir is empty")
        inputs = [path for name, path in vars(args).items() if name.endswith("_path") and path]
        reads = self.folder.resolve() in [Path(path).expanduser().resolve() for path in inputs]
        check(not reads, f"--output-dir {self.folder} holds a model that this run reads: choose another")
        check(args.resume is None or not args.overwrite, "--resume goes on, --overwrite starts again: choose one")
        check(args.resume is None or len(args.resume) < 2, "--resume takes one checkpoint at most")
        installed = args.track is None or importlib.util.find_spec(args.track)
        check(installed, f"--track {args.track}: not installed; pip install -e '.[track]'")
        seen = [None, False, []]  # what is wrong; finished?; checkpoints to try: rank 0 looks, for all
        if self.writes:
            try:
                with user_errors(OSError, f"--output-dir {self.folder}: cannot be read or written"):
                    seen[1:] = self.look()
            except UserError as error:
                seen[0] = str(error)
        dist.broadcast_object_list(seen)
        problem, self.finished, candidates = seen
        check(not problem, problem)
        self.source = next(filter(self.is_whole, candidates), None)
        check(self.source or not candidates, f"{self.folder}: none of its checkpoints can be used; --overwrite starts "
              "again")  # fmt: skip
        self.done = int(self.source.name.removeprefix("step_")) if self.source else 0

    def look(self) -> tuple[bool, list[Path]]:
        """Is the run in the folder finished, and from which checkpoints may it go on, newest first? On rank 0."""
        if self.folder.is_dir() and any(self.folder.iterdir()):
            ours = any((self.folder / name).exists() for name in ("args.json", "config.json", ".lock"))
            check(ours, f"--output-dir {self.folder} holds other files than a run's: choose another")
            self.take_lock()
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))  # by torchrun --max-restarts
        restarted = restarts > 0 and self.lock is not None and self.lock.read() == launch()
        finished, begun = (self.folder / "config.json").exists(), (self.folder / "metrics.jsonl").exists()
        if self.args.resume is None and not restarted:
            allowed = self.args.overwrite
            reward = getattr(self.args, "reward_output_dir", None) == self.args.output_dir
            ways = f"use it by --reward-path {self.folder}" if reward else "choose another --output-dir"
            check(allowed or not finished, f"{self.folder} holds a finished run or a model: {ways}, or --overwrite it")
            check(allowed or not begun, f"{self.folder} holds an unfinished run: --resume or --overwrite it")
            return False, []
        found = sorted((p for p in self.checkpoints.glob("step_*") if p.name[5:].isdigit()), reverse=True)
        if self.args.resume and not restarted:  # a restart goes on from the newest, which came after PATH
            found = [path for path in found if path.resolve() == Path(self.args.resume[0]).expanduser().resolve()]
            check(found, f"--resume {self.args.resume[0]}: no checkpoint of {self.folder}")
        if begun or finished:
            file, kinds = self.folder / "args.json", (OSError, ValueError, AttributeError)
            with user_errors(kinds, f"{file}: cannot be read; --overwrite starts again"):
                before = json.loads(file.read_text())
                changed = self.changed(before)
            check(not changed, f"{self.folder}: cannot go on with other settings: {changed}")
        if finished:
            log(f"{self.folder} is finished already")
            return True, []
        if not found:
            log(f"{self.folder}: no checkpoint yet, starting from the beginning")
        return False, found

    def take_lock(self) -> None:
        """Hold the folder for this process; the system gives it back when the process ends, however it ends."""
        self.lock = self.taken.enter_context(open(self.folder / ".lock", "a+"))
        with user_errors(BlockingIOError, f"{self.folder} is in use by another run: choose another --output-dir"):
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.lock.seek(0)

    def changed(self, before: dict) -> str:
        """How the settings differ from those `before`."""
        now = json.loads(json.dumps(asdict(self.args)))
        return "; ".join(f"--{name.replace('_', '-')} was {before.get(name)}, now {now.get(name)}"
                         for name in sorted(now.keys() | before.keys())
                         if name not in FREE_SETTINGS and before.get(name) != now.get(name))  # fmt: skip

    def is_whole(self, checkpoint: Path) -> bool:
        """Is every file of a checkpoint what was written? All ranks share the reading, and say what is wrong."""
        problem = None
        try:
            manifest = json.loads((checkpoint / "manifest.json").read_text())
            names = sorted(manifest.keys() | {".metadata", "state.json"})
            for name in names[dist.get_rank() :: dist.get_world_size()]:
                if sha256(checkpoint / name) != manifest[name]:
                    problem = f"{name} is not what was written"
            changed = self.changed(json.loads((checkpoint / "state.json").read_text())["args"])
            problem = f"of another run: {changed}" if changed else problem
        except OSError as error:
            problem = f"{Path(error.filename or checkpoint).name} cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError, AttributeError):
            problem = "its manifest is damaged"
        problems = [None] * dist.get_world_size()
        dist.all_gather_object(problems, problem)
        problem = next((problem for problem in problems if problem), None)
        named = [Path(path).expanduser().resolve() for path in self.args.resume or ()]
        check(not problem or checkpoint.resolve() not in named, f"--resume {checkpoint}: {problem}")
        if problem:
            log(f"{checkpoint}: {problem}; trying the one before")
        return not problem

    def start(self, trained: list[tuple], num_updates: int, data: str, **carried):
        """Take the folder, and restore the checkpoint if the run goes on from one.

        `trained`: a (model, optimizer, scheduler) each; `data`: their `fingerprint`; `carried`: what else the loop
        carries from update to update. Returns the number of updates done, and `carried` as attributes of an object, as
        given or as restored, which every checkpoint saves.
        """
        self.trained, self.num_updates, self.data = trained, num_updates, data
        self.carried = types.SimpleNamespace(**carried)
        if self.source is not None:
            self.restore()
        self.take_folder()
        self.start_tracker()
        for number in (signal.SIGTERM, signal.SIGINT):  # ours from now on, the old handler's again when the run ends
            self.taken.callback(signal.signal, number, signal.signal(number, self.stop))
        return self.done, self.carried

    def take_folder(self) -> None:
        """Leave in the folder what belongs to the updates done, and nothing else of a run; on rank 0, once."""
        if not self.writes or self.metrics:
            return
        with user_errors(OSError, f"--output-dir {self.folder}: cannot be written"):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if self.lock is None:
                self.take_lock()
                others = (self.folder / "config.json").exists() or (self.folder / "metrics.jsonl").exists()
                check(not others, f"{self.folder}: another run has begun there meanwhile: choose another --output-dir")
            self.lock.truncate(0)
            self.lock.write(launch())
            self.lock.flush()
            (self.folder / "config.json").unlink(missing_ok=True)  # first: from here on nothing is finished
            for path in self.folder.glob("model*.safetensors*"):
                path.unlink()
            for path in self.checkpoints.iterdir():  # of an abandoned future, or not finished
                if not path.name[5:].isdigit() or int(path.name[5:]) > self.done:
                    shutil.rmtree(path)
            (self.folder / "args.json").write_text(json.dumps(asdict(self.args), indent=2) + "\n")
            shutil.copy(self.script, self.folder / self.script.name)
            metrics = self.folder / "metrics.jsonl"
            lines = metrics.read_text().splitlines(keepends=True)[: self.done] if self.done else []
            write_synced(metrics.with_suffix(".tmp"), "".join(lines))
            os.replace(metrics.with_suffix(".tmp"), metrics)
            self.metrics = self.taken.enter_context(open(metrics, "a", buffering=1))

    def start_tracker(self) -> None:
        """Send metrics to what `--track` names, too; a resumed run goes on there."""
        if self.writes and self.args.track == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = self.taken.enter_context(SummaryWriter(self.folder / "tensorboard", purge_step=self.done + 1))
            self.tracker = lambda metrics, step: [writer.add_scalar(k, v, step) for k, v in metrics.items()]
        elif self.writes and self.args.track == "wandb":
            import wandb

            before = getattr(self.carried, "wandb_id", None)
            with user_errors(Exception, "--track wandb: cannot start; `wandb login`, or WANDB_MODE=offline"):
                tracked = wandb.init(project="dvpo", name=self.folder.name, config=asdict(self.args), dir=self.folder,
                                     id=before, resume="allow")  # fmt: skip
            self.carried.wandb_id = tracked.id
            self.tracker = wandb.log
            self.taken.callback(wandb.finish)

    def stop(self, number: int, _) -> None:
        """On a signal: finish the update, then save and leave. A second Ctrl-C leaves at once."""
        self.signal = number
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)

    def told_to_stop(self) -> int:
        """The number of the signal that this or another rank has received, else 0."""
        number = torch.tensor(self.signal)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def leave(self, number: int, after: str) -> None:
        """Leave with 128 + the signal's number, as a shell would report it, on all ranks."""
        log(f"stopped by {signal.Signals(number).name} after {after}: the same command with --resume goes on")
        self.taken.close()
        end_processes()
        sys.exit(128 + number)

    def log(self, update: int, metrics: dict, show: tuple[str, ...]) -> None:
        """Append one update's metrics to metrics.jsonl, and print those named in `show`, at most every five seconds."""
        if not self.writes:
            return
        self.metrics.write(json.dumps({"step": update, **metrics}) + "\n")
        if self.tracker:
            self.tracker(metrics, update)
        if time.time() - self.printed > 5 or update == self.num_updates:
            self.printed = time.time()
            shown = "  ".join(f"{name} {metrics[name]:.3g}" for name in show if name in metrics)
            print(f"{update:>5}/{self.num_updates}  {self.printed - self.started:4.0f} s  {shown}", flush=True)

    def checkpoint(self, update: int) -> None:
        """After an update: save every `--checkpoint-every`, after the last, and when told to stop; then leave."""
        told = self.told_to_stop() if update < self.num_updates else 0
        if told or update % self.args.checkpoint_every == 0 or update == self.num_updates:
            self.save_checkpoint(update)
        if told:
            self.leave(told, f"update {update}")

    def save_checkpoint(self, update: int) -> None:
        """Write `checkpoints/step_N`, whole or not at all, and drop all but the newest two."""
        target, unfinished = self.checkpoints / f"step_{update:06d}", self.checkpoints / ".unfinished"
        try:
            if self.writes:
                os.fsync(self.metrics.fileno())
                unfinished.mkdir()
                state = {"args": asdict(self.args), "carried": vars(self.carried), "data": self.data,
                         "versions": versions(), "ranks": dist.get_world_size(),
                         "schedulers": [scheduler.state_dict() for _, _, scheduler in self.trained]}  # fmt: skip
                write_synced(unfinished / "state.json", json.dumps(state))
            dist.barrier()
            dcp.save(self.tensors(), checkpoint_id=unfinished)
            written = list(unfinished.glob(f"__{dist.get_rank()}_*"))
            if self.writes:
                written += [unfinished / ".metadata", unfinished / "state.json"]
            manifests = [None] * dist.get_world_size()
            dist.all_gather_object(manifests, {path.name: sha256(path) for path in written})
            if self.writes:
                manifest = {name: digest for part in manifests for name, digest in part.items()}
                write_synced(unfinished / "manifest.json", json.dumps(manifest, indent=2))
                os.rename(unfinished, target)
                for old in sorted(self.checkpoints.glob("step_*"))[:-2]:
                    shutil.rmtree(old)
        except (OSError, dcp.CheckpointException) as error:
            if self.writes:
                shutil.rmtree(unfinished, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 1e9
            raise RunError(f"{target}: cannot be written ({cause(error)}; {free:.1f} GB are free there). Make "
                           "room, then --resume goes on from the one before") from error  # fmt: skip

    def tensors(self) -> dict:
        """Weights and optimizer states of what is trained, as shards."""
        parts = [get_state_dict(model, optimizer) for model, optimizer, _ in self.trained]
        return {str(i): {"model": model, "optimizer": optimizer} for i, (model, optimizer) in enumerate(parts)}

    def restore(self) -> None:
        """Load `self.source` into what is trained and carried."""
        state = json.loads((self.source / "state.json").read_text())
        same = state["data"] == self.data
        check(same, f"{self.source}: --dataset {self.args.dataset} or a frozen model has changed since; --overwrite "
              "starts again")  # fmt: skip
        before, now = {**state["versions"], "ranks": state["ranks"]}, {**versions(), "ranks": dist.get_world_size()}
        if before != now:
            log(f"warning: {self.source} was made with {before}, now {now}: results may differ")
        tensors = self.tensors()
        with user_errors(dcp.CheckpointException, f"{self.source}: does not fit {self.args.model_path}"):
            dcp.load(tensors, checkpoint_id=self.source)
        for i, (model, optimizer, scheduler) in enumerate(self.trained):
            set_state_dict(model, optimizer, model_state_dict=tensors[str(i)]["model"],
                           optim_state_dict=tensors[str(i)]["optimizer"])  # fmt: skip
            scheduler.load_state_dict(state["schedulers"][i])
        vars(self.carried).update(state["carried"])
        log(f"going on from {self.source}")

    def save(self, model, state_dict: dict, tokenizer, title: str) -> None:
        """Write model (safetensors), config, tokenizer, chat template and model card, and end the run."""
        if self.writes:
            unfinished = self.folder / ".unfinished"
            shutil.rmtree(unfinished, ignore_errors=True)
            if model.config.tie_word_embeddings:
                state_dict.pop("lm_head.weight", None)  # it is the embedding, stored once
            dtype = next(iter(state_dict.values())).dtype
            model.save_pretrained(unfinished, state_dict=state_dict)  # empties the dict
            model.config.dtype = dtype  # not that of the fp32 model that was trained
            model.config.save_pretrained(unfinished)
            tokenizer.save_pretrained(unfinished)
            command = f"torchrun --nproc_per_node {dist.get_world_size()} " if dist.get_world_size() > 1 else "python "
            (unfinished / "README.md").write_text(
                f"# {title}\n\nMade by\n\n```\n{command}{shlex.join(sys.argv)}\n```\n\n"
                "in an implementation of arXiv:2502.16944 and its baseline, with "
                f"{', '.join(f'{name} {version}' for name, version in versions().items())}. Settings: `args.json`; "
                "every update: `metrics.jsonl`.\n",
                encoding="utf-8",
            )
            for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):  # last: finished
                shutil.copymode(unfinished / "config.json", file)  # safetensors lets only the owner read its files
                os.replace(file, self.folder / file.name)
            unfinished.rmdir()
            log(f"saved {self.folder} after {time.time() - self.started:.0f} s")
            _store.set(f"saved {self.folder}", "yes")
        _store.wait([f"saved {self.folder}"], timedelta(days=1))  # a large model may take longer than a barrier waits
        self.taken.close()


def launch() -> str:
    """Names the torchrun that started this process; its restarts have the same name, another torchrun has not."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()}"


def fingerprint(data: list, *models: str) -> str:
    """Tells whether a run goes on with the data (told apart by their `repr`) and the frozen models it began with."""
    digest = hashlib.sha256()
    for row in data:
        digest.update(repr(row).encode())
    for path in models:
        folder = Path(cached_file(str(Path(path).expanduser()), "config.json")).parent  # a hub id's is in the cache
        for file in sorted(folder.glob("model*.safetensors")):  # what is loaded, as transformers names it
            digest.update(sha256(file).encode())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """Versions of the software that decides a run's last bits."""
    return {"python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__}


def sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_synced(file: Path, text: str) -> None:
    """Write `text` so that it outlives a crash of the machine."""
    with open(file, "w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
