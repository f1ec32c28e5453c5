"""Fixtures: a tiny model on disk, a process group per test, and scripts run as users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Both are read at import: no test may wait for a network, and what is promised to the last bit is promised on a CPU.
os.environ["HF_HUB_OFFLINE"] = "1"
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import common

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a 2-layer, 32-wide language model with the embedded task's tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = common.toy_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    """Folder of a 2-layer, 32-wide language model with learned positions."""
    folder = tmp_path_factory.mktemp("tiny_gpt2")
    tokenizer = common.toy_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64,
                        initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> str:
    """Folder of a 2-layer, 32-wide language model with ALiBi positions."""
    folder = tmp_path_factory.mktemp("tiny_bloom")
    tokenizer = common.toy_tokenizer()
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2,
                         bos_token_id=None, eos_token_id=tokenizer.eos_token_id)  # fmt: skip
    BloomForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gvm(tmp_path_factory, tiny_model) -> str:
    """Folder of a value model with a non-zero head, made from `tiny_model`."""
    folder = tmp_path_factory.mktemp("tiny_gvm")
    tokenizer = common.load_tokenizer(tiny_model)
    gvm = common.load_value_model(tiny_model, tokenizer, torch.float32, fresh_head=True)
    torch.manual_seed(1)
    torch.nn.init.normal_(gvm.score.weight)
    gvm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def processes():
    """A process group of one, gone after the test."""
    common.init_processes()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def no_leftover_processes():
    yield
    if dist.is_initialized():  # a `main` that raised leaves its group behind
        dist.destroy_process_group()


def run_script(*arguments, ranks: int = 1, launcher=(), cwd=None, **variables) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ARGUMENTS`, or torchrun (with flags `launcher`) for several ranks, as a user would."""
    command = [sys.executable]
    if ranks > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *launcher]
    script, *rest = map(str, arguments)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(
        [*command, str(ROOT / script), *rest], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def load_weights(folder) -> dict:
    return load_file(Path(folder) / "model.safetensors")
