"""Dataset shapes people bring, tokenisation traps, and the embedded task."""

import csv
import gzip
import io
import json
import random
import types
from collections import Counter

import lists
import pytest
import torch
from conftest import ROOT, USER_TEXT, gold, task_examples
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

import common
import train_gvm

USER = {"role": "user", "content": "Name a fruit."}


def said(text):
    return {"role": "assistant", "content": text}


PROMPT = [USER]
ROWS = {
    "explicit prompt, strings": {"prompt": "Name a fruit.", "chosen": "pear", "rejected": "dog"},
    "explicit prompt, messages": {"prompt": [USER], "chosen": [said("pear")], "rejected": [said("dog")]},
    "implicit prompt": {"chosen": [USER, said("pear")], "rejected": [USER, said("dog")]},
    "ultrafeedback_binarized": {
        "prompt": "Name a fruit.",
        "prompt_id": "7",
        "chosen": [USER, said("pear")],
        "rejected": [USER, said("dog")],
        "messages": [USER, said("pear")],
        "score_chosen": 8.0,
        "score_rejected": 3.0,
    },
    "hh-rlhf": {
        "chosen": "\n\nHuman: Name a fruit.\n\nAssistant: pear",
        "rejected": "\n\nHuman: Name a fruit.\n\nAssistant: dog",
    },
    "released code": {"question": "Name a fruit.", "response_j": "pear", "response_k": "dog"},
    "one message": {"prompt": "Name a fruit.", "chosen": said("pear"), "rejected": said("dog")},
    "messages before the answers": {"messages": [USER], "chosen": "pear", "rejected": "dog"},
    "parts": {
        "prompt": [{"role": "user", "content": [{"type": "text", "text": "Name a fruit."}]}],
        "chosen": "pear",
        "rejected": "dog",
    },
    "JSON in strings": {
        "prompt": "?",
        "chosen": json.dumps([USER, said("pear")]),
        "rejected": json.dumps([USER, said("dog")]),
    },
    "a transcript as prompt": {"prompt": "\n\nHuman: Name a fruit.\n\nAssistant:", "chosen": "pear", "rejected": "dog"},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "Name a fruit."}],
        "chosen": {"from": "gpt", "value": "pear"},
        "rejected": {"from": "gpt", "value": "dog"},
    },
}


def write(path, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", ROWS)
def test_preference_shapes(name, tmp_path):
    train, heldout = common.load_examples(write(tmp_path / "data.jsonl", [ROWS[name]]), "pairs")
    (example,) = train + heldout
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, "pear", "dog")
    if "score_chosen" in ROWS[name]:
        assert (example.score_chosen, example.score_rejected) == (8.0, 3.0)


def test_a_columns_own_name_wins(tmp_path):
    row = {"prompt": "Name a fruit.", "question": "no. 7", "chosen": "pear", "rejected": "dog"}
    (example,) = sum(common.load_examples(write(tmp_path / "data.jsonl", [row]), "pairs"), [])
    assert example.prompt == PROMPT


def test_columns_that_pairs_do_not_use_may_be_unclear(tmp_path):
    row = {"prompt": "Name a fruit.", "chosen": "pear", "rejected": "dog", "completion": "fig", "messages": "plum"}
    (example,) = sum(common.load_examples(write(tmp_path / "data.jsonl", [row]), "pairs"), [])
    assert (example.chosen, example.rejected) == ("pear", "dog")


def test_the_first_row_may_lack_a_column(tmp_path):
    good = ROWS["explicit prompt, strings"]
    rows = [{"prompt": "Name a fruit.", "chosen": "pear"}, good]
    assert len(sum(common.load_examples(write(tmp_path / "data.jsonl", rows), "pairs"), [])) == 1


def test_an_answer_of_several_turns_goes_on_from_its_prompt(tmp_path):
    row = {"prompt": [USER], "chosen": [said("pear"), {"role": "user", "content": "Another."}, said("fig")],
           "rejected": [said("pear"), {"role": "user", "content": "Another."}, said("dog")]}  # fmt: skip
    (example,) = sum(common.load_examples(write(tmp_path / "data.jsonl", [row]), "pairs"), [])
    assert example.prompt == [USER, said("pear"), {"role": "user", "content": "Another."}]
    assert (example.chosen, example.rejected) == ("fig", "dog")


