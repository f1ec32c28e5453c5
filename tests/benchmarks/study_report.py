"""Tables (Markdown) and plots (SVG) of what `study.py` has run.

    python tests/benchmarks/study_report.py              # of the rows behind the README
    python tests/benchmarks/study_report.py --results runs/study/study.jsonl --output-dir runs/study

Out: `report.md` and three plots in `--output-dir`.

A point is the interquartile mean over seeds with its 95 % bootstrap interval over seeds, as arXiv:2108.13264 asks; with
so few seeds such an interval is too short (at 5 seeds it covers the truth nine times in ten). A difference is the mean
over seeds of differences seed by seed, with half of its 95 % t-interval and the number of seeds in brackets; bold where
the interval leaves out 0. Runs that are missing are left out: see the number of seeds.
"""

import contextlib
import gzip
import json
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from study import COEFS, DEFAULT, EQUAL_TIME, EQUAL_TIMES, ONE_PASS, TUNING_SEED

FOLDER = Path(__file__).parent / "results"
# 97.5 % quantiles of Student's t with 1, 2, ... degrees of freedom; the last one serves for all above.
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093)  # fmt: skip
CHOSE = (1, 2, 3, 4, 5, 8)  # seeds on which centring was found needed or chosen (1 to 5) or the judges' settings (8)
COMPARED = ("base", "frontier", "uncentered", "one_pass_fast", "dpo_batch_16", *EQUAL_TIMES)  # experiments
FAR_APART = 2.5  # nats between neighbouring coefficients beyond which nothing is interpolated
COLORS = {"dvpo": "#c0392b", "dvpo_one_pass_fast": "#ec7063", "ppo": "#2471a3", "ppo_one_pass_fast": "#7fb3d5",
          "grpo": "#229954", "grpo_one_pass_fast": "#7dcea0", "dpo": "#7d3c98"}  # fmt: skip
NAMES = {"sft": "SFT", "dvpo": "DVPO", "uncentered": "DVPO, gae_uncentered",
         "ppo": "PPO", "equal_time": f"PPO, {EQUAL_TIME} updates",
         "equal_time_fast": f"PPO, {EQUAL_TIME} updates, twice the rate",
         "equal_time_one_pass": f"PPO, {ONE_PASS['ppo']} updates of one pass",
         "equal_time_one_pass_fast": f"PPO, {ONE_PASS['ppo']} updates of one pass, twice the rate",
         "grpo": "GRPO (TRL)", "dpo": "DPO (TRL)", "dpo_batch_16": "DPO (TRL), batches of 16"}  # fmt: skip
NAMES |= {f"{method}_one_pass_fast": f"{NAMES[method]}, {ONE_PASS['dvpo']} updates of one pass, twice the rate"
          for method in ("dvpo", "ppo", "grpo")}  # fmt: skip


@dataclass
class Args:
    results: str = str(FOLDER / "study.jsonl.gz")
    """what study.py has written, perhaps gzipped; `rerun` beside it has the defaults with another CPU's kernels"""
    output_dir: str = str(FOLDER)
    """folder of report.md and the plots"""


def read(file: Path) -> list[dict]:
    """The rows of a .jsonl or .jsonl.gz file."""
    with (gzip.open if file.suffix == ".gz" else open)(file, "rt") as lines:
        return [json.loads(line) for line in lines]


def iqm(x: torch.Tensor) -> torch.Tensor:
    """Interquartile mean over the last dimension: a quarter of the weight is cut from each end."""
    n = x.shape[-1]
    edges = torch.arange(n + 1, dtype=torch.float64) / n
    weights = (edges[1:].clamp(max=0.75) - edges[:-1].clamp(min=0.25)).clamp(min=0)
    return (x.sort(-1).values * weights).sum(-1) / weights.sum()


