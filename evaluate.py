"""Stage 4: compare policies on held-out prompts, and say how far the GVM can be trusted.

    python evaluate.py                                                         # sft and dvpo on the embedded task
    python evaluate.py sft=runs/sft dvpo=runs/dvpo other=some/folder --dataset DATA --response-length 640
    python evaluate.py --value-guided 0.4 --top-k 4                            # each step steered by the GVM

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
from array import array
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import tyro
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import DynamicCache

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
    response_length: int | None = None
    """tokens; longer answers are cut; None: 20, to be named for models wider than 256"""
    temperature: float = 1.0
    """of sampling and of log-probs; 0 samples greedily, with log-probs at 1; MT-Bench sets its own"""
    top_k: int | None = None
    """sample from the K likeliest tokens alone; None: from all"""
    value_guided: float | None = None
    """BETA: sample from pi(a) exp(V(s, a) / BETA) over the `--top-k` tokens, V being the GVM, as in 0.4; None: pi"""
    show: int | None = None
    """print the token values of answers to so many prompts and of so many held-out pairs, in colour"""

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


def read(model, tokens, mask, cache):
    """Take the next `tokens (B, N)` into a key-value cache; returns the last one's hidden state `(B, H)`.

    `mask (B, P + t)` is False where the cache or `tokens` have padding.
    """
    places = common.position_ids(mask)[:, -tokens.shape[1] :]
    return model.base_model(
        tokens, attention_mask=mask, position_ids=places, use_cache=True, **{common.CACHE: cache}
    ).last_hidden_state[:, -1]


def next_logits(model, tokens, mask, cache):
    """Logits `(B, V)` of what follows the tokens."""
    return project(read(model, tokens, mask, cache), model.get_output_embeddings().weight)


def next_values(model, tokens, mask, cache):
    """Value `(B,)` of the answers up to the last of the tokens, in fp32."""
    return read(model, tokens, mask, cache).float() @ model.score.weight[0].float()


@torch.no_grad()
def guided_generate(policy, guide, prompt_ids, prompt_mask, uniforms, end_ids, pad_id: int, args: Args):
    """Sample answers as `train_dvpo.generate` does, or from its distribution cut by `--top-k` and tilted towards what
    the value model `guide`, if there is one, thinks good: q(a) ~ pi(a) exp(V(s, a) / BETA).

    Returns `response_ids`, `response_mask (B, R)` and `tilt (B, R)`: log q(a_t) - log pi(a_t), zero without either.
    """
    B, R = uniforms.shape
    response_ids = torch.full_like(uniforms, pad_id, dtype=prompt_ids.dtype)  # (B, R)
    response_mask, tilt = torch.zeros_like(response_ids, dtype=torch.bool), torch.zeros_like(uniforms)
    running = torch.ones_like(response_mask[:, 0])  # (B,) has not ended yet
    cache, tokens, mask = DynamicCache(config=policy.config), prompt_ids, prompt_mask
    with whole_weights(policy), whole_weights(guide) if guide else contextlib.nullcontext():
        if guide:
            guide_cache = DynamicCache(config=guide.config)
            guide.next_values(prompt_ids, prompt_mask, guide_cache)
        for t in range(R):
            logits = scores = policy.next_logits(tokens, mask, cache) / (args.temperature or 1.0)  # (B, V)
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)  # (B, P + t + 1)
            if args.top_k:
                best, candidates = logits.topk(min(args.top_k, logits.shape[1]))  # (B, K)
                K = candidates.shape[1]
                if guide:  # it reads each candidate after an answer's cache of its own
                    guide_cache.batch_repeat_interleave(K)
                    values = guide.next_values(candidates.view(-1, 1), mask.repeat_interleave(K, 0), guide_cache)
                    best = best + values.view(B, K) / args.value_guided
                scores = torch.full_like(logits, -torch.inf).scatter(1, candidates, best)
            if args.temperature:
                cumulative = torch.softmax(scores, 1).cumsum(1)  # (B, V)
                threshold = uniforms[:, t, None] * cumulative[:, -1:]
                sampled = torch.searchsorted(cumulative, threshold, right=True).clamp(max=scores.shape[1] - 1)  # (B, 1)
            else:
                sampled = scores.argmax(1, keepdim=True)
                scores = torch.full_like(scores, -torch.inf).scatter(1, sampled, 0.0)
            log_ratio = (scores.log_softmax(1) - logits.log_softmax(1)).gather(1, sampled)
            if guide:
                chosen = (candidates == sampled).int().argmax(1)  # (B,)
                guide_cache.batch_select_indices(torch.arange(B, device=chosen.device) * K + chosen)
            response_ids[:, t] = torch.where(running, sampled[:, 0], pad_id)
            response_mask[:, t] = running
            tilt[:, t] = torch.where(running, log_ratio[:, 0], 0.0)
            running = running & ~torch.isin(sampled[:, 0], end_ids)
            if not running.any():
                break
            tokens = response_ids[:, t : t + 1]  # (B, 1)
    return response_ids, response_mask, tilt


def frozen_policy(path: str, tokenizer, mesh, dtype: torch.dtype):
    """A frozen, sharded policy."""
    policy = common.load_policy(path, tokenizer, dtype).eval().requires_grad_(False)
    return add_methods(shard(policy, mesh, dtype), token_logprobs, next_logits)


def frozen_gvm(path: str, tokenizer, mesh, dtype: torch.dtype, args: Args):
    """The frozen, sharded GVM, which must read the tokens of the policy at `path`."""
    common.check_same_tokenizer(path, tokenizer, args.gvm_path)
    gvm = common.load_value_model(args.gvm_path, tokenizer, dtype, fresh_head=False).eval().requires_grad_(False)
    gvm.config.num_context_trajectories = getattr(gvm.config, "num_context_trajectories", 0)
    common.check(not (args.value_guided and gvm.config.num_context_trajectories), f"--value-guided: {args.gvm_path} is "
                 "conditioned on other answers, and there are none yet: name a GVM that is not")  # fmt: skip
    return add_methods(shard(gvm, mesh, dtype), token_values, next_values)


# ---- Held-out answers of a dataset, behind their context -------------------------------------------------------------
# Copied from train_gvm.Answer
@dataclass
class Answer:
    prompt_ids: array
    response_ids: array
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
            rng = random.Random(f"{key}/{list(answer.prompt_ids)}/{list(answer.response_ids)}")
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
    outcome, all three `by_fraction` of the answer seen, and the `calibration` (mean value, mean outcome) of ten bins.
    """

    def quality(values):
        return {
            "pair_accuracy": wins(*values[pairs].unbind(1)).mean().item() if len(pairs) else None,
            "explained_variance": explained_variance(values, outcomes.double()),
            "correlation": correlation(values, outcomes.double()),
        }

    names, last = ["mean", "last", *(f"p{p}" for p in PERCENTILES)], statistics["last"]
    bins = last.argsort(stable=True).tensor_split(10)
    return {
        **quality(statistics["last"]),
        "pair_accuracy": {name: quality(statistics[name])["pair_accuracy"] for name in names},
        "by_fraction": {f"{f:g}": quality(statistics[f"at_{f:g}"]) for f in FRACTIONS},
        "calibration": [[x[rows].double().mean().item() for x in (last, outcomes)] for rows in bins if len(rows)],
    }


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
def sample(name, policy, reference, guide, prompts: list[list[int]], end_ids, pad_id: int, device, args: Args) -> dict:
    """One answer to each of `prompts`: `response_ids`, `response_mask (B, R)`, and `kl`, `ended (B,)`.

    `kl` to the reference is that of what was sampled from, cut and guided or not. Ranks share the work.
    """
    # The same for every policy: with common luck, they differ by what they learned.
    uniforms = torch.rand(len(prompts), args.response_length, generator=torch.Generator().manual_seed(args.seed))
    mine = torch.tensor(common.rows_of_rank(len(prompts)))
    parts = []
    for rows in mine.split(args.micro_batch_size):
        prompt_ids, prompt_mask = (x.to(device) for x in common.pad([prompts[i] for i in rows], pad_id, "left"))
        response_ids, response_mask, tilt = guided_generate(
            policy, guide, prompt_ids, prompt_mask, uniforms[rows].to(device), end_ids, pad_id, args
        )
        kl = tilt.sum(1)  # (rows,)
        if reference:  # an export needs no KL
            batch = torch.cat([prompt_ids, response_ids], 1), torch.cat([prompt_mask, response_mask], 1), response_mask
            batch = common.crop(*batch)
            logprobs, _ = policy.token_logprobs(*batch, args.temperature or 1.0)  # (rows, r), r at most R
            ref_logprobs, _ = reference.token_logprobs(*batch, args.temperature or 1.0)
            kl += (logprobs - ref_logprobs).sum(1)
        ended = torch.isin(response_ids.gather(1, response_mask.sum(1, keepdim=True) - 1)[:, 0], end_ids)
        parts.append((response_ids, response_mask, kl, ended))
    names = ("response_ids", "response_mask", "kl", "ended")
    answers = {n: common.all_gather(torch.cat(p))[: len(prompts)].cpu() for n, p in zip(names, zip(*parts))}
    common.check(answers["kl"].isfinite().all(), f"{name}: its log-probs or the reference's are not finite")
    rows = zip(prompts, answers["response_ids"], answers["response_mask"])
    answers["judged"] = [Answer(prompt, ids[mask].tolist(), 0.0, "policy") for prompt, ids, mask in rows]
    return answers


