"""Real English by a real pretrained model: does what holds for nine tokens hold here? One command, which goes on where
it was stopped:

    python tests/benchmarks/english.py --model MODEL [--out runs/english] [--small] [--seeds N]

The model in our runs is SmolLM2-135M-Instruct. The prompts and the exact score are those
of tests/tasks/instructions.py. The model answers the prompts; five writers of different skill make answers of its
sentences; the exact score ranks two of them, without noise, and ties are dropped. Then sft, train_gvm, train_dvpo and
train_ppo_baseline at three KL prices (all with one reward model), and evaluate on held-out topics and wordings.

Full size is meant for one GPU. `--small` is for one CPU core: fewer and shorter answers, fewer updates.
Writes OUT/results.json and OUT/samples.md, and prints the table.
"""

import json
import math
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
import tyro

ROOT = Path(__file__).parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "tasks")]

import instructions  # noqa: E402

import common  # noqa: E402
import evaluate  # noqa: E402


@dataclass
class Args:
    model: str
    """chat model to start from: local folder or hub id"""
    out: str = "runs/english"
    """folder for everything made"""
    small: bool = False
    """the form for one CPU core"""
    seeds: int = 1
    """seeds 1 to so many; all share the answers"""


@dataclass
class Size:
    train: int  # prompts
    pairs: int  # to learn from, at most, of each
    heldout: int  # prompts, a pair of each to rank and two answers of each policy to score
    response_length: int  # tokens
    sft_pairs: int
    num_updates: int  # of DVPO and PPO
    rollout: int  # answers per update
    batch: int  # sequences at once
    policy_rate: float


FULL = Size(4000, 1, 256, 96, 2000, 80, 64, 64, 1e-5)
SMALL = Size(96, 2, 48, 48, 96, 8, 16, 16, 8e-5)
# KL prices. The second is the scripts' default, and is run first.
PRICES = {"dvpo": (0.01, 0.05, 0.2), "ppo": (0.02, 0.1, 0.4)}

# ---- Answers: five writers -------------------------------------------------------------------------------------------
# Of the transforming writers: share of forms they obey, of answers they leave unfinished, and of answers about another
# topic. The fifth is the model itself.
WRITERS = {
    "careful": (0.97, 0.02, 0.02),
    "middling": (0.75, 0.10, 0.05),
    "hasty": (0.60, 0.50, 0.05),
    "wandering": (0.60, 0.10, 0.50),
    "model": None,
}
OBEY = {
    "word": lambda text, word: f"{text} Think of {word} as well.",
    "short": lambda text, limit: " ".join(text.split()[: int(limit)]).rstrip(".,;:") + ".",
    "no commas": lambda text, _: text.replace(",", ""),
    "quotes": lambda text, _: '"' + text.replace('"', "") + '"',
    "ending": lambda text, ending: f"{text} {ending}",
    "lowercase": lambda text, _: text.lower(),
}