def interval(values: list[float]) -> tuple[float, float, float]:
    """Interquartile mean and its 95 % bootstrap interval."""
    x = torch.tensor(values, dtype=torch.float64)
    drawn = torch.randint(len(x), (10_000, len(x)), generator=torch.Generator().manual_seed(0))
    low, high = iqm(x[drawn]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return iqm(x).item(), low, high


def show(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.3f} (1 seed)"
    middle, low, high = interval(values)
    return f"{middle:.3f} [{low:.3f}, {high:.3f}]"


def paired(ours: list[float], theirs: list[float]) -> str:
    """The mean difference, seed by seed, with half of its 95 % t-interval, and the number of seeds."""
    if len(ours) < 2:
        return "-"
    x = torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)
    half = T_QUANTILES[min(len(x), len(T_QUANTILES) + 1) - 2] * x.std().item() / len(x) ** 0.5
    mark = "**" if abs(x.mean()) > half else ""
    return f"{mark}{x.mean():+.3f} ± {half:.3f}{mark} ({len(x)})"


def group(rows: list[dict], *experiments: str) -> dict[tuple[str, str], list[dict]]:
    """(method, setting) -> rows of all seeds."""
    groups = defaultdict(list)
    for row in rows:
        if row["experiment"] in experiments:
            groups[row["method"], row["setting"]].append(row)
    return groups


def table(header: str, lines: list[list[str]]) -> None:
    if not lines:
        return
    columns = header.split(" | ")
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for line in lines:
        print("| " + " | ".join(line) + " |")


def kind(row: dict) -> str:
    """The key in NAMES of a run: that of its schedule or estimator, or of its method at the defaults of both."""
    schedule = f"{row['method']}_{row['experiment']}"
    return next(key for key in (schedule, row["experiment"], row["method"]) if key in NAMES)


def policy_cells(members: list[dict]) -> list[str]:
    policy = lambda key: [row["policy"][key] for row in members]
    gold = [row["policy"]["gold"]["mean"] for row in members]
    return [str(len(members)), show(gold), f"{min(gold):.3f}", show(policy("kl")), show(policy("response_length"))]