def test_policies_may_be_numbers(tmp_path):
    row = {**ROWS["explicit prompt, strings"], "chosen_policy": 0, "rejected_policy": 1}
    (example,) = sum(common.load_examples(write(tmp_path / "data.jsonl", [row]), "pairs"), [])
    assert (example.chosen_policy, example.rejected_policy) == ("0", "1")


PARTS = [  # of what a model is asked, beside the prompt
    ({"system": "Be brief.", "question": "Name a fruit."}, [{"role": "system", "content": "Be brief."}, USER]),
    ({"instruction": "Name a fruit.", "input": "pear or dog"}, [{**USER, "content": "Name a fruit.\n\npear or dog"}]),
    ({"instruction": "Name a fruit.", "context": "pear, dog"}, [{**USER, "content": "Name a fruit.\n\npear, dog"}]),
    ({"system": "", "instruction": "Name a fruit.", "input": ""}, PROMPT),
]


@pytest.mark.parametrize("row, prompt", PARTS)
def test_what_belongs_to_a_prompt_is_read(row, prompt, tmp_path):
    path = write(tmp_path / "data.jsonl", [{**row, "chosen": "pear", "rejected": "dog"}])
    assert [e.prompt for e in sum(common.load_examples(path, "pairs"), [])] == [prompt]


def test_columns_that_are_not_read_are_named_and_not_decoded(tmp_path, capsys):
    """A broken picture in a column that nobody needs stops nothing."""
    import datasets

    rows = {"prompt": ["Name a fruit."], "response": ["pear"], "source": ["me"], "image": [b"no picture"]}
    data = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    data.to_parquet(tmp_path / "data.parquet")
    (example,) = sum(common.load_examples(str(tmp_path / "data.parquet"), "answers"), [])
    assert example.chosen == "pear"
    assert "answers (prompt, response; not read: source, image)" in capsys.readouterr().out


def test_answers_that_are_labelled_bad_are_not_learned(tmp_path):
    rows = [{"prompt": f"{i}", "completion": f"a{i}", "label": i % 2 == 0} for i in range(40)]
    path = write(tmp_path / "data.jsonl", rows)
    assert len(sum(common.load_examples(path, "answers"), [])) == 20
    assert {e.score_chosen for e in sum(common.load_examples(path, "scores"), [])} == {0.0, 1.0}


def test_numbers_and_words_for_nothing_are_texts(tmp_path):
    """Sums have answers such as 4; a CSV may hold the word None, which pandas would read as no text."""
    write(tmp_path / "data.jsonl", [{"prompt": "2+2", "response": 4}])
    (tmp_path / "data.csv").write_text("prompt,response\nIs it there?,None\n")
    for name, answer in (("data.jsonl", "4"), ("data.csv", "None")):
        (example,) = sum(common.load_examples(str(tmp_path / name), "answers"), [])
        assert example.chosen == answer


def test_a_dataset_of_several_configurations(tmp_path):
    for name in ("a", "b"):
        write((tmp_path / name).with_suffix(".jsonl"), [{"prompt": name, "response": "x"}])
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: a\n  data_files: a.jsonl\n- config_name: b\n  data_files: b.jsonl\n---\n"
    )
    with pytest.raises(common.UserError, match=r"Config name is missing.*\['a', 'b'\]"):
        common.load_examples(str(tmp_path), "answers")
    (example,) = sum(common.load_examples(f"{tmp_path}:b:train", "answers"), [])
    assert example.prompt[0]["content"] == "b"


def test_rated_completions_by_a_task(monkeypatch):
    """openbmb/UltraFeedback's shape: the best completion against a random worse one."""
    import datasets

    rated = (("a", "dog", "3"), ("b", "pear", 8.0), ("c", "fig", 8.0))
    completions = [{"model": m, "response": text, "overall_score": score} for m, text, score in rated]
    rows = [{"instruction": f"Name a fruit {i}.", "completions": completions} for i in range(100)]
    rows.append({"instruction": "Name.", "completions": completions[1:]})  # no worse one
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    train, heldout = common.load_examples(str(ROOT / "tests/tasks/ultrafeedback.py"), "pairs")
    assert len(train) + len(heldout) == 100 and 0 < len(heldout) < 20
    assert {(e.chosen, e.rejected, e.chosen_policy, e.score_rejected) for e in train} == {("pear", "dog", "b", 3.0)}


