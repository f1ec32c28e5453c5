"""Stage 2: pretrain the global value model (GVM) on preference data by temporal differences. DVPO, arXiv:2502.16944v2.

The GVM reads a prompt and an answer and predicts at every token what the whole answer will be worth: its return-to-go.
Preferences say only that one answer is better than another, so a chosen answer is worth +1 and a rejected one -1, paid
at its last token; TD(lambda) carries that back to the last prompt token. With `--num-context-trajectories K` the GVM
also reads K other prompt/answer pairs of the same policy (tau in the paper): they tell whose return it is to predict.
Afterwards it is frozen. There is no reward model, and `train_dvpo.py` will train no critic.

    python train_gvm.py                                                        # embedded task, after sft
    torchrun --nproc_per_node 8 train_gvm.py --model-path SFT --dataset HuggingFaceH4/ultrafeedback_binarized \
        --max-prompt-length 1024 --response-length 1024 --learning-rate 1e-5 --num-epochs 1

In: an SFT checkpoint and preference pairs or scored answers. Out: `--output-dir`, a sequence-classification checkpoint
(its bias-free head, read at every token, is the value) that `from_pretrained` loads.
Shapes: B sequences, P prompt tokens (left-padded, context included), R response tokens.
"""

import random
import time
import types
from array import array
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import get_linear_schedule_with_warmup

import common


@dataclass
class Args:
    # Paths
    model_path: str = "runs/sft"
    """model to start from, the SFT policy or a value or reward model: local folder or hub id"""
    dataset: str = "tests/tasks/lists.py"
    """preference pairs or scored answers: a task's file, or NAME or NAME:SPLIT of a hub or local dataset"""
    output_dir: str = "runs/gvm"
    """folder of the trained GVM, metrics and arguments"""

    # Training
    seed: int = 1
    """seed of data order and context trajectories"""
    num_epochs: int = 3
    """passes over the data"""
    num_examples: int | None = None
    """use only the first so many training examples (pairs count as one); None uses all"""
    learning_rate: float | None = None
    """AdamW's peak, decayed linearly to zero; None: 2e-4, to be named for models wider than 256 (released code:
    Adafactor, 1.41e-5)"""
    warmup_fraction: float = 0.1
    """share of the updates in which the learning rate rises"""
    batch_size: int = 32
    """answers per update (global); the two of a pair stay together"""
    micro_batch_size: int = 64
    """sequences per forward and backward (per rank); lower it when out of memory, results stay the same"""
    max_grad_norm: float = 1.0
    """gradients are clipped to this norm"""
    lora_rank: int = 0
    """of LoRA: train low-rank pairs beside the layers, at a higher learning rate; 0 trains all weights"""
    max_prompt_length: int = 512
    """tokens, without context; examples with longer prompts are dropped"""
    response_length: int | None = None
    """tokens; longer answers are cut; None: 20, to be named for models wider than 256"""

    # Values
    label_source: Literal["preference", "score"] = "preference"
    """what an answer is worth: preference: +1 chosen, -1 rejected (released code); score: its score, standardised"""
    gamma: float = 1.0
    """discount per token (released code: 1)"""
    td_lambda: float = 0.95
    """0: one-step TD (the paper's loss), 1: Monte Carlo (released code: 0.95)"""
    bt_coef: float = 0.1
    """weight of a Bradley-Terry term on a pair's last values; none where labels are scores (paper, released code: 0)"""
    num_context_trajectories: int = 0
    """K, other prompt/answer pairs by the same policy in front; needs policy columns (released code: 0)"""
    context_trajectory_length: int = 256
    """tokens kept of each context trajectory"""

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


