"""A user's mistake gives one line and exit code 2, before anything is written."""

import gzip
import io
import json
import math
import os
import random
import re
import shutil
import socket
import zipfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import transformers
from conftest import run_script
from safetensors.torch import load_file, save_file

import common
import evaluate
import sft
import train_dvpo
import train_gvm
import train_ppo_baseline

PAIR = {"prompt": "list two animals", "chosen": "dog and cow.", "rejected": "dog."}
USER, ASSISTANT, OTHER = ({"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("assistant", "c")))


@pytest.fixture
def fails(tmp_path, capsys, monkeypatch):
    """fails(module, message, **settings): one line with `message`, exit code 2, and nothing written."""
    out = tmp_path / "out"

    def run(module, message, **settings):
        paths = {"output_dir": str(out)}
        if module is train_ppo_baseline:
            paths["reward_output_dir"] = str(out / "rm")
        capsys.readouterr()
        with pytest.raises(SystemExit) as left, common.one_line_errors():
            module.main(module.Args(**{**paths, **settings}))
        if dist.is_initialized():
            dist.destroy_process_group()
        errors = capsys.readouterr().err.splitlines()
        assert left.value.code == 2 and len(errors) == 1, errors
        assert re.search(message, errors[0]) and errors[0].startswith("error: "), errors[0]
        assert not out.exists()

    return run


@pytest.fixture
def make(tmp_path):
    """make(rows) writes a dataset and returns its path; bytes and strings are written as they are."""

    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        if not isinstance(rows, (bytes, str)):
            rows = "".join(json.dumps(row) + "\n" for row in rows)
        path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
        return str(path)

    return write


# ---- Datasets: every shape, with each kind of damage -----------------------------------------------------------------
DATASETS = [
    ("misnamed columns", [{"prompt": "a", "good": "b", "bad": "c"}], "columns .*good, bad.* fit none of"),
    ("no rejected", [{"prompt": "a", "chosen": "b"}], "columns .*prompt, chosen.* fit none of"),
    ("prompts alone", [{"prompt": "a"}], "columns .*prompt.* fit none of"),
    ("no columns", [{}], "fit none of|no rows|no data"),
    ("a text", "Once upon a time, there was a list.\n", "no rows|no data"),
    ("empty file", "", "no rows|neither readable"),
    ("blank lines", "\n\n", "no rows|neither readable"),
    ("empty chosen", [{**PAIR, "chosen": " "}], "no row can be used here: 1 x empty answer"),
    ("empty rejected", [{**PAIR, "rejected": ""}], "1 x empty answer"),
    ("empty prompt", [{**PAIR, "prompt": "  "}], "1 x empty prompt"),
    ("identical answers", [{**PAIR, "rejected": PAIR["chosen"]}], "1 x chosen and rejected are identical"),
    ("nulls", [{"prompt": None, "chosen": None, "rejected": None}], "no row can be used"),
    ("a null answer", [{**PAIR, "rejected": None}], "1 x malformed row, or a null .KeyError: 'rejected'"),
    ("lists of numbers", [{**PAIR, "chosen": [1], "rejected": [2]}], "1 x malformed row"),
    ("strings without prompt", [{"chosen": "b", "rejected": "c"}], "neither a column 'prompt' nor a conversation"),
    ("messages without role", [{**PAIR, "prompt": [{"content": "a"}]}], "1 x a message without a role"),
    ("messages of parts", [{**PAIR, "prompt": [{**USER, "content": [{"text": "a"}]}]}], "1 x a message without a role"),
    ("no messages", [{"chosen": [], "rejected": []}], "1 x no prompt"),
    ("answers by the user", [{"chosen": [USER], "rejected": [USER]}], "1 x the last message is not the assistant's"),
    ("answers without question", [{"chosen": [ASSISTANT], "rejected": [OTHER]}], "1 x no prompt"),
    ("two assistants in a row", [{"chosen": [USER, ASSISTANT, ASSISTANT], "rejected": [USER, ASSISTANT, OTHER]}],
     "1 x the prompt ends with the assistant"),
    ("different prompts", [{"chosen": [USER, ASSISTANT], "rejected": [{**USER, "content": "c"}, ASSISTANT]}],
     "1 x chosen and rejected answer different prompts"),
    ("transcript without answer", [{"chosen": "\n\nHuman: a", "rejected": "\n\nHuman: a"}], "1 x the last message is"),
    ("a tool call", [{"prompt": [USER], "chosen": [{**ASSISTANT, "tool_calls": [1]}], "rejected": "c"}],
     "1 x a message with tool_calls, which is not read"),
    ("tools", [{**PAIR, "tools": [{"name": "f"}]}], "1 x a column 'tools', which is not read: write it into the"),
    ("an earlier conversation", [{**PAIR, "history": [["a", "b"]]}], "1 x a column 'history', which is not read"),
    ("malformed JSON", json.dumps(PAIR) + "\n{oops\n", "data.jsonl: neither readable .*JSON parse error.* in row 1"),
    ("rows that are lists", "[1, 2]\n", "fit none of"),
    ("rows that are numbers", "7\n", "no rows|no data"),
    ("not UTF-8", b"\xff\xfe{}\n", "data.jsonl: neither readable"),
    ("binary", bytes(range(256)), "data.jsonl: neither readable"),
    ("JSON in UTF-16", json.dumps(PAIR).encode("utf-16"), "neither readable .*'utf-8' codec can't decode"),
    ("prompts too long", [{**PAIR, "prompt": "list two animals " * 200}],
     "no prompt is left: 1 x longer than --max-prompt-length 512"),
]  # fmt: skip


@pytest.mark.parametrize("name, rows, message", DATASETS, ids=[name for name, *_ in DATASETS])
def test_bad_datasets(name, rows, message, make, fails, tiny_model):
    fails(train_gvm, message, model_path=tiny_model, dataset=make(rows))


with zipfile.ZipFile(SPREADSHEET := io.BytesIO(), "w") as archive:
    archive.writestr("[Content_Types].xml", '<?xml version="1.0"?><Types/>')
    archive.writestr("xl/worksheets/sheet1.xml", '<?xml version="1.0"?><worksheet/>')
FILES = [
    ("malformed JSON document", "data.json", '[{"prompt": "a"},\n oops]', "neither readable here"),
    ("a JSON object", "data.json", '{"column": "a"}', "fit none of"),
    ("no gzip", "data.jsonl.gz", "plain text", "neither readable here"),
    ("half a gzip", "data.jsonl.gz", gzip.compress(json.dumps(PAIR).encode() * 99)[:-9], "neither readable here"),
    ("no parquet", "data.parquet", "plain text", "neither readable here"),
    (
        "a comma in a text of a CSV",
        "data.csv",
        "prompt,response\nTell me, please,ok\n",
        "more fields in a row than col",
    ),
    ("a spreadsheet", "data.xlsx", SPREADSHEET.getvalue(), "neither readable here"),
    ("a task without columns", "task.py", "def rows(split):\n    return [{'text': 'a'}]\n", "fit none of"),
    ("a task without rows", "task.py", "def rows(split):\n    return []\n", "no rows"),
]


@pytest.mark.parametrize("name, file, content, message", FILES, ids=[name for name, *_ in FILES])
def test_bad_files(name, file, content, message, make, fails, tiny_model):
    fails(sft, message, model_path=tiny_model, dataset=make(content, file))


@pytest.mark.parametrize(
    "dataset, message",
    [
        ("./nowhere.jsonl", "no such file or folder"),
        ("/nowhere/at/all", "no such file or folder"),
        ("~/nowhere.parquet", "no such file or folder"),
        ("no-such-owner/no-such-dataset", "neither readable here nor on the hub"),
        ("", "neither readable here nor on the hub|expected|no such"),
        (".", "neither readable here nor on the hub"),
    ],
)
def test_datasets_that_are_not_there(dataset, message, fails, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(sft, message, model_path=tiny_model, dataset=dataset)


def test_unknown_split(fails, tiny_model, tmp_path):
    import datasets

    data = datasets.Dataset.from_list([PAIR])
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "several")
    fails(sft, "no split 'test'; there are train", model_path=tiny_model, dataset=f"{tmp_path / 'several'}:test")
    fails(sft, "no split 'test'; there are train", model_path=tiny_model, dataset=f"{tmp_path / 'one'}:test")


def test_a_damaged_dataset_folder(fails, tiny_model, tmp_path):
    import datasets

    datasets.Dataset.from_list([PAIR]).save_to_disk(tmp_path / "data")
    next((tmp_path / "data").glob("*.arrow")).write_bytes(b"damaged")
    fails(sft, "neither readable here nor on the hub", model_path=tiny_model, dataset=str(tmp_path / "data"))


SCORED = {"prompt": "a", "response": "b", "score": 1}


@pytest.mark.parametrize(
    "rows, message",
    [
        ([PAIR], "1 x no score"),
        ([{**SCORED, "score": "N/A"}], "1 x no score"),
        ([{**SCORED, "score": [1]}], "1 x no score"),
        ('{"prompt": "a", "response": "b", "score": NaN}', "1 x no score"),
        ('{"prompt": "a", "response": "b", "score": Infinity}', "1 x no score|neither readable"),
        ([{**SCORED, "response": ""}], "1 x empty answer"),
        ([{**SCORED, "prompt": f"list {n} animals"} for n in ("two", "three", "four")], "all scores in .* equal 1"),
    ],
)
def test_bad_scores(rows, message, make, fails, tiny_model):
    fails(train_gvm, message, model_path=tiny_model, dataset=make(rows), label_source="score")


def test_all_prompts_held_out(make, fails, tiny_model):
    prompt = next(f"list {i}" for i in range(999) if random.Random(f"list {i}").random() < 0.05)
    fails(train_gvm, "too few prompts, all of them are held out", model_path=tiny_model,
          dataset=make([{**PAIR, "prompt": prompt}]))  # fmt: skip


def test_context_without_policy_columns(make, fails, tiny_model):
    fails(train_gvm, "lacks the columns chosen_policy and rejected_policy", model_path=tiny_model,
          dataset=make([PAIR]), num_context_trajectories=3)  # fmt: skip


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"prompt": ""}], "1 x empty prompt"),
        ([{"prompt": [USER, ASSISTANT]}], "1 x the prompt ends with the assistant"),
        ([{"prompt": True}], "1 x no prompt"),
        ([{"text": "a"}], "columns .*text.* fit none of"),
    ],
)
def test_bad_prompts(rows, message, make, fails, tiny_model, tiny_gvm):
    fails(train_dvpo, message, model_path=tiny_model, gvm_path=tiny_gvm, dataset=make(rows))


