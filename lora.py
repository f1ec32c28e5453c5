"""LoRA, arXiv:2106.09685: training low-rank pairs beside a model's frozen weights.

    lora.prepare(policy, args)      # before it is sharded; without LoRA, too
    with lora.off(policy): ...      # the policy as it was: the KL reference, for which no second model is loaded
    lora.merged(policy, dtype)      # the state of a standard model, with or without LoRA

A policy that is its own reference takes 2 bytes a parameter instead of 18, where the base is in bf16. Checkpoints hold
the pairs alone.
"""

import contextlib

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

import common


def prepare(model, args):
    """`model` in training mode, its activations recomputed and its weights trained as `args` say.

    With LoRA all weights are frozen but a value head's, and beside each linear layer of the decoder layers a pair is
    trained in fp32: `y = W x + B A x`. B starts at zero, so that nothing changes.
    """
    model.train()
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if args.lora_rank == 0:
        return model
    layers = [layer for layer in common.decoder_layers(model).modules() if isinstance(layer, torch.nn.Linear)]
    common.check(layers, f"--lora-rank: {model.config.model_type}'s decoder layers hold no nn.Linear: leave it at 0")

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


@contextlib.contextmanager
def off(model):
    """What `model` was before its pairs, but for a value head: of a policy, the KL reference."""
    model.lora_on = False
    yield
    model.lora_on = True


def merged(model, dtype: torch.dtype) -> dict:
    """The whole model, pairs merged, on rank 0's CPU in `dtype`, empty on other ranks; every rank must call."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    for name in [name for name in state if name.endswith("lora_a")]:
        a, b, weight = state.pop(name), state.pop(name[:-1] + "b"), name[: -len("lora_a")] + "weight"
        state[weight] = state[weight].float() + b @ a
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in state.items()}
