"""Longer answers: the chains of tests/tasks/chains.py at 64 and 250 tokens, through the real scripts.

    python tests/benchmarks/long.py --seeds 1 2 3          # resumable: what stands in --results is not run again
    python tests/benchmarks/long.py --lists 31 --seeds 1
    python tests/benchmarks/long.py --report

Every run appends one JSON line to `--results`, with the flags that differ from `COMMON`. A seed's first runs are the SFT
policy, the value models and the reward model; the policies follow in the order of `POLICIES`.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import tyro

ROOT = Path(__file__).parents[2]
TASK = "tests/tasks/chains.py"


@dataclass
class Args:
    lists: int = 8
    """lists in a chain: 8 makes answers of 64 tokens, 31 of 250"""
    seeds: tuple[int, ...] = (1,)
    """a whole set of runs for each"""
    only: tuple[str, ...] = ()
    """names of runs; none is all"""
    num_pairs: int = 6_000
    """preference pairs of the task to learn from"""
    num_updates: int = 100
    """updates of each policy, of 64 answers"""
    work: str = "runs/long"
    """folder of all runs"""
    results: str = str(ROOT / "tests/benchmarks/results/long.jsonl")
    """one line per run"""
    report: bool = False
    """only print the tables of `results`"""


# Name -> flags of the value model; of the policies, with the value model each is judged by.
GVMS = {"gvm": {}, "gvm lambda=1": {"td-lambda": 1.0}, "gvm lambda=0.99": {"td-lambda": 0.99},
        "gvm lambda=0.9": {"td-lambda": 0.9}, "gvm bt=0": {"bt-coef": 0.0}}  # fmt: skip
POLICIES = {
    "dvpo": {},
    "ppo": {},
}


def main(args: Args) -> None:
    results = Path(args.results)
    rows = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.report:
        return report(rows)
    ...


if __name__ == "__main__":
    main(tyro.cli(Args))