# ---- Frontier --------------------------------------------------------------------------------------------------------
def frontier(rows: list[dict], folder: Path, plt) -> None:
    points = defaultdict(list)
    for experiment in COMPARED:
        for members in group(rows, experiment).values():
            if "policy" in members[0]:
                points[kind(members[0])].append(members)
    points = {name: points[name] for name in NAMES if name in points}
    print("\n## Gold score against KL, per KL coefficient")
    lines = []
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for method, settings in points.items():
        settings.sort(key=lambda members: leash(members[0]))
        for members in settings:
            coef = "-" if members[0]["coef"] is None else f"{members[0]['coef']:g}"
            lines.append([NAMES[method], coef, *policy_cells(members)])
        if method not in COLORS:  # the plot is full enough
            continue
        kl = [interval([row["policy"]["kl"] for row in members])[0] for members in settings]
        gold = torch.tensor([interval([row["policy"]["gold"]["mean"] for row in members]) for members in settings])
        bars = torch.stack([gold[:, 0] - gold[:, 1], gold[:, 2] - gold[:, 0]]).clamp(min=0)
        axis.errorbar(kl, gold[:, 0], bars, fmt="o", color=COLORS[method], label=NAMES[method], capsize=3)
        seeds = [{row["seed"] for row in members} for members in settings]
        for i in range(len(kl) - 1):  # as at equal KL: not between runs too far apart, or of other seeds
            if abs(kl[i + 1] - kl[i]) < FAR_APART and seeds[i] == seeds[i + 1]:
                axis.plot(kl[i : i + 2], gold[i : i + 2, 0], color=COLORS[method], lw=1.5)
    table("method | coefficient | seeds | gold | worst seed | KL | tokens", lines)
    axis.set(xlabel="KL to the SFT policy, nats per answer", ylabel="gold score (optimum 1)",
             xlim=(0, 8), ylim=(0.75, 0.97))  # fmt: skip
    axis.grid(alpha=0.3)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncol=2)
    figure.savefig(folder / "frontier.svg", bbox_inches="tight", metadata={"Date": None})

    print("\n## Gold at equal KL, seed by seed (linear between neighbouring coefficients)")
    curves = {method: by_seed(row for members in settings for row in members) for method, settings in points.items()}
    dvpo, uncentered = curves.get("dvpo", {}), curves.get("uncentered", {})
    fast = curves.get("dvpo_one_pass_fast", {})
    fresh = lambda curves: {seed: curve for seed, curve in curves.items() if seed not in CHOSE}

    def differences(pairs: dict[str, tuple]) -> None:
        pairs = {name: pair for name, pair in pairs.items() if pair[0] and pair[1] in curves}
        lines = [[f"{kl:g}", *(at_equal_kl(ours, curves[other], kl) for ours, other in pairs.values())]
                 for kl in (0.95, 1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5, 5.0)]  # fmt: skip
        table(" | ".join(["KL", *pairs]), [line for line in lines if set(line[1:]) - {"-"}])

    differences({
        "DVPO - PPO": (dvpo, "ppo"),
        "the same, seeds that chose nothing": (fresh(dvpo), "ppo"),
        "gae_uncentered - PPO": (uncentered, "ppo"),
        "DVPO - GRPO (TRL)": (dvpo, "grpo"),
        "DVPO - DPO (TRL)": (dvpo, "dpo"),
    })  # fmt: skip
    print("\nIn the time of DVPO's 300 updates, or less (but for PPO's 300 updates, in the last column):")
    others = ("equal_time_one_pass_fast", "ppo")
    differences({
        **{f"DVPO - {NAMES[name]}": (dvpo, name) for name in EQUAL_TIMES},
        **{f"{NAMES['dvpo_one_pass_fast']} - {NAMES[name]}": (fast, name) for name in others},
    })  # fmt: skip
    print("\nAfter as many updates, 400 of one pass at twice the rate each:")
    differences({
        "DVPO - PPO": (fast, "ppo_one_pass_fast"),
        "the same, seeds that chose nothing": (fresh(fast), "ppo_one_pass_fast"),
        "DVPO - GRPO (TRL)": (fast, "grpo_one_pass_fast"),
    })  # fmt: skip

    print("\n## Seed by seed: the defaults, and DVPO's gold less that of the others at 2 nats")
    base = {(row["method"], row["seed"]): row for row in rows if row["experiment"] == "base"}
    number = lambda x, form=".3f": "-" if x is None else f"{x:{form}}"
    lines = []
    for seed in sorted(dvpo):
        gvm, ours, theirs = (base.get((method, seed), {}) for method in ("gvm", "dvpo", "ppo"))
        cells = [number(gvm["gvm"]["pair_accuracy"]["last"] if gvm else None), number(theirs.get("rm_pair_accuracy"))]
        for row in (ours, theirs):
            cells += [number(row["policy"]["gold"]["mean"]), number(row["policy"]["kl"])] if row else ["-", "-"]
        for other in ("ppo", "equal_time", "grpo"):
            both = [interpolate(curve.get(seed, []), 2.0) for curve in (dvpo, curves.get(other, {}))]
            cells.append(number(None if None in both else both[0] - both[1], "+.3f"))
        lines.append([str(seed), *cells])
    table(f"seed | pair accuracy: GVM | reward model | DVPO: gold | KL | PPO: gold | KL | less PPO | less "
          f"{NAMES['equal_time']} | less GRPO (TRL)", lines)  # fmt: skip

    gold = lambda name: {(row["coef"], row["seed"]): row["policy"]["gold"]["mean"] for members in points.get(name, [])
                         for row in members}  # fmt: skip
    centred, uncentred = gold("dvpo"), gold("uncentered")
    seeds = sorted({seed for _, seed in centred.keys() & uncentred.keys()})
    if seeds:
        print("\n## What centring adds to the gold score, per KL coefficient and seed")
        added = lambda run: f"{centred[run] - uncentred[run]:+.3f}" if run in centred and run in uncentred else "-"
        lines = [[f"{coef:g}", *(added((coef, seed)) for seed in seeds)] for coef in COEFS["dvpo"]]
        table(" | ".join(["coefficient", *(f"seed {seed}" for seed in seeds)]), lines)


def leash(row: dict) -> float:
    """Sorts runs by their KL coefficient, the largest first; SFT, which has none, before all."""
    return -math.inf if row["coef"] is None else -row["coef"]


def by_seed(rows) -> dict[int, list[tuple[float, float]]]:
    """(KL, gold) of the runs of each seed, in the order of their coefficients, SFT first."""
    curves = defaultdict(list)
    for row in sorted(rows, key=leash):
        curves[row["seed"]].append((row["policy"]["kl"], row["policy"]["gold"]["mean"]))
    return curves