def test_prompts_train_no_reward_model(make, fails, tiny_model):
    fails(train_ppo_baseline, "columns .*prompt.* fit none of", model_path=tiny_model, dataset=make([{"prompt": "a"}]))


def test_a_reward_that_the_dataset_cannot_pay(make, fails, tiny_model, tiny_gvm):
    data = make([{"prompt": f"a {i}"} for i in range(20)])
    message = "--reward-source task: .* defines no score"
    fails(train_dvpo, message, model_path=tiny_model, gvm_path=tiny_gvm, dataset=data, reward_source="task")
    fails(train_ppo_baseline, message, model_path=tiny_model, dataset=data, reward_source="task")


@pytest.mark.parametrize("score", ["float('nan')", "None", "'good'", "[1.0]"])
@pytest.mark.parametrize("module", [train_dvpo, train_ppo_baseline, evaluate])
def test_scores_that_are_no_numbers(module, score, make, tiny_model, tiny_gvm, tmp_path):
    code = f"""rows = lambda split: [{{"prompt": "list two animals"}}]\nscore = lambda prompt, answer: {score}\n"""
    model = {"model_path": tiny_model, "rollout_batch_size": 8, "output_dir": str(tmp_path / "out")}
    flags = {
        train_dvpo: {**model, "gvm_path": tiny_gvm},
        train_ppo_baseline: {**model, "critic_path": tiny_gvm, "reward_source": "task"},
        evaluate: {"policies": (f"a={tiny_model}",), "reference_path": tiny_model, "gvm_path": None},
    }[module]
    with pytest.raises(common.UserError, match=r"task.py: score\(\) gave no finite number for '"):
        module.main(module.Args(dataset=make(code, "task.py"), **flags))


