"""A user's mistake gives one line and exit code 2, before anything is written."""

import json

import pytest
import torch
from conftest import run_script

import common
import evaluate
import sft
import train_dvpo
import train_gvm
import train_ppo_baseline

PAIR = {"prompt": "list two animals", "chosen": "dog and cow.", "rejected": "dog."}


@pytest.fixture
def make(tmp_path, tiny_model):
    """make(rows) writes a dataset and returns its path; a string is written as it is."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text(rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


def fails(main, args, message, tmp_path):
    with pytest.raises(common.UserError, match=message):
        main(args)
    assert not (tmp_path / "out").exists()  # nothing half-written


DATASETS = [
    ("misnamed column", [{"prompt": "a", "good": "b", "bad": "c"}], "columns .*good, bad.* fit none of"),
    ("no rejected", [{"prompt": "a", "chosen": "b"}], "columns .*prompt, chosen.* fit none of"),
    ("empty file", "", "no rows"),
    ("empty answers", [{**PAIR, "chosen": " "}], "no row can be used here: 1 x empty answer"),
    ("identical answers", [{**PAIR, "rejected": PAIR["chosen"]}], "1 x chosen and rejected are identical"),
    ("null everywhere", [{"prompt": None, "chosen": None, "rejected": None}], "no row can be used"),
    ("strings without prompt", [{"chosen": "b", "rejected": "c"}], "neither a column 'prompt' nor a conversation"),
    ("malformed JSON", json.dumps(PAIR) + "\n{oops\n", "line 2: malformed JSON"),
    ("rows that are lists", "[1, 2]\n", "rows must be JSON objects"),
    ("messages without role", [{**PAIR, "prompt": [{"content": "a"}]}], "1 x a message without a role"),
    (
        "prompts too long",
        [{**PAIR, "prompt": "list two animals " * 200}],
        "1 prompts longer than --max-prompt-length 512",
    ),
]


@pytest.mark.parametrize("name, rows, message", DATASETS, ids=[name for name, *_ in DATASETS])
def test_bad_datasets(name, rows, message, make, tiny_model, tmp_path):
    fails(train_gvm.main, train_gvm.Args(tiny_model, make(rows), str(tmp_path / "out")), message, tmp_path)


def test_malformed_json_document(make, tiny_model, tmp_path):
    path = make('[{"prompt": "a"},\n oops]', "data.json")
    fails(sft.main, sft.Args(tiny_model, path, str(tmp_path / "out")), "line 2: malformed JSON", tmp_path)


@pytest.mark.parametrize("path", ["./nowhere.jsonl", "/nowhere/at/all", "data.csv"])
def test_missing_or_unknown_files(path, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.csv").write_text("a,b\n")
    message = "no such file or folder|expected .jsonl"
    fails(sft.main, sft.Args(tiny_model, path, str(tmp_path / "out")), message, tmp_path)


def test_unknown_split(tiny_model, tmp_path):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list([PAIR])}).save_to_disk(tmp_path / "data")
    args = sft.Args(tiny_model, f"{tmp_path / 'data'}:validation", str(tmp_path / "out"))
    fails(sft.main, args, "no split 'validation'; there are train", tmp_path)


def test_scores_are_missing(make, tiny_model, tmp_path):
    args = train_gvm.Args(tiny_model, make([PAIR]), str(tmp_path / "out"), label_source="score")
    fails(train_gvm.main, args, "1 x no score", tmp_path)


def test_all_scores_equal(make, tiny_model, tmp_path):
    rows = [{"prompt": f"list {n} animals", "response": "dog.", "score": 1} for n in ("two", "three", "four")]
    args = train_gvm.Args(tiny_model, make(rows), str(tmp_path / "out"), label_source="score")
    fails(train_gvm.main, args, "all scores in .* equal 1", tmp_path)


def test_context_without_policy_columns(make, tiny_model, tmp_path):
    args = train_gvm.Args(tiny_model, make([PAIR]), str(tmp_path / "out"), num_context_trajectories=3)
    fails(train_gvm.main, args, "lacks the columns chosen_policy and rejected_policy", tmp_path)


@pytest.mark.parametrize(
    "setting",
    [{"micro_batch_size": 0}, {"rollout_batch_size": 7}, {"response_length": 0}, {"num_minibatches": -1},
     {"temperature": 0.0}, {"num_updates": 0}, {"dp_replicate": 3}],
)  # fmt: skip
def test_impossible_settings(setting, tiny_model, tiny_gvm, tmp_path):
    args = train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(tmp_path / "out"), **setting)
    fails(train_dvpo.main, args, "must be above 0|must be a multiple of", tmp_path)


def test_a_stage_is_missing(tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = train_dvpo.Args(tiny_model, output_dir=str(tmp_path / "out"))
    fails(train_dvpo.main, args, "runs/gvm: no such folder; `python train_gvm.py` makes it", tmp_path)


@pytest.mark.parametrize("path", ["./nowhere", "no-such-owner/no-such-model"])
def test_missing_models(path, tmp_path):
    args = sft.Args(path, output_dir=str(tmp_path / "out"))
    fails(sft.main, args, f"{path}: (no such folder|cannot load)", tmp_path)


def test_tokenizers_differ(tiny_model, tiny_gvm, tmp_path):
    tokenizer = common.load_tokenizer(tiny_gvm)
    tokenizer.add_tokens(["new"])
    gvm = common.load_value_model(tiny_gvm, tokenizer=tokenizer, dtype=torch.float32, fresh_head=False)
    gvm.save_pretrained(tmp_path / "gvm")
    tokenizer.save_pretrained(tmp_path / "gvm")
    args = train_dvpo.Args(tiny_model, str(tmp_path / "gvm"), output_dir=str(tmp_path / "out"))
    fails(train_dvpo.main, args, "different tokenizers", tmp_path)


def test_a_policy_is_no_gvm(tiny_model, tmp_path):
    args = train_dvpo.Args(tiny_model, tiny_model, output_dir=str(tmp_path / "out"))
    fails(train_dvpo.main, args, "is it a GVM|no value model", tmp_path)


def test_a_policy_is_no_reward_model(tiny_model, tmp_path):
    args = train_ppo_baseline.Args(tiny_model, tiny_model, output_dir=str(tmp_path / "out"))
    fails(train_ppo_baseline.main, args, "is it a GVM or a reward model|no value or reward model", tmp_path)


@pytest.mark.parametrize(
    "setting",
    [{"micro_batch_size": 3}, {"reward_batch_size": 3}, {"reward_num_epochs": 0}, {"rollout_batch_size": 7},
     {"value_clip_coef": 0.0}],
)  # fmt: skip
def test_impossible_settings_of_ppo(setting, tiny_model, tmp_path):
    args = train_ppo_baseline.Args(
        tiny_model, output_dir=str(tmp_path / "out"), reward_output_dir=str(tmp_path / "out"), **setting
    )
    fails(train_ppo_baseline.main, args, "must be above 0|must be a multiple of", tmp_path)


def test_prompts_train_no_reward_model(make, tiny_model, tmp_path):
    args = train_ppo_baseline.Args(tiny_model, dataset=make([{"prompt": "a"}]), output_dir=str(tmp_path / "out"),
                                   reward_output_dir=str(tmp_path / "out"))  # fmt: skip
    fails(train_ppo_baseline.main, args, "columns .*prompt.* fit none of", tmp_path)


def test_a_pair_is_seen_in_one_piece(make, tiny_model, tmp_path):
    args = train_gvm.Args(tiny_model, make([PAIR]), str(tmp_path / "out"), micro_batch_size=1)
    fails(train_gvm.main, args, "--micro-batch-size 1 must be a multiple of 2", tmp_path)


def test_a_head_of_the_wrong_width(tiny_model, tmp_path):
    from transformers import AutoModelForTokenClassification

    model = AutoModelForTokenClassification.from_pretrained(tiny_model, num_labels=3)
    model.save_pretrained(tmp_path / "gvm")
    common.load_tokenizer(tiny_model).save_pretrained(tmp_path / "gvm")
    args = train_dvpo.Args(tiny_model, str(tmp_path / "gvm"), output_dir=str(tmp_path / "out"))
    fails(train_dvpo.main, args, "head has 3 outputs, expected 1", tmp_path)


@pytest.mark.parametrize("family", ["gemma3_text", "opt", "gpt2"])
def test_unsupported_architectures(family, tiny_model, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
    if family == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 128}
    config = AutoConfig.for_model(family, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    common.load_tokenizer(tiny_model).save_pretrained(tmp_path / "model")
    args = train_gvm.Args(str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    fails(train_gvm.main, args, "Llama, Qwen2, Qwen3, Mistral[^{]*$", tmp_path)  # no placeholder left unfilled


def test_weights_must_be_safetensors(tiny_model, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.config.save_pretrained(tmp_path / "model")
    torch.save(model.state_dict(), tmp_path / "model" / "pytorch_model.bin")
    common.load_tokenizer(tiny_model).save_pretrained(tmp_path / "model")
    args = sft.Args(str(tmp_path / "model"), output_dir=str(tmp_path / "out"))
    fails(sft.main, args, "cannot load", tmp_path)


def test_evaluate_wants_name_and_path(tiny_model, tmp_path):
    args = evaluate.Args(("runs/sft",), output_dir=str(tmp_path / "out"))
    fails(evaluate.main, args, "expected NAME=PATH", tmp_path)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_line_and_exit_code_2(ranks, tiny_model, tmp_path):
    result = run_script("sft.py", "--model-path", tiny_model, "--dataset", "./nowhere.jsonl", "--output-dir",
                        tmp_path / "out", ranks=ranks, cwd=tmp_path)  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: --dataset ./nowhere.jsonl: no such file or folder"]
    assert not (tmp_path / "out").exists()
    if ranks == 1:
        assert result.returncode == 2 and result.stderr.splitlines() == lines