def less_frontier(rows: list[dict], members: list[dict], experiments=("base", "frontier")) -> str:
    """Gold of runs less that of their method in `experiments`, the default settings, at the same KL and seed.

    Left of the smallest KL there it is less the straight line from SFT, which lies below the curve.
    """
    method = members[0]["method"]
    curves = by_seed(row for row in rows if row["method"] == "sft"
                     or (row["method"] == method and row["experiment"] in experiments))  # fmt: skip
    pairs = [(row["policy"]["gold"]["mean"], interpolate(curves[row["seed"]], row["policy"]["kl"])) for row in members]
    return paired(*zip(*pairs)) if None not in (gold for pair in pairs for gold in pair) else "-"


def at_equal_kl(curves: dict, others: dict, kl: float) -> str:
    """Paired difference over the seeds that both have; "-" where one of them has no runs on both sides of `kl`."""
    seeds = [seed for seed in curves if seed in others and min(len(curves[seed]), len(others[seed])) > 1]
    pairs = [(interpolate(curves[seed], kl), interpolate(others[seed], kl)) for seed in seeds]
    incomplete = len(pairs) < 2 or None in (gold for pair in pairs for gold in pair)
    return "-" if incomplete else paired(*zip(*pairs))


def interpolate(curve: list[tuple[float, float]], kl: float) -> float | None:
    """Gold at `kl` between two neighbouring runs of a seed; None beyond them or where they lie too far apart."""
    for (k0, g0), (k1, g1) in zip(curve, curve[1:]):
        if min(k0, k1) <= kl <= max(k0, k1) and abs(k1 - k0) < FAR_APART:
            return g0 + (g1 - g0) * (kl - k0) / (k1 - k0 or 1)
    return None


# ---- Curves, critics, ablations --------------------------------------------------------------------------------------
def learning_curves(rows: list[dict], folder: Path, plt) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    groups = {method: members for (method, _), members in group(rows, "base").items() if "curve" in members[0]}
    for method, members in groups.items():
        steps = members[0]["curve"]["step"]
        for axis, key in zip(axes, ("objective/gold", "objective/kl")):
            band = torch.tensor([interval([row["curve"][key][i] for row in members]) for i in range(len(steps))])
            axis.plot(steps, band[:, 0], color=COLORS[method], label=NAMES[method])
            axis.fill_between(steps, band[:, 1], band[:, 2], color=COLORS[method], alpha=0.2)
    for axis, label in zip(axes, ("gold score of the rollouts", "KL to SFT, nats per answer")):
        axis.set(xlabel="update", ylabel=label)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(folder / "learning_curves.svg", bbox_inches="tight", metadata={"Date": None})
    dvpo, ppo = ({row["seed"]: row["curve"] for row in groups.get(method, [])} for method in ("dvpo", "ppo"))
    both = sorted(dvpo.keys() & ppo.keys())
    if len(both) > 1:
        print("\n## Who learns faster? DVPO less PPO at the default settings, over fifteen updates of the rollouts")
        less = lambda key, i: paired(*([curves[seed][key][i] for seed in both] for curves in (dvpo, ppo)))
        lines = [[f"to {dvpo[both[0]]['step'][i]}", less("objective/gold", i), less("objective/kl", i)]
                 for i in (*range(8), 11, 15, 19)]  # fmt: skip
        table("updates | gold | KL", lines)


