"""The four stages on real preference pairs with policy columns, from nothing: a 7 M parameter model and its tokenizer
are made from the text itself. Instructions are held out. Small on purpose: 1,200 training pairs, answers cut to 192
tokens.

    python tests/benchmarks/real_pairs.py PAIRS.jsonl.gz [--output-dir runs/real]

Prints the GVM's held-out pair accuracy, overall and on pairs of similar length (within a fifth), with and without
context trajectories, beside the rule "the longer answer wins", each with a 95 % bootstrap interval over instructions.
"""

import gzip
import json
import random
import shutil
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import evaluate  # noqa: E402

MAX_PROMPT, MAX_RESPONSE, NUM_PAIRS = 128, 192, 1200
LIMITS = ["--max-prompt-length", MAX_PROMPT, "--response-length", MAX_RESPONSE]


@dataclass
class Args:
    dataset: tyro.conf.Positional[str]
    """preference pairs with chosen_policy and rejected_policy"""
    output_dir: str = "runs/real"
    """folder for everything made"""


def make_model(texts: list[str], folder: Path) -> None:
    """A Llama of 7 M parameters with random weights and an 8,000-token BPE tokenizer trained on `texts`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<pad>", "<eos>"],
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=8000, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
                         num_attention_heads=4, max_position_embeddings=2048, bos_token_id=None, eos_token_id=1,
                         pad_token_id=0)  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters")


def run(*arguments) -> None:
    print("$ python", *arguments, flush=True)
    subprocess.run([sys.executable, ROOT / arguments[0], *map(str, arguments[1:])], check=True)


def accuracy(right: torch.Tensor, instructions: list[str], keep: torch.Tensor) -> str:
    """Share of `right` among the pairs to `keep`, with a bootstrap interval over instructions."""
    groups: dict[str, list[float]] = {}
    for correct, instruction, kept in zip(right.tolist(), instructions, keep.tolist()):
        if kept:
            groups.setdefault(instruction, []).append(correct)
    sums = torch.tensor([[sum(g), len(g)] for g in groups.values()], dtype=torch.float64)
    drawn = torch.randint(len(sums), (2000, len(sums)), generator=torch.Generator().manual_seed(0))
    total = sums[drawn].sum(1)
    low, high = (total[:, 0] / total[:, 1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return f"{sums[:, 0].sum() / sums[:, 1].sum():.3f} [{low:.3f}, {high:.3f}] on {int(sums[:, 1].sum())} pairs"


def main(args: Args) -> None:
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with (gzip.open if args.dataset.endswith(".gz") else open)(args.dataset, "rt") as lines:
        rows = [json.loads(line) for line in lines]
    instructions = sorted({row["prompt"] for row in rows})
    random.Random(0).shuffle(instructions)
    test = set(instructions[: len(instructions) // 4])
    for name, inside in (("train", False), ("test", True)):
        lines = [json.dumps(row) + "\n" for row in rows if (row["prompt"] in test) == inside]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    train_file = f"./{folder / 'train.jsonl'}" if not folder.is_absolute() else str(folder / "train.jsonl")
    texts = [row["prompt"] + row[side][-1]["content"] for row in rows if row["prompt"] not in test
             for side in ("chosen", "rejected")]  # fmt: skip
    make_model(texts, folder / "model")
    paths = {name: str((folder / name).resolve()) for name in ("model", "sft", "gvm", "gvm_tau", "dvpo")}
    for path in paths.values():  # of an earlier call
        if Path(path, ".dvpo-run").exists():
            shutil.rmtree(path)
    data = ["--dataset", train_file, *LIMITS]
    run("sft.py", "--model-path", paths["model"], "--output-dir", paths["sft"], *data, "--num-epochs", 1,
        "--num-examples", NUM_PAIRS, "--batch-size", 32, "--micro-batch-size", 16, "--learning-rate", 1e-3)  # fmt: skip
    gvm = ["train_gvm.py", "--model-path", paths["sft"], *data, "--num-epochs", 1,
           "--num-examples", NUM_PAIRS, "--batch-size", 32,
           "--micro-batch-size", 16, "--learning-rate", 2e-4]  # fmt: skip
    run(*gvm, "--output-dir", paths["gvm"])
    run(*gvm, "--output-dir", paths["gvm_tau"], "--num-context-trajectories", 3, "--context-trajectory-length", 64)
    run("train_dvpo.py", "--model-path", paths["sft"], "--gvm-path", paths["gvm"], "--output-dir", paths["dvpo"], *data,
        "--num-updates", 5, "--rollout-batch-size", 32, "--micro-batch-size", 16, "--learning-rate", 1e-4)  # fmt: skip

    device = common.init_processes()
    examples = sum(common.load_examples(str(folder / "test.jsonl"), "pairs"), [])
    tokenizer = common.load_tokenizer(paths["sft"])
    limits = evaluate.Args(max_prompt_length=MAX_PROMPT, response_length=MAX_RESPONSE, micro_batch_size=16)
    answers, _ = evaluate.tokenize(tokenizer, examples, "preference", limits)
    kept, _ = common.fit_prompts(tokenizer, examples, MAX_PROMPT)
    lengths = torch.tensor([[len(e.chosen), len(e.rejected)] for e in kept])
    asked = [e.prompt[-1]["content"] for e in kept]
    similar = (lengths[:, 0] - lengths[:, 1]).abs() < 0.2 * lengths.max(1).values
    everything = torch.ones_like(similar)
    rules = {"the longer answer wins": (lengths[:, 0] > lengths[:, 1]).float()}
    for name in ("gvm", "gvm_tau"):
        model = common.load_value_model(paths[name], tokenizer, torch.float32, fresh_head=False).eval()
        model.token_values = types.MethodType(evaluate.token_values, model)
        statistics = evaluate.heldout_statistics(model, answers, tokenizer.pad_token_id, device, limits)
        for statistic in ("last", "mean"):
            values = statistics[statistic].view(-1, 2)
            rules[f"{name}, {statistic} value"] = (values[:, 0] > values[:, 1]).float()
    for name, right in rules.items():
        print(f"{name:>24}: all {accuracy(right, asked, everything)}; similar length {accuracy(right, asked, similar)}")
    common.end_processes()


if __name__ == "__main__":
    main(tyro.cli(Args))
