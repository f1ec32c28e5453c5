"""Longer answers: the chains of tests/tasks/chains.py, some 64 tokens each (or 250), through the real scripts.

    python tests/benchmarks/long.py --seeds 1 2 3          # resumable: a finished run is not run again
    python tests/benchmarks/long.py --seeds 1 --only judges rates
    python tests/benchmarks/long.py --seeds 1 --lists 31 --only judges
    python tests/benchmarks/long.py --report               # only the tables

A seed's SFT policy, value model and reward model come first. Every run's folder stays in `--work`; what the tables need
is kept in `--results`, one JSON line per run. One process, one core.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
TASK = "tests/tasks/chains.py"
# What is run: name -> flags that differ from the scripts' defaults and from `common_flags`.
GVMS = {
    "gvm": {},
    "gvm, lambda 0.9": {"td-lambda": 0.9},
    "gvm, lambda 0.99": {"td-lambda": 0.99},
    "gvm, lambda 1": {"td-lambda": 1.0},
    "gvm, no Bradley-Terry term": {"bt-coef": 0.0},
}
GROUPS = {
    "judges": [name for name in GVMS if name != "gvm"],
    "rates": ["dvpo, rate 6e-4", "dvpo, rate 3e-4", "dvpo, rate 6e-4, approx-kl 0.05", "ppo, rate 6e-4"],
    "base": ["dvpo", "ppo"],
    "lambda": ["dvpo, lambda 1", "dvpo, gvm lambda 1"],
    "advantages": ["dvpo, uncentered", "dvpo, q", "dvpo, released"],
    "task": ["dvpo, task's reward", "ppo, task's reward, critic from GVM", "ppo, task's reward, critic from scratch"],
}
POLICIES = {
    "dvpo": {},
    "ppo": {},
    "dvpo, rate 6e-4": {"learning-rate": 6e-4},
    "dvpo, rate 3e-4": {"learning-rate": 3e-4},
    "dvpo, rate 6e-4, approx-kl 0.05": {"learning-rate": 6e-4, "max-approx-kl": 0.05},
    "ppo, rate 6e-4": {"learning-rate": 6e-4},
    "dvpo, lambda 1": {"gae-lambda": 1.0},
    "dvpo, gvm lambda 1": {"gvm": "gvm, lambda 1"},
    "dvpo, uncentered": {"advantage": "gae_uncentered"},
    "dvpo, q": {"advantage": "q"},
    "dvpo, released": {"advantage": "released"},
    "dvpo, task's reward": {"reward-source": "task"},
    "ppo, task's reward, critic from GVM": {"reward-source": "task", "critic-path": "gvm"},
    "ppo, task's reward, critic from scratch": {"reward-source": "task"},
}
