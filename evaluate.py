"""Stage 4: compare policies on held-out prompts, and say how far the GVM can be trusted.

    python evaluate.py                                                         # sft and dvpo on the embedded task
    python evaluate.py sft=runs/sft dvpo=runs/dvpo other=some/folder --dataset DATA --response-length 640

For each policy: gold score, where a task has an exact one, the GVM's verdict, KL to the reference, answer length, how
often the answer ends by itself, and how often it beats the first policy on the same prompt. For the GVM: how often it
prefers the better of two held-out answers, by statistics of its token values and by how much of the answer it has seen.

In: any number of NAME=PATH. Out: `results.json`, `report.html` and, for judges elsewhere, `answers.json` in
`--output-dir`; with `--export`, a benchmark's files alone. All intervals are 95 % bootstrap intervals over prompts.
Shapes: B sequences, P prompt tokens (left-padded), R response tokens, V vocabulary, H hidden.
"""

import contextlib
import gc
import html
import json
import math
import os
import random
import re
import time
import types
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import StaticLayer

import common


@dataclass
class Args:
    policies: tyro.conf.Positional[tuple[str, ...]] = ("sft=runs/sft", "dvpo=runs/dvpo")
    """what to compare, each as NAME=PATH; the first is the baseline of the win rates"""

    # Paths
    reference_path: str = "runs/sft"
    """policy that KL is measured to: local folder or hub id"""
    gvm_path: str | None = "runs/gvm"
    """global value model to examine: local folder or hub id; None for none"""
    dataset: str = "tests/tasks/lists.py"
    """a task's file, a hub name or a local file or folder: its held-out part; NAME:SPLIT or NAME:all: all of it"""
    output_dir: str = "runs/eval"
    """folder of results.json, report.html and answers.json"""
    export: Literal["alpaca_eval", "arena_hard", "mt_bench"] | None = None
    """write nothing but each policy's answers to this benchmark's questions, `dataset`, as its judge reads them"""

    # Sampling
    seed: int = 1
    """seed of the samples"""
    num_prompts: int = 448
    """held-out prompts to answer (448: all of the embedded task's)"""
    samples_per_prompt: int = 2
    """answers per prompt"""
    micro_batch_size: int = 128
    """sequences per forward (per rank); lower it when out of memory, results stay the same"""
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped"""
    response_length: int = 20
    """tokens; longer answers are cut"""
    temperature: float = 1.0
    """of sampling and of log-probs; 0 samples greedily, with log-probs at 1; MT-Bench sets its own"""

    # Machine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """of weights and compute; auto: bfloat16 on GPU, float32 on CPU"""


# ---- Models ----------------------------------------------------------------------------------------------------------
# Copied from train_dvpo.project
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, accumulated and returned in at least fp32: rounding logits to bf16 would move PPO's ratios."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ weight.to(dtype).T


def fused_logprobs(hidden, weight, labels, temperature: float):
    """What `train_dvpo.fused_logprobs` returns, some tokens at a time: no backward pass will need anything."""
    parts = []
    for rows, targets in zip(hidden.split(1024), labels.split(1024)):
        logprobs = (project(rows, weight) / temperature).log_softmax(1)  # (rows, V)
        entropy = -(logprobs.exp() * logprobs).sum(1)
        parts.append(torch.stack([logprobs.gather(1, targets[:, None])[:, 0], entropy]))
    return torch.cat(parts, 1).unbind(0)


# Copied from train_dvpo.token_logprobs
def token_logprobs(model, input_ids, attention_mask, response_mask, temperature):
    """log pi(a_t | s_t) of every response token, and the policy's entropy there.

    `input_ids`, `attention_mask (B, P + R)`, `response_mask (B, R)`; returns two fp32 `(B, R)`, zero outside the mask.
    Old, new and reference log-probs all come through here, so the first ratio of an update is 1 up to the rounding of
    the compute dtype.
    """
    R = response_mask.shape[1]
    hidden = model.base_model(
        input_ids, attention_mask=attention_mask, position_ids=common.position_ids(attention_mask), use_cache=False
    ).last_hidden_state[:, -R - 1 : -1]  # (B, R, H), the state *before* each response token: the one shift
    weight = model.get_output_embeddings().weight
    labels = input_ids[:, -R:][response_mask]  # (N,)
    logprobs, entropy = fused_logprobs(hidden[response_mask], weight, labels, temperature)
    zeros = torch.zeros_like(response_mask, dtype=logprobs.dtype)
    return zeros.masked_scatter(response_mask, logprobs), zeros.masked_scatter(response_mask, entropy)


# Copied from train_dvpo.shard
def shard(model, mesh, dtype: torch.dtype):
    """FSDP2: every decoder layer is a unit, the rest another; computes in `dtype`, reduces gradients in fp32."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in common.decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=precision)
    # After a forward pass the root stays whole for the backward pass, unless the model is frozen and none will come.
    trained = any(parameter.requires_grad for parameter in model.parameters())
    # The root's inputs stay as they are: numbers to sample by would be coarse in bf16.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    return fully_shard(model, mesh=mesh, mp_policy=precision, reshard_after_forward=not trained)


