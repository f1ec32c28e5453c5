"""Baseline: PPO-RLHF with a reward model and an online critic, what DVPO (arXiv:2502.16944v2) does without.

`diff train_ppo_baseline.py train_dvpo.py` shows the paper: same rollout, same policy loss, same metrics.

Before the loop a reward model (RM) learns the preferences by Bradley-Terry, unless `--reward-path` names one. In the
loop a critic, started from the RM, learns the values of the policy online. Per update:

    rollout     the policy answers prompts
    score       old and reference log-probs of the answers; the RM's score of each; the critic's value at every token
    advantages  GAE over those values, closed at the end of each answer by its score
    update      PPO-clip on the policy and a clipped value loss on the critic, some epochs of minibatches

    python train_ppo_baseline.py                                               # embedded task, after sft
    torchrun --nproc_per_node 8 train_ppo_baseline.py --model-path SFT --reward-path RM --dataset DATA \
        --max-prompt-length 1024 --response-length 640 --learning-rate 2e-6 --critic-learning-rate 9e-6 --num-epochs 4 \
        --kl-coef 0.2 --kl-target 6 --gae-lambda 0.95

In: an SFT checkpoint, preference pairs or an RM, prompts. Out: `--output-dir`, a checkpoint that `from_pretrained`
loads, and `--reward-output-dir`, a sequence-classification checkpoint, where the RM was trained here.
Shapes: B sequences, P prompt tokens (left-padded), R response tokens, T = P + R, V vocabulary, H hidden, N tokens.
"""

import contextlib
import gc
import time
import types
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import DynamicCache, StaticCache, get_linear_schedule_with_warmup
from transformers.cache_utils import StaticLayer

import common


