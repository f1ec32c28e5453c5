"""The long form of tests/test_faults.py: runs killed at random instants must end bit-identical; and what that costs.

    python tests/benchmarks/faults.py            # all kinds of faults: a table
    python tests/benchmarks/faults.py --only cost

A tiny model; every script in turn. A fault strikes at a random instant of the run, start-up included; then `--resume`.
Every run is a child forked after the imports, so that a trial takes seconds.
"""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
import tyro  # noqa: E402

ROOT = Path(__file__).parents[2]
TASK = "tests/tasks/lists.py"
sys.path.insert(0, str(ROOT))

import common  # noqa: E402
import sft  # noqa: E402
import train_dvpo  # noqa: E402
import train_gvm  # noqa: E402
import train_ppo_baseline  # noqa: E402

MODULES = {"sft": sft, "train_gvm": train_gvm, "train_dvpo": train_dvpo, "train_ppo_baseline": train_ppo_baseline}
KINDS = {"kill -9": 50, "SIGTERM": 20, "kill -9 while saving": 10, "damaged checkpoint": 10, "full disk": 5}


@dataclass
class Args:
    only: tuple[str, ...] = (*KINDS, "cost")
    """kinds of faults, and "cost": the time that checkpoints take at the default interval"""
    seed: int = 1
    """seed of the instants"""


def in_child(script: str, flags: dict, log: Path, file_size: int | None = None) -> int:
    """Start the script in a forked process, its output in `log`; returns the process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    with open(log, "a") as file, contextlib.suppress(BaseException):
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            if file_size:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, resource.RLIM_INFINITY))
            with common.one_line_errors():
                MODULES[script].main(MODULES[script].Args(**flags))
            code = 0
        except SystemExit as left:
            code = left.code
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def outcome(pid: int) -> int:
    """The exit code of a child; minus the signal's number where one killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def flags_of(script: str, models: Path, folder: Path) -> dict:
    same = {"model_path": str(models / "sft"), "output_dir": str(folder), "checkpoint_every": 3}
    own = {
        "sft": {"model_path": TASK, "num_examples": 160, "num_epochs": 1, "batch_size": 16},
        "train_gvm": {"num_examples": 100, "num_epochs": 1, "batch_size": 8, "num_context_trajectories": 1},
        "train_dvpo": {"gvm_path": str(models / "gvm"), "num_updates": 20, "rollout_batch_size": 8, "kl_target": 3.0},
        "train_ppo_baseline": {"dataset": str(models / "pairs.jsonl"), "num_updates": 15, "rollout_batch_size": 8,
                               "reward_batch_size": 16, "reward_output_dir": f"{folder}_rm", "reward_num_epochs": 1},
    }[script]  # fmt: skip
    return {**same, **own}


def result(folder: Path) -> tuple:
    """What must be identical: the weights' SHA-256 and every metric but the clock and the memory."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return common.sha256(folder / "model.safetensors"), [
        {key: value for key, value in row.items() if not key.startswith("time/")} for row in rows
    ]


def damage(checkpoint: Path, rng: random.Random) -> str:
    """Flip a byte of one of its files, cut its end off, or remove it."""
    file = rng.choice(sorted(checkpoint.iterdir()))
    data, how = bytearray(file.read_bytes()), rng.choice(["flipped", "truncated", "missing"])
    if how == "missing":
        file.unlink()
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        file.write_bytes(data if how == "flipped" else data[: rng.randrange(len(data))])
    return how


def trial(kind: str, script: str, models: Path, reference: tuple, seconds: float, rng: random.Random) -> str:
    """One fault and what became of the run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder, log = Path(temporary) / "run", Path(temporary) / "log"
        flags = flags_of(script, models, folder)
        if kind == "full disk":
            code = outcome(in_child(script, flags, log, file_size=rng.randrange(50_000, 500_000)))
            if code != 1 or log.read_text().count("error: ") != 1:
                return f"left with {code}: {log.read_text()[-300:]}"
        else:
            pid = in_child(script, flags, log)
            checkpoints = lambda whole: [path for path in Path(temporary).glob("run*/checkpoints/step_*")
                                         if (path / "manifest.json").exists() == whole]  # fmt: skip
            start = time.monotonic()
            if kind == "kill -9 while saving":
                time.sleep(rng.uniform(0.2, 1) * seconds)
                while time.monotonic() - start < 2 * seconds and not checkpoints(whole=False):
                    time.sleep(0.0005)
                time.sleep(rng.uniform(0, 0.03))
            else:
                time.sleep(rng.uniform(0, seconds))
                while kind == "damaged checkpoint" and time.monotonic() - start < 2 * seconds:
                    if len(checkpoints(whole=True)) > 1:
                        break
                    time.sleep(0.01)
            os.kill(pid, signal.SIGTERM if kind == "SIGTERM" else signal.SIGKILL)
            code = outcome(pid)
            if code == 0 or (kind == "damaged checkpoint" and len(checkpoints(whole=True)) < 2):
                return "missed"  # it had ended already, or there was nothing to damage
            if kind == "kill -9 while saving" and not checkpoints(whole=False):
                return "missed"  # no checkpoint was left unfinished
            if kind == "SIGTERM" and code not in (128 + signal.SIGTERM, -signal.SIGTERM):
                return f"left with {code}: {log.read_text()[-300:]}"
            if kind == "damaged checkpoint":
                damage(max(checkpoints(whole=True), key=lambda path: path.stat().st_mtime), rng)
        code = outcome(in_child(script, {**flags, "resume": True}, log))
        if code:
            return f"did not resume ({code}): {log.read_text()[-300:]}"
        return "identical" if result(folder) == reference else "different"