# Copied from train_dvpo.add_methods
def add_methods(model, *functions):
    """Make functions of a model its methods that FSDP treats like `forward`: the head's weight is whole inside them."""
    for function in functions:
        setattr(model, function.__name__, types.MethodType(function, model))
        register_fsdp_forward_method(model, function.__name__)
    return model


# Copied from train_dvpo.generate
@torch.no_grad()  # not inference_mode: the next training step would raise
def generate(model, prompt_ids, prompt_mask, uniforms, end_ids, pad_id: int, temperature: float):
    """Sample answers from a sharded policy, whose method this is, without any communication per token.

    `prompt_ids`, `prompt_mask (B, P)` left-padded; `uniforms (B, R)` in [0, 1), one per token to sample, so that
    an answer does not depend on the number of ranks; `end_ids (E,)` end an answer. Returns `response_ids` and
    `response_mask (B, R)`, the ending token inside the mask, `pad_id` after it.
    """
    R = uniforms.shape[1]
    response_ids = torch.full_like(uniforms, pad_id, dtype=prompt_ids.dtype)  # (B, R)
    response_mask = torch.zeros_like(response_ids, dtype=torch.bool)
    running = torch.ones_like(response_mask[:, 0])  # (B,) has not ended yet
    with whole_weights(model):
        read, tokens = reader(model, prompt_mask, R), prompt_ids
        for t in range(R):
            cumulative = torch.softmax(read(tokens) / temperature, 1).cumsum(1)  # (B, V)
            threshold = uniforms[:, t, None] * cumulative[:, -1:]
            sampled = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=cumulative.shape[1] - 1)
            response_ids[:, t] = torch.where(running, sampled, pad_id)
            response_mask[:, t] = running
            running = running & ~torch.isin(sampled, end_ids)
            if not running.any():
                break
            tokens = response_ids[:, t : t + 1]  # (B, 1)
    return response_ids, response_mask


# Copied from train_dvpo.whole_weights
@contextlib.contextmanager
def whole_weights(model):
    """Gather a sharded model's weights once, not once per token."""
    was_training = model.training
    model.eval()  # gradient checkpointing would silently drop the cache in train mode
    model.set_reshard_after_forward(False)
    yield
    model.train(was_training)
    model.set_reshard_after_forward(True)
    model.set_reshard_after_forward(not was_training, recurse=False)  # as `shard` does
    for unit in model.modules():  # left gathered across an optimizer step, the next forward would use stale weights
        if isinstance(unit, FSDPModule):
            unit.reshard()


# Copied from train_dvpo.reader
def reader(model, prompt_mask, R: int):
    """`read(tokens)` takes the next tokens `(B, N)` into a key-value cache and returns the logits `(B, V)` after them.

    The prompts come first, masked by `prompt_mask (B, P)`, then at most `R` tokens one by one.
    """
    P = prompt_mask.shape[1]
    attention_mask = torch.nn.functional.pad(prompt_mask, (0, R), value=True)  # (B, P + R)
    positions = common.position_ids(attention_mask)
    cache = key_value_cache(model, P + R)
    static, num_read = isinstance(cache, StaticCache), 0

    def step(tokens, mask, places):
        hidden = model.base_model(
            tokens, attention_mask=mask, position_ids=places, use_cache=True, **{common.CACHE: cache}
        )
        return project(hidden.last_hidden_state[:, -1], model.get_output_embeddings().weight)  # (B, V)

    def read(tokens):
        nonlocal step, num_read
        start, num_read = num_read, num_read + tokens.shape[1]
        mask = attention_mask if static else attention_mask[:, :num_read]  # as wide as the cache
        inputs = tokens, mask, positions[:, start:num_read]
        if static and start == P + 1:  # the first step of one token has warmed up what a graph cannot
            step = replayed(step, inputs)
        return step(*inputs)

    return read


