"""A verifiable task of your own can be this short: sums, with an exact score. Bring a model that can read digits."""

import random
import re


def rows(split):
    """Pairs of a right and a wrong answer; one sum in ten is held out."""
    rng = random.Random(split)
    for a, b in ((a, b) for a in range(100) for b in range(100)):
        if ((a + 3 * b) % 10 == 0) == (split == "heldout"):
            wrong = a + b + rng.choice([-10, -1, 1, 10])
            yield {"prompt": f"What is {a} + {b}?", "chosen": f"{a + b}", "rejected": f"{wrong}"}


def score(prompt, answer):
    """1 for the right number, -1 for anything else."""
    a, b = re.findall(r"\d+", prompt[-1]["content"])
    return 1.0 if answer.strip() == str(int(a) + int(b)) else -1.0