def td_loss(values, labels, mask, gamma: float, lam: float) -> torch.Tensor:
    """`0.5 (V - G)^2` summed over the last prompt token and all response tokens: the GVM loss of arXiv:2502.16944v2.

    `values (B, R + 1)`, `labels (B,)` paid at the last token, `mask (B, R)`; returns `(B,)`. The targets G are
    TD(lambda) returns of the detached values.
    """
    # DEVIATION: the paper's loss is one-step (lambda = 0); 0.95, as in the released code, reaches early tokens sooner.
    last = mask.sum(1, keepdim=True) - 1  # (B, 1)
    rewards = torch.zeros_like(values[:, 1:]).scatter(1, last, labels[:, None])  # (B, R)
    returns = common.td_lambda_returns(values.detach(), rewards, mask, gamma, lam)  # (B, R + 1)
    # DEVIATION: the released code trains response tokens alone; the state before the first one is a baseline too.
    trained = torch.cat([torch.ones_like(mask[:, :1]), mask], 1)  # (B, R + 1)
    return 0.5 * ((values - returns) ** 2).masked_fill(~trained, 0.0).sum(1)


def bradley_terry_loss(scores) -> torch.Tensor:
    """`-log P(chosen is preferred)` under Bradley-Terry, `(M,)`, of `scores (2 M,)`: chosen, rejected, chosen, ..."""
    chosen, rejected = scores.view(-1, 2).unbind(1)  # (M,)
    return -torch.nn.functional.logsigmoid(chosen - rejected)


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


# ---- Answers, their labels and their context -------------------------------------------------------------------------
@dataclass
class Answer:
    prompt_ids: array
    response_ids: array
    label: float  # what the answer is worth
    policy: str | None  # who wrote it


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


def policy_pools(answers: list[Answer]) -> dict[str, list[common.Trajectory]]:
    """Every policy's trajectories."""
    pools: dict[str, list[common.Trajectory]] = {}
    for answer in answers:
        pools.setdefault(answer.policy, []).append((answer.prompt_ids, answer.response_ids))
    return pools


@torch.no_grad()
def heldout_values(gvm, answers: list[Answer], pad_id: int, device, args: Args) -> tuple[torch.Tensor, torch.Tensor]:
    """The value of each held-out answer with half of it seen and as a whole, `(len(answers),)` each; ranks share it."""
    pools, mine = policy_pools(answers), [answers[i] for i in common.rows_of_rank(len(answers))]
    parts = []
    for i in range(0, len(mine), args.micro_batch_size):
        batch = make_batch(gvm.config, mine[i : i + args.micro_batch_size], pools, "heldout", pad_id, device)
        values, lengths = gvm.token_values(**batch).double(), batch["response_mask"].sum(1)
        columns = torch.stack([(lengths / 2).round().long(), lengths], 1)  # (micro, 2) column t has seen t tokens
        parts.append(values.gather(1, columns))
    return common.all_gather(torch.cat(parts))[: len(answers)].cpu().unbind(1)


def pair_accuracy(values: torch.Tensor) -> float:
    """Share of pairs ranked rightly, ties half, of `values (2 M,)`: chosen, rejected, chosen, ..."""
    chosen, rejected = values.view(-1, 2).unbind(1)
    return ((chosen > rejected).double() + 0.5 * (chosen == rejected).double()).mean().item()