# Copied from train_dvpo.replayed
def replayed(step, inputs):
    """`step`, for tensors of the shapes of `inputs`, as a CUDA graph: its many launches take longer than the work."""
    inputs, graph = [tensor.clone() for tensor in inputs], torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's threads may go on meanwhile
        output = step(*inputs)

    def replay(*tensors):
        for place, tensor in zip(inputs, tensors):
            place.copy_(tensor)
        graph.replay()
        return output

    return replay


# Copied from train_dvpo.key_value_cache
def key_value_cache(model, length: int) -> DynamicCache | StaticCache:
    """An empty cache for `length` tokens: a static one on a GPU, where `replayed` can repeat a model's step.

    That is where Python decides nothing in it: no sliding window, no experts, a plain SDPA mask.
    """
    config = model.config
    plain = model._can_compile_fullgraph and config._attn_implementation == "sdpa"
    experts = any("expert" in name for name, _ in model.named_modules())
    if model.device.type == "cuda" and plain and not experts:
        cache = StaticCache(config, max_cache_len=length)
        if all(type(layer) is StaticLayer for layer in cache.layers):
            return cache
    return DynamicCache(config=config)


# Copied from train_gvm.token_values
def token_values(model, input_ids, attention_mask, response_mask) -> torch.Tensor:
    """Values `(B, R + 1)` in fp32: column 0 after the last prompt token, column t after response token t.

    `input_ids`, `attention_mask (B, P + R)`, `response_mask (B, R)`. The head computes in fp32: neighbouring values
    differ by less than bf16 resolves, and advantages are those differences.
    """
    R = response_mask.shape[1]
    hidden = model.base_model(
        input_ids, attention_mask=attention_mask, position_ids=common.position_ids(attention_mask), use_cache=False
    ).last_hidden_state[:, -R - 1 :]  # (B, R + 1, H)
    return hidden.float() @ model.score.weight[0].float()


# ---- Held-out answers of a dataset, behind their context -------------------------------------------------------------
# Copied from train_gvm.Answer
@dataclass
class Answer:
    prompt_ids: list[int]
    response_ids: list[int]
    label: float  # what the answer is worth
    policy: str | None  # who wrote it


# Copied from train_gvm.tokenize
def tokenize(tokenizer, examples: list[common.Example], label_source: str, args: Args, heldout: bool = False):
    """Answers in dataset order, and how many of them belong together: 2 (chosen, rejected, chosen, ...) or 1."""
    examples, prompts = common.fit_prompts(tokenizer, examples, args.max_prompt_length, heldout)
    sides = ("chosen", "rejected") if examples and examples[0].rejected is not None else ("chosen",)
    rows = [(prompt_ids, example, side) for prompt_ids, example in zip(prompts, examples) for side in sides]
    texts = [getattr(example, side) for _, example, side in rows]
    responses = common.tokenize_answers(tokenizer, texts, args.response_length)
    answers = []
    for (prompt_ids, example, side), response_ids in zip(rows, responses):
        label = 1.0 if side == "chosen" else -1.0
        if label_source == "score":
            label = getattr(example, f"score_{side}")
        answers.append(Answer(prompt_ids, response_ids, label, getattr(example, f"{side}_policy")))
    return answers, len(sides)


# Copied from train_gvm.make_batch
def make_batch(config, answers: list[Answer], pools: dict, key: str, pad_id: int, device, widths=(0, 0)) -> dict:
    """`common.pad_batch` of answers whose prompts have trajectories of the same policy in front, where there are to be
    some: `config.num_context_trajectories` of at most `config.context_trajectory_length` tokens.

    They are drawn from `pools` (policy -> its trajectories) by a generator seeded with `key` and the answer.
    """
    prompts = [answer.prompt_ids for answer in answers]
    if config.num_context_trajectories:
        for i, answer in enumerate(answers):
            rng = random.Random(f"{key}/{answer.prompt_ids}/{answer.response_ids}")
            prompts[i] = common.condition(rng, answer.prompt_ids, pools[answer.policy],
                                          config.num_context_trajectories,
                                          config.context_trajectory_length)  # fmt: skip
    return common.pad_batch(prompts, [answer.response_ids for answer in answers], pad_id, device, widths)


