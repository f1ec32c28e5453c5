"""Bytes a GPU holds, by a formula, and an update's counted by FSDP2's memory tracker, without any GPU.

    python tests/benchmarks/memory.py            # the table, by formula
    python tests/benchmarks/memory.py --check    # formula against tracker, where the policy alone takes a step

The tracker runs the real forward and backward pass of the sharded policy on tensors without data, as one rank of a
process group that is not there. It counts what torch holds: no fragmentation, no CUDA context (about 1 GB together).
"""

import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import tyro
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))
import common
import train_dvpo

LLAMA = dict(num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128256, intermediate_size=8192)
SHAPES = {  # Llama-3.2-1B, Llama-3.2-3B and Meta-Llama-3-8B
    "1B": dict(hidden_size=2048, num_hidden_layers=16, tie_word_embeddings=True, head_dim=64),
    "3B": dict(hidden_size=3072, num_hidden_layers=28, tie_word_embeddings=True, num_attention_heads=24),
    "8B": dict(hidden_size=4096, num_hidden_layers=32, tie_word_embeddings=False, intermediate_size=14336),
}


@dataclass
class Args:
    check: bool = False
    """compare with the tracker, which takes some minutes, instead of printing the table"""
    micro_batch_size: int = 4
    """sequences per forward and backward (per rank)"""
    rollout_micro_batch_size: int = 32
    """answers sampled at once (per rank)"""
    length: int = 1024
    """tokens of a sequence, prompt and answer"""
    lora_rank: int = 32
    """of the rows with LoRA"""


def config_of(shape: str) -> LlamaConfig:
    return LlamaConfig(**{**LLAMA, **SHAPES[shape]})


def sizes(config: LlamaConfig, rank: int) -> tuple[int, int, int]:
    """Parameters of a decoder layer, of the embedding and the head together, and of a layer's pairs."""
    c = config
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = [(c.hidden_size, queries), (c.hidden_size, keys), (c.hidden_size, keys), (queries, c.hidden_size),
              *[(c.hidden_size, c.intermediate_size)] * 3]  # fmt: skip
    pairs = sum(rank * (a + b) for a, b in linear)
    return sum(a * b for a, b in linear), c.vocab_size * c.hidden_size * (1 if c.tie_word_embeddings else 2), pairs


def state(shape: str, world_size: int, rank: int, trained: int, frozen: int, each: int = 16) -> float:
    """Bytes of all shards: `each` a trained parameter (weight 4, gradient 4, Adam's two 8), 2 a frozen one."""
    config = config_of(shape)
    layer, root, pairs = sizes(config, rank)
    whole = config.num_hidden_layers * layer + root
    if rank:  # the trained models' bases are frozen
        frozen, whole_trained = frozen + trained, config.num_hidden_layers * pairs
    else:
        whole_trained = whole
    return (each * trained * whole_trained + 2 * frozen * whole) / world_size


def rollout(shape: str, rank: int, batch: int, length: int) -> float:
    """Bytes of the policy, whole, and of the key-value cache, while answers are sampled."""
    config = config_of(shape)
    layer, root, pairs = sizes(config, rank)
    cache = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * batch * length
    return 2 * (config.num_hidden_layers * (layer + pairs) + root) + 2 * cache


def working(shape: str, rank: int, batch: int, length: int) -> float:
    """Bytes of a micro-batch's forward and backward pass, activations recomputed: the larger of two moments."""
    config = config_of(shape)
    layer, root, pairs = sizes(config, rank)
    tokens, H = batch * length, config.hidden_size
    inputs = 2 * tokens * H * config.num_hidden_layers  # what is kept of each layer
    # A layer recomputed in backward, in bf16: its inputs and outputs, some of them in fp32 for the norms, and
    # gradients as they come.
    inside = 2 * tokens * (10 * H + 6 * config.intermediate_size + 4 * rank)
    # Two layers are whole at a time; one has bf16 gradients and their fp32 copy, which is sent.
    units = 2 * 2 * (layer + pairs) + 6 * (pairs if rank else layer)
    head_gradient = 0 if rank else 2 * config.vocab_size * H
    in_layer = 2 * root + head_gradient + inputs + inside + units
    at_end = 2 * root + (0 if rank else 6 * root)
    return max(in_layer, at_end)


def tracked(shape: str, world_size: int, rank: int, batch: int, length: int) -> float:
    """The tracker's peak of one forward and backward pass of the sharded policy."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=world_size)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16 if rank else torch.float32)
        model = LlamaForCausalLM(config_of(shape)).train()
        torch.set_default_dtype(torch.float32)
        common.prepare(model, train_dvpo.Args(lora_rank=rank, gradient_checkpointing=True))
        base = model.base_model

        def loss(model, ids):
            hidden = base(ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            weight = model.get_output_embeddings().weight
            return train_dvpo.fused_logprobs(hidden, weight, ids[:, 1:].flatten(), chunk_size=4096)[0].sum()

        model.forward = types.MethodType(loss, model)
        model = train_dvpo.shard(model, mesh, torch.bfloat16)
        tracker = FSDPMemTracker(model)
        with tracker:
            model(torch.zeros(batch, length, dtype=torch.long)).backward()
        peak = tracker.get_tracker_snapshot("peak")
    dist.destroy_process_group()
    return next(iter(peak.values()))["Total"]


def main(args: Args) -> None:
    gb = lambda number: f"{number / 1e9:.1f}"
    if args.check:
        print("| shape | GPUs | LoRA rank | tracker, GB | formula, GB | ratio |\n|---|---|---|---|---|---|")
        for shape in SHAPES:
            for world_size in (1, 8, 64):
                for rank in (0, args.lora_rank):
                    counted = tracked(shape, world_size, rank, args.micro_batch_size, args.length)
                    expected = state(shape, world_size, rank, 1, 0, each=8)  # the tracker miscounts optimizers
                    expected += working(shape, rank, args.micro_batch_size, args.length)
                    print(f"| {shape} | {world_size} | {rank} | {gb(counted)} | {gb(expected)} | "
                          f"{expected / counted:.2f} |", flush=True)  # fmt: skip
        return
    print("| shape | method | weights | 1 GPU: models | in all | 8 GPUs: models | in all | 64 GPUs: models | in all |")
    print("|---|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for method, trained, full, without in (("DVPO", 1, 2, 1), ("PPO", 2, 2, 1)):
            for rank, frozen in ((0, full), (args.lora_rank, without)):
                cells = []
                for world_size in (1, 8, 64):
                    models = state(shape, world_size, rank, trained, frozen)
                    update = models + working(shape, rank, args.micro_batch_size, args.length)
                    sampling = state(shape, world_size, rank, trained, frozen, each=12)  # no gradients
                    sampling += rollout(shape, rank, args.rollout_micro_batch_size, args.length)
                    cells += [gb(models), gb(max(update, sampling))]
                print(f"| {shape} | {method} | {f'LoRA {rank}' if rank else 'all'} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(tyro.cli(Args))