# ---- Files for the judges of AlpacaEval 2, Arena-Hard-Auto and MT-Bench (FastChat) -----------------------------------
QUESTION_COLUMNS = {"alpaca_eval": ["instruction"], "arena_hard": ["uid", "prompt"],
                    "mt_bench": ["question_id", "category", "turns"]}  # fmt: skip
MT_BENCH_TEMPERATURES = {"extraction": 0, "math": 0, "coding": 0, "reasoning": 0, "stem": 0.1, "humanities": 0.1}


def judge_row(benchmark: str, name: str, question: dict, answers: list[str]) -> dict:
    """What a benchmark's program reads of the `answers`, one a turn, of policy `name` to a question."""
    if benchmark == "alpaca_eval":
        return {"instruction": question["instruction"], "output": answers[0], "generator": name}
    if benchmark == "mt_bench":
        return {"question_id": question["question_id"], "answer_id": f"{name}-{question['question_id']}",
                "model_id": name, "choices": [{"index": 0, "turns": answers}], "tstamp": time.time()}  # fmt: skip
    messages = [{"role": "user", "content": question["prompt"]},
                {"role": "assistant", "content": {"answer": answers[0]}}]  # fmt: skip
    return {"uid": question["uid"], "ans_id": f"{name}-{question['uid']}", "model": name, "messages": messages,
            "tstamp": time.time()}  # fmt: skip


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
        whole = all([*map(type, asked)] == [str, str] for asked in turns)
        common.check(whole, f"--dataset {args.dataset}: some rows have not two turns")
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
        policy = frozen_policy(path, tokenizer, mesh, dtype)
        guide = frozen_gvm(path, tokenizer, mesh, dtype, args) if args.value_guided else None
        end_ids = torch.tensor(policy.generation_config.eos_token_id, device=device)  # (E,)
        chats, num_cut = [[] for _ in questions], 0
        for turn in range(len(turns[0])):  # the second one's prompt holds the policy's own first answer
            for chat, asked in zip(chats, turns):
                chat.append({"role": "user", "content": asked[turn]})
            with common.user_errors(common.UserError, f"{name}: a question is not as its chat template takes them"):
                prompts = [common.tokenize_prompt(tokenizer, chat) for chat in chats]  # all: a judge takes no part
            common.check_positions(path, policy, max(map(len, prompts)) + args.response_length)
            for temperature in sorted(set(temperatures)):
                rows = [i for i, its in enumerate(temperatures) if its == temperature]
                settings = replace(args, seed=args.seed + turn, temperature=temperature)
                answers = sample(name, policy, None, guide, [prompts[i] for i in rows], end_ids,
                                 tokenizer.pad_token_id, device, settings)  # fmt: skip
                num_cut += (~answers["ended"]).sum().item()
                for i, ids, mask in zip(rows, answers["response_ids"], answers["response_mask"]):
                    text = tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
                    chats[i].append({"role": "assistant", "content": text})
        said = [[message["content"] for message in chat[1::2]] for chat in chats]
        rows = [judge_row(args.export, name, *question) for question in zip(questions, said)]
        text = json.dumps(rows) if args.export == "alpaca_eval" else "\n".join(map(json.dumps, rows))
        if dist.get_rank() == 0:
            files[name].write_text(text + "\n")
        common.log(f"wrote {files[name]}: {len(rows)} questions, {num_cut} answers cut to --response-length")
        del policy, guide
        gc.collect()  # as in `main`
    common.end_processes()


