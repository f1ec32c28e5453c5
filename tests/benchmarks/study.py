r"""The study: DVPO, PPO, DPO and GRPO on the embedded task, from the same SFT policy and preference data.

DVPO and PPO see the same prompts, and as many answers in as many updates; GRPO as many, eight to a prompt; DPO makes
as many passes over the pairs as the value model and the reward model do.

    pip install -e '.[peers,report]'
    python tests/benchmarks/study.py                     # resumable: what stands in --results is not run again
    python tests/benchmarks/study.py --seeds 4 5
    python tests/benchmarks/study.py --only equal_time trajectories
    python tests/benchmarks/study_report.py --results runs/study/study.jsonl --output-dir runs/study

Every run appends one JSON line to `--results`, so a stopped study goes on where it was. Runs go through the real
`main` of each script, `--num-workers` side by side, each on one core. The rows behind the README are in
`tests/benchmarks/results/study.jsonl.gz`, without what `study_report.py` and the tests do not read. Rows hold the flags
that differ from the defaults.

Another CPU's last bits make another run. How far results move so, the report tells of a file beside `--results`:

    ATEN_CPU_CAPABILITY=avx2 python tests/benchmarks/study.py --only base --seeds 4 5 10 \
        --results runs/study/rerun.jsonl --output-dir runs/rerun
"""

import concurrent.futures
import contextlib
import json
import math
import multiprocessing
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
import types
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ["OMP_NUM_THREADS"] = "1"  # a core per run; read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import tyro  # noqa: E402

ROOT = Path(__file__).parents[2]
TASK = "tests/tasks/lists.py"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "peers")]

STUDY = ("base", "frontier", "advantage", "gvm", "stability", "unreliable")  # three seeds in some three hours
MORE = ("equal_time", "equal_time_fast", "equal_time_one_pass", "equal_time_one_pass_fast", "one_pass_fast",
        "stability_one_pass", "dpo_batch_16", "trajectories", "uncentered", "ppo_variants", "judges",
        "tuning")  # fmt: skip
COEFS = {  # of the KL to the reference: kl_coef (DVPO, PPO), beta (GRPO, DPO)
    "dvpo": (0.2, 0.1, 0.05, 0.025, 0.0125),
    "ppo": (0.4, 0.2, 0.1, 0.05, 0.025),
    "grpo": (0.64, 0.32, 0.16, 0.08, 0.04),
    "dpo": (2.0, 1.4, 1.0, 0.7, 0.5),
}
DEFAULT = {"dvpo": 0.05, "ppo": 0.1}
RATES = (3e-4, 1.2e-3)  # half and twice the default
EQUAL_TIME = 190  # updates that PPO makes while DVPO makes its 300, by the median times of the default runs
ONE_PASS = {"dvpo": 400, "ppo": 287}  # updates in that time with one pass over each rollout instead of two
EQUAL_TIMES = {  # schedules of PPO that take as long: a short run might want larger steps, or fresh answers more often
    "equal_time": {"num_updates": EQUAL_TIME},
    "equal_time_fast": {"num_updates": EQUAL_TIME, "learning_rate": max(RATES)},
    "equal_time_one_pass": {"num_updates": ONE_PASS["ppo"], "num_epochs": 1},
    "equal_time_one_pass_fast": {"num_updates": ONE_PASS["ppo"], "num_epochs": 1, "learning_rate": max(RATES)},
}
ONE_PASS_FAST = {"num_updates": ONE_PASS["dvpo"], "num_epochs": 1, "learning_rate": max(RATES)}  # of DVPO, PPO, GRPO
GVMS = {  # the value model changed; three passes through its pairs where nothing else is said
    "paper's loss": {"td_lambda": 0.0, "bt_coef": 0.0},
    "td_lambda=0": {"td_lambda": 0.0},
    "td_lambda=0.5": {"td_lambda": 0.5},
    "td_lambda=0.9": {"td_lambda": 0.9},
    "td_lambda=1": {"td_lambda": 1.0},
    "bt_coef=0": {"bt_coef": 0.0},
    "scores": {"label_source": "score"},
    "from RM": {"model_path": "rm"},
    "1/16 of the pairs": {"num_examples": 1_000},
    "1/4 of the pairs": {"num_examples": 4_000},
    "1/4 of the pairs, as many updates": {"num_examples": 4_000, "num_epochs": 12},
    "twice the passes": {"num_epochs": 6},
}
TRAJECTORIES = {
    "six passes more": {"model_path": "gvm", "num_epochs": 6},
    "six passes more, K=1": {"model_path": "gvm", "num_epochs": 6, "num_context_trajectories": 1},
    "six passes more, K=3": {"model_path": "gvm", "num_epochs": 6, "num_context_trajectories": 3},
}
ADVANTAGES = {
    "q": {"advantage": "q"},
    "q, tuned": {"advantage": "q", "learning_rate": 1e-4, "kl_coef": 0.2},
    "released": {"advantage": "released"},
    "released, tuned": {"advantage": "released", "learning_rate": 1e-4},
    "gae_lambda=0": {"gae_lambda": 0.0},
    "gae_lambda=0.5": {"gae_lambda": 0.5},
    "gae_lambda=1": {"gae_lambda": 1.0},
}
PPO_VARIANTS = {  # what DVPO was given or had tried, given to PPO
    "centered, kl_coef=0.05": {"centered": True, "kl_coef": 0.05},
    "centered, kl_coef=0.025": {"centered": True, "kl_coef": 0.025},
    "gae_lambda=1": {"gae_lambda": 1.0},
    "twice the passes": {"reward_path": None, "reward_output_dir": "rm-twice_the_passes", "reward_num_epochs": 6},
    "critic from GVM": {"critic_path": "gvm"},
}

