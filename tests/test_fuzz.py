"""Datasets that nobody would write on purpose: never a traceback, never a silently wrong mask."""

import json

import lists
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import common

ROUNDS = settings(
    max_examples=200, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = st.one_of(
    st.sampled_from(["", " ", "list two animals", "dog and cow.", "\n\nHuman: a\n\nAssistant: b", "\x1b[2J", "<eos>"]),
    st.text(max_size=12),
    st.text(st.characters(categories=["Cs", "L"]), max_size=3),  # halves of characters among them
)
KEY = TEXT.filter(str.isprintable)  # `datasets` itself fails on a NUL in a name
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-9, 9), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEY, inner, max_size=3)),
    max_leaves=6,
)
ROLE = st.sampled_from(["user", "assistant", "system", "", "tool", None])
MESSAGES = st.lists(st.fixed_dictionaries({}, optional={"role": ROLE, "content": st.one_of(TEXT, JSON)}), max_size=4)
COLUMNS = ["prompt", "chosen", "rejected", "response", "system", "input", "label", "score", "score_chosen",
           "score_rejected", "policy", "chosen_policy", "rejected_policy", *common.ALIASES]  # fmt: skip
ROW = st.dictionaries(
    st.one_of(st.sampled_from(COLUMNS), st.text(max_size=3)), st.one_of(TEXT, MESSAGES, JSON), max_size=6
)
WHOLE_TEXT = TEXT.filter(lambda text: text.strip() and text.isprintable())
NEEDS = st.sampled_from(["prompts", "answers", "pairs", "scores"])


def usable(text) -> bool:
    return isinstance(text, str) and bool(text.strip())


def check_examples(examples, needs):
    for example in examples:
        assert all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in example.prompt)
        assert usable(example.prompt[-1]["content"]) and example.prompt[-1]["role"] != "assistant"
        if needs != "prompts":
            assert usable(example.chosen)
        if needs == "pairs":
            assert usable(example.rejected) and example.chosen != example.rejected
        if needs == "scores":
            assert example.score_chosen is not None


def check_rows(load, needs, expected=()):
    """What `load` finds: no traceback, nothing unusable, and the answers in `expected` are among it."""
    try:
        examples = load()
    except common.UserError:
        assert not expected
        return
    assert examples
    check_examples(examples, needs)
    assert set(expected) <= {example.chosen for example in examples}


@ROUNDS
@given(rows=st.lists(ROW, min_size=1, max_size=4), needs=NEEDS)
def test_rows_of_any_kind(tmp_path, rows, needs):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    check_rows(lambda: sum(common.load_examples(str(path), needs), []), needs)


GOOD = {  # by shape: a row that can be used whatever is asked for, but for what its shape lacks
    ("chosen", "rejected"): {"chosen": "\n\nHuman: a\n\nAssistant: good", "rejected": "\n\nHuman: a\n\nAssistant: b",
                             "score_chosen": 1, "score_rejected": 0},
    ("prompt", "chosen", "rejected"): {"prompt": "a", "chosen": "good", "rejected": "b", "score_chosen": "1",
                                       "score_rejected": 0},
    ("prompt", "response", "score"): {"prompt": "a", "response": "good", "score": 1},
    ("messages",): {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "good"}],
                    "score": 1},
}  # fmt: skip


@ROUNDS
@given(shape=st.sampled_from(list(GOOD)), data=st.data(), needs=NEEDS)
def test_right_columns_with_any_content(shape, data, needs):
    """A good row is found among whatever stands around it. (A file of such rows may be refused as a whole, above.)"""
    kinds = {"score": JSON}
    row = st.fixed_dictionaries({name: kinds.get(name, st.one_of(TEXT, MESSAGES, JSON)) for name in shape},
                                optional={"policy": JSON, "chosen_policy": JSON})  # fmt: skip
    rows = data.draw(st.lists(row, min_size=1, max_size=3))
    lacks = needs == "pairs" and "rejected" not in shape
    rows = [*rows, GOOD[shape]]
    check_rows(lambda: common.to_examples(rows, "rows", needs), needs, [] if lacks else ["good"])


@ROUNDS
@given(content=st.one_of(st.binary(max_size=60), TEXT.map(str.encode)),
       name=st.sampled_from(["a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz"]))  # fmt: skip
def test_files_of_any_bytes(tmp_path, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(common.UserError):
        common.load_examples(str(tmp_path / name), "pairs")


@ROUNDS
@given(rows=st.lists(st.tuples(WHOLE_TEXT, WHOLE_TEXT), min_size=1, max_size=5),
       limit=st.integers(1, 8))  # fmt: skip
def test_masks_cover_the_answer_and_nothing_else(rows, limit):
    """Row by row, what is masked is the answer with its end, cut to the limit; before it stands the prompt, whole."""
    tokenizer = lists.model()[1]
    rows = [("list two animals", "dog and cow."), *rows]  # one at least is left
    examples = [common.Example([{"role": "user", "content": prompt}], answer) for prompt, answer in rows]
    examples, prompts = common.fit_prompts(tokenizer, examples, 999)
    responses = common.tokenize_answers(tokenizer, [e.chosen for e in examples], limit)
    batch = common.pad_batch(prompts, responses, tokenizer.pad_token_id, "cpu")
    R = batch["response_mask"].shape[1]
    end = common.chat_marks(tokenizer)[1]
    for i, example in enumerate(examples):
        ids = tokenizer(example.chosen, add_special_tokens=False).input_ids
        answer = [i for i in ids if i not in (0, 1, 3, 4)] + [end]  # <pad>, <eos>, <user> and <assistant> taken out
        masked = batch["input_ids"][i, -R:][batch["response_mask"][i]].tolist()
        assert masked == answer[:limit] and 0 < len(masked) <= limit and end not in masked[: len(answer) - 1]
        real = batch["input_ids"][i][batch["attention_mask"][i]].tolist()
        assert real == [*prompts[i], *masked]
        assert real.count(end) <= 1 and example.prompt[0]["content"].count("<eos>") == 0
        shown = tokenizer.apply_chat_template(example.prompt, tokenize=False, add_generation_prompt=True)
        assert list(prompts[i]) == tokenizer(shown, add_special_tokens=False).input_ids
