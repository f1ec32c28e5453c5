"""The embedded task: list so many things of a kind, without the ones excluded, and stop.

"list three metals, not the zinc" -> "iron, tin and gold."

A task is a file that `--dataset` and `--model-path` can name. It defines `rows(split)`, the data; `score(prompt,
answer)`, an exact score (optional); and `model()`, a small model from scratch (optional). `arithmetic.py` is shorter.
"""

import math
import os
import random
import re

import torch

# For so small a model several threads spend most of their time waiting for one another, beside other work very long.
if "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

CATEGORIES = {
    "animals": "dog cat horse cow sheep goat lion tiger bear wolf".split(),
    "fruits": "apple pear plum peach cherry grape lemon mango melon fig".split(),
    "tools": "hammer saw drill wrench chisel file plane clamp shovel rake".split(),
    "colors": "red green blue yellow purple pink brown black white grey".split(),
    "metals": "iron copper gold silver tin lead zinc nickel cobalt chrome".split(),
    "sports": "tennis golf rugby hockey boxing rowing judo squash polo cricket".split(),
    "trees": "oak pine birch maple cedar willow elm ash beech larch".split(),
    "cities": "paris london rome berlin madrid tokyo cairo delhi oslo lima".split(),
}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
# Fault rates of the writers: item of another kind, repetition, excluded item, wrong number of items.
WRITERS = {
    "expert": (0.01, 0.01, 0.02, 0.04),
    "careful": (0.02, 0.03, 0.06, 0.12),
    "hasty": (0.04, 0.03, 0.10, 0.45),
    "forgetful": (0.03, 0.20, 0.40, 0.20),
    "careless": (0.20, 0.08, 0.40, 0.35),
}
FAULT = 0.5  # what one fault costs
NOISE = 0.12  # scale of the annotators' Gumbel noise: their preferences are Bradley-Terry in score / NOISE
SIZES = {"train": 16_000, "heldout": 2_000}  # pairs


def score(prompt: list[dict], answer: str) -> float:
    """The exact score in [-1, 1] of an answer: 1 minus half a point for every fault.

    Faults: an item of another kind, excluded, or named before; each item too many or too few; anything not written
    as "a, b and c.". Every prompt has perfect answers, and no answer is perfect for all prompts.
    """
    number, category, excluded = parse(prompt[-1]["content"])
    items = [item for item in re.split(r", | and ", answer.removesuffix(".")) if item]
    allowed = [item in CATEGORIES[category] and item not in excluded for item in items]
    wrong = sum(not ok or item in items[:i] for i, (item, ok) in enumerate(zip(items, allowed)))
    faults = wrong + abs(len(items) - number) + (answer != sentence(items))
    return max(-1.0, 1.0 - FAULT * faults)


def parse(question: str) -> tuple[int, str, list[str]]:
    """How many of what are asked for, and what is excluded."""
    number, category = re.match(r"list (\w+) (\w+)", question).groups()
    return NUMBERS[number], category, re.findall(r"the (\w+)", question)


def sentence(items: list[str]) -> str:
    """`["a", "b", "c"]` as "a, b and c."."""
    return (", ".join(items[:-1]) + " and " if len(items) > 1 else "") + "".join(items[-1:]) + "."


def write(rng: random.Random, question: str, writer: str) -> str:
    """An answer to `question` as the named writer gives it."""
    wrong, repeat, forbidden, miscount = WRITERS[writer]
    length, category, excluded = parse(question)
    if rng.random() < miscount:  # the hasty stop early, the others err both ways
        length = max(1, length + rng.choice([-2, -1, -1] if writer == "hasty" else [-1, 1, 2]))
    items = []
    for _ in range(length):
        fault = rng.random()
        fresh = [item for item in CATEGORIES[category] if item not in items and item not in excluded]
        if fault < wrong or not fresh:
            items.append(rng.choice(CATEGORIES[rng.choice([c for c in CATEGORIES if c != category])]))
        elif fault < wrong + repeat and items:
            items.append(rng.choice(items))
        else:
            items.append(rng.choice(fresh))
    if excluded and rng.random() < forbidden:
        items[rng.randrange(len(items))] = rng.choice(excluded)
    return sentence(items)


def compared(rng: random.Random, question: str, writers, write, score) -> list[dict]:
    """A preference pair of two answers by random writers; none where they agree.

    An annotator sees the exact score through Gumbel noise and prefers the higher: Bradley-Terry preferences.
    """
    judged = []
    for writer in rng.choices(list(writers), k=2):
        answer = write(rng, question, writer)
        gold = score([{"role": "user", "content": question}], answer)
        judged.append((gold - NOISE * math.log(-math.log(rng.random())), answer, writer))
    scores, answers, names = zip(*sorted(judged, reverse=True))  # the preferred one first
    columns = ("chosen", "rejected", "score_chosen", "score_rejected", "chosen_policy", "rejected_policy")
    pair = {"prompt": question, **dict(zip(columns, answers + scores + names))}
    return [pair] if answers[0] != answers[1] else []


def rows(split: str) -> list[dict]:
    """Preference pairs between random writers; "train" and "heldout" share no prompt."""
    rng = random.Random(0)
    questions = []
    for number in NUMBERS:
        for category, items in CATEGORIES.items():
            questions.append(f"list {number} {category}")
            questions += [f"list {number} {category}, not the {a}" for a in items]
            questions += [f"list {number} {category}, not the {a} or the {b}" for a in items for b in items if a < b]
    rng.shuffle(questions)
    cut = len(questions) // 5
    pools = {"train": questions[cut:], "heldout": questions[:cut]}
    for name, pool in pools.items():  # both in turn, as they share the random numbers
        pairs = []
        while len(pairs) < SIZES[name]:
            pairs += compared(rng, pool[len(pairs) % len(pool)], WRITERS, write, score)
        if name == split:
            return pairs


CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


WORDS = ["list", *NUMBERS, *CATEGORIES, *sum(CATEGORIES.values(), []), "not", "the", "or", "and"]


def model(words=tuple(WORDS)):
    """Config of a 2-layer, 128-wide Llama, and a tokenizer: one token per word, and decoding gives back the text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocabulary = {token: i for i, token in enumerate([*special, *words, ",", "."])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=True)  # no space before a comma or a full stop
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        extra_special_tokens=["<user>", "<assistant>"], chat_template=CHAT_TEMPLATE,
    )  # fmt: skip
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=8,
        max_position_embeddings=512, initializer_range=0.05, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return config, tokenizer
