"""Longer answers with an exact score: chains of lists, in which early choices decide what is possible later.

"chain 3, never tools, not the zinc or the dog" ->
"1 fruits apple, pear and lemon. 2 cities cairo, rome and london. 3 animals wolf, horse and cat."

The last item of a list decides the kind of the next one (`FOLLOWS`), and the very last one must lead back to the
first kind, which the answer chooses. How many lists make a chain, give or take one, says the environment variable
CHAIN_LISTS: 8 (answers of some 64 tokens, the default), 31 (250) or 1 (9):

    export CHAIN_LISTS=31
    python sft.py --model-path tests/tasks/chains.py --dataset tests/tasks/chains.py --response-length 300
"""

import math
import os
import random
import re
import runpy
from pathlib import Path

EMBEDDED = runpy.run_path(str(Path(__file__).with_name("lists.py")))  # its words, model and tokenizer serve here, too
CATEGORIES = EMBEDDED["CATEGORIES"]
KINDS = list(CATEGORIES)
# The kind of the list after one that ends with an item: so many kinds on as the item's place among its own.
FOLLOWS = {item: KINDS[(k + i) % len(KINDS)] for k, kind in enumerate(KINDS) for i, item in enumerate(CATEGORIES[kind])}
LISTS = int(os.environ.get("CHAIN_LISTS", 8))
MEMORY = 12  # items: none may come again among so many
# Fault rates of the writers, per list: a kind that does not follow, an item of another kind, a repetition, something
# excluded; per chain: a wrong number of lists.
WRITERS = {
    "expert": (0.01, 0.01, 0.01, 0.01, 0.02),
    "careful": (0.04, 0.02, 0.03, 0.03, 0.06),
    "hasty": (0.06, 0.04, 0.05, 0.06, 0.50),
    "forgetful": (0.15, 0.04, 0.20, 0.25, 0.10),
    "careless": (0.25, 0.20, 0.10, 0.25, 0.30),
}
FAULT = 0.5 / LISTS**0.5  # what one fault costs: scores spread as far in long chains as in short ones
NOISE = 0.12  # scale of the annotators' Gumbel noise: their preferences are Bradley-Terry in score / NOISE
SIZES = {"train": 16_000, "heldout": 2_000}  # pairs


def parse(question: str) -> tuple[int, list[str]]:
    """How many lists are asked for, and what is excluded: a kind and two items."""
    number, excluded = re.fullmatch(r"chain (\d+), never (.*)", question).groups()
    return int(number), re.findall(r"\w+(?=,|$| or)", excluded)


def score(prompt: list[dict], answer: str) -> float:
    """The exact score of an answer, in [-1, 1]: 1 minus `FAULT` for every fault.

    Faults: a kind that does not follow or is excluded; an item of another kind, excluded, or among the last `MEMORY`;
    each list too many or too few; no way back to the first kind; anything not written as `chain` does.
    """
    number, excluded = parse(prompt[-1]["content"])
    lists = [(kind, items) for kind, *items in re.findall(r"\d+ (\w+) (\w+), (\w+) and (\w+)\.", answer)]
    faults, named, follows = abs(len(lists) - number) + (chain(lists) != answer), [], None
    for kind, items in lists:
        faults += kind in excluded or kind != (follows or kind) or kind not in KINDS
        for item in items:
            faults += item not in CATEGORIES.get(kind, []) or item in excluded or item in named[-MEMORY:]
            named.append(item)
        follows = FOLLOWS.get(items[-1])
    faults += not lists or follows != lists[0][0]
    return max(-1.0, 1.0 - FAULT * faults)


def chain(lists: list[tuple[str, list[str]]]) -> str:
    """Lists, each a kind and three items, as an answer."""
    return " ".join(f"{i} {kind} {a}, {b} and {c}." for i, (kind, (a, b, c)) in enumerate(lists, 1))


def write(rng: random.Random, question: str, writer: str) -> str:
    """An answer to `question` as the named writer gives it; none of them plans ahead."""
    number, excluded = parse(question)
    astray, foreign, repeat, forbidden, miscount = WRITERS[writer]
    if rng.random() < miscount:  # the hasty stop early, the others err both ways
        number = max(1, number + (-1 - rng.randrange(1 + number // 4) if writer == "hasty" else rng.choice([-1, 1])))
    kind, lists, named = rng.choice([kind for kind in KINDS if kind not in excluded]), [], []
    for i in range(number):
        kind = rng.choice(KINDS) if rng.random() < astray else kind
        rng.shuffle(items := [item for item in CATEGORIES[kind] if item not in excluded])
        items.sort(key=lambda item: item in named[-MEMORY:])  # the fresh ones first
        first = lists[0][0] if lists else kind
        goes_on = [x for x in items if (FOLLOWS[x] == first if i == number - 1 else FOLLOWS[x] not in excluded)]
        end = (goes_on or items)[0]
        items = [*[x for x in items if x != end][:2], end]
        if rng.random() < foreign:
            items[rng.randrange(2)] = rng.choice(CATEGORIES[rng.choice([k for k in KINDS if k != kind])])
        if rng.random() < repeat and named:
            items[rng.randrange(2)] = rng.choice(named[-MEMORY:])
        if rng.random() < forbidden:
            items[rng.randrange(2)] = rng.choice(excluded[1:])
        lists.append((kind, items))
        named += items
        kind = FOLLOWS[end]
    return chain(lists)


def question(rng: random.Random) -> str:
    number = max(1, LISTS + rng.choice([-1, 0, 1])) if LISTS > 1 else 1
    one, other = rng.sample(sum(CATEGORIES.values(), []), 2)
    return f"chain {number}, never {rng.choice(KINDS)}, not the {one} or the {other}"


def rows(split: str) -> list[dict]:
    """Preference pairs between random writers, with Bradley-Terry preferences as in lists.py; each prompt comes twice,
    and "train" and "heldout" share none."""
    rng = random.Random(split)
    pairs = []
    while len(pairs) < SIZES[split]:
        asked = question(rng)
        if (random.Random(asked).random() < 0.1) != (split == "heldout"):
            continue
        prompt = [{"role": "user", "content": asked}]
        for _ in range(2):
            judged = []
            for writer in rng.choices(list(WRITERS), k=2):
                answer = write(rng, asked, writer)
                judged.append((score(prompt, answer) - NOISE * math.log(-math.log(rng.random())), answer, writer))
            scores, answers, writers = zip(*sorted(judged, reverse=True))  # the preferred one first
            if answers[0] != answers[1]:
                names = ("chosen", "rejected", "score_chosen", "score_rejected", "chosen_policy", "rejected_policy")
                pairs.append({"prompt": asked, **dict(zip(names, answers + scores + writers))})
    return pairs


def model():
    """The embedded task's model and tokenizer, with this task's words."""
    return EMBEDDED["model"](["chain", "never", *map(str, range(1, LISTS + 10)), *EMBEDDED["WORDS"]])