def test_policy_and_reward_model_in_one_folder(fails, tiny_model, tmp_path):
    fails(train_ppo_baseline, "--output-dir and --reward-output-dir must differ", model_path=tiny_model,
          reward_output_dir=str(tmp_path / "out"))  # fmt: skip


# ---- Settings --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "setting",
    [{"micro_batch_size": 0}, {"rollout_batch_size": 7}, {"response_length": 0}, {"num_minibatches": -1},
     {"temperature": float("nan")}, {"num_updates": 0}, {"dp_replicate": 3}, {"dp_replicate": 0},
     {"learning_rate": -1e-3}, {"learning_rate": float("inf")}, {"gamma": -1.5}, {"gae_lambda": -0.1},
     {"clip_coef": -0.1}, {"kl_coef": -1.0}, {"kl_target": -1.0}, {"max_grad_norm": -1.0}, {"max_kl": float("nan")},
     {"seed": -1}, {"seed": 2**63}, {"max_prompt_length": 0}, {"rollout_micro_batch_size": 0}, {"checkpoint_every": 0},
     {"num_epochs": 0}, {"lora_rank": -1}],
    ids=str,
)  # fmt: skip
def test_impossible_settings(setting, fails, tiny_model, tiny_gvm):
    name = next(iter(setting)).replace("_", "-")
    message = f"--{name} (.* )?must be |processes must be a multiple of --{name}"
    fails(train_dvpo, message, model_path=tiny_model, gvm_path=tiny_gvm, **setting)


@pytest.mark.parametrize(
    "module, setting",
    [*((train_ppo_baseline, setting) for setting in (
        {"micro_batch_size": 3}, {"reward_batch_size": 3}, {"reward_num_epochs": 0}, {"rollout_batch_size": 7},
        {"value_clip_coef": -0.1}, {"critic_learning_rate": -1.0}, {"missing_eos_penalty": float("nan")})),
     *((train_gvm, setting) for setting in (
        {"td_lambda": -2.0}, {"bt_coef": -1.0}, {"warmup_fraction": -0.5}, {"num_context_trajectories": -1},
        {"num_examples": 0}, {"micro_batch_size": 1}, {"batch_size": 3}))],
    ids=lambda x: getattr(x, "__name__", str(x)),
)  # fmt: skip
def test_impossible_settings_of_other_scripts(module, setting, fails, tiny_model):
    fails(module, "must be (a multiple of|at least [01])", model_path=tiny_model, **setting)