def critics(rows: list[dict], folder: Path, plt) -> None:
    groups = {method: members for (method, _), members in group(rows, "base").items() if "critic" in members[0]}
    from_gvm = group(rows, "ppo_variants").get(("ppo", "critic from GVM"))
    targets = {"dvpo": "GVM against E[label given gold]", "ppo": "PPO's critic against score and KL to come"}
    print("\n## Is the critic right? Fresh answers, judged before any training on them, by tenth of the run")
    print("\nEach critic against its own target, with half of the answer seen and before its last token. Error and "
          "bias are in standard deviations of the target in that tenth, which shrink as answers get better; the share "
          "of variance explained leaves out the bias; the correlation is with gold.")  # fmt: skip
    lines = []
    figure, axes = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    columns = [(key, fraction) for fraction in ("0.5", "1")
               for key in ("error", "bias", "explained_variance", "gold_correlation")]  # fmt: skip
    plots = {("bias", "0.5"): "bias, half seen", ("explained_variance", "0.5"): "variance explained, half seen",
             ("gold_correlation", "1"): "correlation with gold, before the last token"}  # fmt: skip
    named = {targets[method]: members for method, members in groups.items()}
    if from_gvm:
        named["the same, started from the GVM"] = from_gvm
    at = lambda members, i, key, f: [row["critic"][i]["by_fraction"][f][key] for row in members]
    for name, members in named.items():
        for i in (0, 1, 4, 9):
            cells = [show(at(members, i, *column)) for column in columns]
            lines.append([name, str(len(members)), f"from {members[0]['critic'][i]['first_update']}", *cells])
    for method, members in groups.items():
        steps = [window["first_update"] for window in members[0]["critic"]]
        for axis, (column, title) in zip(axes, plots.items()):
            band = torch.tensor([interval(at(members, i, *column)) for i in range(len(steps))])
            axis.plot(steps, band[:, 0], color=COLORS[method], label=NAMES[method])
            axis.fill_between(steps, band[:, 1], band[:, 2], color=COLORS[method], alpha=0.2)
            axis.set(xlabel="update", ylabel=title)
            axis.grid(alpha=0.3)
    table("critic | seeds | updates | half seen: error | bias | variance explained | correlation | "
          "last token: error | bias | variance explained | correlation", lines)  # fmt: skip
    if groups:
        axes[0].legend()
    figure.savefig(folder / "critics.svg", bbox_inches="tight", metadata={"Date": None})
    drifting = [row["curve"]["critic/drift"] for row in group(rows, "base")["ppo", "default"]]
    if drifting:
        first, last = show([d[0] for d in drifting]), show([d[-1] for d in drifting])
        print("\nDrift of PPO's critic, RMS distance from the rollout's values over an update, in its first and last "
              f"twentieth of the run: {first}, {last}. A frozen GVM has none.")  # fmt: skip


def times(rows: list[dict]) -> None:
    """What equal time is reckoned by: one core per run, two runs side by side."""
    kinds = defaultdict(list)
    for row in rows:
        if row["experiment"] in ("base", "one_pass_fast", *EQUAL_TIMES) and "time" in row:
            kinds[NAMES[kind(row)]].append(row)
    lines = []
    for name, members in kinds.items():
        updates = members[0]["curve"]["step"][-1]
        seconds = statistics.median(row["time"]["total"] for row in members)
        lines.append([name, str(updates), str(len(members)), f"{seconds:.3f}", f"{updates * seconds:.0f}"])
    print("\n## Seconds of an update: the median of each run, and of those the median")
    table("method | updates | runs | an update | all updates", lines)


def passes(rows: list[dict]) -> None:
    """DVPO less PPO where value model and reward model make three passes over the pairs, and where both make six."""
    runs = {(row["method"], row["setting"], row["seed"]): row for row in rows
            if row["experiment"] in ("base", "gvm", "ppo_variants")}  # fmt: skip
    seeds = sorted(seed for method, setting, seed in runs
                   if (method, setting) == ("ppo", "twice the passes") and ("dvpo", setting, seed) in runs)  # fmt: skip
    if not seeds:
        return
    print("\n## DVPO less PPO, with three passes over the pairs for value and reward model, and with six")
    lines = []
    for setting, name in (("default", "three"), ("twice the passes", "six")):
        ours = [runs["dvpo", setting, seed] for seed in seeds]
        theirs = [runs["ppo", setting, seed] for seed in seeds]
        judges = [runs["gvm", setting, seed] for seed in seeds] if setting == "default" else ours
        last = [row["gvm"]["pair_accuracy"]["last"] for row in judges]
        columns = [(last, [row["rm_pair_accuracy"] for row in theirs])]
        for measure in (lambda row: row["policy"]["gold"]["mean"], lambda row: row["policy"]["kl"]):
            columns.append((list(map(measure, ours)), list(map(measure, theirs))))
        cells = [f"{', '.join(f'{x:.3f}' for x in a)} less {', '.join(f'{x:.3f}' for x in b)}: {paired(a, b)}"
                 for a, b in columns]  # fmt: skip
        lines.append([name, ", ".join(map(str, seeds)), *cells])
    table("passes | seeds | pair accuracy | gold | KL", lines)


