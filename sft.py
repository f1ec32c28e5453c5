"""Stage 1: supervised fine-tuning, the policy that DVPO starts from and stays close to.

    python sft.py                                                              # embedded task, from scratch
    torchrun --nproc_per_node 8 sft.py --model-path meta-llama/Llama-3.2-3B \
        --dataset HuggingFaceH4/ultrafeedback_binarized --max-prompt-length 1024 \
        --response-length 1024 --learning-rate 2e-5 --num-epochs 1

The loss is the negative log-likelihood of the answer's tokens, its end included; prompts carry none.
In: a language model and answers (the chosen ones of preference pairs). Out: `--output-dir`, a checkpoint that
`from_pretrained` loads. Shapes: B sequences, P prompt tokens (left-padded), R response tokens, V vocabulary, H hidden.
"""

import contextlib
import copy
import time
import types
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoModelForSequenceClassification, get_linear_schedule_with_warmup

import common


@dataclass
class Args:
    # Paths
    model_path: str = "tests/tasks/lists.py"
    """language model to start from: local folder or hub id, or a task's file for its small one, untrained"""
    dataset: str = "tests/tasks/lists.py"
    """answers to learn: a task's file, or NAME or NAME:SPLIT of a hub or local dataset"""
    output_dir: str = "runs/sft"
    """folder of the trained model, metrics and arguments"""

    # Training
    seed: int = 1
    """seed of initial weights and data order"""
    answers: Literal["auto", "chosen", "both"] = "auto"
    """of a preference pair; auto: both where a task has an exact score, which RL then improves on; else chosen"""
    num_epochs: int = 2
    """passes over the data"""
    num_examples: int | None = None
    """use only the first so many training examples; None uses all"""
    learning_rate: float | None = None
    """AdamW's peak, decayed linearly to zero; None: 1.5e-3, to be named for models wider than 256"""
    warmup_fraction: float = 0.1
    """share of the updates in which the learning rate rises"""
    batch_size: int = 64
    """answers per update (global)"""
    micro_batch_size: int = 64
    """sequences per forward and backward (per rank); lower it when out of memory, results stay the same"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    lora_rank: int = 0
    """of LoRA: train low-rank pairs beside the layers, at a higher learning rate; 0 trains all weights"""
    max_prompt_length: int = 512
    """tokens; examples with longer prompts are dropped"""
    response_length: int | None = None
    """tokens; longer answers are cut; None: 20, to be named for models wider than 256"""

    # Machine
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """compute and saved weights; trained in float32; auto: bfloat16 on GPU, float32 on CPU"""
    dp_replicate: int = 1
    """replicas of the sharded model (hybrid sharding: one per machine)"""
    gradient_checkpointing: bool = False
    """recompute activations in the backward pass: less memory, more time"""
    checkpoint_every: int = 200
    """updates between checkpoints in `output_dir`, the newest two of which are kept"""
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


# ---- Data and held-out loss ------------------------------------------------------------------------------------------
def demonstrations(
    tokenizer, examples: list[common.Example], both: bool, args: Args, heldout: bool = False
) -> list[common.Trajectory]:
    """(prompt ids, response ids) of the chosen answers, or of both answers of every pair."""
    examples, prompts = common.fit_prompts(tokenizer, examples, args.max_prompt_length, heldout)
    sides = ("chosen", "rejected") if both else ("chosen",)
    rows = [(prompt, getattr(e, side) or "") for prompt, e in zip(prompts, examples) for side in sides]
    rows = [(prompt, text) for prompt, text in rows if text.strip()]
    responses = common.tokenize_answers(tokenizer, [text for _, text in rows], args.response_length)
    return [(prompt, response) for (prompt, _), response in zip(rows, responses)]


@torch.no_grad()
def heldout_loss(policy, rows: list[common.Trajectory], pad_id: int, device, args: Args) -> float:
    """Mean negative log-likelihood per answer token of `rows`, shared among ranks."""
    mine, parts = [rows[i] for i in common.rows_of_rank(len(rows))], []
    for i in range(0, len(mine), args.micro_batch_size):
        batch = common.pad_batch(*zip(*mine[i : i + args.micro_batch_size]), pad_id, device)
        logprobs, _ = policy.token_logprobs(**batch, temperature=1.0)
        parts.append(torch.stack([-logprobs.sum(1), batch["response_mask"].sum(1)], 1))  # (micro, 2)
    total, count = common.all_gather(torch.cat(parts))[: len(rows)].sum(0).tolist()
    return total / count


def has_value_model(config) -> bool:
    """Whether train_gvm.py can make a value model of this family; a model on the meta device holds no weights."""
    with contextlib.suppress(Exception), torch.device("meta"):  # whatever a family without one raises
        return AutoModelForSequenceClassification.from_config(copy.deepcopy(config)).score.bias is None
    return False


def main(args: Args) -> None:
    # ---- 1 Processes -------------------------------------------------------------------------------------------------
    device = common.init_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    args = common.settle(args, args.model_path, learning_rate=1.5e-3, response_length=20)
    dtype = getattr(torch, args.dtype)
    run = common.Run(args, __file__)
    common.check(args.batch_size % world_size == 0, f"--batch-size must be a multiple of {world_size}, the processes")
    common.check(world_size % args.dp_replicate == 0, f"{world_size} processes must be a multiple of --dp-replicate")
    mesh = init_device_mesh(device.type, (args.dp_replicate, world_size // args.dp_replicate),
                            mesh_dim_names=("replicate", "shard"))  # fmt: skip
    mesh = mesh if args.dp_replicate > 1 else mesh["shard"]
    if run.finished:
        return common.end_processes()
    torch.manual_seed(args.seed)

    # ---- 2 Data ------------------------------------------------------------------------------------------------------
    tokenizer = common.load_tokenizer(args.model_path, untrained=True)
    examples, heldout = common.load_examples(args.dataset, needs="answers")
    exact_score = getattr(common.load_task(args.dataset), "score", None)
    both = args.answers == "both" or (args.answers == "auto" and exact_score is not None)
    train_set = demonstrations(tokenizer, examples[: args.num_examples], both, args)
    heldout_set = demonstrations(tokenizer, heldout[:512], both, args, heldout=True)
    kinds = "chosen and rejected" if both else "chosen"
    common.log(f"{len(train_set)} answers to learn ({kinds}), {len(heldout_set)} held out; the first:")
    common.log("  prompt: {!r}\n  answer: {!r}".format(*map(tokenizer.decode, train_set[0])))
    if exact_score:
        common.log(f"  its exact score: {exact_score(examples[0].prompt, examples[0].chosen):g}")
    if args.dry_run:
        return common.dry_run(args, *zip(*train_set), bytes_each=dtype.itemsize if args.lora_rank else 16)

    # ---- 3 Model -----------------------------------------------------------------------------------------------------
    untrained = common.load_task(args.model_path) is not None
    common.check(not (untrained and args.lora_rank), f"--lora-rank: {args.model_path} is untrained: leave it at 0")
    policy = common.load_policy(args.model_path, tokenizer, dtype if args.lora_rank else torch.float32)
    if not has_value_model(policy.config):
        common.log(f"warning: no value model can be made of {policy.config.model_type}: train_gvm.py will refuse it")
    policy = add_methods(shard(common.prepare(policy, args), mesh, dtype), token_logprobs)
    num_updates = max(1, args.num_epochs * len(train_set) // args.batch_size)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    num_warmup = int(args.warmup_fraction * num_updates)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup, num_updates)

    widest = [max(map(len, side)) for side in zip(*train_set, *heldout_set)]  # prompts, answers
    common.check_positions(args.model_path, policy, sum(widest))
    data = common.fingerprint(train_set, *[args.model_path] * (not untrained))
    done, _ = run.start([(policy, optimizer, scheduler)], num_updates, data)
    for update in range(done + 1, num_updates + 1):
        start = time.perf_counter()
        # ---- 4 Update ------------------------------------------------------------------------------------------------
        rows = common.shuffled_batch(len(train_set), update, args.batch_size, args.seed)
        num_tokens = sum(len(train_set[row][1]) for row in rows)  # of all ranks: loss and gradient are per token
        mine = rows[rank * args.batch_size // world_size : (rank + 1) * args.batch_size // world_size]
        # The first updates (the second has the optimizer's states) are the widest: memory runs out now or never.
        widths = widest if update <= 2 else (0, 0)
        sum_loss = 0
        for i in range(0, len(mine), args.micro_batch_size):
            micro = [train_set[row] for row in mine[i : i + args.micro_batch_size]]
            batch = common.pad_batch(*zip(*micro), tokenizer.pad_token_id, device, widths)
            logprobs, _ = policy.token_logprobs(**batch, temperature=1.0)  # (micro, R), zero outside the answer
            loss = -logprobs.sum(1)  # (micro,)
            (loss.sum() * world_size / num_tokens).backward()  # FSDP averages over ranks, this wants the sum
            sum_loss += loss.detach().sum()
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm).full_tensor()
        dist.all_reduce(sum_loss)
        loss = sum_loss / num_tokens
        common.check_finite(update, "the loss or its gradient is", torch.stack([loss, grad_norm]))
        optimizer.step()
        optimizer.zero_grad()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()

        # ---- 5 Log ---------------------------------------------------------------------------------------------------
        seconds = time.perf_counter() - start
        metrics = {
            "loss/sft": loss.item(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm.item(),
            "time/total": seconds,
            "time/tokens_per_sec": num_tokens / seconds,
            "time/peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
        if heldout_set and update in (1, num_updates // 2, num_updates):
            metrics["loss/sft_heldout"] = heldout_loss(policy, heldout_set, tokenizer.pad_token_id, device, args)
        run.log(update, metrics, ("loss/sft", "loss/sft_heldout", "optim/lr", "time/tokens_per_sec"))
        run.checkpoint(update)

    # ---- 6 Save ------------------------------------------------------------------------------------------------------
    run.save(policy, dtype, tokenizer, "Supervised fine-tuned policy")
    common.log(f"next: python train_gvm.py --model-path {args.output_dir} --dataset {args.dataset} "
               f"--response-length {args.response_length}")  # fmt: skip
    common.end_processes()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args))
