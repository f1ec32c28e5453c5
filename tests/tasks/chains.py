"""Longer answers with an exact score: chains of lists, whose first word decides where they end.

"chain 3 to animals, not the zinc or the dog" ->
"1 trees oak, elm and pine. 2 cities cairo, rome and lima. 3 animals wolf, horse and cat."

The kinds follow one another in a fixed order. To end with the right one, the answer must begin with the right one. The
environment variable CHAIN_LISTS says how many lists make a chain, give or take one: 8 (answers of some 64 tokens, the
default), 31 (250) or 1 (9):

    export CHAIN_LISTS=31
    python sft.py --model-path tests/tasks/chains.py --dataset tests/tasks/chains.py --response-length 300
"""

import os
import random
import re
import runpy
from pathlib import Path

EMBEDDED = runpy.run_path(str(Path(__file__).with_name("lists.py")))  # its words, model and tokenizer serve here, too
CATEGORIES = EMBEDDED["CATEGORIES"]
KINDS = list(CATEGORIES)  # in the order of a chain, round and round
LISTS = int(os.environ.get("CHAIN_LISTS", 8))
# Fault rates of the writers, per list: a kind that does not follow, an item of another kind, a repetition, something
# excluded; per chain: a wrong beginning, a wrong number of lists.
WRITERS = {
    "expert": (0.005, 0.01, 0.01, 0.01, 0.05, 0.02),
    "careful": (0.02, 0.02, 0.03, 0.03, 0.20, 0.06),
    "hasty": (0.03, 0.04, 0.05, 0.06, 0.40, 0.50),
    "forgetful": (0.06, 0.04, 0.15, 0.20, 0.80, 0.20),
    "careless": (0.12, 0.20, 0.10, 0.20, 0.80, 0.30),
}
FAULT = 0.5 / LISTS**0.5  # what one fault costs: scores spread as far in long chains as in short ones
WRONG_END = 3  # faults
SIZES = {"train": 6_000, "heldout": 1_000}  # pairs


def parse(question: str) -> tuple[int, str, list[str]]:
    """How many lists are asked for, of which kind the last one is to be, and which items are excluded."""
    number, goal = re.match(r"chain (\d+) to (\w+)", question).groups()
    return int(number), goal, re.findall(r"the (\w+)", question)


def after(kind: str, steps: int = 1) -> str:
    """The kind that comes so many lists after `kind`."""
    return KINDS[(KINDS.index(kind) + steps) % len(KINDS)]


def score(prompt: list[dict], answer: str) -> float:
    """The exact score of an answer, in [-1, 1]: 1 minus `FAULT` for every fault.

    Faults: a kind that does not follow on the one before; an item that is excluded, of another kind, or twice in its
    list; each list too many or too few; anything not written as `chain` does. A wrong end counts as three faults.
    """
    number, goal, excluded = parse(prompt[-1]["content"])
    lists = [(kind, items) for kind, *items in re.findall(r"\d+ (\w+) (\w+), (\w+) and (\w+)\.", answer)]
    faults = abs(len(lists) - number) + (chain(lists) != answer)
    for i, (kind, items) in enumerate(lists):
        faults += kind not in KINDS or (i > 0 and after(kind, -1) != lists[i - 1][0])
        faults += sum(x not in CATEGORIES.get(kind, []) or x in excluded or x in items[:j] for j, x in enumerate(items))
    faults += WRONG_END * (not lists or lists[-1][0] != goal)
    return max(-1.0, 1.0 - FAULT * faults)


def chain(lists: list[tuple[str, list[str]]]) -> str:
    """Lists, each a kind and three items, as an answer."""
    return " ".join(f"{i} {kind} {a}, {b} and {c}." for i, (kind, (a, b, c)) in enumerate(lists, 1))


def write(rng: random.Random, question: str, writer: str) -> str:
    """An answer to `question` as the named writer gives it."""
    number, goal, excluded = parse(question)
    astray, foreign, repeat, forbidden, misled, miscount = WRITERS[writer]
    kind, lists = rng.choice(KINDS) if rng.random() < misled else after(goal, 1 - number), []
    if rng.random() < miscount:  # the hasty stop early, the others err both ways
        number = max(1, number + (-1 - rng.randrange(1 + number // 4) if writer == "hasty" else rng.choice([-1, 1])))
    for _ in range(number):
        items = rng.sample([item for item in CATEGORIES[kind] if item not in excluded], 3)
        if rng.random() < foreign:
            items[rng.randrange(3)] = rng.choice(CATEGORIES[rng.choice([k for k in KINDS if k != kind])])
        if rng.random() < repeat:
            items[2] = items[rng.randrange(2)]
        if rng.random() < forbidden:
            items[rng.randrange(3)] = rng.choice(excluded)
        lists.append((kind, items))
        kind = rng.choice(KINDS) if rng.random() < astray else after(kind)
    return chain(lists)


def question(rng: random.Random) -> str:
    number = LISTS + rng.choice([-1, 0, 1]) * (LISTS > 1)
    one, other = rng.sample(sum(CATEGORIES.values(), []), 2)
    return f"chain {number} to {rng.choice(KINDS)}, not the {one} or the {other}"


def rows(split: str) -> list[dict]:
    """Preference pairs between random writers, as in lists.py; each prompt comes twice, and no split shares one."""
    rng = random.Random(split)
    pairs = []
    while len(pairs) < SIZES[split]:
        asked = question(rng)
        if (random.Random(asked).random() < 0.1) != (split == "heldout"):
            continue
        for _ in range(2):
            pairs += EMBEDDED["compared"](rng, asked, WRITERS, write, score)
    return pairs


def model():
    """The embedded task's model and tokenizer, with this task's words."""
    return EMBEDDED["model"](["chain", "to", *map(str, range(1, LISTS + 10)), *EMBEDDED["WORDS"]])
