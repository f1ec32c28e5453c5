"""A verifiable task in plain English: answer about a topic, in forms that can be checked exactly, one or two at a time.

"Tell me about rivers. Use no capital letters." -> "rivers carry water from the hills to the sea."

Train and held-out prompts share neither topics nor wordings. There are prompts alone: answers come from a language
model, as in tests/benchmarks/english.py.
"""

import random
import re

TOPICS = {
    "train": "rivers bridges bees clocks dogs cats horses gardens trees clouds mountains boats trains planes cars "
    "books songs games kitchens markets schools teachers farmers doctors robots computers candles "
    "shoes apples oceans".split(),
    "heldout": "islands lakes birds bicycles castles painters guitars museums spiders storms".split(),
}
QUESTIONS = {
    "train": ("Tell me about {}.", "What are {} like?", "Write a sentence or two about {}."),
    "heldout": ("Describe {} to me.", "What should I know about {}?"),
}
WORDS = "music winter children home summer water money history".split()
ENDINGS = "That is all.|Thank you.|Have a nice day.|I hope this helps.".split("|")
# Two forms in one prompt are one of each group. A form: wordings to train on and held-out ones, what `{}` stands for,
# and whether an answer has it.
CONTENT = {
    "lowercase": (
        ("Use no capital letters.", "Write in lowercase only.", "All letters are to be small."),
        ("Keep every letter lowercase.", "Capital letters are forbidden."),
        [""],
        lambda answer, _: answer == answer.lower(),
    ),
    "no commas": (
        ("Do not use commas.", "Write without any comma.", "No commas, please."),
        ("Avoid the comma.", "There must not be a comma."),
        [""],
        lambda answer, _: "," not in answer,
    ),
    "word": (
        ('Use the word "{}".', 'The word "{}" must occur.', 'Say "{}" at least once.'),
        ('Mention "{}" somewhere.', 'Include the word "{}".'),
        WORDS,
        lambda answer, word: word in words(answer),
    ),
}
LAYOUT = {
    "short": (
        ("Use at most {} words.", "Write no more than {} words.", "The limit is {} words."),
        ("Stay within {} words.", "Do not exceed {} words."),
        [str(n) for n in range(10, 17)],
        lambda answer, limit: len(words(answer)) <= int(limit),
    ),
    "quotes": (
        ("Put the answer in quotation marks.", "Begin and end with a quotation mark.", "Write it as a quotation."),
        ("Wrap everything in double quotes.", "Enclose your answer in quotation marks."),
        [""],
        lambda answer, _: answer[0] == answer[-1] == '"' and answer.count('"') == 2,
    ),
    "ending": (
        ('End with "{}"', 'The last words are to be "{}"', 'Close with "{}"'),
        ('Finish by saying "{}"', 'Let your final sentence be "{}"'),
        ENDINGS,
        lambda answer, ending: answer.lower().endswith(ending.lower()),
    ),
    "bullets": (
        ("Give three lines that each start with a dash.", "Write three points, each after a dash."),
        ("Make three bullet points with dashes.", "List three things, with a dash before each."),
        [""],
        lambda answer, _: len(answer.splitlines()) == 3 and all(x.startswith("- ") for x in answer.splitlines()),
    ),
}
FORMS = CONTENT | LAYOUT
FAULT = 0.5  # what one fault costs
SIZES = {"train": 4_000, "heldout": 400}  # prompts


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.lower())


def topic(question: str) -> str:
    """What it asks about."""
    return re.search(rf"\b({'|'.join(sum(TOPICS.values(), []))})\b", question)[1]


def forms(question: str) -> dict[str, str]:
    """The forms that it asks for, by name, and what stands for `{}` in each; known by their wordings alone."""
    found = {}
    for name, (train, heldout, *_) in FORMS.items():
        for wording in train + heldout:
            if match := re.search(re.escape(wording).replace(r"\{\}", "(.+?)"), question):
                found[name] = (*match.groups(), "")[0]
    return found


def score(prompt: list[dict], answer: str) -> float:
    """The exact score in [-1, 1]: 1 minus half a point for every fault.

    Faults: each form that is broken; the topic not named; an end that is no end of a sentence. Fewer than four
    words, or as many repeated words as new ones, are worth -1 whatever their form.
    """
    question, answer = prompt[-1]["content"], answer.strip()
    said = words(answer)
    if len(said) < 4 or len(set(said)) <= len(said) / 2:
        return -1.0
    faults = sum(not FORMS[name][3](answer, argument) for name, argument in forms(question).items())
    faults += topic(question)[:-1] not in answer.lower()  # in the singular
    faults += answer[-1] not in '.!?"'
    return max(-1.0, 1.0 - FAULT * faults)


def rows(split: str) -> list[dict]:
    """Different prompts in random order. The system message asks for short answers, and is short itself."""
    rng, questions = random.Random(split), {}
    while len(questions) < SIZES[split]:
        names = rng.choice([[rng.choice(list(FORMS))], [rng.choice(list(CONTENT)), rng.choice(list(LAYOUT))]])
        parts = [rng.choice(QUESTIONS[split]).format(rng.choice(TOPICS[split]))]
        for train, heldout, arguments, _ in map(FORMS.get, names):
            parts.append(rng.choice(train if split == "train" else heldout).format(rng.choice(arguments)))
        questions[" ".join(parts)] = None
    system = {"role": "system", "content": "Answer briefly."}
    return [{"prompt": [system, {"role": "user", "content": question}]} for question in questions]