JUDGE_SEEDS = (8, 100, 101, 102)  # 8: where the value model had not learned enough in 1,500 updates of 64 answers
JUDGES = {  # settings tried for the value model and the reward model, three passes each; the defaults among them
    "gvm": (
        {"batch_size": 64, "learning_rate": 2e-4},
        {"batch_size": 64, "learning_rate": 4e-4},
        {"batch_size": 64, "learning_rate": 8e-4},
        {"batch_size": 32, "learning_rate": 2e-4},
        {"batch_size": 32, "learning_rate": 4e-4},
        {"batch_size": 64, "learning_rate": 4e-4, "bt_coef": 0.3},
        {"batch_size": 64, "learning_rate": 4e-4, "bt_coef": 1.0},
        {"batch_size": 32, "learning_rate": 2e-4, "bt_coef": 0.3},
    ),
    "rm": (
        {"batch_size": 64, "learning_rate": 2e-4},
        {"batch_size": 64, "learning_rate": 4e-4},
        {"batch_size": 32, "learning_rate": 2e-4},
    ),
}
TUNING_SEED = 100  # of runs that only choose settings
TUNING = {  # all that was tried; the defaults are the best of it, as far as one seed can tell
    "dvpo": (
        {"learning_rate": 1e-4},
        {"learning_rate": 3e-4},
        {"learning_rate": 6e-4},
        {"learning_rate": 3e-4, "gae_lambda": 1.0},
        {"learning_rate": 3e-4, "kl_coef": 0.1},
        *(
            {"num_updates": ONE_PASS["dvpo"], "num_epochs": 1, "kl_coef": 0.025, "learning_rate": rate}
            for rate in (6e-4, 1.2e-3, 2.4e-3)
        ),
        # and the paper's and the released code's advantages, which might want smaller steps or a shorter leash
        *(
            {"advantage": advantage, "learning_rate": rate, "kl_coef": coef}
            for advantage in ("q", "released")
            for rate, coef in ((1e-4, 0.05), (1e-4, 0.2), (3e-4, 0.2))
        ),
    ),
    "ppo": (
        {"learning_rate": 1e-4, "critic_learning_rate": 1e-3},
        {"learning_rate": 3e-4, "critic_learning_rate": 1e-3},
        {"learning_rate": 6e-4, "critic_learning_rate": 1e-3},
        {"learning_rate": 3e-4, "critic_learning_rate": 1e-3, "value_clip_coef": 5.0},
        {"learning_rate": 3e-4, "critic_learning_rate": 3e-4},
        {"learning_rate": 6e-4, "critic_learning_rate": 3e-4},
        {"learning_rate": 6e-4, "critic_learning_rate": 1e-4},
        {"learning_rate": 6e-4, "critic_learning_rate": 3e-4, "value_clip_coef": 5.0},
        # and in DVPO's time, with one pass over each rollout
        *(
            {"num_updates": ONE_PASS["ppo"], "num_epochs": 1, "kl_coef": 0.05, "learning_rate": rate}
            for rate in (3e-4, 6e-4, 1.2e-3)
        ),
        # and as many of these as DVPO makes
        *(
            {"num_updates": ONE_PASS["dvpo"], "num_epochs": 1, "kl_coef": 0.05, **rates}
            for rates in (
                {"learning_rate": 6e-4},
                {"learning_rate": 1.2e-3},
                {"learning_rate": 2.4e-3},
                {"learning_rate": 1.2e-3, "critic_learning_rate": 6e-4},
                {"learning_rate": 1.2e-3, "critic_learning_rate": 1.2e-3},
            )
        ),
    ),
    "grpo": (
        {"learning_rate": 1e-4},
        {"learning_rate": 3e-4},
        {"learning_rate": 6e-4},
        {"learning_rate": 6e-4, "num_generations": 4},
        {"learning_rate": 6e-4, "num_generations": 16},
        # and where it is compared with DVPO
        *({"learning_rate": 6e-4, "beta": beta, "num_generations": n} for beta in (0.16, 0.32) for n in (8, 16)),
        {"learning_rate": 1.2e-3, "beta": 0.16},
        *(
            {"num_updates": ONE_PASS["dvpo"], "num_epochs": 1, "beta": 0.08, "learning_rate": rate}
            for rate in (6e-4, 1.2e-3, 2.4e-3)
        ),
    ),
    "dpo": (
        *({"learning_rate": rate, "beta": 0.1, "num_epochs": 1, "batch_size": 32} for rate in (3e-5, 1e-4, 3e-4, 1e-3)),
        {"learning_rate": 1e-4, "beta": 0.1, "num_epochs": 2, "batch_size": 32},
        *(
            {"learning_rate": rate, "beta": beta, "num_epochs": 1, "batch_size": 32}
            for rate in (1e-4, 3e-4)
            for beta in (0.3, 1.0)
        ),
        # and where it is compared with DVPO
        {"learning_rate": 3e-4, "beta": 2.0, "num_epochs": 3, "batch_size": 32},
        *(
            {"learning_rate": rate, "beta": 1.0, "num_epochs": 3, "batch_size": size}
            for size, rates in ((32, (1e-4, 3e-4, 1e-3)), (16, (1.5e-4, 3e-4, 6e-4)), (8, (3e-4, 6e-4)))
            for rate in rates
        ),
    ),
}