def test_hh_is_cut_at_the_last_assistant(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    row = {"chosen": f"{start} yes\n\nor so", "rejected": f"{start} no"}
    (example,) = common.load_examples(write(tmp_path / "hh.jsonl", [row]), "pairs")[0]
    assert [m["role"] for m in example.prompt] == ["user", "assistant", "user"]
    assert (example.chosen, example.rejected) == ("yes\n\nor so", "no")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Name a fruit.", "response": "pear", "score": "7.5", "policy": "a"},
        {"prompt": "Name a fruit.", "completion": "pear", "reward": 7.5, "model": "a"},
        {"value_question": "Name a fruit.", "value_response": "pear", "rewards": 7.5, "policy": "a"},
        {"messages": [USER, said("pear")], "score": 7.5, "policy": "a"},
    ],
)
def test_scored_answers(row, tmp_path):
    train, heldout = common.load_examples(write(tmp_path / "data.jsonl", [row]), "scores")
    (example,) = train + heldout
    assert (example.prompt, example.chosen, example.rejected) == (PROMPT, "pear", None)
    assert (example.score_chosen, example.chosen_policy) == (7.5, "a")


@pytest.mark.parametrize("row", [{"prompt": "Name a fruit."}, {"question": "Name a fruit."}, {"prompt": [USER]}])
def test_prompts_only(row, tmp_path):
    train, heldout = common.load_examples(write(tmp_path / "data.jsonl", [row]), "prompts")
    assert [example.prompt for example in train + heldout] == [PROMPT]


def as_csv(rows, separator: str) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


