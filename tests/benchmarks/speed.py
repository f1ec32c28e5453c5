"""Time per phase and memory of one update, DVPO beside PPO on equal work: same shapes, same answers, run in turns.

    python tests/benchmarks/speed.py                                     # the embedded task's sizes, on a CPU core
    python tests/benchmarks/speed.py --size 1b                           # Llama-3.2-1B shapes, on one GPU
    python tests/benchmarks/speed.py --size 3b --micro-batch-size 2      # PPO's state alone is 116 GB, DVPO's 64 GB

Random weights, no dataset, no hub, no network. The real `main` of both scripts runs, with a learning rate of 0: all the
work of an update is done, and both policies keep answering the same. "state" is what models, gradients and optimizers
hold; "peak" what torch had allocated at most (GPU) or the process held (CPU), activations and logits included.
"""

import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).parents[2]
SHAPES = {  # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied
    "embedded": (128, 256, 2, 8, 8, 107, False),
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),
}
PHASES = ("rollout", "score", "update", "total")


@dataclass
class Args:
    size: Literal["embedded", "1b", "3b"] = "embedded"
    """shapes of all models"""
    methods: tuple[Literal["dvpo", "ppo"], ...] = ("dvpo", "ppo")
    """what to run"""
    rounds: int = 3
    """runs of each method, in turns"""
    num_updates: int = 0
    """updates per run, of which the first two, padded to the widest, are not counted; 0: 26 (embedded) or 4"""
    rollout_batch_size: int = 64
    """answers per update"""
    micro_batch_size: int = 0
    """sequences per forward and backward; 0: 64 (embedded) or 4"""
    prompt_length: int = 0
    """tokens of the longest prompts, the shortest have two thirds; 0: 12 (embedded) or 512"""
    response_length: int = 0
    """tokens; 0: 20 (embedded) or 512"""
    num_epochs: int = 2
    """passes over each rollout"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """as the scripts' own"""
    lora_rank: int = 0
    """as the scripts' own"""
    gradient_checkpointing: bool = False
    """as the scripts' own"""


