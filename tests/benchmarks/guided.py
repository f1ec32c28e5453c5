"""Value-guided decoding: gold and KL against BETA and K, of the SFT policy and of DVPO's, beside what the cut to K
tokens does alone.

    pip install -e '.[report]'
    python tests/benchmarks/guided.py                    # resumable: seeds and settings in --results are not run again
    python tests/benchmarks/guided.py --seeds 1 2

Per seed the main job's first three stages, then 896 answers per policy and setting with the same luck. Prints the table
and draws `guided.svg` beside `--results`. KL is that of what is sampled from to the SFT policy; K=1 is greedy. Time is
the CPU's, of sampling in batches of 128, so that a busy machine changes it little.
"""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import torch  # noqa: E402
import tyro  # noqa: E402
from study_report import interval, paired, show, table  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import evaluate  # noqa: E402

SETTINGS = [
    {},
    *({"top_k": k} for k in (8, 4, 1)),
    *({"top_k": k, "value_guided": beta} for k in (8, 4) for beta in (0.4, 0.2, 0.1, 0.05)),
    {"top_k": 16, "value_guided": 0.1},
]
GENERATE = evaluate.guided_generate  # which is timed below
COLORS = {"sft": "#2471a3", "dvpo": "#c0392b"}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    """seeds of all stages"""
    results: str = "tests/benchmarks/results/guided.json"
    """file of the rows"""
    output_dir: str = "runs/guided"
    """folder of the models"""


def train(folder: Path, seed: int) -> None:
    """The main job's SFT policy, value model and DVPO policy; what is finished stays."""
    paths = {name: str(folder / name) for name in COLORS}
    gvm = str(folder / "gvm")
    for stage in (
        ["sft.py", "--output-dir", paths["sft"]],
        ["train_gvm.py", "--model-path", paths["sft"], "--output-dir", gvm],
        ["train_dvpo.py", "--model-path", paths["sft"], "--gvm-path", gvm, "--output-dir", paths["dvpo"]],
    ):
        subprocess.run([sys.executable, *stage, "--seed", str(seed), "--resume"], cwd=ROOT, check=True)


def measure(folder: Path, seed: int, rows: list[dict], save) -> None:
    """Add what is missing of a seed to `rows`, and `save()` each."""
    device, dtype = common.init_processes(), torch.float32
    mesh = init_device_mesh("cpu", (1,))
    args = evaluate.Args(gvm_path=str(folder / "gvm"), response_length=20, seed=seed, value_guided=1.0)
    sft = str(folder / "sft")
    tokenizer = common.load_tokenizer(sft)
    _, heldout = common.load_examples(args.dataset, needs="prompts")
    heldout = list({str(example.prompt): example for example in heldout}.values())
    heldout, tokens = common.fit_prompts(tokenizer, heldout, args.max_prompt_length)
    asked = [example.prompt for example in heldout for _ in range(args.samples_per_prompt)]
    prompts = [prompt for prompt in tokens for _ in range(args.samples_per_prompt)]
    score = common.load_task(args.dataset).score
    reference = evaluate.frozen_policy(sft, tokenizer, mesh, dtype)
    gvm = evaluate.frozen_gvm(sft, tokenizer, mesh, dtype, args)
    seconds = 0.0

    def timed(*arguments):
        nonlocal seconds
        start = time.process_time()
        answers = GENERATE(*arguments)
        seconds += time.process_time() - start
        return answers

    evaluate.guided_generate = timed
    for name in COLORS:
        policy = evaluate.frozen_policy(str(folder / name), tokenizer, mesh, dtype)
        end_ids = torch.tensor(policy.generation_config.eos_token_id)
        for setting in SETTINGS:
            key = {"seed": seed, "policy": name, "setting": setting}
            if any(key.items() <= row.items() for row in rows):
                continue
            seconds = 0.0
            guide = gvm if "value_guided" in setting else None
            settings = replace(args, **{"value_guided": None, **setting})
            answers = evaluate.sample(name, policy, reference, guide, prompts, end_ids, tokenizer.pad_token_id, device,
                                      settings)  # fmt: skip
            texts = [tokenizer.decode(answer.response_ids, skip_special_tokens=True) for answer in answers["judged"]]
            gold = sum(map(score, asked, texts)) / len(texts)
            rows.append({**key, "gold": gold, "kl": answers["kl"].mean().item(), "ms": 1000 * seconds / len(texts),
                         "response_length": answers["response_mask"].sum(1).double().mean().item(),
                         "eos_rate": answers["ended"].double().mean().item()})  # fmt: skip
            save()
            print(json.dumps(rows[-1]), flush=True)
    torch.distributed.destroy_process_group()


def report(rows: list[dict], picture: Path) -> None:
    """Print the table, and draw gold against KL."""
    of = lambda policy, setting: [row for row in rows if row["policy"] == policy and row["setting"] == setting]
    column = lambda members, key: [row[key] for row in members]
    lines = []
    for policy in COLORS:
        for setting in SETTINGS:
            if not (members := of(policy, setting)):
                continue
            k, beta = setting.get("top_k"), setting.get("value_guided")
            cut = {row["seed"]: row["gold"] for row in of(policy, {"top_k": k})} if beta else {}
            both = [row for row in members if row["seed"] in cut]
            lines.append([policy.upper(), str(k or "all"), str(beta or "-"), str(len(members)),
                          show(column(members, "gold")), show(column(members, "kl")),
                          paired(column(both, "gold"), [cut[row["seed"]] for row in both]),
                          f"{interval(column(members, 'ms'))[0]:.1f}"])  # fmt: skip
    table("policy | K | BETA | seeds | gold | KL | minus the cut alone | ms per answer", lines)

    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "guided"  # the same plot is the same file
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5))
    middle = lambda members: [interval(column(members, key))[0] for key in ("kl", "gold")]
    for policy, color in COLORS.items():
        if not of(policy, {}):
            continue
        points = [middle(of(policy, setting)) for setting in SETTINGS[:4] if of(policy, setting)]
        axis.plot(*zip(*points), "o:", color=color, label=f"{policy.upper()}: all tokens, K = 8, 4, 1")
        for k, mark in ((8, "s-"), (4, "^-")):
            guided = [s for s in SETTINGS if s.get("top_k") == k and "value_guided" in s and of(policy, s)]
            points = [middle(of(policy, setting)) for setting in guided]
            axis.plot(*zip(*points), mark, color=color, alpha=0.6, lw=1, label=f"{policy.upper()}, guided, K = {k}")
    axis.set(xlabel="KL to the SFT policy, nats per answer", ylabel="gold")
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(picture, bbox_inches="tight", metadata={"Date": None})


def main(args: Args) -> None:
    file = Path(args.results)
    rows = json.loads(file.read_text()) if file.exists() else []
    save = lambda: file.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    for seed in args.seeds:
        folder = Path(args.output_dir).absolute() / f"seed{seed}"
        if sum(row["seed"] == seed for row in rows) < len(COLORS) * len(SETTINGS):
            train(folder, seed)
            measure(folder, seed, rows, save)
    report(rows, file.with_suffix(".svg"))


if __name__ == "__main__":
    main(tyro.cli(Args))