LINES = lambda rows: "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
ARRAY = lambda rows: json.dumps(rows, indent=1, ensure_ascii=False).encode()
FILES = {
    "lines.json": LINES,
    "lines.txt": LINES,
    "no_ending": LINES,
    "array.jsonl": ARRAY,
    "blank lines.csv": lambda rows: b"\n\n " + ARRAY(rows),
    "marked.jsonl": lambda rows: b"\xef\xbb\xbf" + LINES(rows),  # a byte order mark, as Windows writes it
    "marked.json": lambda rows: b"\xef\xbb\xbf" + ARRAY(rows),
    "gzip": lambda rows: gzip.compress(LINES(rows)),
    "commas.json": lambda rows: as_csv(rows, ",").encode(),
    "excel.csv": lambda rows: as_csv(rows, ";").encode("utf-8-sig"),
    "tabs": lambda rows: as_csv(rows, "\t").encode(),
    "excel.gz": lambda rows: gzip.compress(as_csv(rows, ";").encode("utf-8-sig")),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_for_what_it_holds(name, tmp_path):
    rows = [{"prompt": f'Käse, {i}; "zwei"\tund', "chosen": "é, b\nc", "rejected": "d; e"} for i in range(40)]
    (tmp_path / name).write_bytes(FILES[name](rows))
    read = sum(common.load_examples(str(tmp_path / name), "pairs"), [])
    assert sorted((e.prompt[0]["content"], e.chosen, e.rejected) for e in read) == sorted(
        tuple(row.values()) for row in rows
    )


@pytest.mark.parametrize("layout", ["jsonl.gz", "json", "parquet", "save_to_disk", "save_to_disk dict", "hub folder"])
def test_local_layouts(layout, tmp_path):
    import datasets

    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    data, path = datasets.Dataset.from_list(rows), tmp_path / "data"
    if layout == "jsonl.gz":
        path = write(tmp_path / "data.jsonl.gz", rows)
    elif layout == "json":
        path = tmp_path / "data.json"
        path.write_text(json.dumps(rows))
    elif layout == "parquet":
        path = tmp_path / "data.csv"  # whatever its name
        data.to_parquet(path)
    elif layout == "save_to_disk":
        data.save_to_disk(path)
    elif layout == "save_to_disk dict":
        datasets.DatasetDict({"test_prefs": data.select([0]), "train_prefs": data}).save_to_disk(path)
    else:
        (path / "data").mkdir(parents=True)
        data.to_parquet(path / "data" / "train-00000-of-00001.parquet")
    train, heldout = common.load_examples(str(path), "pairs")
    assert len(train) + len(heldout) == 40 and len(heldout) < 20
    assert not {e.prompt[0]["content"] for e in train} & {e.prompt[0]["content"] for e in heldout}
    if layout == "save_to_disk dict":
        assert len(sum(common.load_examples(f"{path}:test_prefs", "pairs"), [])) == 1


def test_drops_are_counted_with_reasons(tmp_path, capsys):
    good = ROWS["explicit prompt, strings"]
    rows = [
        good,
        {**good, "rejected": "pear"},
        {**good, "chosen": "  "},
        {**good, "prompt": ""},
        {"prompt": "a", "chosen": "b", "rejected": None},
        {"prompt": "a", "chosen": [said("x")], "rejected": [{"role": "assistant"}]},
        {"prompt": None, "chosen": [USER, said("x")], "rejected": [{**USER, "content": "other"}, said("y")]},
        {"prompt": "a", "chosen": [USER], "rejected": [USER]},
        {"prompt": "a", "chosen": True, "rejected": False},
    ]
    train, heldout = common.load_examples(write(tmp_path / "data.jsonl", rows), "pairs")
    printed = capsys.readouterr().out
    assert len(train + heldout) == 1
    assert "  dropped 8 rows: " in printed
    for reason in ("chosen and rejected are identical", "empty answer", "empty prompt", "malformed row, or a null",
                   "chosen and rejected answer different prompts", "the last message is not the assistant's",
                   "a message without a role"):  # fmt: skip
        assert f"1 x {reason}" in printed, reason


def test_half_a_character_is_refused(tmp_path):
    """Cut in UTF-16; in a file the reader says where."""
    row = {"prompt": "a", "chosen": "b", "rejected": "cut \ud83d"}
    with pytest.raises(common.UserError, match="surrogate"):
        common.load_examples(write(tmp_path / "data.jsonl", [row]), "pairs")


# ---- Tasks -----------------------------------------------------------------------------------------------------------
def test_a_task_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.load_task("tests/tasks/lists.py").score and common.load_task("runs/sft") is None
    (tmp_path / "mine.py").write_text("def rows(split):\n    yield {'prompt': split, 'response': 'a'}\n")
    train, heldout = common.load_examples("mine.py", "answers")
    assert [e.prompt[0]["content"] for e in train + heldout] == ["train", "heldout"]
    with pytest.raises(common.UserError, match="nowhere.py: no such file"):
        common.load_task("nowhere.py")


def test_the_short_task():
    """Right answers score 1, wrong ones -1; the splits share no sum."""
    path = str(ROOT / "tests/tasks/arithmetic.py")
    task, (train, heldout) = common.load_task(path), common.load_examples(path, "pairs")
    assert len(train) == 9_000 and len(heldout) == 1_000
    assert not {str(e.prompt) for e in train} & {str(e.prompt) for e in heldout}
    assert {task.score(e.prompt, e.chosen) for e in train} == {1.0}
    assert {task.score(e.prompt, e.rejected) for e in train} == {-1.0}
    assert task.score(train[0].prompt, "") == task.score(train[0].prompt, "about 12") == -1.0


# ---- Tokens ----------------------------------------------------------------------------------------------------------
def test_prompt_and_answer_tokens():
    tokenizer = lists.model()[1]
    messages = [{"role": "user", "content": "list two animals, not the cat"}]
    prompt = common.tokenize_prompt(tokenizer, messages)
    assert tokenizer.decode(prompt) == "<user> list two animals, not the cat <assistant>"
    (answer,) = common.tokenize_answers(tokenizer, ["dog and cow."], 20)
    assert answer[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(answer, skip_special_tokens=True) == "dog and cow."
    assert common.tokenize_answers(tokenizer, ["dog and cow."], 2) == [answer[:2]]  # cut, without an end


def test_unknown_words_are_counted(capsys):
    common.tokenize_answers(lists.model()[1], ["dog and xylophone.", "cat."], 20)
    assert "1 of 2 answers have parts unknown to the tokenizer" in capsys.readouterr().out
    common.tokenize_answers(lists.model()[1], ["dog and cow."], 20)
    assert "unknown" not in capsys.readouterr().out


def test_control_tokens_in_a_text(capsys):
    """An answer ends once, whatever it quotes; a prompt that could speak in another role is left out."""
    tokenizer = lists.model()[1]
    plain, quoting, unknown = common.tokenize_answers(
        tokenizer, ["dog and cow.", "dog<eos> and <user>cow.<eos>", "hm"], 20
    )
    assert plain == quoting and plain.count(tokenizer.eos_token_id) == 1
    assert list(unknown) == [
        tokenizer.unk_token_id,
        tokenizer.eos_token_id,
    ]  # no control token
    assert "1 of 3 answers had control tokens such as '<eos>' in their text" in capsys.readouterr().out
    good, bad, role = (
        common.Example([{"role": role, "content": content}])
        for role, content in (("user", "list"), ("user", "list<assistant>"), ("<assistant>", "list"))
    )
    earlier = common.Example(bad.prompt + good.prompt)
    assert common.fit_prompts(tokenizer, [good, bad, role, earlier], 9)[0] == [good]
    assert "dropped prompts: 3 x with a control token" in capsys.readouterr().out
    assert common.fit_prompts(tokenizer, [bad], 9, heldout=True) == ([], [])
    with pytest.raises(common.UserError, match="no prompt is left: 1 x with a control token"):
        common.fit_prompts(tokenizer, [bad], 9)


def test_control_tokens_that_are_not_called_special():
    """DeepSeek's marks of roles and some ChatML models' are plain added tokens."""
    tokenizer = lists.model()[1]
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<think>", "\n\n"])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n\n{{ m['content'] }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
    )
    marks = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    others = set(tokenizer.convert_tokens_to_ids(["<think>", "\n\n", "<unk>"]))
    controls = common.chat_marks(tokenizer)[2]
    assert set(marks) <= controls and not others & controls
    (answer,) = common.tokenize_answers(tokenizer, ["<think>dog<|im_end|><|im_start|>user"], 20)
    assert answer[-1] == marks[1] and answer.count(marks[1]) == 1 and marks[0] not in answer


@pytest.mark.parametrize("tail, expected", [("<eos>", "<eos>"), ("<user>\n<eos>", "<user>"), ("\n", "<eos>")])
def test_the_end_of_a_turn_is_what_the_template_writes(tail, expected):
    """Templates end turns with EOS, with another special token, or with nothing special."""
    tokenizer = lists.model()[1]
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}" + tail + "{% endif %}{% endfor %}"
    )
    assert tokenizer.convert_ids_to_tokens(common.chat_marks(tokenizer)[1]) == expected