def faults(args: Args, models: Path) -> None:
    rng = random.Random(args.seed)
    references = {}
    for script in MODULES:
        folder, start = models / f"reference-{script}", time.monotonic()
        assert outcome(in_child(script, flags_of(script, models, folder), models / "log")) == 0
        references[script] = result(folder), time.monotonic() - start
    print("| fault | trials | identical | else |\n|---|---|---|---|", flush=True)
    for kind in (kind for kind in KINDS if kind in args.only):
        outcomes = Counter()
        for i in range(KINDS[kind]):
            script, what = list(MODULES)[i % len(MODULES)], "missed"
            while what == "missed":  # what nothing struck says nothing
                what = trial(kind, script, models, *references[script], rng)
            outcomes[what] += 1
        others = "; ".join(f"{count} x {what}" for what, count in outcomes.items() if what != "identical")
        print(f"| {kind} | {KINDS[kind]} | {outcomes['identical']} | {others or '-'} |", flush=True)


def cost(models: Path) -> None:
    """Seconds per checkpoint against those of the updates between two, with the default settings of every script."""
    print("\n| script | s per checkpoint | updates between | s per update | share |\n|---|---|---|---|---|", flush=True)
    for script, module in MODULES.items():
        folder, log = models / f"cost-{script}", models / "log"
        every = module.Args().checkpoint_every
        updates = 2 * every + 1
        flags = {"output_dir": str(folder), "model_path": str(models / "sft")}
        flags |= {"sft": {"model_path": TASK, "num_examples": 32 * updates, "num_epochs": 1},
                  "train_gvm": {"num_examples": 32 * updates, "num_epochs": 1}}.get(
                      script, {"num_updates": updates})  # fmt: skip
        flags |= {"train_dvpo": {"gvm_path": str(models / "gvm")},
                  "train_ppo_baseline": {"reward_path": str(models / "rm")}}.get(script, {})  # fmt: skip
        save, times = common.Run.save_checkpoint, models / f"times-{script}.txt"

        def timed(*rest, save=save, times=times):
            start = time.perf_counter()
            save(*rest)
            with open(times, "a") as file:
                file.write(f"{time.perf_counter() - start}\n")

        common.Run.save_checkpoint = timed
        code = outcome(in_child(script, flags, log))
        common.Run.save_checkpoint = save
        assert code == 0, log.read_text()[-2000:]
        saving = statistics.median(map(float, times.read_text().split()))
        rows = [json.loads(line)["time/total"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        update = statistics.median(rows)
        share = saving / (every * update)
        print(f"| {script}.py | {saving:.3f} | {every} | {update:.3f} | {share:.1%} |", flush=True)


def make_models(models: Path) -> None:
    """A policy, a GVM and a reward model, trained hardly at all, and a file of pairs."""
    out = lambda name: {"output_dir": str(models / name)}
    short = {"num_examples": 320, "num_epochs": 1}
    jobs = [("sft", {"model_path": TASK, **short, **out("sft")}),
            ("train_gvm", {"model_path": str(models / "sft"), **short, **out("gvm")})]  # fmt: skip
    rows = [{key: row[key] for key in ("prompt", "chosen", "rejected")}
            for row in common.load_task(TASK).rows("train")[:140]]  # fmt: skip
    (models / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ppo = {"model_path": str(models / "sft"), "dataset": str(models / "pairs.jsonl"), "num_updates": 1}
    jobs.append(("train_ppo_baseline", {**ppo, "reward_output_dir": str(models / "rm"), **out("ppo")}))
    for script, flags in jobs:
        code = outcome(in_child(script, flags, models / "log"))
        assert code == 0, (models / "log").read_text()[-2000:]


def main(args: Args) -> None:
    unknown = set(args.only) - {*KINDS, "cost"}
    assert not unknown, f"no such kind of fault: {unknown}"
    models = Path(tempfile.mkdtemp())
    start = time.monotonic()
    try:
        make_models(models)
        if set(args.only) & set(KINDS):
            faults(args, models)
        if "cost" in args.only:
            cost(models)
    finally:
        shutil.rmtree(models)
    print(f"\n{time.monotonic() - start:.0f} s, seed {args.seed}, torch {torch.__version__}")


if __name__ == "__main__":
    main(tyro.cli(Args))