@dataclass
class Args:
    # Paths
    model_path: str = "runs/sft"
    """policy and KL reference: local folder or hub id"""
    reward_path: str | None = None
    """sequence-classification reward model: local folder or hub id; None trains one first: --reward-output-dir"""
    critic_path: str | None = None
    """value model that the critic starts from, a GVM perhaps: local folder or hub id; None is the RM"""
    dataset: str = "tests/tasks/lists.py"
    """prompts, and pairs for the RM: a task's file, or NAME or NAME:SPLIT of a hub or local dataset"""
    output_dir: str = "runs/ppo"
    """folder of the trained policy, metrics and arguments"""
    reward_output_dir: str | None = None
    """folder of the RM trained here; None: `output_dir` with rm for ppo in its name, as runs/rm for runs/ppo, or _rm"""

    # Reward model
    reward_num_epochs: int = 3
    """passes over the preference pairs"""
    reward_learning_rate: float | None = None
    """AdamW's peak, decayed linearly to zero; None: 2e-4, to be named for models wider than 256"""
    reward_warmup_fraction: float = 0.1
    """share of the RM's updates in which its learning rate rises"""
    reward_batch_size: int = 32
    """answers per update of the RM (global); the two of a pair stay together"""
    reward_center_coef: float = 0.01
    """pulls the scores of each pair towards a sum of zero: Bradley-Terry leaves their mean open"""

    # Training
    seed: int = 1
    """seed of the RM's data order, the order of prompts, sampling and minibatches"""
    num_updates: int = 300
    """updates, each one rollout and `num_epochs` passes over it"""
    learning_rate: float | None = None
    """AdamW's, decayed linearly to zero; None: 6e-4, or less for answers above 20 tokens (released code: 2e-6)"""
    critic_learning_rate: float | None = None
    """the critic's, decayed likewise; None: half of `learning_rate`, the best ratio on the small task"""
    num_epochs: int = 2
    """passes over each rollout (released code: 4)"""
    num_minibatches: int = 2
    """optimizer steps per pass"""
    rollout_batch_size: int = 64
    """answers per update (global)"""
    micro_batch_size: int = 64
    """sequences per forward and backward (per rank); lower it when out of memory, results stay the same"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    lora_rank: int = 0
    """of LoRA: train low-rank pairs beside the layers, at a higher learning rate; 0 trains all weights"""

    # Rollout
    max_prompt_length: int = 512
    """tokens; longer prompts are dropped"""
    response_length: int | None = None
    """tokens; longer answers are cut; None: 20, to be named for models wider than 256 (released code: 640)"""
    temperature: float = 1.0
    """of sampling and of every log-prob (released code: 1)"""
    rollout_micro_batch_size: int | None = None
    """answers sampled at once (per rank); None is all; lower it when out of memory, results stay the same"""

    # Advantages
    reward_source: Literal["rm", "task"] = "rm"
    """task: the dataset's exact score; there is no RM then, and the critic starts from `critic_path` or the policy"""
    gamma: float = 1.0
    """discount per token (released code: 1)"""
    gae_lambda: float = 0.95
    """GAE's lambda: 0 looks one token ahead, 1 to the end of the answer (released code: 0.95)"""
    kl_coef: float = 0.1
    """price of a nat of KL to the reference, taken off the reward (released code: 0.2, adaptive)"""
    kl_target: float | None = None
    """nats per answer; adapts `kl_coef` towards it (released code: 6); None keeps it fixed"""
    missing_eos_penalty: float = 1.0
    """taken off the RM's score of an answer that was cut before it ended"""
    clip_coef: float = 0.2
    """PPO's epsilon on the probability ratio"""
    value_clip_coef: float = 0.2
    """the critic's values are clipped to this distance from those of the rollout"""
    max_approx_kl: float | None = None
    """nats per token between old and new policy; past it an update's remaining steps are skipped; None never"""
    max_kl: float = 200.0
    """nats per answer to the reference; past it the policy has collapsed, and the run stops"""

    # Machine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute, frozen and saved weights; trained in float32; auto: bfloat16 on GPU, float32 on CPU"""
    dp_replicate: int = 1
    """replicas of the sharded models (hybrid sharding: one per machine)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    checkpoint_every: int = 50
    """updates between checkpoints in `output_dir`, the newest two of which are kept, and between samples shown"""
    resume: bool = False
    """go on with an interrupted run, from its newest whole checkpoint; start where there is none"""
    dry_run: bool = False
    """show the data, token counts and an estimate of the memory, then stop before any model is loaded"""
    track: Literal["tensorboard", "wandb"] | None = None
    """also send metrics there"""


# ---- The mathematics -------------------------------------------------------------------------------------------------
# Copied from train_dvpo.FusedLogprobs
class FusedLogprobs(torch.autograd.Function):
    """Linear + log-softmax + gather over slices of the vocabulary, whose logits are recomputed in backward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, temperature, chunk_size):
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        top = hidden.new_full((len(hidden),), -torch.inf, dtype=dtype)  # (N,) the largest logit so far
        total, weighted = torch.zeros_like(top), torch.zeros_like(top)  # (N,) sums of e^(z - top) and z e^(z - top)
        label_logits = torch.zeros_like(top)  # (N,)
        for start in range(0, len(weight), chunk_size):
            logits = project(hidden, weight[start : start + chunk_size]).div_(temperature)  # (N, chunk)
            place = labels - start  # (N,) the label's column, if it is in this slice
            column = place.clamp(0, logits.shape[1] - 1)
            label_logits += logits.gather(1, column[:, None])[:, 0] * (place == column)
            before, top = top, torch.maximum(top, logits.amax(1))
            shrink, exp = (before - top).exp(), (logits - top[:, None]).exp_()  # (N,), (N, chunk)
            total = total * shrink + exp.sum(1)
            weighted = weighted * shrink + exp.mul_(logits).sum(1)
            del logits, exp  # or they would still be held while the next slice's are made
        logsumexp = top + total.log()  # (N,)
        entropy = logsumexp - weighted / total
        ctx.save_for_backward(hidden, weight, labels, logsumexp)
        ctx.temperature, ctx.chunk_size = temperature, chunk_size
        ctx.mark_non_differentiable(entropy)
        return label_logits - logsumexp, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, _):
        hidden, weight, labels, logsumexp = ctx.saved_tensors
        g = -grad_logprobs[:, None] / ctx.temperature  # (N, 1)
        grad_hidden = torch.zeros_like(hidden, dtype=g.dtype)  # (N, H) summed in fp32
        grad_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None  # (V, H) a frozen head has none
        scaled = (g * hidden).to(hidden.dtype)  # (N, H)
        for start in range(0, len(weight), ctx.chunk_size):
            slice_ = weight[start : start + ctx.chunk_size]  # (chunk, H)
            residual = project(hidden, slice_).div_(ctx.temperature).sub_(logsumexp[:, None]).exp_()  # (N, chunk)
            place = labels - start
            column = place.clamp(0, residual.shape[1] - 1)
            # p - onehot(y): minus the gradient of log p_y by the logits.
            residual.scatter_add_(1, column[:, None], -(place == column)[:, None].to(residual.dtype))
            residual = residual.to(weight.dtype)
            grad_hidden += project(residual, slice_.T)
            if grad_weight is not None:
                grad_weight[start : start + ctx.chunk_size] = project(residual.T, scaled.T)
            del residual
        return grad_hidden.mul_(g).to(hidden.dtype), grad_weight, None, None, None