# ---- Report ----------------------------------------------------------------------------------------------------------
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe and Ito's: told apart by all
WORDS = {"gold": "exact score (gold), at most 1", "gvm_score": "value model's score",
         "kl": "KL to the reference, nats per answer", "response_length": "answer length, tokens",
         "eos_rate": "share of answers that end by themselves", "win_rate": "win rate",
         "scores": "score by the run's judge", "off_support": "share of answers unlike the reference's"}  # fmt: skip
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Evaluation</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>:root{color-scheme:light dark}body{font:15px/1.5 sans-serif;
margin:2em auto;max-width:70em;padding:0 1em}table{display:block;overflow-x:auto}td{padding:.2em .8em}
tr:first-child{font-weight:bold}tr:nth-child(even){background:#8882}pre{font:inherit;line-height:1.9;white-space:pre-wrap;
overflow-wrap:anywhere}pre span{color:#000;padding:.15em 0;outline:1px solid #8883}figure{text-align:center;
display:inline-block;width:min(22em,100%);margin:0 1em 1em 0}svg{fill:none;stroke:#888;stroke-width:1.5;
stroke-linecap:round;text-anchor:middle}text{fill:currentColor;stroke:none;font-size:11px}</style><h1>Evaluation</h1>"""


def table(corner: str, rows: dict[str, dict]) -> list[list[str]]:
    """Header and one row of texts for each of `rows`, of numbers or means with their intervals."""
    bounds = lambda x: f" [{x['low']:.3f}, {x['high']:.3f}]" if "low" in x else ""
    number = lambda x: f"{x:.3f}" if isinstance(x, float) else str(x)
    show = lambda x: "-" if x is None else number(x["mean"]) + bounds(x) if isinstance(x, dict) else number(x)
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    return [[corner, *columns], *([name, *(show(row.get(c)) for c in columns)] for name, row in rows.items())]


def tables(results: dict):
    """Captions and tables: of the policies, and of the GVM on held-out pairs."""
    policies = {name: {c: row[c] for c in WORDS if c in row} for name, row in results["policies"].items()}
    yield caption(policies), table("policy", policies)
    if gvm := results.get("gvm"):
        accuracy = {"GVM": gvm["pair_accuracy"]}
        if "gold_pair_accuracy" in gvm:
            accuracy["gold"] = {"last": gvm["gold_pair_accuracy"]}
        yield "held-out pairs ranked rightly by a statistic of their token values", table("judge", accuracy)
        yield "value against label, once so much of an answer is read", table("share read", gvm["by_fraction"])
        if "by_subset" in gvm:
            yield "the same by subset", table("subset", gvm["by_subset"])
        if "by_policy" in gvm:
            yield "means, and correlation of value and label, by writer", table("written by", gvm["by_policy"])


def caption(policies: dict) -> str:
    """What the numbers of the policies mean."""
    judge = next((row["win_rate"]["judge"] for row in policies.values() if "win_rate" in row), None)
    if judge is None:
        return "no judge of answers: neither an exact score nor a GVM"
    biased = "; the GVM is no impartial judge of a policy that was trained against it" * (judge == "gvm_score")
    return f"[95 % bootstrap interval over prompts]; win rate by {judge} against the first policy, ties half{biased}"


@torch.no_grad()
def shown_answer(gvm, tokenizer, name: str, answer: Answer, pool: list[Answer]) -> tuple:
    """`name`, the texts of the answer's tokens, and V(s_1) with the value after every token. All ranks do the same."""
    if gvm is None:
        return f"{name}: {tokenizer.decode(answer.response_ids)}", [], []
    batch = make_batch(gvm.config, [answer], policy_pools(pool), "heldout", tokenizer.pad_token_id, gvm.device)
    pairs = [answer.response_ids[max(0, i - 1) : i + 1] for i in range(len(answer.response_ids))]  # spaces need two
    tokens = [tokenizer.decode(pair).removeprefix(tokenizer.decode(pair[:-1])) for pair in pairs]
    return name, tokens, gvm.token_values(**batch)[0].tolist()