@dataclass
class Args:
    only: tuple[Literal[(*STUDY, *MORE)], ...] = STUDY
    """experiments to run; "base" is what all others start from and runs wherever it is missing"""
    match: tuple[str, ...] = ("",)
    """run what has one of these in its name, as in dvpo/q or bt_coef"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of all stages"""
    num_workers: int = 2
    """runs side by side"""
    results: str = "runs/study/study.jsonl"
    """file that every finished run is added to"""
    output_dir: str = "runs/study"
    """folder of the models"""


@dataclass
class Cell:
    """One run: scripts with the arguments that differ from their defaults, and the policy to evaluate after them."""

    experiment: str
    method: str
    setting: str
    seed: int
    stages: list[tuple[str, dict]]
    policy: str | None
    gvm: str | None = None
    coef: float | None = None

    @property
    def key(self) -> str:
        return f"{self.experiment}/{self.method}/{self.setting}/seed {self.seed}"


def cells(experiment: str, seed: int) -> list[Cell]:
    """The runs of one experiment and seed; paths are relative to the seed's folder."""

    def train(method, setting, flags, gvm="gvm", **more):
        name = f"{experiment}-{method}-{setting}".replace("/", "_").replace(" ", "_")
        script = {"dvpo": "train_dvpo", "ppo": "train_ppo_baseline"}.get(method, method)
        paths = {"dvpo": {"gvm_path": gvm}, "dpo": {}}.get(method, {"reward_path": "rm"})
        return Cell(experiment, method, setting, seed, [(script, {**paths, "output_dir": name, **flags})], name, **more)

    if experiment == "base":
        sft = Cell("base", "sft", "default", seed, [("sft", {"model_path": TASK, "output_dir": "sft"})], "sft")
        gvm = Cell("base", "gvm", "default", seed, [("train_gvm", {"output_dir": "gvm"})], None, "gvm")
        dvpo = train("dvpo", "default", {}, coef=DEFAULT["dvpo"])
        ppo = train("ppo", "default", {"reward_path": None, "reward_output_dir": "rm"}, coef=DEFAULT["ppo"])
        return [sft, gvm, dvpo, ppo]
    show = lambda value: value if isinstance(value, str) else f"{value:g}"
    name = lambda flags: ", ".join(f"{key}={show(value)}" for key, value in flags.items())
    if experiment == "judges":
        made = []
        for flags in JUDGES["gvm"]:
            folder = f"judges-gvm-{name(flags)}".replace(" ", "_")
            stages = [("train_gvm", {"output_dir": folder, **flags})]
            made.append(Cell(experiment, "gvm", name(flags), seed, stages, None, folder))
        for flags in JUDGES["rm"]:  # the script trains one when it has none; of its policy one update
            trained = {"reward_path": None, "reward_output_dir": f"judges-rm-of-{name(flags)}".replace(" ", "_")}
            flags_of_rm = {f"reward_{key}": value for key, value in flags.items()}
            made.append(train("ppo", name(flags), {**trained, **flags_of_rm, "num_updates": 1}))
        return made
    if experiment == "tuning":
        return [train(method, name(flags), flags) for method, tried in TUNING.items() for flags in tried]
    flag = {"dvpo": "kl_coef", "ppo": "kl_coef", "grpo": "beta", "dpo": "beta"}
    if experiment == "frontier":
        return [train(method, f"{flag[method]}={coef:g}", {flag[method]: coef}, coef=coef)
                for method in COEFS for coef in COEFS[method] if coef != DEFAULT.get(method)]  # fmt: skip
    if experiment in EQUAL_TIMES:
        flags = EQUAL_TIMES[experiment]
        return [train("ppo", f"{flags['num_updates']} updates, kl_coef={coef:g}", {**flags, "kl_coef": coef}, coef=coef)
                for coef in COEFS["ppo"][1:]]  # fmt: skip
    if experiment == "one_pass_fast":
        return [train(method, f"{ONE_PASS['dvpo']} updates, {flag[method]}={coef:g}",
                      {**ONE_PASS_FAST, flag[method]: coef}, coef=coef)
                for method in ("dvpo", "ppo", "grpo") for coef in COEFS[method][1:]]  # fmt: skip
    if experiment == "dpo_batch_16":
        return [train("dpo", f"batch_size=16, beta={coef:g}", {"batch_size": 16, "beta": coef}, coef=coef)
                for coef in COEFS["dpo"]]  # fmt: skip
    if experiment == "uncentered":
        return [train("dvpo", f"gae_uncentered, kl_coef={coef:g}", {"advantage": "gae_uncentered", "kl_coef": coef},
                      coef=coef) for coef in COEFS["dvpo"]]  # fmt: skip
    if experiment == "ppo_variants":
        return [train("ppo", setting, flags, coef=flags.get("kl_coef", DEFAULT["ppo"]))
                for setting, flags in PPO_VARIANTS.items()]  # fmt: skip
    if experiment in ("gvm", "trajectories"):
        made = []
        for setting, flags in (GVMS if experiment == "gvm" else TRAJECTORIES).items():
            folder = "gvm-" + setting.replace("/", "_").replace(" ", "_")
            cell = train("dvpo", setting, {}, gvm=folder, coef=DEFAULT["dvpo"])
            cell.stages.insert(0, ("train_gvm", {"output_dir": folder, **flags}))
            cell.gvm = folder
            made.append(cell)
        return made
    if experiment == "advantage":
        return [train("dvpo", setting, flags, coef=flags.get("kl_coef", DEFAULT["dvpo"]))
                for setting, flags in ADVANTAGES.items()]  # fmt: skip
    if experiment == "stability":
        return [train(method, f"learning_rate={rate:g}", {"learning_rate": rate}, coef=DEFAULT[method])
                for method in ("dvpo", "ppo") for rate in RATES]  # fmt: skip
    if experiment == "stability_one_pass":  # half and twice the rate of one_pass_fast
        flags = {**ONE_PASS_FAST, "max_kl": 1e9}
        return [train(method, f"{ONE_PASS['dvpo']} updates, learning_rate={factor * flags['learning_rate']:g}",
                      {**flags, "learning_rate": factor * flags["learning_rate"]}, coef=DEFAULT[method])
                for method in ("dvpo", "ppo") for factor in (0.5, 2)]  # fmt: skip
    # A GVM from a sixteenth of the pairs and nothing that holds the policy back: it will be exploited.
    small = "gvm-unreliable"
    flags = {"kl_coef": 0.0, "max_kl": 1e9}
    exploited = train("dvpo", "1/16 of the pairs, kl_coef=0", flags, gvm=small, coef=0.0)
    exploited.stages.insert(0, ("train_gvm", {"output_dir": small, **GVMS["1/16 of the pairs"]}))
    return [train("dvpo", "kl_coef=0", {"kl_coef": 0.0}, coef=0.0), exploited]