# Copied from train_dvpo.project
def project(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T`, accumulated and returned in at least fp32: rounding logits to bf16 would move PPO's ratios."""
    if x.is_cuda and x.dtype == torch.bfloat16:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return x.to(dtype) @ weight.to(dtype).T


# Copied from train_dvpo.fused_logprobs
def fused_logprobs(hidden, weight, labels, temperature: float = 1.0, chunk_size: int | None = None):
    """`log softmax(hidden @ weight.T / temperature)` at `labels`, and the entropy, never holding `(N, V)` logits.

    `hidden (N, H)`, `weight (V, H)`, `labels (N,)`; returns `(logprobs, entropy)`, `(N,)` each in at least fp32.
    Log-probs are differentiable in `hidden` and `weight`; the entropy is for logging and is not. Extra memory: some
    N x max(`chunk_size`, H) floats. The softmax is summed over `chunk_size` rows of `weight` at a time (None: by
    device), as in arXiv:1805.02867.
    """
    # Small slices stay in a CPU's cache; on a GPU they would take longer to launch than to compute (by estimate).
    chunk_size = chunk_size or (4096 if hidden.is_cuda else 1024)
    return FusedLogprobs.apply(hidden, weight, labels, temperature, chunk_size)


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


# Copied from train_gvm.bradley_terry_loss
def bradley_terry_loss(scores) -> torch.Tensor:
    """`-log P(chosen is preferred)` under Bradley-Terry, `(M,)`, of `scores (2 M,)`: chosen, rejected, chosen, ..."""
    chosen, rejected = scores.view(-1, 2).unbind(1)  # (M,)
    return -torch.nn.functional.logsigmoid(chosen - rejected)


def ppo_advantages(values, scores, kl, mask, gamma: float, lam: float, kl_coef: float):
    """Token advantages, whitened, and the critic's targets: Section 2 of arXiv:1909.08593.

    `values (B, R + 1)` of the critic, `scores (B,)` of the RM, `kl (B, R)` log-ratio of policy to reference,
    `mask (B, R)`; returns advantages and returns, `(B, R)` each, the returns at the state before each token.
    """
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    rewards = (-kl_coef * kl).scatter_add(1, last, scores[:, None])  # (B, R) the score is paid on the last token
    values = values.scatter(1, last + 1, 0.0)  # and nothing comes after it
    advantages = common.gae(values, rewards, mask, gamma, lam)
    return common.masked_whiten(advantages, mask), advantages + values[:, :-1]


# Copied from train_dvpo.ppo_clip_loss
def ppo_clip_loss(new_logprobs, logprobs, advantages, mask, clip_coef: float):
    """PPO-clip, Eq. 7 of arXiv:1707.06347, summed over the tokens of `mask`.

    All inputs `(B, R)`. Returns the loss and, for logging, the sums of k3 (an estimate of KL(old || new)), of clipped
    tokens, of the ratio and of its square.
    """
    logratio = (new_logprobs - logprobs)[mask]  # (N,)
    ratio, advantages = logratio.exp(), advantages[mask]
    clipped = ratio.clamp(1 - clip_coef, 1 + clip_coef)
    loss = -torch.min(advantages * ratio, advantages * clipped).sum()
    with torch.no_grad():
        sums = (ratio - 1 - logratio).sum(), (ratio != clipped).sum(), ratio.sum(), (ratio**2).sum()
    return loss, sums


def clipped_value_loss(new_values, values, returns, mask, clip_coef: float) -> torch.Tensor:
    """`0.5 max((V - G)^2, (clip(V) - G)^2)`, summed over the tokens of `mask`; all inputs `(B, R)`."""
    clipped = torch.clamp(new_values, values - clip_coef, values + clip_coef)
    return 0.5 * torch.max((new_values - returns) ** 2, (clipped - returns) ** 2)[mask].sum()


# ---- Sharding --------------------------------------------------------------------------------------------------------
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


# ---- Rollout ---------------------------------------------------------------------------------------------------------
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


# ---- Reward model ----------------------------------------------------------------------------------------------------
def tokenize_pairs(tokenizer, examples, args: Args, heldout: bool = False) -> list[common.Trajectory]:
    """Prompt and response tokens of both answers of each pair: chosen, rejected, chosen, ..."""
    examples, prompts = common.fit_prompts(tokenizer, examples, args.max_prompt_length, heldout)
    texts = [text for example in examples for text in (example.chosen, example.rejected)]
    responses = common.tokenize_answers(tokenizer, texts, args.response_length)
    return [(prompts[i // 2], response) for i, response in enumerate(responses)]


@torch.no_grad()
def heldout_accuracy(rm, answers: list[common.Trajectory], pad_id: int, device, args: Args) -> float:
    """Share of held-out pairs that the RM ranks rightly; ties count half. Ranks share the work."""
    mine = [answers[i] for i in common.rows_of_rank(len(answers))]
    scores = []
    for i in range(0, len(mine), args.micro_batch_size):
        batch = common.pad_batch(*zip(*mine[i : i + args.micro_batch_size]), pad_id, device)
        scores.append(common.last_values(rm.token_values(**batch), batch["response_mask"]))
    chosen, rejected = common.all_gather(torch.cat(scores))[: len(answers)].view(-1, 2).unbind(1)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def train_reward_model(args: Args, tokenizer, mesh, dtype, trained_dtype, device) -> None:
    """Bradley-Terry on the preference pairs, started from the SFT policy; leaves the RM in `args.output_dir`."""
    run = common.Run(args, __file__)
    if run.finished:
        return
    rank, world_size = dist.get_rank(), dist.get_world_size()
    whole = args.reward_batch_size % (2 * world_size) == 0 and args.micro_batch_size % 2 == 0
    common.check(whole, f"--reward-batch-size must be a multiple of {2 * world_size} and --micro-batch-size a multiple "
                 "of 2: whole pairs for every process")  # fmt: skip
    examples, heldout = common.load_examples(args.dataset, needs="pairs")
    train_set = tokenize_pairs(tokenizer, examples, args)
    heldout_set = tokenize_pairs(tokenizer, heldout, args, heldout=True)
    common.log(f"reward model: {len(train_set) // 2} pairs, {len(heldout_set) // 2} held out")
    rm = common.load_value_model(args.model_path, tokenizer, trained_dtype, fresh_head=True)
    rm = add_methods(shard(common.prepare(rm, args), mesh, dtype), token_values)
    num_updates = max(1, args.reward_num_epochs * len(train_set) // args.reward_batch_size)
    optimizer = torch.optim.AdamW(rm.parameters(), lr=args.reward_learning_rate, weight_decay=0.0, fused=True)
    num_warmup = int(args.reward_warmup_fraction * num_updates)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup, num_updates)

    widest = [max(map(len, side)) for side in zip(*train_set, *heldout_set)]  # prompts, answers
    common.check_positions(args.model_path, rm, sum(widest))
    data = common.fingerprint(train_set, args.model_path)
    done, _ = run.start([(rm, optimizer, scheduler)], num_updates, data)
    num_pairs = args.reward_batch_size // 2
    for update in range(done + 1, num_updates + 1):
        start = time.perf_counter()
        pairs = common.shuffled_batch(len(train_set) // 2, update, num_pairs, args.seed)
        mine = pairs[rank * num_pairs // world_size : (rank + 1) * num_pairs // world_size]
        widths = widest if update <= 2 else (0, 0)
        sum_loss = 0
        for i in range(0, len(mine), args.micro_batch_size // 2):
            micro = [train_set[2 * pair + side] for pair in mine[i : i + args.micro_batch_size // 2] for side in (0, 1)]
            batch = common.pad_batch(*zip(*micro), tokenizer.pad_token_id, device, widths)
            scores = common.last_values(rm.token_values(**batch), batch["response_mask"])  # (micro,)
            loss = bradley_terry_loss(scores)  # (pairs,)
            loss = loss + args.reward_center_coef * scores.view(-1, 2).sum(1) ** 2  # Eq. 2 of arXiv:2312.09244
            (loss.sum() * world_size / num_pairs).backward()  # FSDP averages over ranks, this wants the sum
            sum_loss += loss.detach().sum()
        grad_norm = torch.nn.utils.clip_grad_norm_(rm.parameters(), args.max_grad_norm).full_tensor()
        dist.all_reduce(sum_loss)
        loss = sum_loss / num_pairs
        common.check_finite(update, "the loss or its gradient is", torch.stack([loss, grad_norm]))
        optimizer.step()
        optimizer.zero_grad()
        metrics = {
            "rm/loss": loss.item(),
            "optim/lr": scheduler.get_last_lr()[0],
            "optim/grad_norm": grad_norm.item(),
            "time/total": time.perf_counter() - start,
            "time/peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
        scheduler.step()
        if heldout_set and update in (num_updates // 4, num_updates // 2, num_updates):
            metrics["rm/pair_accuracy"] = heldout_accuracy(rm, heldout_set, tokenizer.pad_token_id, device, args)
        run.log(update, metrics, ("rm/loss", "rm/pair_accuracy", "optim/lr"))
        run.checkpoint(update)
    run.save(rm, dtype, tokenizer, "Reward model (Bradley-Terry)")


def main(args: Args) -> None:
    # ---- 1 Processes -------------------------------------------------------------------------------------------------
    device = common.init_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    small_rate = 6e-4 / max(1, (args.response_length or 20) / 20)  # longer answers, at the same rate, overshoot
    by_rm = args.reward_source == "rm"
    of_rm = {"reward_learning_rate": 2e-4} if by_rm and args.reward_path is None else {}
    args = common.settle(args, args.model_path, learning_rate=small_rate, response_length=20, **of_rm)
    dtype = getattr(torch, args.dtype)
    if args.critic_learning_rate is None:
        args = replace(args, critic_learning_rate=args.learning_rate / 2)
    run = common.Run(args, __file__)
    share = args.num_minibatches * world_size
    common.check(args.rollout_batch_size % share == 0,
                 f"--rollout-batch-size must be a multiple of {share}, --num-minibatches x processes")  # fmt: skip
    output = Path(args.output_dir)
    beside = output.with_name(output.name.replace("ppo", "rm") if "ppo" in output.name else output.name + "_rm")
    reward_path = (args.reward_output_dir or str(beside)) if args.reward_path is None else args.reward_path
    common.check(output.resolve() != Path(reward_path).resolve(), "--output-dir and --reward-output-dir must differ")
    made = (Path(reward_path) / "README.md").exists() and by_rm and args.reward_path is None and not args.resume
    common.check(not made, f"{reward_path} holds a reward model: if {args.dataset} trained it, use it by --reward-path "
                 f"{reward_path}, else choose another --reward-output-dir")  # fmt: skip
    common.check(world_size % args.dp_replicate == 0, f"{world_size} processes must be a multiple of --dp-replicate")
    mesh = init_device_mesh(device.type, (args.dp_replicate, world_size // args.dp_replicate),
                            mesh_dim_names=("replicate", "shard"))  # fmt: skip
    mesh = mesh if args.dp_replicate > 1 else mesh["shard"]
    if run.finished:
        return common.end_processes()

    # ---- 2 Data ------------------------------------------------------------------------------------------------------
    tokenizer = common.load_tokenizer(args.model_path)
    if args.critic_path is not None:  # said before an RM is trained
        common.check_same_tokenizer(args.model_path, tokenizer, args.critic_path)
    examples, _ = common.load_examples(args.dataset, needs="prompts")
    examples = list({str(example.prompt): example for example in examples}.values())  # each prompt once
    examples, all_prompts = common.fit_prompts(tokenizer, examples, args.max_prompt_length)
    exact_score = getattr(common.load_task(args.dataset), "score", None)  # "gold", where the task has one
    common.check(exact_score or by_rm, f"--reward-source task: {args.dataset} defines no score()")
    common.log(f"{len(all_prompts)} different prompts, the first: {tokenizer.decode(all_prompts[0])!r}")
    if args.dry_run:
        return common.dry_run(args, all_prompts, [], 3 * dtype.itemsize if args.lora_rank else 32 + 2 * dtype.itemsize)

    # ---- 3 Models: two trained, two frozen ---------------------------------------------------------------------------
    trained_dtype = dtype if args.lora_rank else torch.float32
    if by_rm and args.reward_path is None:
        train_reward_model(replace(args, output_dir=reward_path), tokenizer, mesh, dtype, trained_dtype, device)
        gc.collect()  # the model and its methods refer to each other: without it, its memory would stay taken
    policy = common.load_policy(args.model_path, tokenizer, trained_dtype)
    end_ids = torch.tensor(policy.generation_config.eos_token_id, device=device)  # (E,)
    policy = add_methods(shard(common.prepare(policy, args), mesh, dtype), token_logprobs, generate)
    reference = policy  # without its pairs
    if not args.lora_rank:
        reference = common.load_policy(args.model_path, tokenizer, dtype).eval().requires_grad_(False)
        reference = add_methods(shard(reference, mesh, dtype), token_logprobs)
    if by_rm:
        common.check_same_tokenizer(args.model_path, tokenizer, reward_path)
        rm = common.load_value_model(reward_path, tokenizer, dtype, fresh_head=False)
        rm = add_methods(shard(rm.eval().requires_grad_(False), mesh, dtype), token_values)
        common.check_positions(reward_path, rm, max(map(len, all_prompts)) + args.response_length)
    critic_path = args.critic_path or (reward_path if by_rm else args.model_path)
    critic = common.load_value_model(critic_path, tokenizer, trained_dtype, fresh_head=not by_rm)
    critic = add_methods(shard(common.prepare(critic, args), mesh, dtype), token_values)
    # eps as in CleanRL's PPO: where gradients are tiny, steps are, too.
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, eps=1e-5, weight_decay=0.0, fused=True)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), lr=args.critic_learning_rate, eps=1e-5, weight_decay=0.0,
                                         fused=True)  # fmt: skip
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, args.num_updates)
    critic_scheduler = get_linear_schedule_with_warmup(critic_optimizer, 0, args.num_updates)
    trained = [(policy, optimizer, scheduler), (critic, critic_optimizer, critic_scheduler)]
    data = common.fingerprint(all_prompts, args.model_path, critic_path, *[reward_path] * by_rm)
    done, carried = run.start(trained, args.num_updates, data, kl_coef=args.kl_coef, usual_surprise=None)
    B, longest_prompt = args.rollout_batch_size, max(map(len, all_prompts))
    for path, model in ((args.model_path, policy), (critic_path, critic)):
        common.check_positions(path, model, longest_prompt + args.response_length)
    mine = torch.arange(B).chunk(world_size)[rank]  # the rows this rank rolls out and scores
    for update in range(done + 1, args.num_updates + 1):
        # ---- 4 Rollout: each rank answers its share of the prompts, then all ranks hold all answers (a few MB) -------
        start = time.perf_counter()  # each phase ends where its results are read, so a GPU has finished it
        # All randomness of an update comes from (seed, update), for the whole batch: the number of ranks is no matter.
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        drawn = common.shuffled_batch(len(all_prompts), update, B, args.seed)
        prompts = [all_prompts[i] for i in drawn]
        # The first updates (the second has the optimizer's states) are the widest: memory runs out now or never.
        widest = update <= 2
        crop = (lambda *batch: batch) if widest else common.crop
        padded = common.pad(prompts, tokenizer.pad_token_id, "left", longest_prompt if widest else 0)
        prompt_ids, prompt_mask = (x.to(device) for x in padded)  # (B, P)
        uniforms = torch.rand(B, args.response_length, generator=generator).to(device)
        rollouts = [policy.generate(prompt_ids[micro], prompt_mask[micro], uniforms[micro], end_ids,
                                    tokenizer.pad_token_id, args.temperature)
                    for micro in mine.split(args.rollout_micro_batch_size or B)]  # fmt: skip
        response_ids, response_mask = (common.all_gather(torch.cat(x)) for x in zip(*rollouts))
        lengths = response_mask.sum(1)  # (B,)
        ended = torch.isin(response_ids.gather(1, lengths[:, None] - 1)[:, 0], end_ids)  # (B,) False where it was cut
        longest = args.response_length if widest else lengths.max()
        response_ids, response_mask = response_ids[:, :longest], response_mask[:, :longest]  # (B, R)
        input_ids = torch.cat([prompt_ids, response_ids], 1)  # (B, P + R)
        attention_mask = torch.cat([prompt_mask, response_mask], 1)  # (B, P + R)
        rollout_end = time.perf_counter()

        # ---- 5 Score: old and reference log-probs, the RM's scores, the critic's values ------------------------------
        R = response_mask.shape[1]
        logprobs, ref_logprobs = torch.zeros(B, R, device=device), torch.zeros(B, R, device=device)
        values, scores = torch.zeros(B, R + 1, device=device), torch.zeros(B, 1, device=device)
        with torch.no_grad():
            for micro in common.by_length(mine, attention_mask).split(args.micro_batch_size):
                batch = crop(input_ids[micro], attention_mask[micro], response_mask[micro])
                r = batch[2].shape[1]  # at most R
                logprobs[micro, :r], _ = policy.token_logprobs(*batch, args.temperature)
                reference.lora_on = False  # a policy with LoRA is its own reference
                ref_logprobs[micro, :r], _ = reference.token_logprobs(*batch, args.temperature)
                policy.lora_on = True
                values[micro, : r + 1] = critic.token_values(*batch)
                if by_rm:
                    scores[micro, 0] = common.last_values(rm.token_values(*batch), batch[2])
        scored = torch.cat([logprobs, ref_logprobs, values, scores], 1)[mine]  # (B / world_size, 3 R + 2)
        scored = common.all_gather(scored)  # again all ranks hold all rows
        common.check_finite(update, "log-probs, values or scores are", scored)
        logprobs, ref_logprobs, values, scores = scored.split([R, R, R + 1, 1], 1)
        # Each rank decodes and scores its share; the first answers, which may be shown, are rank 0's.
        asked = [examples[drawn[i]].prompt for i in mine]
        texts = [tokenizer.decode(response_ids[i][response_mask[i]], skip_special_tokens=True) for i in mine]
        if exact_score:
            gold = common.all_gather(torch.tensor([*map(exact_score, asked, texts)], device=device))  # (B,)
        kl = logprobs - ref_logprobs  # (B, R) k1, zero outside the mask
        scores = scores[:, 0] if by_rm else gold  # (B,)
        rewarded = scores - args.missing_eos_penalty * ~ended if by_rm else scores  # (B,)
        advantages, returns = ppo_advantages(
            values, rewarded, kl, response_mask, args.gamma, args.gae_lambda, carried.kl_coef
        )  # (B, R) both
        score_end = time.perf_counter()

        # ---- 6 Update: PPO-clip on the policy, clipped value loss on the critic --------------------------------------
        steps = []
        shuffled = [torch.randperm(B, generator=generator) for _ in range(args.num_epochs)]
        for minibatch in [rows for epoch in shuffled for rows in epoch.chunk(args.num_minibatches)]:  # `break` ends all
            num_tokens = response_mask[minibatch].sum()  # of all ranks and micro-batches, so neither changes the loss
            rows = common.by_length(minibatch.chunk(world_size)[rank], attention_mask)
            sums = 0  # over the tokens, in the order in which section 7 unpacks their means
            for micro in rows.split(args.micro_batch_size):
                batch = crop(input_ids[micro], attention_mask[micro], response_mask[micro])
                new_logprobs, entropy = policy.token_logprobs(*batch, args.temperature)  # (micro, r)
                mask, r = batch[2], new_logprobs.shape[1]
                loss, ratio_sums = ppo_clip_loss(
                    new_logprobs, logprobs[micro, :r], advantages[micro, :r], mask, args.clip_coef
                )
                (loss * world_size / num_tokens).backward()  # FSDP averages over ranks, this wants the sum
                new_values = critic.token_values(*batch)[:, :-1]  # (micro, r)
                old_values, target = values[micro, :r], returns[micro, :r]
                value_loss = clipped_value_loss(new_values, old_values, target, mask, args.value_clip_coef)
                (value_loss * world_size / num_tokens).backward()
                drift = ((new_values.detach() - old_values) ** 2)[mask].sum()
                sums += torch.stack([loss.detach(), *ratio_sums, entropy.sum(), value_loss.detach(), drift])
            grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor()
            critic_grad_norm = torch.nn.utils.clip_grad_norm_(critic.parameters(), args.max_grad_norm).full_tensor()
            norms = torch.stack([grad_norm, critic_grad_norm])
            dist.all_reduce(sums)
            steps.append(torch.cat([sums / num_tokens, norms]))
            common.check_finite(update, "a loss or its gradient is", steps[-1])
            optimizer.step()
            optimizer.zero_grad()
            critic_optimizer.step()
            critic_optimizer.zero_grad()
            if args.max_approx_kl is not None and steps[-1][1] > args.max_approx_kl:  # [1]: approxkl
                break

        # ---- 7 Log ---------------------------------------------------------------------------------------------------
        loss, approxkl, clipfrac, ratio, ratio_squared, entropy, value_loss, drift, grad_norm, critic_grad_norm = (
            torch.stack(steps).mean(0).tolist()
        )
        end = time.perf_counter()
        # Can the RM still be trusted? It learned from answers that the reference, too, was trained on. Nothing in its
        # scores betrays an answer unlike those, but the reference's surprise may, nats per token.
        surprise = -ref_logprobs.sum(1) / lengths  # (B,)
        if update == 1:  # the policy still is the reference
            carried.usual_surprise = surprise.quantile(0.95).item()
        off_support = (surprise > carried.usual_surprise).float().mean().item()  # starts near 0.05
        sequence_kl = kl.sum(1).mean().item()
        targets = returns[response_mask]  # (N,)
        unexplained = (targets - values[:, :-1][response_mask]).var(correction=0).item()
        metrics = {
            "objective/kl": sequence_kl,
            "objective/entropy": -logprobs.sum(1).mean().item(),
            "objective/non_score_reward": -carried.kl_coef * sequence_kl,
            "objective/scores": scores.mean().item(),
            "objective/kl_coef": carried.kl_coef,
            "val/off_support": off_support,
            "policy/approxkl": approxkl,
            "policy/clipfrac": clipfrac,
            "policy/entropy": entropy,
            "loss/policy": loss,
            "loss/value": value_loss,
            "critic/explained_variance": 1 - unexplained / max(targets.var(correction=0).item(), 1e-12),
            "critic/drift": drift**0.5,
            "critic/grad_norm": critic_grad_norm,
            "val/ratio": ratio,
            "val/ratio_var": ratio_squared - ratio**2,
            "val/response_length": lengths.float().mean().item(),
            "val/eos_rate": ended.float().mean().item(),
            "optim/lr": scheduler.get_last_lr()[0],
            "optim/grad_norm": grad_norm,
            "time/rollout": rollout_end - start,
            "time/score": score_end - rollout_end,
            "time/update": end - score_end,
            "time/total": end - start,
            "time/tokens_per_sec": lengths.sum().item() / (end - start),
            "time/peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
        scheduler.step()
        critic_scheduler.step()
        if exact_score:
            metrics["objective/gold"] = gold.mean().item()
        run.log(update, metrics, ("objective/gold", "objective/scores", "objective/kl", "val/response_length",
                                  "val/eos_rate", "val/off_support"))  # fmt: skip
        if update % args.checkpoint_every == 0 or update == args.num_updates:
            for prompt, text, score in zip(asked[:3], texts, scores.tolist()):
                said = " | ".join(message["content"] for message in prompt)
                common.log(f"    {'RM' if by_rm else 'gold'} {score:+.2f}  {said[-200:]!r} -> {text[:300]!r}")
            if metrics["val/eos_rate"] < 0.5:
                common.log(f"    {1 - metrics['val/eos_rate']:.0%} of the answers were cut: raise --response-length?")
            if off_support > 0.5:
                common.log(f"warning: {off_support:.0%} of the answers surprise the reference more than 95 % of its "
                           "own: the RM has seen nothing like them; raise --kl-coef")  # fmt: skip
        if args.kl_target:  # Section 2.2 of arXiv:1909.08593: proportional control, at most 2 % per update
            carried.kl_coef *= 1 + 0.1 * min(max(sequence_kl / args.kl_target - 1, -0.2), 0.2)
        common.check(sequence_kl <= args.max_kl, f"update {update}: {sequence_kl:.0f} nats per answer to the reference "
                     "are above --max-kl: lower --learning-rate or raise --kl-coef")  # fmt: skip
        run.checkpoint(update)

    # ---- 8 Save ------------------------------------------------------------------------------------------------------
    run.save(policy, dtype, tokenizer, "Policy trained by PPO (baseline of DVPO)")
    common.log(f"next: python evaluate.py sft={args.model_path} ppo={args.output_dir} --reference-path "
               f"{args.model_path} --gvm-path None --dataset {args.dataset} --response-length "
               f"{args.response_length}")  # fmt: skip
    common.end_processes()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args))
