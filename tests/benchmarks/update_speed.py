"""Seconds per update beside what a user would take instead, on one core each, run in turns.

    pip install -e '.[peers]'
    python -m venv old && old/bin/pip install trl==1.12.0 tyro        # the last TRL that has a PPOTrainer
    python sft.py && python train_gvm.py
    python tests/benchmarks/update_speed.py --ppo-python old/bin/python

Six versions do the same work on the embedded task: 64 answers of at most 20 tokens, 2 epochs x 2 minibatches, 2-layer
128-wide models in fp32, the learning rate 0, so that answers stay as long as they are. The value model serves as reward
model and critic, too. The naive version is what a competent first draft of DVPO looks like: `model.generate`, whole
log-softmaxes, a loop for GAE, `torch.optim.AdamW`, no sharding. Prints medians per phase, and ratios pair by pair.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

UPDATES, SKIPPED = 25, 5  # of which the first are left out
PHASES = ("rollout", "score", "update", "total")
VERSIONS = ("dvpo", "naive dvpo", "naive dvpo in FSDP2", "ppo", "TRL ppo", "TRL grpo")


@dataclass
class Args:
    rounds: int = 3
    """runs of each version"""
    ppo_python: str = sys.executable
    """the Python of an environment with trl 1.12.0"""
    model_path: str = "runs/sft"
    """policy"""
    gvm_path: str = "runs/gvm"
    """value model, and reward model"""
    version: str | None = None
    """run this one alone, once, and print its medians"""


def naive(args: Args, sharded: bool) -> list[tuple]:
    """Seconds of each phase, per update: rows of `PHASES`. `sharded`: what the update pays for FSDP2 alone."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import common

    tokenizer = AutoTokenizer.from_pretrained(args.model_path, padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained(args.model_path)
    reference = AutoModelForCausalLM.from_pretrained(args.model_path).eval()
    gvm = AutoModelForSequenceClassification.from_pretrained(args.gvm_path).eval()
    if sharded:
        import train_dvpo

        mesh = init_device_mesh(common.init_processes().type, (1,))
        policy = train_dvpo.shard(policy, mesh, torch.float32)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0, eps=1e-5)
    texts = [example.prompt for example in common.load_examples("tests/tasks/lists.py", "prompts")[0]]

    def logprobs_of(model, sequences, mask, P):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(sequences, attention_mask=mask, position_ids=positions).logits[:, P - 1 : -1]
        return torch.log_softmax(logits, -1).gather(2, sequences[:, P:, None])[..., 0]

    rows = []
    for update in range(UPDATES):
        start = time.perf_counter()
        prompts = tokenizer.apply_chat_template(texts[update * 64 : update * 64 + 64], add_generation_prompt=True,
                                                padding=True, return_tensors="pt", return_dict=True)  # fmt: skip
        P = prompts.input_ids.shape[1]
        with torch.no_grad():
            sequences = policy.generate(**prompts, max_new_tokens=20, do_sample=True, top_k=0,
                                        pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        response = sequences[:, P:]
        mask = ((response == tokenizer.eos_token_id).cumsum(1) - (response == tokenizer.eos_token_id).long()) == 0
        full_mask = torch.cat([prompts.attention_mask, mask.long()], 1)
        rollout = time.perf_counter()
        with torch.no_grad():
            old = logprobs_of(policy, sequences, full_mask, P)
            kl = old - logprobs_of(reference, sequences, full_mask, P)
            positions = (full_mask.cumsum(1) - 1).clamp(min=0)
            hidden = gvm.model(sequences, attention_mask=full_mask, position_ids=positions).last_hidden_state
            values = gvm.score(hidden)[:, P - 1 :, 0]
        advantages, last = torch.zeros_like(old), torch.zeros(64)
        for t in reversed(range(old.shape[1])):
            delta = -0.05 * kl[:, t] + values[:, t + 1] - values[:, t]
            last = (delta + 0.95 * last) * mask[:, t]
            advantages[:, t] = last
        advantages = (advantages - advantages[mask].mean()) / advantages[mask].std()
        score = time.perf_counter()
        for _ in range(2):
            for rows_ in torch.randperm(64).chunk(2):
                new = logprobs_of(policy, sequences[rows_], full_mask[rows_], P)
                ratio = (new - old[rows_]).exp()
                loss = -torch.min(ratio * advantages[rows_], ratio.clamp(0.8, 1.2) * advantages[rows_])
                (loss[mask[rows_]].mean()).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        end = time.perf_counter()
        rows.append((rollout - start, score - rollout, end - score, end - start))
    return rows


def ours(script, args: Args, **models) -> list[tuple]:
    """The same rows, from a real script's metrics."""
    with tempfile.TemporaryDirectory() as folder:
        more = {"num_updates": UPDATES, "learning_rate": 0.0, "checkpoint_every": 10**9}
        script.main(script.Args(model_path=args.model_path, output_dir=folder + "/out", **models, **more))
        lines = [json.loads(line) for line in (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[f"time/{phase}"] for phase in PHASES) for line in lines]


class Marks:
    """The times at which functions of a library are called and left."""

    def __init__(self):
        self.times = {}

    def watch(self, owner, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments, **more):
            self.times.setdefault(f"{name} called", []).append(time.perf_counter())
            result = function(*arguments, **more)
            self.times.setdefault(f"{name} left", []).append(time.perf_counter())
            return result

        setattr(owner, name, watched)

    def rows(self, called: str, answered: str, scored: str) -> list[tuple]:
        """Rows of `PHASES`: an update lasts from one call of the rollout to the next."""
        times = zip(self.times[called], self.times[answered], self.times[scored], self.times[called][1:])
        return [(b - a, c - b, end - c, end - a) for a, b, c, end in times]


def trl_ppo(args: Args) -> list[tuple]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
    from trl.experimental import ppo
    from trl.experimental.ppo import ppo_trainer

    import common

    tokenizer = AutoTokenizer.from_pretrained(args.model_path, padding_side="left")
    chat = {"tokenize": True, "add_generation_prompt": True, "return_dict": False}
    examples = common.load_examples("tests/tasks/lists.py", "prompts")[0]
    prompts = {str(example.prompt): example.prompt for example in examples}.values()
    rows = [{"input_ids": tokenizer.apply_chat_template(prompt, **chat)} for prompt in prompts]
    policy = lambda: AutoModelForCausalLM.from_pretrained(args.model_path)
    judge = lambda: AutoModelForSequenceClassification.from_pretrained(args.gvm_path)
    marks = Marks()
    marks.watch(ppo_trainer, "batch_generation")
    marks.watch(ppo_trainer, "masked_whiten")  # the last step before the update
    with tempfile.TemporaryDirectory() as folder:
        config = ppo.PPOConfig(
            output_dir=folder, learning_rate=0.0, bf16=False, use_cpu=True, gradient_checkpointing=False,
            temperature=1.0, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=10**9,
            num_ppo_epochs=2, num_mini_batches=2, per_device_train_batch_size=64, gradient_accumulation_steps=1,
            total_episodes=64 * UPDATES, response_length=20, stop_token="eos", num_sample_generations=0,
        )  # fmt: skip
        data = datasets.Dataset.from_list(rows)
        ppo.PPOTrainer(config, tokenizer, policy(), policy(), judge(), data, judge(), eval_dataset=data).train()
    return marks.rows("batch_generation called", "batch_generation left", "masked_whiten left")


def trl_grpo(args: Args) -> list[tuple]:
    import grpo
    from trl import GRPOTrainer

    marks = Marks()
    marks.watch(GRPOTrainer, "_generate")
    marks.watch(GRPOTrainer, "_generate_and_score_completions")
    with tempfile.TemporaryDirectory() as folder:
        grpo.main(grpo.Args(args.model_path, args.gvm_path, output_dir=folder, num_updates=UPDATES, learning_rate=0.0))
    return marks.rows("_generate called", "_generate left", "_generate_and_score_completions left")


def rows_of(args: Args) -> list[tuple]:
    import train_dvpo
    import train_ppo_baseline

    return {
        "dvpo": lambda: ours(train_dvpo, args, gvm_path=args.gvm_path),
        "naive dvpo": lambda: naive(args, sharded=False),
        "naive dvpo in FSDP2": lambda: naive(args, sharded=True),
        "ppo": lambda: ours(train_ppo_baseline, args, reward_path=args.gvm_path),
        "TRL ppo": lambda: trl_ppo(args),
        "TRL grpo": lambda: trl_grpo(args),
    }[args.version]()


def main(args: Args) -> None:
    if args.version:
        rows = rows_of(args)[SKIPPED:]
        print(json.dumps([statistics.median(column) for column in zip(*rows)]))
        return
    results = {version: [] for version in VERSIONS}
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'tests/peers'}"}
    for _ in range(args.rounds):
        for version, medians in results.items():
            python = args.ppo_python if version == "TRL ppo" else sys.executable
            command = [python, __file__, "--version", version, "--model-path", args.model_path]
            output = subprocess.run([*command, "--gvm-path", args.gvm_path], env=environment, stdout=subprocess.PIPE,
                                    text=True, check=True).stdout  # fmt: skip
            medians.append(json.loads(output.splitlines()[-1]))
            print(f"{version}: " + "  ".join(f"{phase} {s:.3f} s" for phase, s in zip(PHASES, medians[-1])), flush=True)
    print(f"| version | {' | '.join(PHASES)} | of DVPO's total |\n|{'---|' * 6}")
    for version, medians in results.items():
        ratios = sorted(other[3] / dvpo[3] for other, dvpo in zip(medians, results["dvpo"]))
        seconds = " | ".join(f"{statistics.median(column):.3f} s" for column in zip(*medians))
        print(f"| {version} | {seconds} | {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}) |")


if __name__ == "__main__":
    main(tyro.cli(Args))