# ---- One run ---------------------------------------------------------------------------------------------------------
def mean_label_by_gold() -> dict[float, float]:
    """E[label | gold] over the preference pairs: the true value, in the GVM's units, of an answer with that score."""
    import common

    labels: dict[float, list[int]] = {}
    score = common.load_task(TASK).score
    for example in common.load_examples(TASK, "pairs")[0]:
        for text, label in ((example.chosen, 1), (example.rejected, -1)):
            labels.setdefault(score(example.prompt, text), []).append(label)
    return {gold: statistics.mean(signs) for gold, signs in labels.items()}


class Recorder:
    """Compares the critic of a run, GVM or online, with what came of the very answers it judged, before it saw them.

    It reads what `dvpo_advantages` or `ppo_advantages` is given, and the exact scores that the task gives: the scripts
    stay as they are. `windows` has a row per tenth of the run.
    """

    def __init__(self, module):
        import torch

        import common

        self.updates, self.gold, self.pending, true_value = [], [], None, mean_label_by_gold()
        load_task, log = common.load_task, common.Run.log
        name = "dvpo_advantages" if hasattr(module, "dvpo_advantages") else "ppo_advantages"
        advantages = getattr(module, name)
        self.replaced = (module, name, advantages), (common, "load_task", load_task), (common.Run, "log", log)

        def recorded_dvpo(values, rewards, mask, *rest):
            self.pending = values, None, mask
            return advantages(values, rewards, mask, *rest)

        def recorded_ppo(values, scores, kl, mask, gamma, lam, kl_coef):
            ahead = scores[:, None] - kl_coef * kl.flip(1).cumsum(1).flip(1)  # (B, R) return-to-go of this very answer
            self.pending = values, torch.cat([ahead, scores[:, None]], 1), mask
            return advantages(values, scores, kl, mask, gamma, lam, kl_coef)

        def recorded_task(path):
            task = load_task(path)
            if task is None:
                return None

            def score(prompt, answer):
                self.gold.append(task.score(prompt, answer))
                return self.gold[-1]

            return types.SimpleNamespace(**{**vars(task), "score": score})

        def recorded_log(run, *rest):
            if self.pending:  # not while a reward model is trained
                values, returns, mask = self.pending
                gold, self.gold = self.gold, []
                if returns is None:
                    returns = torch.tensor([true_value[g] for g in gold])[:, None].expand_as(values)
                self.updates.append((values, returns, mask, torch.tensor(gold)))
            return log(run, *rest)

        setattr(module, name, recorded_dvpo if name == "dvpo_advantages" else recorded_ppo)
        common.load_task, common.Run.log = recorded_task, recorded_log

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for owner, name, original in self.replaced:
            setattr(owner, name, original)

    def windows(self) -> list[dict]:
        import torch

        import evaluate

        rows, width = [], math.ceil(len(self.updates) / 10)
        for start in range(0, len(self.updates), width):
            row = {"first_update": start + 1, "by_fraction": {}}
            for fraction in evaluate.FRACTIONS:
                parts = []
                for values, returns, mask, gold in self.updates[start : start + width]:
                    # A critic has no use for the state after the last token: 100 % is the state before it.
                    column = (fraction * (mask.sum(1) - 1)).round().long()[:, None]
                    parts.append(torch.stack([values.gather(1, column)[:, 0], returns.gather(1, column)[:, 0], gold]))
                value, actual, gold = torch.cat(parts, 1).double()
                row["by_fraction"][f"{fraction:g}"] = {
                    "error": ((value - actual).square().mean().sqrt() / actual.std()).item(),  # in std of the target
                    "bias": ((value - actual).mean() / actual.std()).item(),
                    "target_std": actual.std().item(),  # it shrinks as answers get better
                    "explained_variance": evaluate.explained_variance(value, actual),
                    "gold_correlation": evaluate.correlation(value, gold),
                }
            rows.append(row)
        return rows