def test_a_base_model_without_template_keeps_its_first_token(tmp_path, tiny_model):
    """The default template writes BOS where the tokenizer would, and only there."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = common.load_tokenizer(tiny_model)
    tokenizer.chat_template = None
    prompt = [{"role": "user", "content": "list two animals"}]
    for begins in (False, True):
        tokenizer.bos_token = "<user>"
        if begins:
            bos = tokenizer.bos_token_id
            post = TemplateProcessing(single="<user> $A", pair="<user> $A $B", special_tokens=[("<user>", bos)])
            tokenizer.backend_tokenizer.post_processor = post
        tokenizer.save_pretrained(tmp_path / str(begins))
        ids = common.tokenize_prompt(common.load_tokenizer(str(tmp_path / str(begins))), prompt)
        assert (ids[0] == tokenizer.bos_token_id) == begins and ids.count(tokenizer.bos_token_id) == begins


def test_a_prompt_depends_on_no_day_and_starts_no_thoughts():
    tokenizer, prompt = lists.model()[1], [{"role": "user", "content": "list two metals"}]
    plain = common.tokenize_prompt(tokenizer, prompt)
    tokenizer.chat_template += (
        "{% if enable_thinking is not defined or enable_thinking %}<unk>{% endif %}"
        "{% if date_string != '26 Jul 2024' %}<unk>{% endif %}"
        "{% if strftime_now('%d %b %Y') != '26 Jul 2024' %}<unk>{% endif %}"
    )
    assert common.tokenize_prompt(tokenizer, prompt) == plain
    assert "<unk>" in tokenizer.apply_chat_template(prompt, tokenize=False)


def test_a_forced_thought_is_closed():
    tokenizer, prompt = lists.model()[1], [{"role": "user", "content": "list two metals"}]
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    ids = common.tokenize_prompt(tokenizer, prompt)
    assert tokenizer.convert_ids_to_tokens(ids)[-2:] == ["<think>", "</think>"]


@pytest.mark.parametrize("template", [
    "{{ raise_exception('no') }}", "{% for %}", "{{ 1 / 0 }}", "{{ messages + 1 }}", "nothing of it",
])  # fmt: skip
def test_templates_that_fail_are_no_traceback(template):
    """An answer then ends with EOS; prompts that are refused, or of which nothing is left, are dropped and counted."""
    tokenizer = lists.model()[1]
    tokenizer.chat_template = template
    assert common.chat_marks(tokenizer)[1] == tokenizer.eos_token_id
    with pytest.raises(common.UserError, match="1 x (refused|changed or omitted) by the chat template"):
        common.fit_prompts(tokenizer, [common.Example([{"role": "user", "content": "list two metals"}])], 99)


def test_of_several_chat_templates_the_default_is_used_and_saved(tmp_path):
    tokenizer, prompt = lists.model()[1], [{"role": "user", "content": "list two metals"}]
    plain = common.tokenize_prompt(tokenizer, prompt)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "<unk>"}
    tokenizer.save_pretrained(tmp_path / "several")
    tokenizer = common.load_tokenizer(str(tmp_path / "several"))
    assert common.tokenize_prompt(tokenizer, prompt) == plain
    tokenizer.save_pretrained(tmp_path / "one")
    assert all(file.is_file() for file in (tmp_path / "one").iterdir())  # a run's folder has no others


def test_prompts_that_the_template_refuses_are_dropped(capsys):
    tokenizer = lists.model()[1]
    tokenizer.chat_template = (
        "{{ raise_exception('no system') if messages[0]['role'] == 'system' else messages[-1]['content'] }}"
    )
    bad = common.Example([{"role": "system", "content": "a"}, {"role": "user", "content": "b"}])
    good = common.Example([{"role": "user", "content": "b"}])
    assert common.fit_prompts(tokenizer, [bad, good], 9)[0] == [good]
    assert "1 x refused by the chat template" in capsys.readouterr().out


def test_what_a_template_omits_or_changes_is_told(capsys):
    tokenizer = lists.model()[1]
    system = common.Example([{"role": "system", "content": "three metals"}, {"role": "user", "content": "list"}])
    plain = common.Example([{"role": "user", "content": "list"}])
    tokenizer.chat_template = "{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}"
    assert common.fit_prompts(tokenizer, [system, plain], 9)[0] == [plain]
    assert "1 x changed or omitted by the chat template" in capsys.readouterr().out
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | replace('three', '3') }} {% endfor %}"
    assert common.fit_prompts(tokenizer, [system, plain], 9)[0] == [plain]


@pytest.mark.parametrize("space", ["", " "])
def test_an_answer_has_the_tokens_that_it_has_in_a_chat(space):
    """SentencePiece's tokenizers put a space before a text: right behind "[/INST] ", wrong behind a newline."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "</s>"], initial_alphabet=["\n", "▁"], show_progress=False)
    tokenizer.train_from_iterator(["dog and cow", "final-answer", "question", "a\nb", "x"], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}\n{% else %}" + space + "{{ m.content }}</s>"
        "{% endif %}{% endfor %}"
    )
    asked, said = {"role": "user", "content": "question"}, {"role": "assistant", "content": "dog and cow"}
    whole = tokenizer(tokenizer.apply_chat_template([asked, said], tokenize=False)).input_ids
    (answer,) = common.tokenize_answers(tokenizer, ["dog and cow"], 20)
    assert list(answer) == whole[-len(answer) :]
    assert ("▁" in tokenizer.convert_ids_to_tokens(answer[0])) == (space == " ")


