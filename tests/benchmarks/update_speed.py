"""Seconds per update of `train_dvpo.py` beside a naive version of the same algorithm, on one core, run in turns.

    python sft.py && python train_gvm.py && python tests/benchmarks/update_speed.py

Both do the same work on the embedded task: 64 answers of at most 20 tokens, 2 epochs x 2 minibatches, 2-layer 128-wide
models. The naive version is what a competent first draft looks like: `model.generate`, whole log-softmaxes, a loop for
GAE, `torch.optim.AdamW`, no sharding. Prints medians per phase and the ratio pair by pair.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS, UPDATES = 3, 25


def naive(num_updates: int) -> list[float]:
    """Seconds of each phase and in total, per update: rows of (rollout, score, update, total)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    import common

    tokenizer = AutoTokenizer.from_pretrained("runs/sft", padding_side="left")
    policy = AutoModelForCausalLM.from_pretrained("runs/sft")
    reference = AutoModelForCausalLM.from_pretrained("runs/sft").eval()
    gvm = AutoModelForSequenceClassification.from_pretrained("runs/gvm").eval()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-4, eps=1e-5)
    texts = [example.prompt for example in common.load_examples("tests/tasks/lists.py", "prompts")[0]]

    def logprobs_of(model, sequences, mask, P):
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(sequences, attention_mask=mask, position_ids=positions).logits[:, P - 1 : -1]
        return torch.log_softmax(logits, -1).gather(2, sequences[:, P:, None])[..., 0]

    rows = []
    for update in range(num_updates):
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


def ours(num_updates: int) -> list[float]:
    """The same rows, from the real script's metrics."""
    import tempfile

    import train_dvpo

    with tempfile.TemporaryDirectory() as folder:
        train_dvpo.main(train_dvpo.Args(num_updates=num_updates, output_dir=folder + "/out", checkpoint_every=10**9))
        lines = [json.loads(line) for line in (Path(folder) / "out" / "metrics.jsonl").read_text().splitlines()]
    return [tuple(line[f"time/{phase}"] for phase in ("rollout", "score", "update", "total")) for line in lines]


def main() -> None:
    if len(sys.argv) == 2:  # a child: run one version and print its medians, the first updates left out
        rows = {"naive": naive, "ours": ours}[sys.argv[1]](UPDATES)[5:]
        print(json.dumps([statistics.median(column) for column in zip(*rows)]))
        return
    results = {"naive": [], "ours": []}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    for _ in range(ROUNDS):
        for name, medians in results.items():
            command = [sys.executable, __file__, name]
            output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
            medians.append(json.loads(output.splitlines()[-1]))
    for name, medians in results.items():
        phases = zip(("rollout", "score", "update", "total"), zip(*medians))
        print(f"{name:>6}: " + "  ".join(f"{phase} {statistics.median(s):.3f} s" for phase, s in phases))
    for i, phase in ((2, "update"), (3, "total")):
        ratios = sorted(a[i] / b[i] for a, b in zip(results["ours"], results["naive"]))
        spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}, {ROUNDS} pairs"
        print(f"ours / naive, {phase}: {statistics.median(ratios):.2f} ({spread})")


if __name__ == "__main__":
    main()