def center(advantages_of):
    """`ppo_advantages`, centred as DVPO's are."""

    def centered(values, scores, kl, mask, *rest):
        import common
        import train_dvpo

        advantages, returns = advantages_of(values, scores, kl, mask, *rest)
        return common.masked_whiten(train_dvpo.center_per_token(advantages, mask), mask), returns

    return centered


def stands(module, flags: dict) -> bool:
    """Has another run of this seed made this very model?"""
    folder = Path(flags["output_dir"])
    if not (folder / "README.md").exists():
        return False
    made = json.loads((folder / "args.json").read_text())
    return made == json.loads(json.dumps(asdict(module.Args(**flags))))


def remove_run(folder: str) -> None:
    """Remove the folder of a run, where there is one."""
    if Path(folder, ".dvpo-run").exists():
        shutil.rmtree(folder)


def run_cell(cell: Cell, folder: str) -> dict:
    """Train, evaluate, and return the row of results."""
    import importlib

    import torch
    import transformers

    torch.set_num_threads(1)
    os.makedirs(folder, exist_ok=True)
    os.chdir(folder)
    made_with = {"commit": subprocess.getoutput(f"git -C {shlex.quote(str(ROOT))} describe --always --dirty"),
                 "python": sys.version.split()[0], "torch": torch.__version__, "transformers": transformers.__version__,
                 "cpu": torch.backends.cpu.get_cpu_capability()}  # fmt: skip
    row = {"key": cell.key, "experiment": cell.experiment, "method": cell.method, "setting": cell.setting,
           "seed": cell.seed, "coef": cell.coef, "stages": cell.stages, "made_with": made_with,
           "seconds": {}}  # fmt: skip
    for script, flags in cell.stages:
        reward_dir = flags.get("reward_output_dir")
        if reward_dir and Path(reward_dir, "README.md").exists():
            flags["reward_path"] = reward_dir
        elif reward_dir:
            remove_run(reward_dir)  # what a stopped study has left
        module, flags = importlib.import_module(script), {"model_path": "sft", "seed": cell.seed, **flags}
        centered, took = flags.pop("centered", False), Path(f"{flags['output_dir']}-seconds.txt")
        if script in ("sft", "train_gvm") and took.exists() and stands(module, flags):
            row["seconds"][script] = float(took.read_text())
            continue
        start = time.perf_counter()
        recorded = script in ("train_dvpo", "train_ppo_baseline")
        with contextlib.ExitStack() as stack:
            if centered:
                stack.callback(setattr, module, "ppo_advantages", module.ppo_advantages)
                module.ppo_advantages = center(module.ppo_advantages)
            recorder = stack.enter_context(Recorder(module)) if recorded else None
            remove_run(flags["output_dir"])  # what a stopped study has left
            module.main(module.Args(**flags))
        row["seconds"][script] = time.perf_counter() - start
        took.write_text(str(row["seconds"][script]))
        if recorded:
            row["critic"] = recorder.windows()
    metrics = Path(cell.policy or "") / "metrics.jsonl"
    if metrics.exists():
        updates = [json.loads(line) for line in metrics.read_text().splitlines()]
        if "objective/gold" in updates[0]:
            row["curve"] = curve(updates)
            row["time"] = {phase: statistics.median(u[f"time/{phase}"] for u in updates)
                           for phase in ("rollout", "score", "update", "total")}  # fmt: skip
    import evaluate

    policies = (f"policy={cell.policy or 'sft'}",)
    out = Path(f"{cell.policy or cell.gvm}-eval")
    evaluate.main(evaluate.Args(policies, "sft", cell.gvm, output_dir=str(out), seed=cell.seed,
                                num_prompts=448 if cell.policy else 1))  # fmt: skip
    results = json.loads((out / "results.json").read_text())
    if cell.policy:
        row["policy"] = results["policies"]["policy"]
    if cell.gvm:
        row["gvm"] = results["gvm"]
    rm_metrics = Path(cell.stages[-1][1].get("reward_output_dir", ""), "metrics.jsonl")
    if rm_metrics.exists():
        row["rm_pair_accuracy"] = json.loads(rm_metrics.read_text().splitlines()[-1])["rm/pair_accuracy"]
    if cell.policy and cell.policy != "sft":
        shutil.rmtree(cell.policy)
    return row