@torch.no_grad()
def model_answers(path: str, prompts: list[list[dict]], size: Size) -> list[str]:
    """What the model answers to `prompts`, sampled at a temperature of 0.7."""
    tokenizer = common.load_tokenizer(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(DEVICE)
    torch.manual_seed(0)
    texts = []
    for i in range(0, len(prompts), 2 * size.batch):
        tokens = [common.tokenize_prompt(tokenizer, prompt) for prompt in prompts[i : i + 2 * size.batch]]
        ids, mask = (x.to(DEVICE) for x in common.pad(tokens, tokenizer.pad_token_id, "left"))
        out = model.generate(ids, attention_mask=mask, do_sample=True, temperature=0.7, top_k=0,
                             max_new_tokens=size.response_length, pad_token_id=tokenizer.pad_token_id)  # fmt: skip
        texts += tokenizer.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        print(f"{len(texts)}/{len(prompts)} answers", flush=True)
    return [text.strip() for text in texts]


def sentences(text: str) -> list[str]:
    """The whole sentences of `text` that are neither very short nor long, without a list's marks."""
    found = [x.strip(' -*"') for x in re.findall(r"[^.!?\n]+[.!?]", text)]
    return [x for x in found if 4 <= len(x.split()) <= 20]


def write(rng: random.Random, question: str, bank: dict[str, list[str]], writer: str) -> str:
    """An answer to `question` as the named writer makes it of the sentences in `bank`, by topic."""
    obeys, leaves, wanders = WRITERS[writer]
    about = rng.choice(list(bank)) if rng.random() < wanders else instructions.topic(question)
    asked = {name: x for name, x in instructions.forms(question).items() if rng.random() < obeys}
    number = 3 if "bullets" in asked else 1
    drawn = rng.sample(bank[about], number)
    text = "\n".join("- " + sentence for sentence in drawn) if "bullets" in asked else " ".join(drawn)
    if asked.keys() >= {"word", "short"}:  # room for the sentence that holds the word
        asked["short"] = str(int(asked["short"]) - 5)
        text, asked["word"] = OBEY["short"](text, asked.pop("short")), asked["word"]
    for name in OBEY:
        if name in asked:
            text = OBEY[name](text, asked[name])
    return text[: int(len(text) * rng.uniform(0.5, 0.9))] if rng.random() < leaves else text


def make_pairs(split: str, args: Args, size: Size) -> list[dict]:
    """Pairs of answers by two writers, ranked by the exact score; none where they tie."""
    rng = random.Random(split)
    prompts = [row["prompt"] for row in instructions.rows(split)[: getattr(size, split)]]
    answers = model_answers(args.model, prompts, size)
    bank = {topic: [] for topic in instructions.TOPICS[split]}
    for prompt, answer in zip(prompts, answers):
        topic = instructions.topic(prompt[-1]["content"])
        bank[topic] += [x for x in sentences(answer) if topic[:-1] in x.lower()]
    for topic, known in bank.items():  # three at least, for three lines
        plain = [f"Many people like {topic}.", f"Some {topic} are very old.", f"No two {topic} are alike."]
        known += plain[: max(0, 3 - len(known))]
    pairs = []
    for prompt, answer in list(zip(prompts, answers)) * (size.pairs if split == "train" else 1):
        question = prompt[-1]["content"]
        said = [(w, answer if w == "model" else write(rng, question, bank, w)) for w in rng.sample(list(WRITERS), 2)]
        judged = sorted(((instructions.score(prompt, text), writer, text) for writer, text in said), reverse=True)
        (high, *chosen), (low, *rejected) = judged
        if high > low and rejected[1]:
            names = ("score_chosen", "chosen_policy", "chosen", "score_rejected", "rejected_policy", "rejected")
            pairs.append({"prompt": prompt, **dict(zip(names, (high, *chosen, low, *rejected)))})
    return pairs


TASK = '''"""The pairs beside this file, and the exact score of {path}."""

import json
import pathlib
import runpy

score = runpy.run_path({path!r})["score"]


def rows(split):
    text = pathlib.Path(__file__).with_name(split + ".jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]
'''


def make_task(folder: Path, args: Args, size: Size) -> str:
    """The task's file in `folder`, and the answers beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "heldout"):
        file = folder / f"{split}.jsonl"
        if not file.exists():
            lines = [json.dumps(pair) for pair in make_pairs(split, args, size)]
            file.write_text("\n".join(lines) + "\n")
            print(f"wrote {file}: {len(lines)} pairs", flush=True)
    (folder / "task.py").write_text(TASK.format(path=str(ROOT / "tests" / "tasks" / "instructions.py")))
    return str(folder / "task.py")


# ---- Stages ----------------------------------------------------------------------------------------------------------
def run(script: str, **flags) -> None:
    """Run a script to its end, or from where it was stopped; a finished run ends at once."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *flags.pop("names", [])]
    for name, value in flags.items():
        command += ["--" + name.replace("_", "-"), str(value)] if value is not True else ["--" + name]
    print("$", *command[1:], flush=True)
    subprocess.run(command, check=True)


def one_seed(seed: int, task: str, folder: Path, args: Args, size: Size) -> None:
    """All stages of a seed; the middle KL prices first, so that a run that is cut short still compares."""
    path = lambda name: str(folder / name)
    data = dict(dataset=task, response_length=size.response_length)
    train = dict(data, seed=seed, micro_batch_size=size.batch, resume=True)
    run("sft", model_path=args.model, output_dir=path("sft"), learning_rate=5e-5, num_epochs=1,
        num_examples=size.sft_pairs, batch_size=16, **train)  # fmt: skip
    run("train_gvm", model_path=path("sft"), output_dir=path("gvm"), learning_rate=3e-5, num_epochs=1,
        batch_size=16, checkpoint_every=20, **train)  # fmt: skip

    def judge(name: str, model: str, gvm: str) -> None:
        if not (folder / "eval" / name / "results.json").exists():
            run("evaluate", names=[f"{name}={model}"], reference_path=path("sft"), gvm_path=gvm, seed=seed,
                output_dir=path(f"eval/{name}"), num_prompts=size.heldout, samples_per_prompt=2,
                micro_batch_size=2 * size.batch, **data)  # fmt: skip

    reinforce = dict(train, model_path=path("sft"), learning_rate=size.policy_rate, num_updates=size.num_updates,
                     num_epochs=1, rollout_batch_size=size.rollout, checkpoint_every=5)  # fmt: skip
    judge("sft", path("sft"), path("gvm"))
    for i in (1, 0, 2):
        dvpo, ppo = PRICES["dvpo"][i], PRICES["ppo"][i]
        run("train_dvpo", gvm_path=path("gvm"), output_dir=path(f"dvpo_{dvpo}"), kl_coef=dvpo, **reinforce)
        judge(f"dvpo_{dvpo}", path(f"dvpo_{dvpo}"), "None")
        reward = dict(reward_path=path("rm"))
        if i == 1:  # the first one trains the reward model
            reward = dict(reward_output_dir=path("rm"), reward_learning_rate=3e-5, reward_num_epochs=1,
                          reward_batch_size=16)  # fmt: skip
        run("train_ppo_baseline", output_dir=path(f"ppo_{ppo}"), kl_coef=ppo,
            critic_learning_rate=2 * size.policy_rate, **reward, **reinforce)  # fmt: skip
        judge(f"ppo_{ppo}", path(f"ppo_{ppo}"), "None")
    judge("model", args.model, "None")


# ---- Report ----------------------------------------------------------------------------------------------------------
@torch.no_grad()
def perplexity(model, tokenizer, rows: list[dict]) -> float:
    """Of the texts of answers, per token, under `model`."""
    nats, count = 0.0, 0
    tokens = [tokenizer(row["output"], add_special_tokens=False).input_ids for row in rows]
    spoken = [(common.tokenize_prompt(tokenizer, row["prompt"]), ids) for row, ids in zip(rows, tokens) if ids]
    for i in range(0, len(spoken), 16):
        batch = common.pad_batch(*zip(*spoken[i : i + 16]), tokenizer.pad_token_id, model.device)
        nats -= evaluate.token_logprobs(model, **batch, temperature=1.0)[0].sum().item()
        count += batch["response_mask"].sum().item()
    return math.exp(nats / count)


def share(right: float, n: int) -> str:
    """A share of `n`, with its normal 95 % interval."""
    half = 1.96 * math.sqrt(right * (1 - right) / n)
    return f"{right:.3f} [{right - half:.3f}, {right + half:.3f}] of {n}"


def report(folder: Path, args: Args, size: Size) -> None:
    """Of all that is finished: results.json, samples.md and a table."""
    tokenizer = common.load_tokenizer(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).to(DEVICE)
    results = {"size": vars(size), "policies": [], "judges": []}
    pairs = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    ends = torch.tensor([[pair[side][-1] in '.!?"' for side in ("chosen", "rejected")] for pair in pairs])
    rule = evaluate.wins(*ends.unbind(1)).mean().item()  # how far one gets without reading
    results["judges"].append({"judge": "rule that an answer with an end beats one without", "last": rule})
    for seed in range(1, args.seeds + 1):
        runs = folder / f"seed{seed}"
        for file in sorted(runs.glob("eval/*/results.json"), key=lambda file: file.stat().st_mtime):
            name, found = file.parent.name, json.loads(file.read_text())
            row, rows = found["policies"][name], json.loads(file.with_name("answers.json").read_text())
            row = {key: row[key] for key in ("gold", "kl", "response_length", "eos_rate")}
            row["perplexity"] = perplexity(model, tokenizer, rows)
            results["policies"].append({"seed": seed, "name": name, **row})
            if "gvm" in found:
                results["judges"].append({"seed": seed, "judge": "GVM", "last": found["gvm"]["pair_accuracy"]["last"],
                                          "by_fraction": found["gvm"]["by_fraction"]})  # fmt: skip
        if (runs / "rm" / "README.md").exists():
            last = json.loads((runs / "rm" / "metrics.jsonl").read_text().splitlines()[-1])
            results["judges"].append({"seed": seed, "judge": "RM", "last": last["rm/pair_accuracy"]})
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    print("| seed | policy, KL price | gold | KL | perplexity | tokens | ends |\n|---|---|---|---|---|---|---|")
    for row in results["policies"]:
        gold = "{mean:.3f} [{low:.3f}, {high:.3f}]".format(**row["gold"])
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("kl", "perplexity", "response_length", "eos_rate"))
        print(f"| {row['seed']} | {row['name'].replace('_', ', ')} | {gold} | {numbers} |")
    for row in results["judges"]:
        seed = f"seed {row['seed']}: " if "seed" in row else ""
        print(f"{seed}the {row['judge']} ranks {share(row['last'], len(pairs))} held-out pairs rightly")
    samples(folder / "seed1" / "eval", folder / "samples.md")


def samples(evals: Path, file: Path) -> None:
    """The first twenty held-out prompts, with an answer of each policy at the middle KL price and its exact score."""
    names = [name for name in ("model", "sft", f"dvpo_{PRICES['dvpo'][1]}", f"ppo_{PRICES['ppo'][1]}")
             if (evals / name / "results.json").exists()]  # fmt: skip
    answers = [json.loads((evals / name / "answers.json").read_text())[:40:2] for name in names]
    text = "# Twenty samples: the first held-out prompts, an answer each, and its exact score\n"
    for rows in zip(*answers):
        text += f"\n**{rows[0]['instruction']}**\n\n"
        for name, row in zip(names, rows):
            text += f"- {name} ({row['gold']:+.1f}): {row['output'].strip()!r}\n"
    file.write_text(text)


def main(args: Args) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    size, folder = (SMALL if args.small else FULL), Path(args.out)
    task = make_task(folder, args, size)
    for seed in range(1, args.seeds + 1):
        one_seed(seed, task, folder / f"seed{seed}", args, size)
        report(folder, args, size)


if __name__ == "__main__":
    main(tyro.cli(Args))