def colour(value: float, limit: float) -> tuple[int, int, int]:
    """From red at `-limit` over white to blue at `limit`, as (red, green, blue); black text can be read on each."""
    share = max(-1.0, min(1.0, value / limit))
    end = (90, 150, 255) if share > 0 else (255, 100, 90)
    return tuple(round(255 + abs(share) * (part - 255)) for part in end)


def heat_map(examples: list[tuple], terminal: bool = False) -> str:
    """Prompts, each with its `shown_answer`s, every token on the colour of its value: HTML, or for a terminal."""
    page, bold, escape = "", "<b>{}</b>", lambda text: html.escape(common.printable(text))
    cell = '<span style="background:rgb({0},{1},{2})" title="value {3:+.3f}, change {4:+.3f}">{5}</span>'
    if terminal:
        bold, escape, cell = "\x1b[1m{}\x1b[0m", common.printable, "\x1b[38;2;0;0;0;48;2;{0};{1};{2}m{5}\x1b[0m"
    levels = [abs(value) for _, answers in examples for *_, values in answers for value in values]
    if levels:
        limit = torch.tensor(levels).quantile(0.98).item() or 1.0  # the few beyond it have its colour
        page += "A token's colour: how good the finished answer will be, judged up to there. On the page, point at it. "
        page += f"[prompt]: before the first token. ▲ ▼: up or down by more than {limit / 2:.2g}. From bad to good: "
        page += "".join(cell.format(*colour(x, 1), x * limit, 0, f" {x * limit:+.2g} ") for x in (-1, -0.5, 0, 0.5, 1))
    for prompt, answers in examples:
        page += "\n\n" + bold.format(escape(prompt))
        for name, tokens, values in answers:
            page += f"\n{escape(name)} "
            for text, before, value in zip(["[prompt] ", *tokens[:400]], values[:1] + values, values):
                mark = "▲" * (value - before > limit / 2) + "▼" * (before - value > limit / 2)
                shown = escape(text.replace("\n", "⏎")) + mark
                page += cell.format(*colour(value, limit), value, value - before, shown) + "\n" * text.count("\n")
            page += f" … {len(tokens) - 400} more tokens" * (len(tokens) > 400)
    return page