def judges(rows: list[dict]) -> None:
    """Held-out pair accuracy under the settings that were tried for the value model and the reward model."""
    runs = {}
    for row in rows:
        if row["experiment"] == "judges":
            accuracy = row["gvm"]["pair_accuracy"]["last"] if "gvm" in row else row["rm_pair_accuracy"]
            runs[row["method"], row["setting"], row["seed"]] = accuracy
    seeds, lines = sorted({seed for _, _, seed in runs}), []
    for method, name in (("gvm", "GVM"), ("ppo", "reward model")):
        for setting in dict.fromkeys(s for m, s, _ in runs if m == method):
            found = [runs.get((method, setting, seed)) for seed in seeds]
            lines.append([name, setting, *("-" if x is None else f"{x:.3f}" for x in found)])
    if lines:
        print("\n## Settings tried for the value model and the reward model: pair accuracy after three passes")
        table(" | ".join(["model", "setting", *(f"seed {seed}" for seed in seeds)]), lines)


def trajectories(rows: list[dict]) -> None:
    """What trajectory conditioning changes in the loop: the GVMs that went on from the default, with it or without."""
    print("\n## The GVM in the loop, with trajectories and without: fresh answers, first and last tenth of the run")
    print("\nBias in standard deviations of the target in that tenth, which shrink as answers get better.")
    columns = (*((f, "bias") for f in ("0", "0.5", "1")), ("0.5", "gold_correlation"), ("1", "gold_correlation"))
    lines = []
    for (method, setting), members in group(rows, "base", "trajectories").items():
        if method == "dvpo":
            for i in (0, -1):
                windows = [row["critic"][i] for row in members]
                cells = [show([window["by_fraction"][f][key] for window in windows]) for f, key in columns]
                lines.append([setting, str(len(members)), f"from {windows[0]['first_update']}", *cells])
    table("GVM | seeds | updates | bias: prompt | half | last token | correlation with gold: half | last token", lines)


