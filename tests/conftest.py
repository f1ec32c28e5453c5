"""Fixtures: tiny models on disk, a process group per test, and scripts run as users run them."""

import functools
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Read at import: no test may wait for a network, and what is promised to the last bit is promised on a CPU's core.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"
if "GPU_TESTS" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tasks")]

import lists

import common

USER_TEXT = lambda text: [{"role": "user", "content": text}]


@functools.cache
def task_examples(split: str = "train") -> list[common.Example]:
    """The embedded task's preference pairs."""
    return [common.from_row(row, "preference pairs", "pairs") for row in lists.rows(split)]


def gold(question: str, answer: str) -> float:
    return lists.score(USER_TEXT(question), answer)


# ---- Models ----------------------------------------------------------------------------------------------------------
def save_tiny(tmp_path_factory, name: str, config, model_class) -> str:
    folder = tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    lists.model()[1].save_pretrained(folder)
    return str(folder)


def tiny_llama_config(**more) -> LlamaConfig:
    tokenizer = lists.model()[1]
    same = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=2, initializer_range=0.2, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id)  # fmt: skip
    return LlamaConfig(**{**same, **more})


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> str:
    """Folder of a 2-layer, 32-wide language model with the embedded task's tokenizer."""
    return save_tiny(tmp_path_factory, "tiny", tiny_llama_config(), LlamaForCausalLM)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory) -> str:
    """The like with learned positions."""
    config = GPT2Config(vocab_size=len(lists.model()[1]), n_embd=32, n_layer=2, n_head=2, n_positions=64,
                        initializer_range=0.2, bos_token_id=None, eos_token_id=1)  # fmt: skip
    return save_tiny(tmp_path_factory, "tiny_gpt2", config, GPT2LMHeadModel)


@pytest.fixture(scope="session")
def tiny_bloom(tmp_path_factory) -> str:
    """The like with ALiBi positions."""
    config = BloomConfig(vocab_size=len(lists.model()[1]), hidden_size=32, n_layer=2, n_head=2, initializer_range=0.2,
                         bos_token_id=None, eos_token_id=1)  # fmt: skip
    return save_tiny(tmp_path_factory, "tiny_bloom", config, BloomForCausalLM)


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


# ---- Processes -------------------------------------------------------------------------------------------------------
@pytest.fixture
def processes():
    """A process group of one, gone after the test."""
    common.init_processes()
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_left():
    """A `main` leaves its signal handlers behind, and one that raised its process group."""
    yield
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if dist.is_initialized():
        dist.destroy_process_group()


# A process that has imported what scripts import, and is forked for each of them: imports take seconds.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(
    ["sft", "train_gvm", "train_dvpo", "train_ppo_baseline", "evaluate", "transformers.models.llama.modeling_llama"]
)


def in_child(script: str, arguments: list[str], variables: dict, cwd, output: str) -> None:
    """Run a script as `python SCRIPT ARGUMENTS` would."""
    for number, stream in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{stream}", os.O_CREAT | os.O_WRONLY, 0o644), number)
    os.environ.update(variables)
    os.chdir(cwd or os.getcwd())
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def run_script(*arguments, ranks: int = 1, cwd=None, **variables) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ARGUMENTS`, in `ranks` processes that meet as under torchrun."""
    script, *rest = map(str, arguments)
    variables = {**os.environ, **variables}
    with tempfile.TemporaryDirectory() as folder:
        children = []
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # which torchrun's agent keeps
        for rank in range(ranks):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1",
                     "MASTER_PORT": store.port, "TORCHELASTIC_USE_AGENT_STORE": True} if ranks > 1 else {}  # fmt: skip
            more = {**variables, **{name: str(value) for name, value in place.items()}}
            job = (str(ROOT / script), rest, more, cwd, f"{folder}/{rank}")
            children.append(FORKED.Process(target=in_child, args=job))
            children[-1].start()
        deadline = time.monotonic() + 120
        while any(child.is_alive() for child in children) and time.monotonic() < deadline:
            time.sleep(0.01)
            if any(child.exitcode for child in children):  # as torchrun does, but sooner
                deadline = min(deadline, time.monotonic() + 20)
        for child in children:
            child.kill()
            child.join()
        read = lambda stream: "".join(Path(f"{folder}/{rank}.{stream}").read_text() for rank in range(ranks))
        codes = [child.exitcode for child in children]
        return subprocess.CompletedProcess(arguments, next((c for c in codes if c), 0), read("out"), read("err"))


def torchrun(*arguments, ranks: int = 2, launcher=()) -> subprocess.CompletedProcess:
    """The real `torchrun`, with flags `launcher`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", ranks, *launcher]
    script, *rest = arguments
    command = [str(part) for part in (*command, ROOT / script, *rest)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def read_metrics(folder) -> list[dict]:
    return [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]


def load_weights(folder) -> dict:
    return load_file(Path(folder) / "model.safetensors")