def plot(title: str, x_title: str, series: dict[str, list[tuple]], guide: tuple = ()) -> str:
    """An inline SVG: for every name a line through its points (x, y), dots where they are few; a grey `guide`."""
    xs, ys = zip(*guide, *(point for points in series.values() for point in points))
    left, width, bottom, height = min(xs), max(xs) - min(xs) or 1, min(ys), max(ys) - min(ys) or 1
    place = lambda point: f"{50 + 265 * (point[0] - left) / width:.1f},{155 - 140 * (point[1] - bottom) / height:.1f} "
    svg, legend = f'<path d="M45,10v150h275"/><polyline points="{"".join(map(place, guide))}"/>', ""
    for share in (0, 0.5, 1):
        svg += f'<text x="{50 + 265 * share}" y="175">{left + share * width:.3g}</text>'
        svg += f'<text x="20" y="{159 - 140 * share}">{bottom + share * height:.3g}</text>'
    for i, (name, points) in enumerate(series.items()):
        places, ink = [place(point) for point in points], PALETTE[i % len(PALETTE)]
        dots = "".join(f"M{at}h0" for at in places if len(places) <= 20)
        svg += f'<g stroke="{ink}"><polyline points="{"".join(places)}"/><path d="{dots}" stroke-width="8"/></g>'
        legend += f'<span style="color:{ink}">●</span> {html.escape(name)} ' * bool(points)
    return f'<figure><b>{title}</b><br>{legend}<svg viewBox="0 0 340 180">{svg}</svg>{x_title}</figure>'


def score_against_kl(results: dict) -> str:
    """Score against KL. How good the answers are, and how far the policy moved from the reference; left is cheaper."""
    rows = results["policies"].items()
    points = lambda judge: {name: [(row["kl"], row[judge]["mean"])] for name, row in rows if judge in row}
    return "".join(plot(WORDS[x], WORDS["kl"], points(x)) for x in ("gold", "gvm_score") if points(x))