def test_pairs_without_a_place(fails, tiny_gpt2, tiny_gvm):
    """GPT-2's layers are of a kind of their own; nothing is learned beside layers that nothing was learned by."""
    message = "--lora-rank: gpt2's decoder layers hold no nn.Linear: leave it at 0"
    fails(train_dvpo, message, model_path=tiny_gpt2, gvm_path=tiny_gvm, lora_rank=4)
    fails(sft, "--lora-rank: .*lists.py is untrained: leave it at 0", lora_rank=4)


@pytest.mark.parametrize(
    "flags",
    [["--nonsense"], ["--seed", "one"], ["--advantage", "vtrace"], ["--resume", "a", "b"]],
    ids=str,
)
def test_bad_command_lines(flags, tiny_model, tiny_gvm, tmp_path):
    result = run_script("train_dvpo.py", "--model-path", tiny_model, "--gvm-path", tiny_gvm, *flags, cwd=tmp_path)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


# ---- Models ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["model_path", "gvm_path"])
def test_a_run_does_not_overwrite_what_it_reads(name, fails, tiny_model, tiny_gvm):
    paths = {"model_path": tiny_model, "gvm_path": tiny_gvm}
    before = {file: file.stat() for file in Path(paths[name]).iterdir()}
    fails(train_dvpo, "holds other files than a run's", **paths, output_dir=f"{paths[name]}/")
    assert {file: file.stat() for file in Path(paths[name]).iterdir()} == before


@pytest.mark.parametrize("module", [train_gvm, train_dvpo, train_ppo_baseline])
def test_the_untrained_model_is_for_sft_alone(module, fails):
    """Reference and policy would be two different random models."""
    fails(module, "lists.py: an untrained model, for sft.py alone", model_path="tests/tasks/lists.py")
    fails(sft, r"arithmetic.py: defines no model\(\)", model_path="tests/tasks/arithmetic.py")


