"""tests/tasks/instructions.py and the answers that tests/benchmarks/english.py makes for it."""

import random
import re
import sys

import instructions
import pytest
from conftest import ROOT

import common

sys.path.append(str(ROOT / "tests" / "benchmarks"))
import english  # noqa: E402

# By form: what its wording asks for, an answer that has it, and one that has everything but it.
ANSWERS = {
    "lowercase": ("", "rivers run to the sea.", "Rivers run to the sea."),
    "no commas": ("", "Rivers run to the sea.", "Rivers run, slowly, to the sea."),
    "word": ("water", "Rivers are water on its way.", "Rivers are watery, on their way."),
    "short": ("10", "Rivers run down from the hills to the sea.", "Rivers run from the hills all the way to the sea."),
    "quotes": ("", '"Rivers run to the sea."', 'He said: "Rivers run to the sea."'),
    "ending": ("That is all.", "Rivers run to the sea. That is all.", "That is all. Rivers run to the sea."),
    "bullets": ("", "- A river runs.\n- It bends.\n- It ends.", "- A river runs.\n- It bends and ends."),
}  # fmt: skip


def prompt(text):
    return [{"role": "system", "content": "Answer briefly."}, {"role": "user", "content": text}]


@pytest.mark.parametrize("name", instructions.FORMS)
def test_every_wording_of_a_form_is_known_and_scored(name):
    argument, good, bad = ANSWERS[name]
    train, heldout, *_ = instructions.FORMS[name]
    for wording in train + heldout:
        asked = f"Tell me about rivers. {wording.format(argument)}"
        assert instructions.forms(asked) == {name: argument}
        assert instructions.score(prompt(asked), good) == 1.0
        assert instructions.score(prompt(asked), bad) == 0.5


@pytest.mark.parametrize(
    "answer, score",
    [
        ("rivers run to the sea. that is all.", 1.0),
        ("Rivers run to the sea. That is all.", 0.5),
        ("Rivers run to the sea.", 0.0),
        ("Bees fly to the sea.", -0.5),
        ("Bees fly to the", -1.0),
        ("", -1.0),
        (" \n", -1.0),
        ("a river.", -1.0),
        ("rivers rivers rivers that is all. that is all.", -1.0),
    ],
)
def test_each_fault_costs_as_much_and_what_is_degenerate_is_worth_nothing(answer, score):
    asked = prompt('Describe rivers to me. Use no capital letters. End with "That is all."')
    assert instructions.score(asked, answer) == score


def test_train_and_heldout_share_neither_topics_nor_wordings():
    topics, wordings = {}, {}
    for split in ("train", "heldout"):
        asked = [row["prompt"][-1]["content"] for row in instructions.rows(split)]
        assert len(set(asked)) == len(asked) == instructions.SIZES[split]
        topics[split] = {instructions.topic(question) for question in asked}
        wordings[split] = set()
        for question in asked:
            found = instructions.forms(question)
            assert 1 <= len(found) <= 2
            for argument in (instructions.topic(question), *found.values()):
                question = question.replace(argument, "{}", 1) if argument else question
            wordings[split] |= set(re.split(r"(?<=[.?]) |(?<=\.\") ", question))
    assert not topics["train"] & topics["heldout"]
    assert not wordings["train"] & wordings["heldout"]


def test_the_score_needs_the_file_alone():
    task = common.load_task("tests/tasks/instructions.py")
    assert task.score(prompt("What are bees like? Do not use commas."), "Bees are small, busy and loud.") == 0.5


def test_an_obedient_writer_keeps_every_form_and_the_writers_differ_in_skill(monkeypatch):
    monkeypatch.setitem(english.WRITERS, "obedient", (1.0, 0.0, 0.0))
    sentences = [
        "{} are old, and people like {}.",
        "Some of the {} in this town are large.",
        "Children draw {} at school.",
    ]
    topics = instructions.TOPICS["train"]
    bank = {topic: [text.format(topic.capitalize(), topic) for text in sentences] for topic in topics}
    means = {}
    for writer in ("obedient", "careful", "middling", "hasty", "wandering"):
        rng = random.Random(0)
        scores = [
            instructions.score(row["prompt"], english.write(rng, row["prompt"][-1]["content"], bank, writer))
            for row in instructions.rows("train")[:1000]
        ]
        means[writer] = sum(scores) / len(scores)
    assert means["obedient"] == 1.0
    assert means["obedient"] > means["careful"] > means["middling"] > max(means["hasty"], means["wandering"])


def test_pairs_are_ranked_by_the_exact_score_and_plug_in_as_a_task(monkeypatch, tmp_path):
    about = lambda prompt: instructions.topic(prompt[-1]["content"])
    plain = lambda path, prompts, size: [f"I know {about(prompt)} very well. But" for prompt in prompts]
    monkeypatch.setattr(english, "model_answers", plain)
    path = english.make_task(tmp_path, english.Args(model="none"), english.SMALL)
    score = common.load_task(path).score
    train, heldout = common.load_examples(path, needs="pairs")
    assert len(train) > english.SMALL.train and len(heldout) > english.SMALL.heldout / 2
    for example in train + heldout:
        assert example.score_chosen == score(example.prompt, example.chosen)
        assert example.score_rejected == score(example.prompt, example.rejected) < example.score_chosen
        assert {example.chosen_policy, example.rejected_policy} < set(english.WRITERS)
    assert {example.chosen_policy for example in train} == set(english.WRITERS)