def learning_curves(results: dict) -> str:
    """Learning curves. A run's judge (DVPO: value model, PPO: reward model) may err far from the reference."""
    curves = {key: {name: [] for name in results["policies"]} for key in WORDS}
    for name, policy in results["policies"].items():
        file = Path(policy["path"]).expanduser() / "metrics.jsonl"
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError, TypeError, KeyError):  # a torn line
                row = {key.split("/")[-1]: float(value) for key, value in dict(json.loads(line)).items()}
                for key in WORDS.keys() & row.keys():
                    curves[key][name].append((row["step"], row[key]))
    return "".join(plot(WORDS[key], "update", curves[key]) for key in WORDS if any(curves[key].values()))


def ranking(results: dict) -> str:
    """Ranking. Does the better of two held-out answers have the higher value, once so much is read? Grey: chance."""
    points = [(float(share), row["pair_accuracy"]) for share, row in results["gvm"]["by_fraction"].items()]
    return plot("pairs ranked rightly", "share of each answer read", {"GVM": points}, ((0, 0.5), (1, 0.5)))


def calibration(results: dict) -> str:
    """Calibration. What came of held-out answers, in ten groups by their value. Grey: what the values say."""
    points = {"a tenth of the answers": results["gvm"]["calibration"]}
    return plot("mean label: 1 preferred, -1 not", "mean value", points, ((-1, -1), (1, 1)))


def write_html(path: Path, results: dict, examples: list[tuple]) -> None:
    """A self-contained page: no script, no request, and every text of a model or dataset escaped."""
    grids, pictures = [], [f"<h2>Answers</h2><pre>{heat_map(examples)}</pre>"]
    for text, (header, *rows) in tables(results):
        rows = [[WORDS.get(name, name.replace("_", " ")) for name in header], *rows]
        rows = ["".join(f"<td>{html.escape(cell)}" for cell in row) for row in rows]
        grids.append(f"<table><tr>{'<tr>'.join(rows)}</table><p>{html.escape(text)}")
    for picture in (score_against_kl, learning_curves, *[ranking, calibration] * ("gvm" in results)):
        title, _, text = picture.__doc__.partition(". ")  # told to readers of the code and of the page
        pictures.append(f"<h2>{title}</h2>{text}<p>{drawn}" if (drawn := picture(results)) else "")
    path.write_text("".join([PAGE, *grids[:1], *pictures, *grids[1:]]), encoding="utf-8")


