"""openbmb/UltraFeedback: the best completion of each prompt against a random worse one. A task can bring any data.

    python train_gvm.py --model-path SFT --dataset tests/tasks/ultrafeedback.py --num-context-trajectories 3 ...

Without `score(prompt, answer)`, nothing is scored exactly; the ratings are kept as `score_chosen` and `score_rejected`.
"""

import random


def rows(split):
    """Pairs with their ratings and the names of the models that wrote them; one prompt in twenty is held out."""
    import datasets

    for row in datasets.load_dataset("openbmb/UltraFeedback", split="train"):
        rng = random.Random(row["instruction"])
        if (rng.random() < 0.05) != (split == "heldout"):
            continue
        rated = [c for c in row["completions"] if c["response"] and c["overall_score"] is not None]
        best = max(rated, key=lambda c: float(c["overall_score"]), default=None)
        worse = [c for c in rated if float(c["overall_score"]) < float(best["overall_score"])]
        if worse:
            other = rng.choice(worse)
            yield {"prompt": row["instruction"], "chosen": best["response"], "rejected": other["response"],
                   "score_chosen": best["overall_score"], "score_rejected": other["overall_score"],
                   "chosen_policy": best["model"], "rejected_policy": other["model"]}  # fmt: skip