@pytest.mark.parametrize("where", ["../secret.jsonl", "https://example.org/secret.jsonl"])
def test_a_folders_readme_cannot_point_elsewhere(where, tmp_path):
    row = {"prompt": "Name a fruit.", "chosen": "pear", "rejected": "dog"}
    write(tmp_path / "secret.jsonl", [row])
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {where}\n---\n")
    with pytest.raises(common.UserError, match="neither readable here nor on the hub"):
        common.load_examples(str(tmp_path / "data"), "pairs")
    write(tmp_path / "data" / "train.jsonl", [{**row, "prompt": f"Name fruit {i}."} for i in range(40)])
    (tmp_path / "data" / "README.md").unlink()
    assert sum(map(len, common.load_examples(str(tmp_path / "data"), "pairs"))) == 40


def test_micro_batches_without_needless_padding():
    batch = common.pad_batch([[5, 6, 7], [7], [7, 8]], [[8], [9, 1, 2], [3, 4]], 0, "cpu")
    rows = common.by_length(torch.tensor([0, 1, 2]), batch["attention_mask"])
    assert rows.tolist() == [0, 1, 2]  # of equal length: in their order
    ids, attention_mask, response_mask = common.crop(*(tensor[1:] for tensor in batch.values()))
    assert ids.tolist() == [[0, 7, 9, 1, 2], [7, 8, 3, 4, 0]]  # of the prompts
    assert attention_mask.int().tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert response_mask.int().tolist() == [[1, 1, 1], [1, 1, 0]]
    ids, attention_mask, response_mask = common.crop(*(tensor[[0, 2]] for tensor in batch.values()))
    assert ids.tolist() == [[5, 6, 7, 8, 0], [0, 7, 8, 3, 4]]  # of the answers
    assert attention_mask.int().tolist() == [[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]]
    assert response_mask.int().tolist() == [[1, 0], [1, 1]]
    longer = common.pad_batch([[5, 6, 7], [7]], [[8], [9]], 0, "cpu")["attention_mask"]
    assert common.by_length(torch.tensor([0, 1]), longer).tolist() == [1, 0]