def main(args: Args) -> None:
    # ---- 1 Processes -------------------------------------------------------------------------------------------------
    device = common.init_processes()
    common.check(args.policies, "name at least one policy, as in dvpo=runs/dvpo")
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for policy in args.policies:
        common.check("=" in policy, f"{policy!r}: expected NAME=PATH, as in dvpo=runs/dvpo")
    paths = dict(policy.split("=", 1) for policy in args.policies)
    common.check(len(paths) == len(args.policies), "two policies have the same name")
    args = common.settle(args, next(iter(paths.values())), response_length=20)
    dtype = getattr(torch, args.dtype)
    if args.value_guided is not None:
        common.check(args.value_guided > 0, "--value-guided 0: name a BETA above 0, as in 0.4")
        common.check(args.top_k, "--value-guided needs --top-k, the number of tokens to judge at each step, as in 8")
        common.check(args.gvm_path, "--value-guided needs a value model: --gvm-path")
    if args.export:
        return export(paths, mesh, dtype, device, args)

    # ---- 2 Data: held-out prompts, each several times ----------------------------------------------------------------
    tokenizer = common.load_tokenizer(args.reference_path)
    for path in paths.values():
        common.check_same_tokenizer(args.reference_path, tokenizer, path)
    train, heldout = common.load_examples(args.dataset.removesuffix(":all"), needs="prompts")
    everything = train + heldout
    heldout = everything if ":" in args.dataset else heldout
    common.log(f"{len(heldout)} of {len(everything)} examples are evaluated; NAME:all takes all of NAME")
    common.check(heldout, f"--dataset {args.dataset}: no prompt of its few is held out; {args.dataset}:all takes all")
    heldout, tokens = common.fit_prompts(tokenizer, heldout, args.max_prompt_length)
    unique = {str(example.prompt): (example, ids) for example, ids in zip(heldout, tokens)}
    asked, prompts = zip(*list(unique.values())[: args.num_prompts])
    asked = [example.prompt for example in asked for _ in range(args.samples_per_prompt)]  # messages
    spoken = lambda messages: "\n\n".join(f"{m['role']}: {m['content']}" for m in messages)
    exact_score = getattr(common.load_task(args.dataset.removesuffix(":all")), "score", None)  # "gold"
    repeated = [prompt for prompt in prompts for _ in range(args.samples_per_prompt)]
    common.log(f"{len(prompts)} held-out prompts x {args.samples_per_prompt} answers")

    # ---- 3 Models that judge -----------------------------------------------------------------------------------------
    reference = frozen_policy(args.reference_path, tokenizer, mesh, dtype)
    gvm = frozen_gvm(args.reference_path, tokenizer, mesh, dtype, args) if args.gvm_path else None
    results, longest = {"args": asdict(args), "policies": {}}, max(map(len, prompts)) + args.response_length
    common.check_positions(args.reference_path, reference, longest)

    rated = [e for e in heldout if e.rejected and e.chosen.strip() and e.rejected.strip() and e.chosen != e.rejected]
    known = all(e.chosen_policy and e.rejected_policy for e in rated)
    common.check(known or gvm is None or gvm.config.num_context_trajectories == 0, f"{args.gvm_path} is conditioned on "
                 "other answers of each writer: the pairs must have chosen_policy and rejected_policy")  # fmt: skip
    folder = Path(args.output_dir).expanduser()
    with common.user_errors(OSError, f"--output-dir {folder}: cannot be written"):
        folder.mkdir(parents=True, exist_ok=True)
    common.check(os.access(folder, os.W_OK), f"--output-dir {folder}: cannot be written")  # before the work

    # ---- 4 Policies --------------------------------------------------------------------------------------------------
    by_prompt = lambda x: x.double().view(len(prompts), args.samples_per_prompt)
    examples = [(spoken(messages), []) for messages in asked[:: args.samples_per_prompt][: args.show or 6]]
    baseline, written = None, []
    for name, path in paths.items():
        policy = frozen_policy(path, tokenizer, mesh, dtype)
        common.check_positions(path, policy, longest)
        end_ids = torch.tensor(policy.generation_config.eos_token_id, device=device)  # (E,)
        guide = gvm if args.value_guided else None
        answers = sample(name, policy, reference, guide, repeated, end_ids, tokenizer.pad_token_id, device, args)
        texts = [tokenizer.decode(answer.response_ids, skip_special_tokens=True) for answer in answers["judged"]]
        row = results["policies"][name] = {"path": path}
        verdicts = {}
        if gvm is not None:  # it judges finished answers, behind the policy's own others where it was trained so
            scores = heldout_statistics(gvm, answers["judged"], tokenizer.pad_token_id, device, args)["last"]
            common.check(scores.isfinite().all(), f"{args.gvm_path}: its values are not finite")
            verdicts["gvm_score"] = by_prompt(scores)
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
        for (_, shown), answer in zip(examples, answers["judged"][:: args.samples_per_prompt]):
            shown.append(shown_answer(gvm, tokenizer, name, answer, answers["judged"]))
        numbers = {"tokens": answers["response_mask"].sum(1), "kl": answers["kl"], **verdicts}
        numbers = {key: x.flatten().tolist() for key, x in numbers.items()}
        for i, text in enumerate(texts):  # `instruction`, `output` and `generator` are what AlpacaEval reads
            written.append({"prompt": asked[i], "instruction": asked[i][-1]["content"], "output": text,
                            "generator": name, **{key: x[i] for key, x in numbers.items()}})  # fmt: skip
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
        for example, *pair in zip(rated[: args.show or 6], judged[::2], judged[1::2]):
            shown = [shown_answer(gvm, tokenizer, side, x, judged) for side, x in zip(("chosen", "rejected"), pair)]
            examples.append((spoken(example.prompt), shown))
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
        write_html(folder / "report.html", results, examples)
        with contextlib.suppress(OSError):  # nobody reads it any more
            print(heat_map(examples, terminal=True) if args.show else "", flush=True)
    for text, rows in tables(results):
        widths = [max(map(len, column)) for column in zip(*rows)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
        common.log("\n".join([*lines, f"({text})\n"]))
    common.log(f"wrote results.json, report.html and answers.json in {args.output_dir}")
    common.end_processes()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args))