@pytest.mark.parametrize("path", ["./nowhere", "no-such-owner/no-such-model", "runs/base", ""])
def test_missing_models(path, fails, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fails(sft, f"{path}: (no such folder|cannot load)", model_path=path)


@pytest.mark.parametrize("module, flag", [(train_dvpo, "runs/gvm"), (train_gvm, "runs/sft")])
def test_a_stage_is_missing(module, flag, fails, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    more = {"model_path": tiny_model} if module is train_dvpo else {}
    fails(module, f"{flag}: no such folder, or an unfinished run: run the stage that makes it", **more)


ROPE = {"factor": 2.0, "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
CONFIGS = {
    "quantised": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    "outputs as tuples": {"return_dict": False},
    "scaled positions": {"rope_parameters": {"rope_type": "dynamic", **ROPE}},
    "positions of an unknown type": {"rope_scaling": {"type": "su", **ROPE}, "rope_parameters": None},
    "another vocabulary": {"vocab_size": 777},
    "code of its own": {  # which must not be run
        "model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
    },
}  # fmt: skip


def spoil(folder: Path, damage: str) -> None:
    """Damage a copy of a model."""
    if damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "half the weights":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    elif damage == "weights that are none":
        (folder / "model.safetensors").write_text("not a tensor in sight")
    elif damage == "no config":
        (folder / "config.json").unlink()
    elif damage == "a config that is no JSON":
        (folder / "config.json").write_text("{")
    elif damage == "an unknown architecture":
        (folder / "config.json").write_text(json.dumps({"model_type": "nonesuch"}))
    elif damage == "no tokenizer":
        for file in folder.glob("*token*"):
            file.unlink()
    elif damage == "a tokenizer that is no JSON":
        (folder / "tokenizer.json").write_text("{")
    elif damage == "pickled weights":
        from safetensors.torch import load_file

        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    elif damage == "an adapter":
        (folder / "config.json").rename(folder / "adapter_config.json")
    elif damage == "a tokenizer for sentencepiece":
        (folder / "tokenizer.json").unlink()
        (folder / "tokenizer.model").write_bytes(b"\x0a\x0e")
        settings = {"tokenizer_class": "LlamaTokenizer", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    else:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **CONFIGS[damage]}))
    if damage == "code of its own":
        (folder / "mine.py").write_text(f"open({str(folder / 'executed')!r}, 'w')\n")


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no weights", "cannot load"),
        ("half the weights", "cannot load"),
        ("weights that are none", "cannot load"),
        ("no config", "cannot load"),
        ("a config that is no JSON", "cannot load"),
        ("an unknown architecture", "cannot load"),
        ("no tokenizer", "cannot load AutoTokenizer|the tokenizer has no"),
        ("a tokenizer that is no JSON", "cannot load AutoTokenizer"),
        ("a tokenizer for sentencepiece", "cannot load AutoTokenizer, which needs sentencepiece"),
        ("pickled weights", "cannot load"),
        ("code of its own", "cannot load"),
        ("an adapter", "an adapter: merge it"),
        ("quantised", "quantised weights"),
        ("outputs as tuples", "llama does not compute"),
        ("scaled positions", "positions of the type dynamic are not supported"),
        ("positions of an unknown type", "positions of the type su are not supported"),
        ("another vocabulary", r"weights of another size than needed: .* is \[[0-9]+, 32\], not \[777, 32\]"),
    ],
)
def test_damaged_models(damage, message, fails, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    spoil(folder, damage)
    fails(sft, f"model: ({message})", model_path=str(folder))
    assert not (folder / "executed").exists()


def test_a_model_that_sees_has_no_dropout_and_no_dynamic_positions_either(tmp_path):
    """What it reads with has a config of its own inside."""
    config = transformers.Gemma3Config(text_config={"attention_dropout": 0.3})
    config.save_pretrained(tmp_path)
    assert common.load_config(str(tmp_path)).get_text_config().attention_dropout == 0.0
    config.text_config.rope_parameters["full_attention"] = {"rope_type": "dynamic", **ROPE}
    config.save_pretrained(tmp_path)
    with pytest.raises(common.UserError, match="positions of the type dynamic are not supported"):
        common.load_config(str(tmp_path))


def test_a_dry_run_of_no_language_model(fails, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    transformers.T5Config().save_pretrained(folder)
    fails(sft, "model: no language model", model_path=str(folder), dry_run=True, learning_rate=1.0, response_length=9)


def test_a_tokenizer_without_an_end(fails, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["eos_token"] = None
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    fails(sft, "the tokenizer has no end-of-sequence token", model_path=str(folder))


def test_more_tokens_than_the_model_knows(fails, tiny_model, tmp_path):
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    tokenizer = common.load_tokenizer(tiny_model)
    tokenizer.add_tokens([f"new{i}" for i in range(9)])
    tokenizer.save_pretrained(folder)
    fails(sft, "the model lacks tokens of its tokenizer", model_path=str(folder))


@pytest.mark.parametrize("difference", ["tokenizers", "chat templates"])
def test_tokenizers_differ(difference, fails, tiny_model, tiny_gvm, tmp_path):
    tokenizer = common.load_tokenizer(tiny_gvm)
    if difference == "tokenizers":
        tokenizer.add_tokens(["new"])
    else:
        tokenizer.chat_template += " "
    shutil.copytree(tiny_gvm, tmp_path / "gvm")
    tokenizer.save_pretrained(tmp_path / "gvm")
    fails(train_dvpo, "different tokenizers or chat templates", model_path=tiny_model, gvm_path=str(tmp_path / "gvm"))


@pytest.mark.parametrize("module", [sft, train_dvpo])
@pytest.mark.parametrize("tied", [False, True])
def test_a_gvm_is_no_policy(module, tied, fails, tiny_gvm, tmp_path):
    """Also where the output head is the embedding, which a value model has, too."""
    path = shutil.copytree(tiny_gvm, tmp_path / "copy")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": tied}))
    fails(module, "no language model: it lacks an output head, or is a value", model_path=str(path),
          **({"gvm_path": tiny_gvm} if module is train_dvpo else {}))  # fmt: skip


def test_an_unfinished_run_is_no_model(fails, tiny_gvm, tmp_path):
    (tmp_path / "dvpo").mkdir()
    (tmp_path / "dvpo" / ".dvpo-run").write_text("")
    fails(sft, "dvpo: no such folder, or an unfinished run", model_path=str(tmp_path / "dvpo"))


def test_a_file_has_no_splits(make, fails, tiny_model):
    fails(sft, "no split 'test'; there are train", model_path=tiny_model, dataset=make([PAIR]) + ":test")


def test_a_policy_is_no_gvm(fails, tiny_model):
    fails(train_dvpo, "is it a GVM|no value", model_path=tiny_model, gvm_path=tiny_model)


def test_a_policy_is_no_reward_model(fails, tiny_model):
    fails(
        train_ppo_baseline, "is it a GVM or a reward model|no value or", model_path=tiny_model, reward_path=tiny_model
    )


def test_a_reward_model_without_a_name(fails, tiny_model):
    fails(train_ppo_baseline, "cannot load", model_path=tiny_model, reward_path="")


def test_a_critic_is_missing_before_a_reward_model_is_trained(fails, tiny_model):
    fails(train_ppo_baseline, "runs/nowhere: no such folder", model_path=tiny_model, critic_path="runs/nowhere")


def test_a_reward_model_that_stands_there(fails, tiny_model, tmp_path):
    (tmp_path / "rm").mkdir()
    (tmp_path / "rm" / "README.md").write_text("")
    fails(train_ppo_baseline, "holds a reward model: if .* trained it, use it by --reward-path", model_path=tiny_model,
          reward_output_dir=str(tmp_path / "rm"))  # fmt: skip


def test_a_config_does_not_name_the_attention(tiny_model, tmp_path):
    """transformers would ask the hub for the code of such a kernel."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_attn_implementation": "owner/kernel"}))
    policy = common.load_policy(str(folder), common.load_tokenizer(str(folder)), torch.float32)
    assert policy.config._attn_implementation == "sdpa"


def test_a_head_of_the_wrong_width(fails, tiny_model, tmp_path):
    from transformers import AutoModelForSequenceClassification

    AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=3).save_pretrained(tmp_path / "gvm")
    common.load_tokenizer(tiny_model).save_pretrained(tmp_path / "gvm")
    fails(
        train_dvpo,
        r"weights of another size than needed: score.weight is \[3, [0-9]+\], not \[1, [0-9]+\]",
        model_path=tiny_model,
        gvm_path=str(tmp_path / "gvm"),
    )


@pytest.mark.parametrize(
    "family, module",
    [
        ("opt", train_gvm),
        ("gemma2", sft),
        ("cohere", sft),
        ("granite", sft),
        ("mamba", sft),
        ("openai-gpt", sft),
        ("t5", sft),
        ("bert", sft),
    ],
)
def test_unsupported_architectures(family, module, fails, tiny_model, tmp_path):
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 128}
    if family == "t5":
        sizes = {"d_model": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 128}
    if family == "openai-gpt":
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 128}
    if family == "mamba":
        sizes = {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 128, "initializer_range": 1.0}
    if family == "granite":
        sizes["logits_scaling"] = 8.0
    config = AutoConfig.for_model(family, **sizes)
    auto = AutoModel if family == "t5" else AutoModelForCausalLM
    auto.from_config(config).save_pretrained(tmp_path / "model")
    common.load_tokenizer(tiny_model).save_pretrained(tmp_path / "model")
    message = {"cohere": "more to its logits", "granite": "more to its logits", "mamba": "key-value cache"}
    message = message.get(family, "not supported|cannot load|does not compute")
    message = (
        "cannot load AutoModelForSequenceClassification|no list of decoder layers" if module is train_gvm else message
    )
    fails(module, message, model_path=str(tmp_path / "model"))


# ---- Evaluation ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "policies, message",
    [
        (("runs/sft",), "'runs/sft': expected NAME=PATH"),
        ((), "name at least one policy"),
        (("a=MODEL", "a=MODEL"), "two policies have the same name"),
        (("a=MODEL", "b=./nowhere"), "./nowhere: no such folder"),
        (("a=",), "cannot load"),
    ],
)
def test_bad_evaluations(policies, message, fails, tiny_model):
    policies = tuple(policy.replace("MODEL", tiny_model) for policy in policies)
    fails(evaluate, message, policies=policies, reference_path=tiny_model, gvm_path=None)


@pytest.mark.parametrize("settings, message", [
    ({"value_guided": 0.1}, "--value-guided needs --top-k, .*as in 8"),
    ({"value_guided": 0.0, "top_k": 8}, "--value-guided 0: name a BETA above 0"),
    ({"value_guided": -1.0, "top_k": 8}, "--value-guided -1.0 must be at least 0 and finite"),
    ({"value_guided": math.inf, "top_k": 8}, "--value-guided inf must be at least 0 and finite"),
    ({"value_guided": 0.1, "top_k": 8, "gvm_path": None}, "--value-guided needs a value model: --gvm-path"),
    ({"top_k": 0}, "--top-k 0 must be at least 1"),
])  # fmt: skip
def test_bad_guides(settings, message, fails, tiny_model, tiny_gvm):
    fails(evaluate, message, **{"policies": (f"a={tiny_model}",), "reference_path": tiny_model, "gvm_path": tiny_gvm,
                                **settings})  # fmt: skip


def test_nothing_is_held_out(make, fails, tiny_model):
    prompt = next(f"list {i}" for i in range(999) if random.Random(f"list {i}").random() >= 0.05)
    fails(evaluate, "is held out; .*:all takes all", policies=(f"a={tiny_model}",), reference_path=tiny_model,
          gvm_path=None, dataset=make([{**PAIR, "prompt": prompt}]))  # fmt: skip


def test_a_conditioned_gvm_must_know_who_wrote_the_pairs(make, fails, tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """And says so before any answer is sampled."""
    folder = Path(shutil.copytree(tiny_gvm, tmp_path / "gvm"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_context_trajectories": 1}))
    monkeypatch.delattr(evaluate, "guided_generate")
    settings = {"policies": (f"a={tiny_model}",), "reference_path": tiny_model, "gvm_path": str(folder)}
    fails(evaluate, "must have chosen_policy", **settings, dataset=make([PAIR]) + ":train")
    fails(evaluate, "--value-guided: .*gvm is conditioned on other answers", **settings, value_guided=0.1, top_k=8)


def test_a_policy_that_is_not_finite_wins_nothing(fails, tiny_model, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(tiny_model, tmp_path / "nan"))
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.weight"][0, 0] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(common.UserError, match="nan: its weights are not finite"):
        evaluate.main(evaluate.Args((f"bad={folder}",), tiny_model, None, num_prompts=4, output_dir=str(tmp_path)))


# ---- Paths, permissions, environment ---------------------------------------------------------------------------------
@pytest.mark.parametrize("where", ["file", "file/below"])
@pytest.mark.parametrize("module", [sft, evaluate])
def test_an_output_folder_that_cannot_be(module, where, tiny_model, tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    more = {"model_path": tiny_model} if module is sft else {"policies": (f"a={tiny_model}",), "gvm_path": None,
                                                             "reference_path": tiny_model}  # fmt: skip
    with pytest.raises(SystemExit) as left, common.one_line_errors():
        module.main(module.Args(output_dir=str(tmp_path / where), **more))
    assert left.value.code == 2 and (tmp_path / "file").read_text() == "in the way"
    assert re.match("error: --output-dir .*file.*: cannot be (read or )?written", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["not UTF-8 \udce9", "two\nlines"])
def test_a_name_that_cannot_be_saved_to(name, fails, tiny_model, tmp_path):
    """Told before anything is trained: the end, too, would tell it."""
    fails(sft, "--output-dir .* has a character that", model_path=tiny_model, output_dir=str(tmp_path / name))
    assert not (tmp_path / name).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(fails, tiny_model, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    fails(
        sft, "cannot be written \\(Permission denied", model_path=tiny_model, output_dir=str(tmp_path / "closed" / "x")
    )


ENVIRONMENTS = [
    ({"WORLD_SIZE": "2"}, "start with torchrun .*RANK expected, but not set"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "start with torchrun .*MASTER_ADDR expected, but not set"),
    ({"RANK": "0", "WORLD_SIZE": "two", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, "invalid literal .*'two'"),
    ({"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "1"}, "MASTER_ADDR expected, but not set"),
]


@pytest.mark.parametrize("variables, message", ENVIRONMENTS)
def test_half_an_environment(variables, message, fails, tiny_model, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    fails(sft, f"environment: .*{message}", model_path=tiny_model)


def test_a_port_that_is_taken(fails, tiny_model, monkeypatch):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost",
                            "MASTER_PORT": str(taken.getsockname()[1])}.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        fails(sft, "environment: the processes cannot meet; .*socket", model_path=tiny_model)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_line_from_all_processes(ranks, tiny_model, tmp_path):
    result = run_script("sft.py", "--model-path", tiny_model, "--dataset", "./nowhere.jsonl", "--output-dir",
                        tmp_path / "out", ranks=ranks, cwd=tmp_path)  # fmt: skip
    lines = [line for line in result.stderr.splitlines() if line.startswith("error:")]
    assert lines == ["error: --dataset ./nowhere.jsonl: no such file or folder"]
    assert not (tmp_path / "out").exists()
    if ranks == 1:
        assert result.returncode == 2 and result.stderr.splitlines() == lines


def test_what_a_terminal_would_obey_is_shown(make, fails, tiny_model, capsys):
    """A dataset's column names stand in the message; they cannot clear the screen."""
    fails(train_gvm, r"columns \(\\x1b\[2Jprompt\)", model_path=tiny_model, dataset=make([{"\x1b[2Jprompt": "a"}]))
    common.log("a\x1b[31m\nb")
    assert capsys.readouterr().out == "a\\x1b[31m\nb\n"


def test_a_bad_policy_takes_nothing_from_the_good_one_before(tiny_model, tiny_gvm, tmp_path):
    with pytest.raises(common.UserError, match="no language model"):
        evaluate.main(evaluate.Args((f"good={tiny_model}", f"bad={tiny_gvm}"), tiny_model, None, num_prompts=2,
                                    output_dir=str(tmp_path)))  # fmt: skip
    dist.destroy_process_group()
    answers = json.loads((tmp_path / "answers.json").read_text())
    assert {answer["generator"] for answer in answers} == {"good"} and len(answers) >= 2


# ---- What a model can hold, and what suits it ------------------------------------------------------------------------
@pytest.mark.parametrize("module", [sft, train_gvm, train_ppo_baseline, evaluate])
def test_learned_positions_run_out(module, make, fails, tiny_gpt2):
    rows = [{"prompt": f"list {n} {kind}", "chosen": "dog, " * 40, "rejected": "cat, " * 40}
            for n in ("two", "three", "four", "five") for kind in ("animals", "metals", "tools", "trees")]  # fmt: skip
    data, model = make(rows), {"model_path": tiny_gpt2}
    if module is evaluate:
        data, model = f"{data}:all", {"policies": (f"a={tiny_gpt2}",), "reference_path": tiny_gpt2, "gvm_path": None}
    fails(module, "take up to (8|9)[0-9] tokens, and it was made for 64: lower", dataset=data, response_length=90,
          **model)  # fmt: skip


@pytest.mark.parametrize("module", [sft, train_gvm, train_ppo_baseline])
def test_learned_positions_run_out_on_a_held_out_prompt(module, make, fails, tiny_gpt2):
    rows = [{"prompt": f"list {n} {kind}", "chosen": "dog.", "rejected": "cat."}
            for n in ("two", "three", "four", "five") for kind in ("animals", "metals", "tools", "trees")]  # fmt: skip
    long = "list three fruits" + " dog" * 58
    assert random.Random(long).random() < 0.05  # held out
    rows += [{**rows[0], "prompt": long}]
    fails(module, "take up to [6-9][0-9] tokens, and it was made for 64: lower", dataset=make(rows),
          model_path=tiny_gpt2, max_prompt_length=128)  # fmt: skip


def test_rotary_positions_run_out_and_it_is_said(fails, tiny_model, tmp_path, capsys):
    shutil.copytree(tiny_model, tmp_path / "short")
    config = json.loads((tmp_path / "short" / "config.json").read_text())
    (tmp_path / "short" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8}))
    sft.main(sft.Args(str(tmp_path / "short"), output_dir=str(tmp_path / "out"), num_examples=8, num_epochs=1))
    assert re.search("warning: .*short: prompt and answer take up to [0-9]+ tokens, and it was made for 8",
                     capsys.readouterr().out)  # fmt: skip


@pytest.mark.parametrize(
    "module, flags",
    [(sft, "--learning-rate, --response-length"), (train_gvm, "--learning-rate, --response-length"),
     (train_dvpo, "--learning-rate, --response-length"), (evaluate, "--response-length"),
     (train_ppo_baseline, "--learning-rate, --response-length, --reward-learning-rate")],
    ids=lambda x: getattr(x, "__name__", ""),
)  # fmt: skip
def test_a_large_model_gets_no_defaults_of_a_small_one(module, flags, fails, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "large")
    config = json.loads((tmp_path / "large" / "config.json").read_text())
    (tmp_path / "large" / "config.json").write_text(json.dumps({**config, "hidden_size": 2048}))
    model = {"model_path": str(tmp_path / "large")}
    if module is evaluate:
        model = {"policies": (f"a={tmp_path / 'large'}",)}
    fails(module, f"^error: {flags}: name what suits ", **model)
    if module is train_ppo_baseline:  # without a reward model to train, its rate is not asked for
        fails(module, "^error: --learning-rate, --response-length: name what suits ", reward_path=tiny_model, **model)


def test_a_reward_model_stands_beside_its_policy(tiny_model, tmp_path):
    for name, beside in (("ppo", "rm"), ("my_ppo", "my_rm"), ("other", "other_rm")):
        train_ppo_baseline.main(train_ppo_baseline.Args(
            tiny_model, output_dir=str(tmp_path / name), num_updates=1, rollout_batch_size=8, num_minibatches=1,
            num_epochs=1, reward_batch_size=16_000, reward_num_epochs=1))  # fmt: skip
        assert (tmp_path / beside / "README.md").exists()


def test_weights_without_a_place_are_told(fails, tiny_model, tiny_gvm, tmp_path, capsys):
    for name, source in (("lm", tiny_model), ("gvm", tiny_gvm)):
        shutil.copytree(source, tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        extra = "score.bias" if name == "gvm" else "vision.weight"
        save_file({**weights, extra: torch.ones(1)}, tmp_path / name / "model.safetensors", {"format": "pt"})
    common.load_policy(str(tmp_path / "lm"), common.load_tokenizer(tiny_model), torch.float32)
    assert "lm: 1 of its weights are not read, such as vision.weight" in capsys.readouterr().out
    fails(train_dvpo, "is not a plain `score` layer", model_path=tiny_model, gvm_path=str(tmp_path / "gvm"))


def test_a_family_without_a_value_model_is_told_before_it_is_trained(tiny_model):
    assert sft.has_value_model(common.load_config(tiny_model))
    assert not sft.has_value_model(transformers.Gemma3nTextConfig())


# ---- Security --------------------------------------------------------------------------------------------------------
def test_names_are_no_paths(tiny_model, tmp_path):
    """A policy's name goes into tables; it cannot lead out of the output folder."""
    names = ("../../evil", "/tmp/evil\x1b[2J", "<script>alert(1)</script>")
    evaluate.main(evaluate.Args(tuple(f"{name}={tiny_model}" for name in names), tiny_model, None, num_prompts=2,
                                output_dir=str(tmp_path / "a" / "b" / "out")))  # fmt: skip
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"a/b/out/results.json", "a/b/out/report.html", "a/b/out/answers.json"}
    assert "<script" not in (tmp_path / "a/b/out/report.html").read_text()


def test_nothing_is_sent(tiny_model, tmp_path, monkeypatch):
    """A whole run without a connection or a look-up of a name by Python code; the processes' own talk is gloo's."""

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    sft.main(sft.Args(tiny_model, output_dir=str(tmp_path / "out"), num_examples=8, num_epochs=1, batch_size=8))
    assert (tmp_path / "out" / "config.json").exists()


def test_no_remote_code_and_no_pickle():
    """Loading goes through `load_pretrained` alone, never with a switch that runs or unpickles what was downloaded."""
    sources = {path.name: path.read_text() for path in Path(common.__file__).parent.glob("*.py")}
    assert not [name for name, text in sources.items() if "trust_remote_code=True" in text or "torch.load" in text]
    loads = [f"{name}: {line.strip()}" for name, text in sources.items() for line in text.splitlines()
             if ".from_pretrained(" in line and '"""' not in line]  # fmt: skip
    place = "str(local) if local.is_dir() else path"
    assert loads == [f"common.py: return auto_class.from_pretrained({place}, trust_remote_code=False, **kwargs)"]
    assert sources["common.py"].count("use_safetensors=True") == 1  # of whatever model