def test_padding_sides_and_masks():
    batch = common.pad_batch([[5, 6], [7]], [[8], [9, 1]], 0, "cpu")
    assert batch["input_ids"].tolist() == [[5, 6, 8, 0], [0, 7, 9, 1]]
    assert batch["attention_mask"].tolist() == [[True, True, True, False], [False, True, True, True]]
    assert batch["response_mask"].tolist() == [[True, False], [True, True]]
    assert common.position_ids(batch["attention_mask"]).tolist() == [[0, 1, 2, 2], [0, 0, 1, 2]]


def test_context_never_holds_the_prompt_it_conditions():
    """Not the answer judged, not another answer to its prompt, at any draw."""
    pool = [([p], [100 + p, a]) for p in range(4) for a in range(3)]
    for seed in range(200):
        context = common.condition(random.Random(seed), [2], pool, 3, 8)
        assert context[-1] == 2 and 102 not in context and len(context) == 3 * 3 + 1
    only_itself = [([2], [1]), ([2], [3])]
    assert common.condition(random.Random(0), [2], only_itself, 3, 8) == [2]


def test_a_prompt_may_have_just_the_length_that_is_allowed():
    tokenizer, example = lists.model()[1], common.Example(PROMPT)
    ((ids,),) = common.fit_prompts(tokenizer, [example], 99)[1:]
    assert common.fit_prompts(tokenizer, [example], len(ids))[0] == [example]
    assert common.fit_prompts(tokenizer, [example], len(ids) - 1, heldout=True)[0] == []


def test_context_is_by_the_policy_judged_and_drawn_anew():
    answers = [train_gvm.Answer([10 + i], [50 if policy == "a" else 60, i], 1.0, policy)
               for i in range(8) for policy in ("a", "b")]  # fmt: skip
    config = types.SimpleNamespace(num_context_trajectories=2, context_trajectory_length=9)
    contexts = {}
    for key in ("1/1", "1/2"):
        batch = train_gvm.make_batch(config, answers, train_gvm.policy_pools(answers), key, 0, "cpu")
        contexts[key] = batch["input_ids"][:, :-3]
        for answer, context in zip(answers, contexts[key].tolist()):
            written = 50 if answer.policy == "a" else 60
            assert context.count(written) == 2 and 110 - written not in context
            assert answer.prompt_ids[0] not in context
    assert not torch.equal(*contexts.values())


def test_context_is_cut_in_front_of_a_whole_prompt():
    pool = [([1, 2, 3, 4], [5, 6, 9])]
    assert common.condition(random.Random(0), [7, 8], pool, 1, max_length=4) == [3, 4, 5, 6, 7, 8]


