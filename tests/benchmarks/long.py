"""Longer answers, and rewards from a task: the chains of tests/tasks/chains.py through the real scripts.

    python tests/benchmarks/long.py --seeds 1 2 3              # resumable: what is finished is not run again
    python tests/benchmarks/long.py --seeds 1 --only judges rates
    python tests/benchmarks/long.py --seeds 1 --lists 31 --only judges
    python tests/benchmarks/long.py --seeds 1 --lists 0 --only task --num-updates 300    # the embedded task
    python tests/benchmarks/long.py --report --results tests/benchmarks/results/long.jsonl    # tables of our runs

A seed's SFT policy, value model and reward model come first, then the runs of each group. `--work` holds every run's
folder, `--results` what the tables need, one JSON line per run. One process on one core; a seed's base takes some 25
minutes.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from study_report import paired

ROOT = Path(__file__).parents[2]
RUNS = {  # group -> name -> flags that differ from what `flags` gives; a path is another run's name
    "base": {"dvpo": {}, "ppo": {}},
    "judges": {
        "gvm lambda=0.9": {"td-lambda": 0.9},
        "gvm lambda=0.99": {"td-lambda": 0.99},
        "gvm lambda=1": {"td-lambda": 1.0},
        "gvm bt=0": {"bt-coef": 0.0},
    },
    "rates": {
        "dvpo rate=6e-4": {"learning-rate": 6e-4},
        "ppo rate=6e-4": {"learning-rate": 6e-4},
    },
    "advantages": {
        "dvpo uncentered": {"advantage": "gae_uncentered"},
        "dvpo q": {"advantage": "q"},
        "dvpo released": {"advantage": "released"},
        "dvpo lambda=1": {"gae-lambda": 1.0},
    },
    "lora": {
        f"dvpo lora={rank} rate={rate:g}": {"lora-rank": rank, "learning-rate": rate}
        for rank, rate in ((8, 1e-3), (8, 3e-3), (8, 6e-3), (32, 1e-3), (32, 3e-3), (32, 6e-3), (128, 1e-3))
    },
    "task": {
        "gvm zero": {"learning-rate": 0.0, "num-examples": 64},  # it says 0 everywhere
        "dvpo task": {"reward-source": "task"},
        "dvpo task, no critic": {"reward-source": "task", "gvm-path": "gvm zero", "gae-lambda": 1.0},
        "ppo task, critic from GVM": {"reward-source": "task", "critic-path": "gvm"},
        "ppo task, critic from scratch": {"reward-source": "task"},
    },
}


@dataclass
class Args:
    lists: int = 8
    """lists in a chain: 8 for answers of 64 tokens, 31 for 250; 0: the embedded task, of nine"""
    seeds: tuple[int, ...] = (1,)
    """a whole set of runs for each"""
    only: tuple[str, ...] = ("base",)
    """groups of runs, of base, judges, rates, advantages, lora, task"""
    num_updates: int = 100
    """updates of each policy, of 64 answers"""
    work: str = "runs/long"
    """folder of all runs"""
    results: str = "runs/long/long.jsonl"
    """one line per run"""
    report: bool = False
    """print the tables of `results`, and run nothing"""


def flags(name: str, args: Args, seed: int, folder: Path) -> tuple[str, dict]:
    """The script of a run and its flags; what it starts from lies in `folder`."""
    more = next((runs[name] for runs in RUNS.values() if name in runs), {})
    task, length = ("tests/tasks/chains.py", 11 * args.lists) if args.lists else ("tests/tasks/lists.py", 20)
    same = {"seed": seed, "dataset": task, "response-length": length, "output-dir": folder / name}
    learn = {"num-epochs": 2} if args.lists else {}
    rate = {"learning-rate": 5e-4} if args.lists else {}
    if name == "sft":
        return "sft", {"model-path": task, **same, **learn}
    if name.startswith("gvm"):
        return "train_gvm", {"model-path": folder / "sft", **same, **learn, **rate, **more}
    ppo = name.startswith("ppo")
    judge = {"reward-path": folder / "rm"} if ppo else {"gvm-path": folder / "gvm"}
    if name == "ppo":  # which trains the reward model, with as many passes as the value model
        judge = {"reward-output-dir": folder / "rm", **{f"reward-{k}": v for k, v in {**learn, **rate}.items()}}
    more = {key: folder / value if key.endswith("path") else value for key, value in more.items()}
    policy = {"model-path": folder / "sft", **judge, "num-updates": args.num_updates, **same, **more}
    return ("train_ppo_baseline" if ppo else "train_dvpo"), policy


def run(script: str, given: dict, lists: int) -> None:
    command = [sys.executable, ROOT / f"{script}.py", *(x for k, v in given.items() for x in (f"--{k}", v)), "--resume"]
    print(" ".join(map(str, command[1:])), flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT,
                   env={**os.environ, "OMP_NUM_THREADS": "1", "CHAIN_LISTS": str(lists)})  # fmt: skip


def summary(folder: Path) -> dict:
    """What the tables need of a run: the first update, the largest KL, and means over the last tenth."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = rows[-max(1, len(rows) // 10) :]
    mean = lambda key, rows=last: statistics.mean(row[key] for row in rows)
    kept = {"seconds": mean("time/total", rows), "updates": len(rows)}
    for key in ("gvm/pair_accuracy", "gvm/pair_accuracy_half", "rm/pair_accuracy"):
        if key in rows[-1]:
            kept[key] = rows[-1][key]
    if "objective/kl" in rows[-1]:
        for key in ("objective/gold", "objective/kl", "objective/scores", "val/response_length", "val/eos_rate"):
            kept[key] = mean(key)
        kept["first approxkl"] = rows[0]["policy/approxkl"]
        kept["largest kl"] = max(row["objective/kl"] for row in rows)
        kept["gold at the start"] = rows[0]["objective/gold"]
    return kept


