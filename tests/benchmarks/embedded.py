"""The README's results on the embedded task: the main job, the three advantage estimators, and conditioning on
trajectories, each for several seeds. Resumable: a stage whose folder holds a model is not run again.

    python tests/benchmarks/embedded.py --seeds 1 2 3

Prints means over seeds with 95 % t-intervals and leaves everything in `--output-dir`.
"""

import json
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
T_QUANTILE = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


@dataclass
class Args:
    seeds: tuple[int, ...] = (1, 2, 3)
    """seeds of all stages"""
    output_dir: str = "runs/embedded"
    """folder for everything made"""


def stage(script: str, folder: Path, *flags) -> None:
    """Run one script into `folder`, unless that is done."""
    if not (folder / "model.safetensors").exists() and not (folder / "results.json").exists():
        command = [sys.executable, ROOT / script, "--output-dir", folder.resolve(), *flags]
        subprocess.run(list(map(str, command)), check=True)


def run_seed(folder: Path, seed: int) -> None:
    at = lambda name: str((folder / name).resolve())
    base = ["--seed", seed, "--model-path", at("sft")]
    fresh, start = not folder.exists(), time.perf_counter()
    stage("sft.py", folder / "sft", "--seed", seed)
    stage("train_gvm.py", folder / "gvm", *base)
    stage("train_dvpo.py", folder / "dvpo", *base, "--gvm-path", at("gvm"))
    judge = ["--seed", seed, "--reference-path", at("sft")]
    stage("evaluate.py", folder / "eval", f"sft={at('sft')}", f"dvpo={at('dvpo')}", *judge, "--gvm-path", at("gvm"))
    if fresh:  # the main job: four scripts, start-up included
        (folder / "main_job_seconds.json").write_text(json.dumps(time.perf_counter() - start))
    for advantage in ("q", "released"):
        stage("train_dvpo.py", folder / advantage, *base, "--gvm-path", at("gvm"), "--advantage", advantage)
    # As many updates more, with and without trajectories: both go on from the GVM above.
    more = ["--seed", seed, "--model-path", at("gvm"), "--num-epochs", 3]
    stage("train_gvm.py", folder / "gvm_long", *more)
    stage("train_gvm.py", folder / "gvm_tau", *more, "--num-context-trajectories", 3)
    policies = [f"{name}={at(name)}" for name in ("q", "released")]
    stage("evaluate.py", folder / "eval_more", *policies, *judge, "--gvm-path", at("gvm_long"))
    stage("evaluate.py", folder / "eval_tau", f"sft={at('sft')}", *judge, "--gvm-path", at("gvm_tau"))


def interval(values: list[float]) -> str:
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:.3f}"
    half = T_QUANTILE[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.3f} ± {half:.3f}"


def main(args: Args) -> None:
    folders = [Path(args.output_dir) / f"seed{seed}" for seed in args.seeds]
    for folder, seed in zip(folders, args.seeds):
        run_seed(folder, seed)
    read = lambda folder, name: json.loads((folder / name / "results.json").read_text())
    results = [{name: read(folder, name) for name in ("eval", "eval_more", "eval_tau")} for folder in folders]
    print(f"\nmean ± half of the 95 % t-interval over {len(folders)} seeds; every seed in brackets")
    print("| policy | gold | KL | length |\n|---|---|---|---|")
    for source, name in (("eval", "sft"), ("eval", "dvpo"), ("eval_more", "q"), ("eval_more", "released")):
        rows = [result[source]["policies"][name] for result in results]
        gold = [row["gold"]["mean"] for row in rows]
        seeds = ", ".join(f"{g:.3f}" for g in gold)
        kl, length = ([row[key] for row in rows] for key in ("kl", "response_length"))
        print(f"| {name} | {interval(gold)} ({seeds}) | {interval(kl)} | {interval(length)} |")
    for source, name in (("eval", "gvm"), ("eval_more", "gvm_long"), ("eval_tau", "gvm_tau")):
        reports = [result[source]["gvm"] for result in results]
        print(f"\n{name}: pair accuracy (last value) {interval([r['pair_accuracy']['last'] for r in reports])}, "
              f"gold score itself {interval([r['gold_pair_accuracy'] for r in reports])}")  # fmt: skip
        print("| answer seen | pair accuracy | explained variance | correlation with gold |\n|---|---|---|---|")
        for fraction in reports[0]["by_fraction"]:
            cells = [interval([r["by_fraction"][fraction][key] for r in reports])
                     for key in ("pair_accuracy", "explained_variance", "gold_correlation")]  # fmt: skip
            print(f"| {float(fraction):.0%} | {' | '.join(cells)} |")
    timed = [folder / "main_job_seconds.json" for folder in folders]
    seconds = [json.loads(file.read_text()) for file in timed if file.exists()]  # none where a seed was interrupted
    print(f"\nmain job, seconds: {', '.join(f'{s:.0f}' for s in seconds)}")


if __name__ == "__main__":
    main(tyro.cli(Args))