# Copied from train_gvm.policy_pools
def policy_pools(answers: list[Answer]) -> dict[str, list[common.Trajectory]]:
    """Every policy's trajectories."""
    pools: dict[str, list[common.Trajectory]] = {}
    for answer in answers:
        pools.setdefault(answer.policy, []).append((answer.prompt_ids, answer.response_ids))
    return pools


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
    statistics = {"mean": tokens.nanmean(1), "last": common.last_values(values.double(), mask)}
    for p in PERCENTILES:
        statistics[f"p{p}"] = tokens.nanquantile(p / 100, dim=1)
    for f in FRACTIONS:
        column = (f * lengths).round().long()[:, None]  # (B, 1)
        statistics[f"at_{f:g}"] = values.double().gather(1, column)[:, 0]
    return statistics


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
    for name, row in report.get("by_subset", {}).items():
        lines.append(f"{name[:20]:<20}" + " ".join(show(row[key]) for key in accuracy) + f"  {row['pairs']} pairs")
    lines.append(f"{'answer seen':<20}" + " ".join(f"{float(f):6.0%}" for f in report["by_fraction"]))
    names = {"pair_accuracy": "pair accuracy", "explained_variance": "explained variance",
             "correlation": "label correlation", "gold_correlation": "gold correlation"}  # fmt: skip
    for key, name in names.items():
        if all(key in row for row in report["by_fraction"].values()):
            lines.append(f"{name:<20}" + " ".join(show(row[key]) for row in report["by_fraction"].values()))
    return "\n".join(lines)


@torch.no_grad()
def heldout_statistics(gvm, answers: list[Answer], pad_id: int, device, args: Args) -> dict[str, torch.Tensor]:
    """`token_statistics` of held-out answers, each `(len(answers),)`; the work is shared among ranks."""
    pools, mine = policy_pools(answers), [answers[i] for i in common.rows_of_rank(len(answers))]
    parts = []
    for i in range(0, len(mine), args.micro_batch_size):
        batch = make_batch(gvm.config, mine[i : i + args.micro_batch_size], pools, "heldout", pad_id, device)
        statistics = token_statistics(gvm.token_values(**batch), batch["response_mask"])
        parts.append(torch.stack(list(statistics.values()), 1))
    table = common.all_gather(torch.cat(parts))[: len(answers)].cpu()  # (answers, statistics)
    return dict(zip(statistics, table.unbind(1)))


# ---- Statistics ------------------------------------------------------------------------------------------------------
def interval(x: torch.Tensor, resamples: int = 2_000) -> dict[str, float]:
    """Mean of `x (prompts, samples)` and, of at least ten prompts, its 95 % bootstrap interval over prompts."""
    means = x.double().mean(1)  # (prompts,)
    if len(means) < 10:
        return {"mean": means.mean().item()}
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(means), (resamples, len(means)), generator=generator)
    low, high = means[drawn].mean(1).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"mean": means.mean().item(), "low": low, "high": high}


@torch.no_grad()
def sample(name, policy, reference, gvm, prompts: list[list[int]], end_ids, pad_id: int, device, args: Args) -> dict:
    """One answer to each of `prompts`: `response_ids`, `response_mask (B, R)`, and `kl`, `ended`, `scores (B,)`.

    `scores` is the GVM's value of the finished answer, conditioned on this policy's own other answers where the GVM was
    trained so; absent without a GVM. Ranks share the work.
    """
    # The same for every policy: with common luck, they differ by what they learned.
    uniforms = torch.rand(len(prompts), args.response_length, generator=torch.Generator().manual_seed(args.seed))
    mine = torch.tensor(common.rows_of_rank(len(prompts)))
    parts = []
    for rows in mine.split(args.micro_batch_size):
        prompt_ids, prompt_mask = (x.to(device) for x in common.pad([prompts[i] for i in rows], pad_id, "left"))
        response_ids, response_mask = policy.generate(
            prompt_ids, prompt_mask, uniforms[rows].to(device), end_ids, pad_id, args.temperature or 1e-4
        )
        batch = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1), response_mask
        batch = common.crop(*batch)
        logprobs, _ = policy.token_logprobs(*batch, args.temperature or 1.0)  # (rows, r), r at most R
        ref_logprobs, _ = reference.token_logprobs(*batch, args.temperature or 1.0)
        kl = (logprobs - ref_logprobs).sum(1)  # (rows,)
        ended = torch.isin(response_ids.gather(1, response_mask.sum(1, keepdim=True) - 1)[:, 0], end_ids)
        parts.append((response_ids, response_mask, kl, ended))
    names = ("response_ids", "response_mask", "kl", "ended")
    answers = {n: common.all_gather(torch.cat(p))[: len(prompts)].cpu() for n, p in zip(names, zip(*parts))}
    common.check(answers["kl"].isfinite().all(), f"{name}: its log-probs or the reference's are not finite")
    if gvm is not None:
        rows = zip(prompts, answers["response_ids"], answers["response_mask"])
        judged = [Answer(prompt, ids[mask].tolist(), 0.0, "policy") for prompt, ids, mask in rows]
        answers["scores"] = heldout_statistics(gvm, judged, pad_id, device, args)["last"]
        common.check(answers["scores"].isfinite().all(), f"{args.gvm_path}: its values are not finite")
    return answers