def curve(updates: list[dict]) -> dict[str, list[float]]:
    """Means of some metrics over each twentieth of a run."""
    width = math.ceil(len(updates) / 20)
    parts = [updates[i : i + width] for i in range(0, len(updates), width)]
    names = [name for name in ("objective/gold", "objective/scores", "objective/kl", "val/response_length",
                               "policy/entropy", "critic/drift", "critic/explained_variance", "val/off_support")
             if name in updates[0]]  # fmt: skip
    return {"step": [part[-1]["step"] for part in parts],
            **{name: [statistics.mean(u[name] for u in part) for part in parts] for name in names}}  # fmt: skip


def leave_with_parent() -> None:
    """Let a worker die with the study: stopped or killed, it must not go on in the background."""

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def run_job(job: list[Cell], folder: str, log_file: str) -> list[dict]:
    """Cells that build on one another, in turn; what they print goes to `log_file`."""
    import torch.distributed as dist

    rows = []
    with open(log_file, "a", buffering=1) as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        for cell in job:
            start = time.perf_counter()
            try:
                rows.append(run_cell(cell, folder))
            except BaseException as error:  # the others go on; what failed is tried again by the next call
                traceback.print_exc()
                rows.append({"key": cell.key, "error": f"{type(error).__name__}: {error}"})
                if dist.is_initialized():
                    dist.destroy_process_group()
            rows[-1]["wall"] = time.perf_counter() - start
    return rows