def measure(method: str, args: Args) -> dict:
    """Medians of the phases in seconds, `state_gb` and `peak_gb` of one run."""
    sys.path.insert(0, str(ROOT))
    import torch
    import transformers
    from torch.distributed.tensor import DTensor

    import common

    cuda = torch.cuda.is_available()
    hidden, intermediate, layers, heads, kv_heads, vocabulary, tied = SHAPES[args.size]
    tokenizer = common.load_task("tests/tasks/lists.py").model()[1]
    config = dict(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, num_labels=1,
        max_position_embeddings=4096,
    )  # fmt: skip

    def random_model(auto_class, dtype):
        torch.manual_seed(0)
        with torch.device("cuda" if cuda else "cpu"):
            return auto_class.from_config(transformers.LlamaConfig(**config), dtype=dtype)

    common.load_tokenizer = lambda path: tokenizer
    common.load_policy = lambda path, tokenizer, dtype: random_model(transformers.AutoModelForCausalLM, dtype)
    common.load_value_model = lambda path, tokenizer, dtype, fresh_head: random_model(
        transformers.AutoModelForSequenceClassification, dtype
    )
    common.fingerprint = lambda *arguments: "no files to read"
    common.Run.save = common.Run.save_checkpoint = lambda *arguments: None

    # What is alive when an optimizer has stepped and gradients are still there.
    state_bytes, counting, adamw_step = 0, True, torch.optim.AdamW.step

    def step(*arguments, **more):
        nonlocal state_bytes
        adamw_step(*arguments, **more)
        if not counting:
            return
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        tensors += [x.grad for x in tensors if x.is_leaf and x.grad is not None]
        tensors = [x.to_local() if isinstance(x, DTensor) else x for x in tensors]
        storages = {s.data_ptr(): s.nbytes() for s in (x.untyped_storage() for x in tensors)}
        state_bytes = max(state_bytes, sum(storages.values()))

    log = common.Run.log

    def log_and_reset(run, update, *rest):
        nonlocal counting
        log(run, update, *rest)
        counting = False  # in the first update alone, which is not timed: it takes long
        if update == 2 and cuda:
            torch.cuda.reset_peak_memory_stats()

    common.Run.log = log_and_reset
    torch.optim.AdamW.step = step
    with tempfile.TemporaryDirectory() as folder:
        prompts = Path(folder) / "prompts.jsonl"
        words = ("list two animals not the cat " * args.prompt_length).split()
        texts = [
            f"{i} " + " ".join(words[: args.prompt_length - 3 - i % (args.prompt_length // 3)]) for i in range(256)
        ]
        prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
        script = {"dvpo": "train_dvpo", "ppo": "train_ppo_baseline"}[method]
        module = __import__(script)
        own = {"ppo": {"critic_learning_rate": 0.0, "reward_learning_rate": 0.0, "reward_path": "random"}}.get(
            method, {}
        )
        module.main(
            module.Args(
                dataset=str(prompts), output_dir=folder + "/out", learning_rate=0.0,
                checkpoint_every=10**9,
                num_updates=args.num_updates, rollout_batch_size=args.rollout_batch_size, num_epochs=args.num_epochs,
                micro_batch_size=args.micro_batch_size, response_length=args.response_length,
                max_prompt_length=2 * args.prompt_length, dtype=args.dtype,
                lora_rank=args.lora_rank, gradient_checkpointing=args.gradient_checkpointing, **own,
            )
        )  # fmt: skip
        rows = [json.loads(line) for line in (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()][2:]
        dtype = json.loads((Path(folder) / "out" / "args.json").read_text())["dtype"]
    result = {phase: statistics.median(row[f"time/{phase}"] for row in rows) for phase in PHASES}
    lengths = statistics.mean(row["val/response_length"] for row in rows)
    device = torch.cuda.get_device_name() if cuda else "CPU, one core"
    peak = rows[-1]["time/peak_mem_gb"] if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return {**result, "state_gb": state_bytes / 1e9, "peak_gb": peak,
            "response_length": lengths, "device": device, "dtype": dtype, "torch": torch.__version__,
            "transformers": transformers.__version__}  # fmt: skip


def main(args: Args) -> None:
    large = args.size != "embedded"
    defaults = {"num_updates": (26, 4), "micro_batch_size": (64, 4), "prompt_length": (12, 512),
                "response_length": (20, 512)}  # fmt: skip
    for name, values in defaults.items():
        setattr(args, name, getattr(args, name) or values[large])
    if "SPEED_METHOD" in os.environ:  # a child: one run of one method
        print(json.dumps(measure(os.environ["SPEED_METHOD"], args)))
        return
    runs = {method: [] for method in args.methods}
    for _ in range(args.rounds):
        for method, results in runs.items():
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "SPEED_METHOD": method}
            child = subprocess.run([sys.executable, *sys.argv], env=environment, capture_output=True, text=True)
            if child.returncode:  # out of memory, perhaps: the other method's figures are worth having alone
                print(f"{method}: {child.stderr.splitlines()[-1]}", file=sys.stderr)
            else:
                results.append(json.loads(child.stdout.splitlines()[-1]))
                print(f"{method}: {results[-1]}", file=sys.stderr)
    runs = {method: results for method, results in runs.items() if results}
    if not runs:
        sys.exit(1)
    first = next(iter(runs.values()))[0]
    print(f"{args.size}, {args.rollout_batch_size} answers of {first['response_length']:.1f} tokens, {args.num_epochs} "
          f"epochs x 2 minibatches, {first['dtype']}; {first['device']}, torch {first['torch']}, "
          f"transformers {first['transformers']}; medians of at most {args.rounds}")  # fmt: skip
    print("\n| | rollout s | score s | update s | total s | state GB | peak GB |\n|---|---|---|---|---|---|---|")
    keys = (*PHASES, "state_gb", "peak_gb")
    for method, results in runs.items():
        cells = [f"{statistics.median(result[key] for result in results):.4g}" for key in keys]
        print(f"| {method.upper()} | {' | '.join(cells)} |")
    if len(runs) < 2:
        return
    ratios = [sorted(a[key] / b[key] for a, b in zip(runs["dvpo"], runs["ppo"])) for key in keys]
    print(
        "| DVPO / PPO | " + " | ".join(f"{statistics.median(r):.3f} ({r[0]:.3f} to {r[-1]:.3f})" for r in ratios) + " |"
    )


if __name__ == "__main__":
    main(tyro.cli(Args))