# ---- Files for the judges of AlpacaEval 2, Arena-Hard-Auto and MT-Bench (FastChat) -----------------------------------
QUESTION_COLUMNS = {"alpaca_eval": ["instruction"], "arena_hard": ["uid", "prompt"],
                    "mt_bench": ["question_id", "category", "turns"]}  # fmt: skip
# By category; 0.7 for all others, as in FastChat.
MT_BENCH_TEMPERATURES = {"extraction": 0, "math": 0, "coding": 0, "reasoning": 0, "stem": 0.1, "humanities": 0.1}


def judge_row(benchmark: str, name: str, question: dict, answers: list[str], tokenizer) -> dict:
    """What a benchmark's program reads of the `answers`, one a turn, of policy `name` to a question."""
    if benchmark == "alpaca_eval":
        return {"instruction": question["instruction"], "output": answers[0], "generator": name}
    if benchmark == "mt_bench":
        return {"question_id": question["question_id"], "answer_id": f"{name}-{question['question_id']}",
                "model_id": name, "choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}  # fmt: skip
    prose = answers[0]
    for code in re.findall("```([^`]*)```", prose):
        prose = prose.replace(code, "")
    count = lambda pattern: len(re.findall(pattern, prose, re.MULTILINE))
    style = {  # as Arena-Hard counts, but the policy's tokens: its add_markdown_info.py counts GPT-4o's
        "token_len": len(tokenizer(answers[0], add_special_tokens=False).input_ids),
        "header_count": {f"h{n}": count(rf"^#{{{n}}}\s") for n in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }
    messages = [{"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": {"answer": answers[0]}}]  # fmt: skip
    return {"uid": question["uid"], "ans_id": f"{name}-{question['uid']}", "model": name, "messages": messages,
            "tstamp": time.time(), "metadata": style}  # fmt: skip


def export(paths: dict[str, str], mesh, dtype: torch.dtype, device, args: Args) -> None:
    """Answer all questions of a benchmark with each policy, and write a file each: `judge_row`s, in their order."""
    common.check(not args.dataset.endswith(".py"), f"--export {args.export}: --dataset is to name its questions")
    columns, questions = QUESTION_COLUMNS[args.export], list(common.read_rows(args.dataset, ("eval", "train")))
    if questions and {"cluster", "turns"} <= questions[0].keys():  # Arena-Hard 0.1 as the hub has it
        questions = [{"uid": q["question_id"], "prompt": q["turns"][0]["content"]} for q in questions]
    whole = questions and all(q.get(column) not in (None, "", []) for q in questions for column in columns)
    common.check(whole, f"--dataset {args.dataset}: each question of {args.export} has {' and '.join(columns)}")
    turns, temperatures = [[q[columns[-1]]] for q in questions], [args.temperature] * len(questions)
    if args.export == "mt_bench":
        turns = [q["turns"] for q in questions]
        common.check(all(len(asked) == 2 for asked in turns), f"--dataset {args.dataset}: some rows have not two turns")
        temperatures = [MT_BENCH_TEMPERATURES.get(q["category"], 0.7) for q in questions]
    place = "{}/model_outputs.json" if args.export == "alpaca_eval" else "model_answer/{}.jsonl"
    files = {name: Path(args.output_dir).expanduser() / place.format(name) for name in paths}
    for name, file in files.items():
        plain = re.fullmatch("[A-Za-z0-9][A-Za-z0-9._+-]*", name)
        common.check(plain, f"{name!r} is to name a file: use letters, digits and . _ + - alone")
        common.check(not file.exists(), f"{file} exists: remove it, or choose another --output-dir")
        with common.user_errors(OSError, f"--output-dir {args.output_dir}: cannot be written"):
            file.parent.mkdir(parents=True, exist_ok=True)
    for name, path in paths.items():
        tokenizer = common.load_tokenizer(path)
        policy = common.load_policy(path, tokenizer, dtype).eval().requires_grad_(False)
        room = getattr(policy.config, "max_position_embeddings", math.inf) - args.response_length
        end_ids = torch.tensor(policy.generation_config.eos_token_id, device=device)  # (E,)
        policy = add_methods(shard(policy, mesh, dtype), token_logprobs, generate)
        chats, num_cut = [[] for _ in questions], 0
        for turn in range(len(turns[0])):  # the second one's prompt holds the policy's own first answer
            for chat, asked in zip(chats, turns):
                chat.append({"role": "user", "content": asked[turn]})
            prompts = [common.tokenize_prompt(tokenizer, chat) for chat in chats]
            for ids, asked in zip(prompts, turns):  # a judge wants all: none is dropped
                common.check(ids, f"{path}: its chat template refuses {asked[turn]!r:.80}")
                common.check(len(ids) <= room, f"{path}: too few positions for the {len(ids)} tokens up to "
                             f"{asked[turn]!r:.80} and for --response-length; no judge takes a part")  # fmt: skip
            for temperature in sorted(set(temperatures)):  # KL is not asked for: the policy is its own reference
                rows = [i for i, its in enumerate(temperatures) if its == temperature]
                settings = replace(args, seed=args.seed + turn, temperature=temperature)
                answers = sample(name, policy, policy, None, [prompts[i] for i in rows], end_ids,
                                 tokenizer.pad_token_id, device, settings)  # fmt: skip
                num_cut += (~answers["ended"]).sum().item()
                for i, ids, mask in zip(rows, answers["response_ids"], answers["response_mask"]):
                    text = tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
                    chats[i].append({"role": "assistant", "content": text})
        answers = [[message["content"] for message in chat[1::2]] for chat in chats]
        rows = [judge_row(args.export, name, q, texts, tokenizer) for q, texts in zip(questions, answers)]
        text = json.dumps(rows) if args.export == "alpaca_eval" else "\n".join(map(json.dumps, rows))
        if dist.get_rank() == 0:
            files[name].write_text(text + "\n")
        common.log(f"wrote {files[name]}: {len(rows)} questions, {num_cut} answers cut to --response-length")
        del policy
        gc.collect()  # as in `main`
    common.end_processes()


# ---- Report ----------------------------------------------------------------------------------------------------------
def policy_table(policies: dict) -> list[list[str]]:
    """Header and one row of texts per policy."""

    def show(x):
        if not isinstance(x, dict):
            return f"{x:.3f}"
        return f"{x['mean']:.3f}" + (f" [{x['low']:.3f}, {x['high']:.3f}]" if "low" in x else "")

    columns = [c for c in ("gold", "gvm_score", "kl", "response_length", "eos_rate", "win_rate")
               if any(c in row for row in policies.values())]  # fmt: skip
    rows = [[name, *(show(row[c]) if c in row else "-" for c in columns)] for name, row in policies.items()]
    return [["policy", *columns], *rows]


def caption(policies: dict) -> str:
    """What the numbers of `policy_table` mean."""
    judge = next((row["win_rate"]["judge"] for row in policies.values() if "win_rate" in row), None)
    if judge is None:
        return "no judge of answers: neither an exact score nor a GVM"
    text = (
        f"95 % bootstrap intervals over prompts, ten at least; win rate by {judge} against the first policy, ties half"
    )
    if judge == "gvm_score":
        text += "; the GVM is no impartial judge of a policy that was trained against it"
    return text


def write_html(path: Path, results: dict, samples: list[list[str]]) -> None:
    """A self-contained page: no script, no request, and every text of a model or dataset escaped."""

    def table(rows):
        cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
        return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"

    body = ["<h1>Evaluation</h1><h2>Policies</h2>", table(policy_table(results["policies"]))]
    body += [f"<p>{html.escape(caption(results['policies']))}</p>"]
    if "gvm" in results:
        body += ["<h2>Global value model</h2><pre>", html.escape(value_tables(results["gvm"])), "</pre>"]
    body += ["<h2>Samples</h2>", table(samples)]
    path.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Evaluation</title>'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        "<style>body{font:15px/1.5 sans-serif;margin:2em auto;max-width:75em}td{padding:.2em .8em;vertical-align:top}"
        "tr:first-child{font-weight:bold}tr:nth-child(even){background:#f4f4f4}</style></head><body>"
        f"{''.join(body)}</body></html>\n",
        encoding="utf-8",
    )


def main(args: Args) -> None:
    # ---- 1 Processes -------------------------------------------------------------------------------------------------
    device = common.init_processes()
    dtype = common.compute_dtype(args.dtype, device)
    common.check_settings(replace(args, temperature=args.temperature or 1.0))
    common.check(args.policies, "name at least one policy, as in dvpo=runs/dvpo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for policy in args.policies:
        common.check("=" in policy, f"{policy!r}: expected NAME=PATH, as in dvpo=runs/dvpo")
    paths = dict(policy.split("=", 1) for policy in args.policies)
    common.check(len(paths) == len(args.policies), "two policies have the same name")
    if args.export:
        return export(paths, mesh, dtype, device, args)

    # ---- 2 Data: held-out prompts, each several times ----------------------------------------------------------------
    tokenizer = common.load_tokenizer(args.reference_path)
    for path in paths.values():
        common.check_same_tokenizer(args.reference_path, tokenizer, path)
    train, heldout = common.load_examples(args.dataset.removesuffix(":all"), needs="prompts")
    everything = train + heldout
    heldout = everything if ":" in args.dataset else heldout
    common.log(
        f"{len(heldout)} of {len(everything)} examples are evaluated; {args.dataset.partition(':')[0]}:all takes all"
    )
    common.check(
        heldout, f"--dataset {args.dataset}: none of its few prompts is held out; {args.dataset}:all takes all"
    )
    heldout, tokens = common.fit_prompts(tokenizer, heldout, args.max_prompt_length)
    unique = {str(example.prompt): (example, ids) for example, ids in zip(heldout, tokens)}
    asked, prompts = zip(*list(unique.values())[: args.num_prompts])
    asked = [example.prompt for example in asked for _ in range(args.samples_per_prompt)]  # messages
    questions = [messages[-1]["content"] for messages in asked]
    spoken = ["\n\n".join(f"{m['role']}: {m['content']}" for m in messages) for messages in asked]
    exact_score = getattr(common.load_task(args.dataset), "score", None)  # "gold", where the task has one
    repeated = [prompt for prompt in prompts for _ in range(args.samples_per_prompt)]
    common.log(f"{len(prompts)} held-out prompts x {args.samples_per_prompt} answers")

    # ---- 3 Models that judge -----------------------------------------------------------------------------------------
    def frozen(model):
        return shard(model.eval().requires_grad_(False), mesh, dtype)

    reference = add_methods(frozen(common.load_policy(args.reference_path, tokenizer, dtype)), token_logprobs)
    gvm, results = None, {"args": asdict(args), "policies": {}}
    if args.gvm_path:
        common.check_same_tokenizer(args.reference_path, tokenizer, args.gvm_path)
        gvm = common.load_value_model(args.gvm_path, tokenizer, dtype, fresh_head=False)
        gvm.config.num_context_trajectories = getattr(gvm.config, "num_context_trajectories", 0)
        gvm = add_methods(frozen(gvm), token_values)

    rated = [e for e in heldout if e.rejected and e.chosen.strip() and e.rejected.strip() and e.chosen != e.rejected]
    known = all(e.chosen_policy and e.rejected_policy for e in rated)
    common.check(known or gvm is None or gvm.config.num_context_trajectories == 0,
                 f"{args.gvm_path} is conditioned on trajectories, but {args.dataset} does not say who wrote each "
                 "answer (chosen_policy, rejected_policy); use --gvm-path None")  # fmt: skip
    folder = Path(args.output_dir).expanduser()
    with common.user_errors(OSError, f"--output-dir {folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    common.check(os.access(folder, os.W_OK), f"--output-dir {folder}: cannot be written")  # before the work

    # ---- 4 Policies --------------------------------------------------------------------------------------------------
    by_prompt = lambda x: x.double().view(len(prompts), args.samples_per_prompt)
    samples = [["prompt", *paths], *([text] for text in spoken[:: args.samples_per_prompt][:10])]
    baseline, written = None, []
    for name, path in paths.items():
        policy = frozen(common.load_policy(path, tokenizer, dtype))
        end_ids = torch.tensor(policy.generation_config.eos_token_id, device=device)  # (E,)
        policy = add_methods(policy, token_logprobs, generate)
        answers = sample(name, policy, reference, gvm, repeated, end_ids, tokenizer.pad_token_id, device, args)
        rows = zip(answers["response_ids"], answers["response_mask"])
        texts = [tokenizer.decode(ids[mask], skip_special_tokens=True) for ids, mask in rows]
        row = results["policies"][name] = {"path": path}
        verdicts = {}
        if gvm is not None:
            verdicts["gvm_score"] = by_prompt(answers["scores"])
        if exact_score:
            verdicts["gold"] = by_prompt(torch.tensor(list(map(exact_score, asked, texts))))
        row.update({judge: interval(verdict) for judge, verdict in verdicts.items()})
        row["kl"] = answers["kl"].mean().item()
        row["response_length"] = answers["response_mask"].sum(1).double().mean().item()
        row["eos_rate"] = answers["ended"].double().mean().item()
        if verdicts:  # gold where there is one
            judge, verdict = list(verdicts.items())[-1]
            baseline = verdict if baseline is None else baseline
            row["win_rate"] = {**interval(wins(verdict, baseline)), "judge": judge, "against": next(iter(paths))}
        for table_row, text in zip(samples[1:], texts[:: args.samples_per_prompt]):
            table_row.append(text)
        numbers = {"tokens": answers["response_mask"].sum(1), "kl": answers["kl"], **verdicts}
        numbers = {key: x.flatten().tolist() for key, x in numbers.items()}
        for i, text in enumerate(texts):  # `instruction`, `output` and `generator` are what AlpacaEval reads
            written.append({"prompt": asked[i], "instruction": questions[i], "output": text, "generator": name,
                            **{key: x[i] for key, x in numbers.items()}})  # fmt: skip
        if dist.get_rank() == 0:  # now: the next policy may fail
            (folder / "answers.json").write_text(json.dumps(written, indent=2) + "\n")
        cut = f", {1 - row['eos_rate']:.0%} of the answers were cut: raise --response-length?" * (row["eos_rate"] < 0.5)
        common.log(f"{name}: done{cut}")
        del policy
        gc.collect()  # the model and its methods refer to each other: without it, its memory would stay taken

    # ---- 5 GVM: held-out pairs ---------------------------------------------------------------------------------------
    if gvm is not None and rated:
        judged, _ = tokenize(tokenizer, rated, "preference", args)
        statistics = heldout_statistics(gvm, judged, tokenizer.pad_token_id, device, args)
        labels = torch.tensor([answer.label for answer in judged])
        pairs = torch.arange(len(judged)).view(-1, 2)
        report = results["gvm"] = {"path": args.gvm_path, **value_report(statistics, labels, pairs)}
        for name in sorted({example.subset for example in rated if example.subset}):
            rows = pairs[torch.tensor([example.subset == name for example in rated])]
            accuracy = value_report(statistics, labels, rows)["pair_accuracy"]
            report.setdefault("by_subset", {})[name] = {"pairs": len(rows), **accuracy}
        for name in sorted({answer.policy for answer in judged if answer.policy}):  # is the value global?
            rows = torch.tensor([answer.policy == name for answer in judged])
            report.setdefault("by_policy", {})[name] = {
                "prompt_value": statistics["at_0"][rows].mean().item(),
                "final_value": statistics["last"][rows].mean().item(),
                "mean_label": labels[rows].mean().item(),
                "correlation": correlation(statistics["last"][rows], labels[rows].double()),
            }
        if exact_score:  # the same against the exact score, and how well that itself predicts the preferences
            gold = [exact_score(e.prompt, text) for e in rated for text in (e.chosen, e.rejected)]
            gold = torch.tensor(gold, dtype=torch.float64)
            for fraction, row in report["by_fraction"].items():
                row["gold_correlation"] = correlation(statistics[f"at_{fraction}"], gold)
            report["gold_pair_accuracy"] = wins(*gold.view(-1, 2).unbind(1)).mean().item()

    # ---- 6 Report ----------------------------------------------------------------------------------------------------
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        write_html(folder / "report.html", results, samples)
    table = policy_table(results["policies"])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    common.log("\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table))
    common.log(f"({caption(results['policies'])})")
    if "gvm" in results:
        common.log(f"\n{args.gvm_path} on held-out pairs:\n{value_tables(results['gvm'])}")
        if "by_policy" in results["gvm"]:
            rows = [f"{name[:24]:<24}" + "".join(f"{x:12.3f}" for x in row.values())
                    for name, row in results["gvm"]["by_policy"].items()]  # fmt: skip
            common.log("\n".join([f"{'written by':<24}prompt value final value  mean label correlation", *rows]))
        if "gold_pair_accuracy" in results["gvm"]:
            common.log(f"pair accuracy of the gold score itself: {results['gvm']['gold_pair_accuracy']:.3f}")
    common.log(f"wrote results.json, report.html and answers.json in {args.output_dir}")
    common.end_processes()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args))