def main(args: Args) -> None:
    results, output_dir = Path(args.results), Path(args.output_dir).resolve()
    results.parent.mkdir(parents=True, exist_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    done = {json.loads(line)["key"] for line in results.read_text().splitlines()} if results.exists() else set()
    context = multiprocessing.get_context("spawn")
    seeds_of = lambda e: {"tuning": (TUNING_SEED,), "judges": JUDGE_SEEDS}.get(e, args.seeds)
    with concurrent.futures.ProcessPoolExecutor(args.num_workers, context, leave_with_parent) as pool:
        running, later = {}, {}  # future -> seed, seed -> cells that build on its base models

        def submit(jobs: list[list[Cell]], seed: int) -> None:
            for job in jobs:
                log_file = output_dir / f"log-{job[0].key}.txt".replace("/", "_").replace(" ", "_")
                running[pool.submit(run_job, job, str(output_dir / f"seed{seed}"), str(log_file))] = seed

        for seed in dict.fromkeys(seed for experiment in args.only for seed in seeds_of(experiment)):
            experiments = [e for e in args.only if e != "base" and seed in seeds_of(e)]
            todo = [cell for e in experiments for cell in cells(e, seed) if cell.key not in done]
            later[seed] = [cell for cell in todo if any(part in cell.key for part in args.match)]
            # What the others need is one job, made again where it is missing.
            made = (output_dir / f"seed{seed}" / "rm" / "README.md").exists()
            base = [cell for cell in cells("base", seed) if not made or cell.key not in done]
            if base and (later[seed] or "base" in args.only):
                submit([base], seed)
            else:
                submit([[cell] for cell in later.pop(seed)], seed)
        ran = bool(running)
        while running:
            for future in concurrent.futures.wait(running, return_when="FIRST_COMPLETED").done:
                seed = running.pop(future)
                for row in future.result():
                    shown = row.get("error") or row.get("policy", {}).get("gold", {}).get("mean", "")
                    print(f"{time.strftime('%H:%M:%S')}  {row['wall']:4.0f} s  {row['key']}  {shown}", flush=True)
                    if "error" not in row and row["key"] not in done:
                        done.add(row["key"])
                        with open(results, "a") as file:
                            file.write(json.dumps(row) + "\n")
                submit([[cell] for cell in later.pop(seed, ())], seed)
    if not ran:
        print(f"nothing to run: {results} has all that was asked for, or --match fits nothing; another --results starts"
              " anew")  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Args))