def main(args: Args) -> None:
    # ---- 1 Processes -------------------------------------------------------------------------------------------------
    device = common.init_processes()
    rank, world_size = dist.get_rank(), dist.get_world_size()
    args = common.settle(args, args.model_path, learning_rate=2e-4, response_length=20)
    dtype = getattr(torch, args.dtype)
    run = common.Run(args, __file__)
    common.check(world_size % args.dp_replicate == 0, f"{world_size} processes must be a multiple of --dp-replicate")
    mesh = init_device_mesh(device.type, (args.dp_replicate, world_size // args.dp_replicate),
                            mesh_dim_names=("replicate", "shard"))  # fmt: skip
    mesh = mesh if args.dp_replicate > 1 else mesh["shard"]
    if run.finished:
        return common.end_processes()

    # ---- 2 Data ------------------------------------------------------------------------------------------------------
    tokenizer = common.load_tokenizer(args.model_path)
    needs = {"preference": "pairs", "score": "scores"}[args.label_source]
    examples, heldout = common.load_examples(args.dataset, needs)
    train_set, group_size = tokenize(tokenizer, examples[: args.num_examples], args.label_source, args)
    whole = args.batch_size % (group_size * world_size) == 0 and args.micro_batch_size % group_size == 0
    common.check(whole, f"--batch-size must be a multiple of {group_size * world_size} and --micro-batch-size a "
                 f"multiple of {group_size}: whole pairs for every process")  # fmt: skip
    heldout_set, _ = tokenize(tokenizer, heldout, args.label_source, args, heldout=True)
    if args.label_source == "score":
        scores = torch.tensor([answer.label for answer in train_set])
        common.check(scores.std() > 0, f"--label-source score: all scores in {args.dataset} equal {scores[0].item():g}")
        mean, std = scores.mean().item(), scores.std().item()
        for answer in train_set + heldout_set:
            answer.label = (answer.label - mean) / std
    outcomes = torch.tensor([answer.label for answer in heldout_set], dtype=torch.float64)
    if args.num_context_trajectories:
        known = all(answer.policy for answer in train_set + heldout_set)
        common.check(known, f"--num-context-trajectories needs to know who wrote each answer: {args.dataset} lacks the "
                     "columns chosen_policy and rejected_policy (or policy); add them or leave it at 0")  # fmt: skip
        counts = Counter(answer.policy for answer in train_set)
        common.log(f"answers by policy: {', '.join(f'{name} {count}' for name, count in counts.most_common())}")
    pools = policy_pools(train_set)
    common.log(f"{len(train_set)} answers, {len(heldout_set)} held out; the first, worth {train_set[0].label:+.2f}:")
    common.log(f"  prompt: {tokenizer.decode(train_set[0].prompt_ids)!r}")
    common.log(f"  answer: {tokenizer.decode(train_set[0].response_ids)!r}")
    if args.dry_run:
        answers = [answer.response_ids for answer in train_set]
        bytes_each = dtype.itemsize if args.lora_rank else 16
        context = args.num_context_trajectories * args.context_trajectory_length
        return common.dry_run(args, [answer.prompt_ids for answer in train_set], answers, bytes_each, context)

    # ---- 3 Model -----------------------------------------------------------------------------------------------------
    trained_dtype = dtype if args.lora_rank else torch.float32
    gvm = common.load_value_model(args.model_path, tokenizer, trained_dtype, fresh_head=True)
    gvm.config.num_context_trajectories = args.num_context_trajectories  # train_dvpo.py conditions it likewise
    gvm.config.context_trajectory_length = args.context_trajectory_length
    gvm = add_methods(shard(common.prepare(gvm, args), mesh, dtype), token_values)
    num_updates = max(1, args.num_epochs * len(train_set) // args.batch_size)
    optimizer = torch.optim.AdamW(gvm.parameters(), lr=args.learning_rate, weight_decay=0.0, fused=True)
    num_warmup = int(args.warmup_fraction * num_updates)
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup, num_updates)

    widest = (max(len(answer.prompt_ids) for answer in train_set + heldout_set)
              + args.num_context_trajectories * args.context_trajectory_length,
              max(len(answer.response_ids) for answer in train_set + heldout_set))  # fmt: skip
    common.check_positions(args.model_path, gvm, sum(widest))
    data = common.fingerprint(train_set, args.model_path)
    done, _ = run.start([(gvm, optimizer, scheduler)], num_updates, data)
    for update in range(done + 1, num_updates + 1):
        start = time.perf_counter()
        # ---- 4 Update ------------------------------------------------------------------------------------------------
        groups = common.shuffled_batch(len(train_set) // group_size, update, args.batch_size // group_size, args.seed)
        rows = [group_size * i + side for i in groups for side in range(group_size)]
        num_values = sum(len(train_set[row].response_ids) + 1 for row in rows)  # of all ranks: the loss is per value
        mine = rows[rank * len(rows) // world_size : (rank + 1) * len(rows) // world_size]
        # The first updates (the second has the optimizer's states) are the widest: memory runs out now or never.
        widths = widest if update <= 2 else (0, 0)
        key = f"{args.seed}/{update}"  # of the context's draws
        sum_td = 0
        for i in range(0, len(mine), args.micro_batch_size):
            micro = [train_set[row] for row in mine[i : i + args.micro_batch_size]]
            batch = make_batch(gvm.config, micro, pools, key, tokenizer.pad_token_id, device, widths)
            labels = torch.tensor([answer.label for answer in micro], device=device)  # (micro,)
            values = gvm.token_values(**batch)  # (micro, R + 1)
            loss = td_loss(values, labels, batch["response_mask"], args.gamma, args.td_lambda).sum()
            sum_td += loss.detach()
            loss = loss / num_values
            if group_size == 2 and args.label_source == "preference":
                # DEVIATION: a pair says which answer is better, and +1 and -1 make two absolute verdicts of it, blurred
                # by the strength of the other answer. This term takes the pair as it is, on the finished answers.
                last_values = common.last_values(values, batch["response_mask"])  # (micro,)
                loss = loss + args.bt_coef * bradley_terry_loss(last_values).sum() / len(groups)
            (loss * world_size).backward()  # FSDP averages over ranks, this wants the sum
        grad_norm = torch.nn.utils.clip_grad_norm_(gvm.parameters(), args.max_grad_norm).full_tensor()
        dist.all_reduce(sum_td)
        loss = sum_td / num_values
        common.check_finite(update, "the loss or its gradient is", torch.stack([loss, grad_norm]))
        optimizer.step()
        optimizer.zero_grad()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()

        # ---- 5 Log ---------------------------------------------------------------------------------------------------
        seconds = time.perf_counter() - start
        metrics = {
            "gvm/loss": loss.item(),
            "optim/lr": lr,
            "optim/grad_norm": grad_norm.item(),
            "time/total": seconds,
            "time/tokens_per_sec": num_values / seconds,
            "time/peak_mem_gb": torch.cuda.max_memory_allocated() / 1e9,
        }
        if heldout_set and update in (num_updates // 4, num_updates // 2, num_updates):
            half, last = heldout_values(gvm, heldout_set, tokenizer.pad_token_id, device, args)  # (answers,) each
            unexplained = (outcomes - last).var(correction=0) / outcomes.var(correction=0).clamp(min=1e-12)
            metrics["gvm/explained_variance"] = 1 - unexplained.item()
            if group_size == 2:
                metrics["gvm/pair_accuracy"] = pair_accuracy(last)
                metrics["gvm/pair_accuracy_half"] = pair_accuracy(half)
        run.log(update, metrics, ("gvm/loss", "gvm/pair_accuracy", "gvm/explained_variance", "optim/lr"))
        run.checkpoint(update)

    # ---- 6 Save ------------------------------------------------------------------------------------------------------
    run.save(gvm, dtype, tokenizer, "Global value model (GVM)")
    if done < num_updates and "gvm/pair_accuracy" in metrics:
        common.log(f"ranks {metrics['gvm/pair_accuracy']:.0%} of {len(heldout_set) // 2} held-out pairs correctly; "
                   f"with half of the answer seen {metrics['gvm/pair_accuracy_half']:.0%}")  # fmt: skip
    common.log(f"next: python train_dvpo.py --model-path {args.model_path} --gvm-path {args.output_dir} "
               f"--dataset {args.dataset} --response-length {args.response_length}")  # fmt: skip
    common.end_processes()


if __name__ == "__main__":
    with common.one_line_errors():
        main(common.parse(Args))