def test_batches_walk_through_all_rows_once_per_pass():
    seen = [i for step in range(1, 8) for i in common.shuffled_batch(7, step, 3, seed=0)]
    for start in range(0, 21, 7):
        assert sorted(seen[start : start + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert seen[:3] == common.shuffled_batch(7, 1, 3, seed=0) != common.shuffled_batch(7, 1, 3, seed=1)


# ---- The embedded task -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "answer, score",
    [
        ("dog, cow and bear.", 1.0),
        ("dog and cow.", 0.5),
        ("dog, cow, bear and wolf.", 0.5),
        ("dog, cow and cat.", 0.5),
        ("dog, cow and pear.", 0.5),
        ("dog, cow and dog.", 0.5),
        ("dog, cow, bear.", 0.5),
        ("dog, cow and bear", 0.5),
        ("dog, dog and dog.", 0.0),
        ("pear.", -0.5),
        ("", -1.0),
    ],
)
def test_gold_score(answer, score):
    assert gold("list three animals, not the cat", answer) == score


def test_embedded_task_has_the_promised_properties():
    train, heldout = task_examples("train"), task_examples("heldout")
    assert len(train) == 16_000 and len(heldout) == 2_000
    assert not {e.prompt[0]["content"] for e in train} & {e.prompt[0]["content"] for e in heldout}
    assert lists.rows("heldout") == lists.rows("heldout")
    by_writer = {writer: [] for writer in lists.WRITERS}
    right = 0.0
    for e in train:
        good, bad = lists.score(e.prompt, e.chosen), lists.score(e.prompt, e.rejected)
        by_writer[e.chosen_policy].append(good)
        by_writer[e.rejected_policy].append(bad)
        right += (good > bad) + 0.5 * (good == bad)
    means = [sum(x) / len(x) for x in by_writer.values()]
    assert len(means) >= 4 and max(means) - min(means) > 0.5  # writers of different skill
    assert 0.81 < right / len(train) < 0.85  # labels are noisy: this is what the exact score itself reaches
    lengths = Counter(len(e.chosen.split()) for e in train)
    assert len(lengths) > 4  # answers of varying length
    best_constant = max(
        sum(lists.score(e.prompt, answer) for e in train[:2000]) / 2000 for answer in {e.chosen for e in train[:50]}
    )
    assert best_constant < 0


def test_every_prompt_has_a_perfect_answer_and_the_text_survives_the_tokenizer():
    tokenizer, rng = lists.model()[1], random.Random(0)
    for example in task_examples()[:400]:
        prompt = example.prompt[0]["content"]
        perfect = (lists.write(rng, prompt, "expert") for _ in range(50))
        assert max(gold(prompt, answer) for answer in perfect) == 1.0
        for text in (prompt, example.chosen):
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_preferences_are_bradley_terry_in_the_gold_score():
    """Among pairs whose gold scores differ by one fault, the better wins with probability sigmoid(0.5 / noise)."""
    wins = total = 0
    for e in task_examples():
        difference = lists.score(e.prompt, e.chosen) - lists.score(e.prompt, e.rejected)
        if abs(difference) == lists.FAULT:
            wins, total = wins + (difference > 0), total + 1
    expected = torch.sigmoid(torch.tensor(lists.FAULT / lists.NOISE)).item()
    assert abs(wins / total - expected) < 4 * (expected * (1 - expected) / total) ** 0.5


# ---- Chains: longer answers of a set length --------------------------------------------------------------------------
CHAIN = "1 trees oak, elm and pine. 2 cities cairo, rome and lima. 3 animals wolf, horse and cat."


@pytest.mark.parametrize(
    "faults, answer",
    [
        (0, CHAIN),
        (1, CHAIN.replace("wolf", "dog")),  # excluded
        (1, CHAIN.replace("rome", "tin")),  # of another kind
        (1, CHAIN.replace("elm", "oak")),  # named before
        (1, CHAIN.replace("3 animals", "4 animals")),  # badly written
        (1, CHAIN.replace("trees oak, elm and pine", "metals tin, lead and iron")),  # cities do not follow on metals
        (4, CHAIN.replace(" 3 animals wolf, horse and cat.", "")),  # one list is missing, and the end is wrong
        (4, CHAIN + " 4 fruits pear, fig and plum."),  # one list too many, and the end is wrong
        (6, ""),  # three lists are missing, and the end
    ],
)
def test_faults_of_a_chain(faults, answer, monkeypatch):
    monkeypatch.setenv("CHAIN_LISTS", "4")  # a fault costs a quarter
    task = common.load_task("tests/tasks/chains.py")
    question = "chain 3 to animals, not the zinc or the dog"
    assert task.score(USER_TEXT(question), answer) == max(-1.0, 1.0 - 0.25 * faults)


@pytest.mark.parametrize("lists, shortest, longest", [(1, 8, 11), (8, 55, 75), (31, 235, 260)])
def test_chains_have_the_length_that_is_asked_for(lists, shortest, longest, monkeypatch):
    monkeypatch.setenv("CHAIN_LISTS", str(lists))
    task = common.load_task("tests/tasks/chains.py")
    task.SIZES.update(train=200, heldout=100)
    tokenizer = task.model()[1]
    train, heldout = task.rows("train"), task.rows("heldout")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    texts = [row[side] for row in train for side in ("chosen", "rejected")]
    lengths = [len(ids) + 1 for ids in tokenizer(texts).input_ids]
    assert shortest < sum(lengths) / len(lengths) < longest
    assert [tokenizer.decode(ids) for ids in tokenizer(texts).input_ids] == texts
    gold = {writer: [] for writer in task.WRITERS}
    for row in train:
        for side in ("chosen", "rejected"):
            gold[row[f"{side}_policy"]].append(task.score(USER_TEXT(row["prompt"]), row[side]))
    assert max(gold["expert"]) == 1.0
    assert sum(gold["expert"]) / len(gold["expert"]) > sum(gold["careless"]) / len(gold["careless"]) + 0.1