def value_models(rows: list[dict]) -> None:
    groups = group(rows, "base", "gvm", "trajectories")
    print("\n## Value models, and the policy that DVPO makes with each")
    default = groups.get(("dvpo", "default"), [])
    seeds = {row["seed"]: row for row in default}
    lines = []
    for (method, setting), members in groups.items():
        if "gvm" not in members[0]:
            continue
        reports = [row["gvm"]["by_fraction"] for row in members]
        trained = members if method == "dvpo" else [seeds[row["seed"]] for row in members if row["seed"] in seeds]
        gold = [row["policy"]["gold"]["mean"] for row in trained]
        kl = [row["policy"]["kl"] for row in trained]
        lines.append([setting, str(len(members)), show([row["gvm"]["pair_accuracy"]["last"] for row in members]),
                      show([r["0.5"]["pair_accuracy"] for r in reports]),
                      *(show([r[f]["gold_correlation"] for r in reports]) for f in ("0", "0.5", "1")),
                      show(gold) if gold else "-", show(kl) if kl else "-"])  # fmt: skip
    rm = {row["seed"]: row["rm_pair_accuracy"] for row in rows
          if "rm_pair_accuracy" in row and row["experiment"] == "base"}  # fmt: skip
    table(
        "GVM | seeds | pair accuracy | … half seen | correlation with gold: prompt | half | all | DVPO gold | KL", lines
    )
    reference = {row["seed"]: row for row in groups.get(("gvm", "default"), [])}
    lines = []
    for (_, setting), members in groups.items():
        members = [row for row in members if "gvm" in row and row["seed"] in reference]
        if setting != "default" and len(members) > 1:
            last = lambda row: row["gvm"]["pair_accuracy"]["last"]
            gold = lambda row: row["policy"]["gold"]["mean"]
            lines.append([setting, paired(list(map(last, members)), [last(reference[row["seed"]]) for row in members]),
                          paired(list(map(gold, members)), [gold(seeds[row["seed"]]) for row in members]),
                          less_frontier(rows, members)])  # fmt: skip
    table("less the default | pair accuracy | gold | gold at equal KL", lines)
    if rm:
        print(f"\nReward model (Bradley-Terry), pair accuracy: {show(list(rm.values()))}, {len(rm)} seeds")
    both = sorted(rm.keys() & reference.keys())
    if len(both) > 1:
        accuracies = [reference[seed]["gvm"]["pair_accuracy"]["last"] for seed in both], [rm[seed] for seed in both]
        print(f"\nDefault GVM less reward model: {paired(*accuracies)}")
    print("\n## Value models by fraction of the answer seen")
    lines = []
    for (_, setting), members in group(rows, "base", "trajectories").items():
        if "gvm" in members[0]:
            fractions = members[0]["gvm"]["by_fraction"]
            for key in ("pair_accuracy", "explained_variance", "gold_correlation"):
                cells = [show([row["gvm"]["by_fraction"][f][key] for row in members]) for f in fractions]
                lines.append([setting, str(len(members)), key.replace("_", " "), *cells])
    table("GVM | seeds | | 0 % | 25 % | 50 % | 75 % | 100 %", lines)
    measured = lambda row: [*(x["pair_accuracy"] for x in row["gvm"]["by_fraction"].values()),
                            row["policy"]["gold"]["mean"]]  # fmt: skip
    runs = {setting: {row["seed"]: measured(row) for row in members}
            for (_, setting), members in groups.items() if setting.startswith("six passes more")}  # fmt: skip
    control, lines = runs.pop("six passes more", {}), []
    for setting, members in runs.items():
        both = sorted(members.keys() & control.keys())
        if len(both) > 1:
            ours, theirs = (zip(*(run[seed] for seed in both)) for run in (members, control))
            lines.append([setting, *map(paired, ours, theirs)])
    table("less the control | pair accuracy: 0 % | 25 % | 50 % | 75 % | 100 % | DVPO gold", lines)
    policies = defaultdict(list)
    for row in rows:
        if row["experiment"] == "base" and row["method"] == "gvm":
            for name, values in row["gvm"]["by_policy"].items():
                policies[name].append(values)
    if policies:
        print("\n## The default GVM per behaviour policy, held-out answers")
        keys = ("mean_label", "final_value", "prompt_value", "correlation")
        lines = [[name, *(show([v[key] for v in values]) for key in keys)] for name, values in policies.items()]
        table("policy | mean label | value of the finished answer | of the prompt | correlation with label", lines)


def exploited(rows: list[dict]) -> None:
    """The logged signal beside the gold score, where the GVM holds and where it is exploited."""
    groups = {(m, s): r for (m, s), r in group(rows, "base", "unreliable").items() if m == "dvpo"}
    print("\n## Is the GVM still reliable? `val/off_support` and gold, by fifth of the run")
    lines = []
    for (_, setting), members in groups.items():
        for key in ("val/off_support", "objective/gold", "objective/scores"):
            columns = [[row["curve"][key][i] for row in members] for i in (3, 7, 11, 15, 19)]
            lines.append([setting, str(len(members)), f"`{key}`", *map(show, columns)])
    table("run | seeds | | 20 % | 40 % | 60 % | 80 % | 100 %", lines)
    lines = []
    for row in rows:
        steep = row["experiment"] in ("stability", "stability_one_pass")
        if (row["experiment"] in COMPARED or steep) and "curve" in row and row["policy"]["gold"]["mean"] < 0.8:
            shares, steps = row["curve"]["val/off_support"], row["curve"]["step"]
            worst = max(range(len(shares)), key=shares.__getitem__)
            gold, kl = row["policy"]["gold"]["mean"], row["policy"]["kl"]
            name = NAMES[kind(row)] + (f", {row['setting']}" if steep else "")
            lines.append([name, f"{row['coef']:g}", str(row["seed"]), f"{gold:.3f}", f"{kl:.1f}",
                          f"{shares[worst]:.2f}", str(steps[worst])])  # fmt: skip
    if lines:
        print("\nDid it tell? Runs of DVPO and PPO, of all pairs, that ended below a gold of 0.8, and the largest "
              "share in a twentieth of the run:")  # fmt: skip
    table("run | coefficient | seed | gold | KL | largest `val/off_support` | until update", lines)