def tables(rows: list[dict]) -> None:
    """Mean and standard deviation over the seeds, a line per run, for each length of answers; then DVPO minus PPO."""
    for lists in sorted({row["lists"] for row in rows}):
        names = dict.fromkeys(row["name"] for row in rows if row["lists"] == lists)
        columns = dict.fromkeys(key for row in rows if row["lists"] == lists for key in row["summary"])
        print(f"\n{8 * lists} tokens\n\n| run | seeds | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 2)}")
        for name in names:
            runs = [row["summary"] for row in rows if (row["lists"], row["name"]) == (lists, name)]
            cells = []
            for key in columns:
                values = [run[key] for run in runs if key in run]
                spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
                cells.append(f"{statistics.mean(values):.3f}{spread}" if values else "-")
            print(f"| {name} | {len(runs)} | {' | '.join(cells)} |")
        gold = {name: {row["seed"]: row["summary"].get("objective/gold") for row in rows
                       if (row["lists"], row["name"]) == (lists, name)} for name in names}  # fmt: skip
        for name, other in ((name, name.replace("dvpo", "ppo")) for name in names if name.startswith("dvpo")):
            seeds = sorted(gold[name].keys() & gold.get(other, {}).keys())
            if len(seeds) > 1:
                difference = paired([gold[name][seed] for seed in seeds], [gold[other][seed] for seed in seeds])
                print(f"{name} minus {other}: {difference}")


def main(args: Args) -> None:
    results = Path(args.results)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    done = {(row["lists"], row["seed"], row["name"]) for row in rows}
    for seed in () if args.report else args.seeds:
        folder = (Path(args.work) / f"{args.lists}_{seed}").absolute()
        for name in ["sft", "gvm", *(name for group in args.only for name in RUNS[group])]:
            if (args.lists, seed, name) in done:
                continue
            script, given = flags(name, args, seed, folder)
            if not (folder / name / "README.md").exists():  # which a run writes last
                run(script, given, args.lists)
            summaries = {name: summary(folder / name)}
            if name == "ppo":
                summaries["rm"] = summary(folder / "rm")
            results.parent.mkdir(parents=True, exist_ok=True)
            with open(results, "a") as file:
                for key, value in summaries.items():
                    row = {"lists": args.lists, "seed": seed, "name": key, "summary": value}
                    file.write(json.dumps(row) + "\n")
                    rows.append(row)
    tables(rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