def simple(rows: list[dict], title: str, *experiments: str, default=("base", "frontier")) -> None:
    groups = group(rows, *experiments)
    if groups:
        print(f"\n## {title}")
        lines = [[NAMES[m], setting, *policy_cells(members), less_frontier(rows, members, default)]
                 for (m, setting), members in groups.items() if "policy" in members[0]]  # fmt: skip
        table("method | setting | seeds | gold | worst seed | KL | tokens | gold less the default's at equal KL", lines)


def reruns(rows: list[dict], again: list[dict]) -> None:
    """The default settings and the same seeds with other kernels, whose last bits differ: how far do results move?"""
    first = {(row["method"], row["seed"]): row for row in rows if row["key"].startswith("base/")}

    def measures(row):
        if "gvm" in row:
            yield "GVM, pair accuracy", row["gvm"]["pair_accuracy"]["last"]
        if "rm_pair_accuracy" in row:
            yield "reward model, pair accuracy", row["rm_pair_accuracy"]
        if "policy" in row:
            yield f"{NAMES[row['method']]}, gold", row["policy"]["gold"]["mean"]

    lines = []
    for row in again:
        before = dict(measures(first.get((row["method"], row["seed"]), {})))
        lines += [[what, str(row["seed"]), f"{before[what]:.3f}", f"{now:.3f}", f"{now - before[what]:+.3f}"]
                  for what, now in measures(row) if what in before]  # fmt: skip
    if lines:
        print("\n## The defaults again, with another CPU's kernels")
        table("what | seed | first | again | moved by", lines)


def main(args: Args) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        sys.exit("error: matplotlib is not installed; pip install -e '.[report]'")
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "study"  # the same plot is the same file
    import matplotlib.pyplot as plt

    results = Path(args.results)
    rerun = results.with_name("rerun" + "".join(results.suffixes))
    rows, again = read(results), read(rerun) if rerun.exists() else []
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "report.md", "w") as file, contextlib.redirect_stdout(file):
        write_report(rows, again, folder, plt)
    print(f"wrote {folder}/report.md and the plots")


def write_report(rows: list[dict], again: list[dict], folder: Path, plt) -> None:
    print("# The study on the embedded task\n\nMade by `python tests/benchmarks/study_report.py`.\n")
    for row in rows:  # the tuning seed's default runs belong to the tuning
        tuning = row["seed"] == TUNING_SEED and row["experiment"] == "base"
        row["experiment"] = "tuning" if tuning else row["experiment"]
    print(f"{len(rows) + len(again)} runs. A value: interquartile mean over seeds with its 95 % bootstrap interval. A "
          "difference: mean of differences seed by seed ± half a 95 % t-interval (seeds), bold where it leaves out 0. "
          "At equal KL: less the gold between two neighbouring coefficients of the same seed; left of the first of "
          "them, less the straight line from SFT, which lies below the curve.")  # fmt: skip
    frontier(rows, folder, plt)
    learning_curves(rows, folder, plt)
    critics(rows, folder, plt)
    value_models(rows)
    judges(rows)
    times(rows)
    passes(rows)
    trajectories(rows)
    at_default = [row for row in rows if row["experiment"] != "uncentered" or row["coef"] == DEFAULT["dvpo"]]
    simple(at_default, "Advantage estimator", "uncentered", "advantage")
    simple(rows, "Stability: learning rates", "stability")
    simple(rows, "Stability: learning rates with one pass, against twice the default's rate", "stability_one_pass",
           default=("one_pass_fast",))  # fmt: skip
    simple(rows, "PPO with what DVPO was given", "ppo_variants")
    exploited(rows)
    simple(rows, "Without a KL penalty", "unreliable")
    reruns(rows, again)
    simple(rows, f"Tuning: seed {TUNING_SEED}, on which no methods are compared", "tuning")
    hours = sum(row["wall"] for row in (*rows, *again)) / 3600
    print(f"\nAll runs together: {hours:.1f} core hours")


if __name__ == "__main__":
    main(tyro.cli(Args))
