"""The real scripts at tiny sizes: end to end, one rank against two, one micro-batch against several."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import lists
import pandas
import pytest
import torch
from conftest import ROOT, gold, load_weights, read_metrics, run_script, task_examples
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import common
import evaluate
import sft
import train_dvpo
import train_gvm
import train_ppo_baseline

SCRIPTS = ["sft", "train_gvm", "train_dvpo", "train_ppo_baseline", "evaluate"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_the_flags(script):
    result = run_script(f"{script}.py", "--help")
    assert result.returncode == 0 and "--output-dir" in result.stdout and "--response-length" in result.stdout


@pytest.mark.parametrize("module, bytes_each", [(sft, 16), (train_gvm, 16), (train_dvpo, 24), (train_ppo_baseline, 40)])
def test_a_dry_run_shows_and_writes_nothing(module, bytes_each, tiny_model, tiny_gvm, tmp_path, capsys):
    more = {"gvm_path": tiny_gvm} if module is train_dvpo else {}
    module.main(module.Args(tiny_model, output_dir=str(tmp_path / "run"), dry_run=True, **more))
    printed = capsys.readouterr().out
    assert not list(tmp_path.iterdir())
    counts = [
        int(line.split()[0])
        for line in printed.splitlines()
        if re.search("(prompts|answers) of [0-9]+ to [0-9]+ tokens", line)
    ]
    answers = {sft: 32_000, train_gvm: 32_000}.get(module)
    rows = 2 * answers if answers else int(re.search("([0-9]+) different prompts", printed)[1])
    assert "dropped" not in printed and sum(counts) == rows
    size = sum(tensor.numel() for tensor in load_weights(tiny_model).values())
    assert f"roughly: {bytes_each * size / 1e9:.3f} GB of weights, gradients and optimizer states" in printed


def test_imports_have_no_side_effect(tmp_path):
    code = (
        "import sys; sys.argv = ['x', '--nonsense']; import common, sft, train_gvm, train_dvpo, train_ppo_baseline, "
        "evaluate; import torch.distributed as d; import torch\n"
        "assert not d.is_initialized() and 'datasets' not in sys.modules and 'matplotlib' not in sys.modules\n"
        "print('fine')"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.stdout == "fine\n", result.stderr
    assert not list(tmp_path.iterdir())


def test_an_install_brings_no_modules():
    """Nothing named `common` or `evaluate` may hide another package of that name: the scripts run from the clone."""
    settings = (ROOT / "pyproject.toml").read_text()
    assert "packages = []" in settings and "py-modules" not in settings


def assert_same_run(a, b, keys, tolerance=2e-6):
    """Equal metrics, update by update, and equal trained weights, up to float error."""
    assert len(read_metrics(a)) == len(read_metrics(b))
    for x, y in zip(read_metrics(a), read_metrics(b)):
        for key in keys:
            assert (key in x) == (key in y), (x["step"], key)
            assert x.get(key, 0) == pytest.approx(y.get(key, 0), rel=1e-4, abs=tolerance), (x["step"], key)
    weights = load_weights(b)
    for name, tensor in load_weights(a).items():
        torch.testing.assert_close(tensor, weights[name], rtol=1e-4, atol=tolerance, msg=name)


@pytest.fixture(scope="module")
def some_pairs(tmp_path_factory) -> str:
    """A file of 48 preference pairs of the embedded task."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected} for e in task_examples()[:48]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def chain(tmp_path_factory, tiny_model, some_pairs):
    """sft -> train_gvm (conditioned) -> train_dvpo -> evaluate, each by the command a user types."""
    folder = tmp_path_factory.mktemp("chain")
    size = ["--num-examples", 24, "--num-epochs", 1, "--batch-size", 16]
    steps = [
        ["sft.py", "--model-path", tiny_model, "--output-dir", folder / "sft", *size],
        ["train_gvm.py", "--model-path", folder / "sft", "--output-dir", folder / "gvm", *size,
         "--num-context-trajectories", 1, "--learning-rate", 0.01],
        ["train_dvpo.py", "--model-path", folder / "sft", "--gvm-path", folder / "gvm", "--output-dir", folder / "dvpo",
         "--num-updates", 2, "--rollout-batch-size", 8, "--num-epochs", 1, "--num-minibatches", 1, "--kl-target", 1],
        ["train_ppo_baseline.py", "--model-path", folder / "sft", "--output-dir", folder / "ppo", "--reward-output-dir",
         folder / "rm", "--dataset", some_pairs, "--reward-batch-size", 16, "--num-updates", 2,
         "--rollout-batch-size", 8, "--num-epochs", 1, "--num-minibatches", 1, "--kl-target", 1],
        ["evaluate.py", f"sft={folder / 'sft'}", f"dvpo={folder / 'dvpo'}", "--reference-path", folder / "sft",
         "--gvm-path", folder / "gvm", "--output-dir", folder / "eval", "--num-prompts", 16],
    ]  # fmt: skip
    for step in steps:
        result = run_script(*step)
        assert result.returncode == 0, result.stderr[-3000:]
    return folder


def test_outputs_load_and_tell_how_they_were_made(chain):
    for name, auto in (
        ("sft", AutoModelForCausalLM),
        ("gvm", AutoModelForSequenceClassification),
        ("dvpo", AutoModelForCausalLM),
        ("rm", AutoModelForSequenceClassification),
        ("ppo", AutoModelForCausalLM),
    ):
        folder = chain / name
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert model.config.architectures == [type(model).__name__]
        assert AutoTokenizer.from_pretrained(folder).chat_template
        assert json.loads((folder / "args.json").read_text())["output_dir"] == str(folder)
        assert "python " in (folder / "README.md").read_text() and list(folder.glob("*.py"))
        assert not list(folder.glob("*.bin"))


def test_the_checkpoint_knows_its_end_and_its_dtype(tiny_model, tiny_gvm, tmp_path):
    args = train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(tmp_path / "out"), num_updates=1, rollout_batch_size=8,
                           dtype="bfloat16")  # fmt: skip
    train_dvpo.main(args)
    model = AutoModelForCausalLM.from_pretrained(args.output_dir)
    assert model.dtype == torch.bfloat16 and model.generation_config.eos_token_id == [1]
    assert read_metrics(args.output_dir)[0]["objective/kl"] == pytest.approx(0, abs=1e-5)  # bf16 on both sides


def test_the_policy_really_moved(chain):
    before, after = load_weights(chain / "sft"), load_weights(chain / "dvpo")
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("stage", ["dvpo", "ppo"])
def test_metrics_have_the_contracts_names(chain, stage):
    first, second = read_metrics(chain / stage)
    for key in ("objective/kl objective/entropy objective/non_score_reward objective/scores val/off_support "
                "policy/approxkl policy/clipfrac policy/entropy loss/policy val/ratio val/ratio_var "
                "val/response_length val/eos_rate optim/lr optim/grad_norm time/rollout time/score time/update "
                "time/total time/tokens_per_sec time/peak_mem_gb").split():  # fmt: skip
        assert isinstance(first[key], float), key
    assert "objective/gold" in read_metrics(chain / "dvpo")[0] and "loss/value" in read_metrics(chain / "ppo")[0]
    assert "rm/loss" in read_metrics(chain / "rm")[-1] and "rm/pair_accuracy" in read_metrics(chain / "rm")[-1]
    last = read_metrics(chain / "gvm")[-1]
    assert {"gvm/loss", "gvm/pair_accuracy", "gvm/pair_accuracy_half", "gvm/explained_variance"} <= last.keys()
    assert second["objective/kl_coef"] != first["objective/kl_coef"]  # --kl-target adapts it
    # Kept state is exactly on-policy at first: ratio 1, no clipping, no KL to old or reference policy.
    assert first["val/ratio"] == pytest.approx(1, abs=1e-6) and abs(first["val/ratio_var"]) < 1e-6
    assert first["policy/clipfrac"] == 0 and abs(first["policy/approxkl"]) < 1e-6 and abs(first["objective/kl"]) < 1e-5


def test_dvpo_and_ppo_write_the_same_metrics(chain):
    """So their runs overlay."""
    dvpo, ppo = chain / "dvpo", chain / "ppo"
    shared = read_metrics(dvpo)[0].keys() & read_metrics(ppo)[0].keys()
    assert read_metrics(dvpo)[0].keys() - shared == {"objective/gold"}  # which only a task has
    critic = {"loss/value", "critic/explained_variance", "critic/drift", "critic/grad_norm"}
    assert read_metrics(ppo)[0].keys() - shared == critic


def test_dvpo_and_ppo_start_from_the_same_rollout(chain, tiny_model, tiny_gvm, tmp_path):
    same = dict(num_updates=1, rollout_batch_size=8)
    train_dvpo.main(train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(tmp_path / "dvpo"), **same))
    ppo = train_ppo_baseline.Args(tiny_model, str(chain / "rm"), output_dir=str(tmp_path / "ppo"), **same)
    train_ppo_baseline.main(ppo)
    dvpo, ppo = (read_metrics(tmp_path / name)[0] for name in ("dvpo", "ppo"))
    for key in ("objective/gold", "objective/entropy", "val/response_length", "val/eos_rate"):
        assert dvpo[key] == ppo[key], key


def test_the_reward_model_scores_answers_for_others_as_for_us(chain):
    """transformers' own sequence classifier reads the same score."""
    tokenizer = common.load_tokenizer(str(chain / "rm"))
    prompts = [common.tokenize_prompt(tokenizer, [{"role": "user", "content": "list two animals"}])] * 2
    answers = common.tokenize_answers(tokenizer, ["dog and cow.", "dog."], 20)
    batch = common.pad_batch(prompts, answers, tokenizer.pad_token_id, "cpu")
    rm = common.load_value_model(str(chain / "rm"), tokenizer, torch.float32, fresh_head=False)
    with torch.no_grad():
        scores = common.last_values(train_ppo_baseline.token_values(rm, **batch), batch["response_mask"])
        theirs = AutoModelForSequenceClassification.from_pretrained(chain / "rm")(
            batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, 0]
    assert scores.abs().min() > 0
    torch.testing.assert_close(scores, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["dvpo", "ppo"])
def test_a_policy_that_leaves_the_data_is_noticed(method, chain, tiny_model, tiny_gvm, tmp_path, capsys):
    """Nothing holds the policy back and its judge knows nothing: its answers become ones that no data had."""
    shares = []
    for learning_rate in (1e-6, 0.05):
        same = dict(output_dir=str(tmp_path / str(learning_rate)), num_updates=8, rollout_batch_size=32,
                    learning_rate=learning_rate, kl_coef=0.0, max_kl=1e9)  # fmt: skip
        if method == "dvpo":
            train_dvpo.main(train_dvpo.Args(tiny_model, tiny_gvm, **same))
        else:
            train_ppo_baseline.main(train_ppo_baseline.Args(tiny_model, str(chain / "rm"), **same))
        shares.append(read_metrics(same["output_dir"])[-1]["val/off_support"])
        warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
        assert len(warnings) == (shares[-1] > 0.5)
    assert shares[0] < 0.25 and shares[1] > 0.5


def test_evaluation_reports_every_policy_and_the_gvm(chain):
    results = json.loads((chain / "eval" / "results.json").read_text())
    for name in ("sft", "dvpo"):
        row = results["policies"][name]
        assert row["gold"]["low"] <= row["gold"]["mean"] <= row["gold"]["high"]
        assert {"kl", "response_length", "eos_rate", "win_rate", "gvm_score"} <= row.keys()
    assert results["policies"]["sft"]["kl"] == pytest.approx(0, abs=1e-5)
    assert results["policies"]["sft"]["win_rate"]["mean"] == 0.5
    assert set(results["gvm"]["pair_accuracy"]) == {"mean", "last", "p1", "p5", "p10", "p90", "p95", "p99"}
    assert results["gvm"]["by_policy"].keys() == lists.WRITERS.keys()
    skill = {name: row["mean_label"] for name, row in results["gvm"]["by_policy"].items()}
    assert skill["expert"] > skill["careful"] > skill["careless"]
    assert 0.7 < results["gvm"]["gold_pair_accuracy"] < 0.9
    answers = json.loads((chain / "eval" / "answers.json").read_text())
    for name, row in results["policies"].items():  # every answer, with what the means are of
        mine = [answer for answer in answers if answer["generator"] == name]
        assert len(mine) == 32 and all(a["prompt"][-1]["content"] == a["instruction"] for a in mine)
        assert [a["gold"] for a in mine] == [gold(a["instruction"], a["output"]) for a in mine]
        means = {"gold": row["gold"]["mean"], "gvm_score": row["gvm_score"]["mean"], "kl": row["kl"]}
        means["tokens"] = row["response_length"]
        for key, mean in means.items():
            assert sum(a[key] for a in mine) / len(mine) == pytest.approx(mean, abs=1e-5), key
    page = (chain / "eval" / "report.html").read_text()
    assert "default-src 'none'" in page and "<script" not in page and "&lt;" not in page.split("<h2>")[0]


def test_the_readmes_chat_answers(chain, capsys):
    """The README's very lines, with a folder that was just trained."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert '"runs/dvpo"' in block
    exec(block.replace("runs/dvpo", str(chain / "dvpo")), {})
    assert re.search(r"\{'role': 'assistant', 'content': '.+'\}\]\}\n$", capsys.readouterr().out)


# ---- The report's pictures -------------------------------------------------------------------------------------------
def hovers(page: str) -> list[tuple[float, float]]:
    """Value and change of every coloured token of a page, without those of its scale."""
    numbers = re.findall(r'title="value (\S+), change (\S+)"', page)
    return [(float(value), float(change)) for value, change in numbers][5:]


def test_reports_escape_model_output(tmp_path):
    row = {"gold": {"mean": 0.0, "low": 0.0, "high": 0.0}, "kl": 0.0, "response_length": 1.0, "eos_rate": 1.0}
    payload = '"><script>alert(1)</script>\x1b[2J'
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "objective/kl": 0.5}\n')
    results = {"policies": {payload: {"path": str(tmp_path), **row}}}
    examples = [(payload, [(payload, [payload, payload], [0.1, 0.2, 0.3])]), (payload, [(payload, [], [])])]
    evaluate.write_html(tmp_path / "report.html", results, examples)
    page = (tmp_path / "report.html").read_text()
    # A row of the table, two prompts, two names, two tokens, and the legends of two plots.
    assert "<script" not in page and page.count("&quot;&gt;&lt;script&gt;") == 9
    assert "no judge of answers" in page and "win rate" not in page  # none is promised where there is none
    shown = evaluate.heat_map(examples, terminal=True)
    assert "\x1b[38;2;0;0;0;48;2;" in shown and "\x1b[2J" not in shown and shown.count("\\x1b[2J") == 6


def test_colours_follow_the_values():
    """A higher value is never redder or less blue; beyond the limit nothing changes; black can be read on all."""
    colours = [evaluate.colour(value / 10, 2.0) for value in range(-30, 31)]
    assert colours[30] == (255, 255, 255) and colours[0] == colours[10] and colours[60] == colours[50]
    assert all(a[0] >= b[0] and a[2] <= b[2] for a, b in zip(colours, colours[1:])) and len(set(colours)) == 41
    linear = lambda part: ((part / 255 + 0.055) / 1.055) ** 2.4
    for red, green, blue in colours:  # WCAG's contrast ratio of black text
        assert (0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue) + 0.05) / 0.05 > 4.5


def test_tokens_bear_the_values_of_the_model(tiny_model, tiny_gvm, tmp_path, processes):
    """On the page stands what `train_gvm.token_values` gives, and what was judged with context is shown with it."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for path in (tiny_gvm, conditioned(tiny_gvm, tmp_path)):
        gvm = common.load_value_model(str(path), tokenizer, torch.float32, fresh_head=False)
        gvm.config.num_context_trajectories = getattr(gvm.config, "num_context_trajectories", 0)
        gvm.token_values = lambda gvm=gvm, **batch: train_gvm.token_values(gvm, **batch)
        limits = evaluate.Args(micro_batch_size=3, response_length=20)
        answers, _ = evaluate.tokenize(tokenizer, task_examples()[:8], "preference", limits)
        shown = [evaluate.shown_answer(gvm, tokenizer, "x", answer, answers) for answer in answers]
        for answer, (_, tokens, values) in zip(answers, shown):
            assert "".join(tokens) == tokenizer.decode(answer.response_ids) and tokens[-1] == " <eos>"
            assert hovers(evaluate.heat_map([("", [("x", tokens, values)])])) == [
                (pytest.approx(value, abs=5e-4), pytest.approx(value - before, abs=1e-3))
                for value, before in zip(values, values[:1] + values)
            ]
        judged = evaluate.heldout_statistics(gvm, answers, tokenizer.pad_token_id, torch.device("cpu"), limits)
        assert [values[-1] for *_, values in shown] == pytest.approx(judged["last"].tolist(), abs=1e-5)
        if not gvm.config.num_context_trajectories:
            batch = common.pad_batch([answers[0].prompt_ids], [answers[0].response_ids], 0, "cpu")
            assert shown[0][2] == pytest.approx(train_gvm.token_values(gvm, **batch)[0].tolist(), abs=1e-5)


def test_any_token_can_be_shown(digits_model, tiny_gvm, processes):
    """Ends of lines, parts of characters, and long answers, of which the rest is counted."""
    tokenizer = AutoTokenizer.from_pretrained(digits_model)
    gvm = types.SimpleNamespace(config=types.SimpleNamespace(num_context_trajectories=0), device="cpu")
    gvm.token_values = lambda response_mask, **_: torch.linspace(-1, 1, response_mask.shape[1] + 1)[None]
    ids = tokenizer("a <b>\né" + "c" * 500).input_ids
    name, tokens, values = evaluate.shown_answer(gvm, tokenizer, "x", evaluate.Answer([2], ids, 0.0, None), [])
    page = evaluate.heat_map([("", [(name, tokens, values)])])
    assert len(tokens) == len(ids) == len(values) - 1 and len(hovers(page)) == 401
    assert "⏎</span>\n<span" in page and ">é<" in page and ">&lt;<" in page
    assert page.endswith(f" … {len(ids) - 400} more tokens")


def test_large_changes_are_marked():
    page = evaluate.heat_map([("", [("x", ["up", "level", "down"], [0.0, 1.0, 1.0, -1.0])])])
    assert ">up▲<" in page and ">level<" in page and ">down▼<" in page


def test_learning_curves_overlay_and_bear_torn_lines(tmp_path):
    for name, more in (
        ("dvpo", '{"step": 3, "objec'),
        ("ppo", 'null\n3\n{"objective/kl": 1}\n{"step": 3, "a": [1]}\n'),
    ):
        rows = [{"step": step, "objective/kl": step / 10, "val/off_support": 0.0} for step in (1, 2)]
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + more)
    paths = {"sft": "owner/a-hub-id", "dvpo": str(tmp_path / "dvpo"), "ppo": str(tmp_path / "ppo")}
    policies = {"policies": {name: {"path": path} for name, path in paths.items()}}
    plots = evaluate.learning_curves(policies).split("<figure>")[1:]
    assert len(plots) == 2 and evaluate.WORDS["kl"] in plots[0] and evaluate.WORDS["off_support"] in plots[1]
    for plot in plots:  # a colour per policy, the same in all plots
        drawn = re.findall(r'<g stroke="(\S+)"><polyline points="([^"]+)"', plot)
        assert [ink for ink, points in drawn] == list(evaluate.PALETTE[1:3])
        assert all(len(points.split()) == 2 for _, points in drawn)
        assert "</span> dvpo" in plot and "</span> ppo" in plot and "</span> sft" not in plot
    assert evaluate.learning_curves({"policies": {"sft": {"path": "owner/a-hub-id"}}}) == ""


def test_calibration_counts_every_answer_once():
    values, outcomes = torch.randn(60, dtype=torch.float64), torch.randint(2, (60,)) * 2.0 - 1
    statistics = evaluate.token_statistics(values[:, None].expand(60, 3), torch.ones(60, 2, dtype=torch.bool))
    bins = evaluate.value_report(statistics, outcomes, torch.arange(60).view(-1, 2))["calibration"]
    assert len(bins) == 10 and bins == sorted(bins)
    assert torch.tensor(bins).mean(0).tolist() == pytest.approx(
        [values.mean().item(), outcomes.mean().item()], abs=1e-6
    )
    best = outcomes[values.argsort()[-6:]]
    assert bins[-1][1] == pytest.approx(best.mean().item())


def test_the_report_of_a_chain(chain, tmp_path):
    """All pictures, of one process or two; `--show` prints so many prompts and pairs in the same colours."""
    pages = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        paths = [f"{name}={chain / name}" for name in ("sft", "dvpo", "ppo")]
        command = ["evaluate.py", *paths, "--reference-path", chain / "sft", "--gvm-path", chain / "gvm",
                   "--num-prompts", 4, "--show", 2, "--output-dir", folder]  # fmt: skip
        result = run_script(*command, ranks=ranks)
        assert result.returncode == 0, result.stderr[-3000:]
        pages.append((folder / "report.html").read_text())
        shown = re.findall(r"\x1b\[38;2;0;0;0;48;2;(\d+);(\d+);(\d+)m", result.stdout)
        assert shown == re.findall(r"background:rgb\((\d+),(\d+),(\d+)\)", pages[-1])
        assert result.stdout.count("\x1b[1muser: list") == 4
    for title in ("Answers", "Score against KL", "Learning curves", "Ranking", "Calibration"):
        assert all(f"<h2>{title}</h2>" in page for page in pages), title
    assert not re.search(r"https?:|<script|<link|<img|src=|@import|url\(", pages[0])
    assert len(hovers(pages[0])) == len(hovers(pages[1])) > 40
    for one, two in zip(hovers(pages[0]), hovers(pages[1])):
        assert one == pytest.approx(two, abs=2e-3)


@pytest.mark.parametrize(
    "name, extra",
    [
        ("two ranks", {"ranks": 2}),
        ("four micro-batches", {"flags": ["--micro-batch-size", 4]}),
        ("two replicas, small micro-batches, recomputed activations",
         {"ranks": 2, "flags": ["--dp-replicate", 2, "--micro-batch-size", 2, "--gradient-checkpointing"]}),
        ("two ranks train pairs, small micro-batches, recomputed activations",
         {"ranks": 2, "flags": ["--micro-batch-size", 2, "--gradient-checkpointing"],
          "both": ["--lora-rank", 4, "--learning-rate", 0.01]}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("script", ["sft", "train_gvm", "train_dvpo", "train_ppo_baseline"])
def test_ranks_and_micro_batches_do_not_change_a_run(
    script, name, extra, tiny_model, tiny_gvm, some_pairs, tmp_path, same_run_cache
):
    flags = {
        "sft": ["--model-path", tiny_model, "--num-examples", 32, "--num-epochs", 1, "--batch-size", 16],
        "train_gvm": ["--model-path", tiny_model, "--num-examples", 16, "--num-epochs", 1, "--batch-size", 16,
                      "--num-context-trajectories", 2],
        "train_dvpo": ["--model-path", tiny_model, "--gvm-path", conditioned(tiny_gvm, tmp_path), "--num-updates", 3,
                       "--rollout-batch-size", 16],
        "train_ppo_baseline": ["--model-path", tiny_model, "--dataset", some_pairs, "--reward-batch-size", 16,
                               "--num-updates", 3, "--rollout-batch-size", 16],
    }[script]  # fmt: skip
    keys = {
        "sft": ["loss/sft", "loss/sft_heldout", "optim/grad_norm"],
        "train_gvm": ["gvm/loss", "gvm/pair_accuracy", "gvm/explained_variance", "optim/grad_norm"],
        "train_dvpo": ["loss/policy", "optim/grad_norm", "objective/kl", "objective/gold", "policy/approxkl",
                       "objective/scores", "val/response_length", "policy/entropy"],
        "train_ppo_baseline": ["loss/policy", "loss/value", "optim/grad_norm", "objective/kl", "policy/approxkl",
                               "objective/scores", "val/response_length", "critic/drift", "critic/explained_variance"],
    }[script]  # fmt: skip
    out = lambda name: (
        ["--output-dir", tmp_path / name]
        + (["--reward-output-dir", tmp_path / f"{name}_rm"] if script == "train_ppo_baseline" else [])
    )
    flags += extra.get("both", [])
    one = script, str(extra.get("both"))
    if one not in same_run_cache:
        same_run_cache[one] = tmp_path / "one"
        result = run_script(f"{script}.py", *flags, *out("one"))
        assert result.returncode == 0, result.stderr[-3000:]
    result = run_script(f"{script}.py", *flags, *extra.get("flags", []), *out("other"), ranks=extra.get("ranks", 1))
    assert result.returncode == 0, result.stderr[-3000:]
    assert_same_run(same_run_cache[one], tmp_path / "other", keys)


@pytest.mark.parametrize("extra", [{"ranks": 2}, {"flags": ["--micro-batch-size", 3]}, {"ranks": 2, "guided": True}])
def test_ranks_and_micro_batches_do_not_change_an_evaluation(extra, chain, tiny_gvm, tmp_path):
    """An odd number of answers: of two ranks one repeats a row, which must not count twice."""
    gvm = [tiny_gvm, "--value-guided", 0.5, "--top-k", 4] if "guided" in extra else [chain / "gvm"]
    command = ["evaluate.py", f"dvpo={chain / 'dvpo'}", "--reference-path", chain / "sft", "--gvm-path", *gvm,
               "--num-prompts", 5, "--samples-per-prompt", 1]  # fmt: skip
    results = []
    for options in ({}, extra):
        folder = tmp_path / str(len(results))
        result = run_script(*command, *options.get("flags", []), "--output-dir", folder, ranks=options.get("ranks", 1))
        assert result.returncode == 0, result.stderr[-3000:]
        results.append(json.loads((folder / "results.json").read_text()))
    for part in ("policies", "gvm"):
        numbers = [dict(leaves(result[part])) for result in results]
        assert len(numbers[0]) > 3 and numbers[0] == pytest.approx(numbers[1], rel=1e-4, abs=1e-5)


def leaves(tree: dict, path=""):
    """The numbers in nested dictionaries, by their paths."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}/{key}")
        elif isinstance(value, (int, float)):
            yield f"{path}/{key}", value


def conditioned(gvm, tmp_path):
    """A copy of `gvm` that says it was trained on two trajectories."""
    shutil.copytree(gvm, tmp_path / "gvm")
    config = json.loads((tmp_path / "gvm/config.json").read_text())
    config.update(num_context_trajectories=2, context_trajectory_length=24)
    (tmp_path / "gvm/config.json").write_text(json.dumps(config))
    return tmp_path / "gvm"


@pytest.fixture(scope="module")
def same_run_cache():
    return {}


def test_early_stop_skips_the_rest_of_an_update(tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """With a limit that only the old policy itself keeps, up to rounding: one optimizer step or two instead of four."""
    steps, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: steps.append(1) or step(self, *rest))
    counts = []
    for limit in (None, 1e-12):
        folder = tmp_path / str(limit)
        train_dvpo.main(
            train_dvpo.Args(
                tiny_model,
                tiny_gvm,
                output_dir=str(folder),
                num_updates=2,
                rollout_batch_size=8,
                learning_rate=0.05,
                max_approx_kl=limit,
            )  # fmt: skip
        )
        counts.append(len(steps) - sum(counts))
    assert counts[0] == 8 and counts[1] <= 4  # in two updates


def test_advantage_estimators_lead_to_different_policies(tiny_model, tiny_gvm, tmp_path):
    weights = []
    for advantage in ("gae", "gae_uncentered", "q", "released"):
        folder = tmp_path / advantage
        train_dvpo.main(train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(folder), num_updates=1,
                                        rollout_batch_size=8, advantage=advantage))  # fmt: skip
        weights.append(load_weights(folder)["model.layers.0.mlp.up_proj.weight"])
    assert not any(torch.equal(weights[0], other) for other in weights[1:])


def test_a_reward_from_the_task_is_paid_at_the_end_and_nothing_follows_it(tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """In both scripts the exact score is the last token's reward; DVPO's GVM and PPO's critic are critics alone."""
    seen = {}

    def spy(module, name):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: seen.update({name: given}) or original(*given))

    spy(train_dvpo, "dvpo_advantages")
    spy(train_ppo_baseline, "ppo_advantages")
    same = dict(num_updates=1, rollout_batch_size=8, response_length=6, reward_source="task", kl_coef=0.0)
    train_dvpo.main(train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(tmp_path / "dvpo"), **same))
    ppo = train_ppo_baseline.Args(tiny_model, critic_path=tiny_gvm, output_dir=str(tmp_path / "ppo"), **same)
    train_ppo_baseline.main(ppo)
    values, rewards, mask, *_ = seen["dvpo_advantages"]
    last = mask.sum(1, keepdim=True)
    assert (values.gather(1, last) == 0).all() and (values[:, 0] != 0).all()
    paid = rewards.gather(1, last - 1)[:, 0]
    assert paid.abs().sum() > 0 and torch.equal(rewards.sum(1), paid)
    for folder in ("dvpo", "ppo"):
        assert read_metrics(tmp_path / folder)[0]["objective/gold"] == pytest.approx(paid.mean().item())
    critic_values, scores, *_ = seen["ppo_advantages"]
    torch.testing.assert_close(scores, paid)
    torch.testing.assert_close(critic_values[:, 0], values[:, 0])  # the same critic, before it learns along
    assert not (tmp_path / "rm").exists()


def test_dvpo_conditions_a_gvm_that_was_trained_so(tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """The K in the GVM's config changes the values that the policy is judged by; no answer conditions itself."""
    tokenizer = common.load_tokenizer(tiny_gvm)
    gvm = common.load_value_model(tiny_gvm, tokenizer, torch.float32, fresh_head=False)
    gvm.config.num_context_trajectories, gvm.config.context_trajectory_length = 7, 32
    gvm.save_pretrained(tmp_path / "gvm")
    tokenizer.save_pretrained(tmp_path / "gvm")
    conditioned, condition = [], common.condition
    monkeypatch.setattr(
        common,
        "condition",
        lambda rng, ids, *rest: conditioned.append((list(ids), condition(rng, ids, *rest))) or conditioned[-1][1],
    )
    scores = []
    for path in (tiny_gvm, str(tmp_path / "gvm")):
        folder = tmp_path / f"run{len(scores)}"
        train_dvpo.main(train_dvpo.Args(tiny_model, path, output_dir=str(folder), num_updates=1, rollout_batch_size=8))
        scores.append(read_metrics(folder)[0]["objective/scores"])
    assert scores[0] != scores[1] and len(conditioned) == 8
    for prompt, whole in conditioned:
        text = str(whole)[1:-1]
        others = [other for other, _ in conditioned if other != prompt]
        assert all(str(other)[1:-1] in text for other in others) and text.count(str(prompt)[1:-1]) == 1


@pytest.mark.parametrize("module", [train_dvpo, train_ppo_baseline])
def test_an_answer_ends_with_its_turn_or_the_text(module, tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """Llama's instruction models end turns with another token than base models end texts with."""
    paths = [Path(shutil.copytree(path, tmp_path / f"model{i}")) for i, path in enumerate((tiny_model, tiny_gvm))]
    for path in paths:
        tokenizer = common.load_tokenizer(tiny_model)
        tokenizer.chat_template = tokenizer.chat_template.replace("{{ eos_token }}", "<unk>")
        tokenizer.save_pretrained(path)
    ends, generate = [], module.generate
    recorded = lambda *args: ends.append(args[4].tolist()) or generate(*args)
    recorded.__name__ = "generate"
    monkeypatch.setattr(module, "generate", recorded)
    judge = {"gvm_path" if module is train_dvpo else "reward_path": str(paths[1])}
    module.main(
        module.Args(str(paths[0]), output_dir=str(tmp_path / "out"), num_updates=1, rollout_batch_size=8, **judge)
    )
    assert {tokenizer.eos_token_id, tokenizer.unk_token_id} == set(ends[0])


def test_scored_answers_with_some_held_out(tiny_model, tmp_path):
    """There are no pairs to rank then; the explained variance is reported, whatever the unit of the scores."""
    explained = []
    for unit in (1, 10):
        data, folder = tmp_path / f"{unit}.jsonl", tmp_path / f"gvm{unit}"
        rows = [{"prompt": e.prompt, "response": e.chosen, "score": unit * e.score_chosen}
                for e in task_examples()[:60]]  # fmt: skip
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        train_gvm.main(train_gvm.Args(tiny_model, str(data), str(folder), num_epochs=1, batch_size=8,
                                      label_source="score"))  # fmt: skip
        last = read_metrics(folder)[-1]
        assert "gvm/pair_accuracy" not in last
        explained.append(last["gvm/explained_variance"])
    assert explained[0] < 1 and explained[0] == pytest.approx(explained[1], abs=1e-4)


@pytest.mark.parametrize("module", [sft, train_gvm, train_ppo_baseline])
def test_all_held_out_prompts_may_be_too_long(module, some_pairs, tiny_model, tmp_path):
    long = next(p for p in (f"list {i}" + " animals" * 600 for i in range(999)) if random.Random(p).random() < 0.05)
    rows = [json.loads(line) for line in Path(some_pairs).read_text().splitlines()]
    rows = [row for row in rows if random.Random(row["prompt"][0]["content"]).random() >= 0.05]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {**rows[0], "prompt": long}]))
    out = {"output_dir": str(tmp_path / "out")}
    if module is train_ppo_baseline:
        out |= {"reward_output_dir": str(tmp_path / "rm"), "num_updates": 1, "rollout_batch_size": 8}
    module.main(module.Args(model_path=tiny_model, dataset=str(data), **out))
    assert (tmp_path / "out" / "README.md").exists()


@pytest.mark.parametrize("td_lambda", [0.0, 0.95])
def test_the_gvm_approaches_the_exact_value_function(td_lambda, tiny_model, tmp_path):
    """A policy that picks each of two words by a fair coin; what an answer is worth is known, so every value is."""
    worth = {("dog", "dog"): 1.0, ("dog", "cat"): 0.0, ("cat", "dog"): -1.0, ("cat", "cat"): -2.0}
    exact = {(): -0.5, ("dog",): 0.5, ("cat",): -1.5, **worth}
    data = tmp_path / "answers.jsonl"
    rows = [
        {"prompt": "list two animals", "response": " ".join(words), "score": score} for words, score in worth.items()
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = train_gvm.Args(
        tiny_model, str(data), str(tmp_path / "gvm"), num_epochs=1600, batch_size=8, learning_rate=5e-3,
        label_source="score", td_lambda=td_lambda,
    )  # fmt: skip
    train_gvm.main(args)
    tokenizer = common.load_tokenizer(args.output_dir)
    gvm = common.load_value_model(args.output_dir, tokenizer, torch.float32, fresh_head=False)
    prompts = [common.tokenize_prompt(tokenizer, [{"role": "user", "content": "list two animals"}])] * 4
    batch = common.pad_batch(prompts, common.tokenize_answers(tokenizer, [" ".join(w) for w in worth], 20), 0, "cpu")
    scores = torch.tensor(list(worth.values()))
    with torch.no_grad():
        values = train_gvm.token_values(gvm, **batch) * scores.std() + scores.mean()  # (4, 4), undo standardising
    for words, row in zip(worth, values):
        for t in range(3):
            assert row[t].item() == pytest.approx(exact[words[:t]], abs=0.15), (words[:t], td_lambda)
        assert row[3].item() == pytest.approx(worth[words], abs=0.15)  # the end of the answer


# ---- LoRA ------------------------------------------------------------------------------------------------------------
def test_pairs_go_through_all_stages(tiny_model, some_pairs, tmp_path):
    """Every folder holds a standard, merged model that moved beside the decoder's layers alone; the next stage, and
    evaluate.py, take it. In the first update the policy is the reference exactly: its pairs change nothing yet."""
    at = lambda name: str(tmp_path / name)
    same = {"dataset": some_pairs, "lora_rank": 4, "learning_rate": 0.01}
    sft.main(sft.Args(tiny_model, output_dir=at("sft"), num_epochs=1, batch_size=16, **same))
    train_gvm.main(train_gvm.Args(at("sft"), output_dir=at("gvm"), num_epochs=1, batch_size=16, **same))
    same |= {"num_updates": 2, "rollout_batch_size": 8}
    train_dvpo.main(train_dvpo.Args(at("sft"), at("gvm"), output_dir=at("dvpo"), **same))
    train_ppo_baseline.main(train_ppo_baseline.Args(at("sft"), output_dir=at("ppo"), reward_batch_size=16, **same))
    for name, start in (("sft", tiny_model), ("gvm", at("sft")), ("rm", at("sft")), ("dvpo", at("sft")),
                        ("ppo", at("sft"))):  # fmt: skip
        before, after = load_weights(start), load_weights(at(name))
        auto = AutoModelForSequenceClassification if name in ("gvm", "rm") else AutoModelForCausalLM
        _, info = auto.from_pretrained(at(name), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        moved = {key for key in after if key not in before or not torch.equal(before[key], after[key])}
        expected = {key for key in after if key.endswith("proj.weight") or key == "score.weight"}
        assert moved == expected, name
        if name in ("dvpo", "ppo"):
            first, second = read_metrics(at(name))
            assert first["objective/kl"] == 0 and second["objective/kl"] != 0
    evaluate.main(evaluate.Args((f"sft={at('sft')}", f"dvpo={at('dvpo')}"), at("sft"), at("gvm"),
                                output_dir=at("eval"), num_prompts=4))  # fmt: skip
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["policies"]["dvpo"]["kl"] > 0


# ---- What is saved is what was loaded --------------------------------------------------------------------------------
def edit_config(folder, **changes):
    config = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_head_of_its_own_survives_a_config_that_ties_it(tiny_model, some_pairs, tmp_path):
    """transformers does not tie where the file holds both matrices; nor may saving."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    edit_config(folder, tie_word_embeddings=True)
    sft.main(sft.Args(str(folder), some_pairs, str(tmp_path / "out"), num_epochs=1, learning_rate=0.0))
    before, after = load_weights(tiny_model), load_weights(tmp_path / "out")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert not json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]


def test_a_models_own_stop_tokens_end_its_answers(tiny_model, tiny_gvm, tmp_path):
    """GLM-4's answers end with the next role's mark, which only its generation settings say."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [1, 3]}))
    args = train_dvpo.Args(str(folder), tiny_gvm, output_dir=str(tmp_path / "out"), num_updates=1, rollout_batch_size=8)
    train_dvpo.main(args)
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"] == [1, 3]


def test_a_frozen_head_gets_no_gradient():
    hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(20, 8)
    logprobs, _ = train_dvpo.fused_logprobs(hidden, weight, torch.arange(5))
    logprobs.sum().backward()
    assert hidden.grad.abs().sum() > 0 and weight.grad is None


# ---- Evaluating one's own file ---------------------------------------------------------------------------------------
def test_evaluation_of_a_small_file(tiny_model, tmp_path, capsys):
    """What is held out is told, with the way to all; no interval of a few prompts; a whole conversation is shown."""
    turns = [{"role": "user", "content": "list two animals"}, {"role": "assistant", "content": "dog and cow."}]
    rows = [{"prompt": [*turns, {"role": "user", "content": f"list {n} metals"}], "chosen": "tin.", "rejected": "dog."}
            for n in (*lists.NUMBERS, "the", "or")]  # fmt: skip
    data = tmp_path / "mine.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = evaluate.Args((f"a={tiny_model}",), tiny_model, None, f"{data}:all", str(tmp_path / "eval"), temperature=0.0)
    results = []
    for seed in (1, 2):
        args.seed = seed
        evaluate.main(args)
        results.append(json.loads((tmp_path / "eval" / "answers.json").read_text()))
    assert results[0] == results[1]  # greedy, whatever the seed
    assert f"{len(rows)} of {len(rows)} examples are evaluated" in capsys.readouterr().out
    page = (tmp_path / "eval" / "report.html").read_text()
    assert "list two animals" in page and "dog and cow." in page
    for absent in ("A token's colour", "<h2>Score", "<h2>Learning", "<h2>Ranking", "<h2>Calibration", "nan", "None"):
        assert absent not in page, absent
    assert evaluate.interval(torch.ones(9, 2)).keys() == {"mean"} != evaluate.interval(torch.ones(10, 2)).keys()


# ---- What a run says -------------------------------------------------------------------------------------------------
def test_a_run_tells_the_time_left_the_next_command_and_what_to_watch(tiny_model, tiny_gvm, tmp_path, capsys):
    args = train_dvpo.Args(tiny_model, tiny_gvm, output_dir=str(tmp_path / "dvpo"), num_updates=2, rollout_batch_size=8,
                           response_length=1)  # fmt: skip
    train_dvpo.main(args)
    said = capsys.readouterr().out
    assert " s left  " in said and "val/off_support" in said and "of the answers were cut" in said
    assert f"next: python evaluate.py sft={tiny_model} dvpo={tmp_path / 'dvpo'} --reference-path {tiny_model}" in said
    gvm = train_gvm.Args(tiny_model, output_dir=str(tmp_path / "gvm"), num_epochs=1, num_examples=32)
    train_gvm.main(gvm)
    said = capsys.readouterr().out
    assert "% of 2000 held-out pairs correctly; with half of the answer seen " in said
    assert f"next: python train_dvpo.py --model-path {tiny_model} --gvm-path {tmp_path / 'gvm'}" in said


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory) -> str:
    """Folder of a tiny model that reads any text, byte by byte."""
    from conftest import tiny_llama_config
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(["<pad>", "<eos>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    folder = tmp_path_factory.mktemp("digits")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_llama_config(vocab_size=len(tokenizer))).save_pretrained(folder)
    return str(folder)


def test_a_task_of_ones_own_goes_through_all_stages(digits_model, tmp_path):
    """`tests/tasks/arithmetic.py`, as the README names it, with a model of one's own."""
    data = ["--dataset", "tests/tasks/arithmetic.py", "--response-length", 6]
    small = ["--num-examples", 64, "--num-epochs", 1, "--batch-size", 32]
    rl = ["--num-updates", 1, "--rollout-batch-size", 8]
    at = lambda name: str(tmp_path / name)
    for step in (
        ["sft.py", "--model-path", digits_model, *data, *small, "--output-dir", at("sft")],
        ["train_gvm.py", "--model-path", at("sft"), *data, *small, "--output-dir", at("gvm")],
        ["train_dvpo.py", "--model-path", at("sft"), "--gvm-path", at("gvm"), *data, *rl, "--output-dir", at("dvpo")],
        ["train_ppo_baseline.py", "--model-path", at("sft"), "--reward-path", at("gvm"), *data, *rl,
         "--output-dir", at("ppo")],
        ["evaluate.py", f"sft={at('sft')}", f"dvpo={at('dvpo')}", f"ppo={at('ppo')}", "--reference-path", at("sft"),
         "--gvm-path", at("gvm"), *data, "--num-prompts", 8, "--output-dir", at("eval")],
    ):  # fmt: skip
        result = run_script(*step)
        assert result.returncode == 0, result.stderr[-3000:]
    policies = json.loads((tmp_path / "eval" / "results.json").read_text())["policies"]
    assert policies.keys() == {"sft", "dvpo", "ppo"} and all(-1 <= p["gold"]["mean"] <= 1 for p in policies.values())
    assert "objective/gold" in read_metrics(at("dvpo"))[0] and "objective/gold" in read_metrics(at("ppo"))[0]


def test_each_answer_is_scored_once(tiny_model, tiny_gvm, tmp_path):
    """Scoring may be slow: of two ranks each scores its share. All of a task's prompts are still scored by it."""
    task, calls = tmp_path / "task.py", tmp_path / "calls"
    task.write_text(f"""
def rows(split):
    return [{{"prompt": "list two " + kind}} for kind in ("animals", "metals", "tools", "trees")]

def score(prompt, answer):
    with open({str(calls)!r}, "a") as file:
        file.write(".")
    return 0.5
""")
    result = run_script("train_dvpo.py", "--model-path", tiny_model, "--gvm-path", tiny_gvm, "--dataset", task,
                        "--num-updates", 1, "--rollout-batch-size", 8, "--output-dir", tmp_path / "dvpo",
                        ranks=2)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    assert len(calls.read_text()) == 8 and read_metrics(tmp_path / "dvpo")[0]["objective/gold"] == 0.5
    evaluate.main(evaluate.Args((f"a={tiny_model}",), tiny_model, None, f"{task}:all", str(tmp_path / "eval")))
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["policies"]["a"]["gold"]["mean"] == 0.5


# ---- Files for the judges of AlpacaEval 2, Arena-Hard-Auto and MT-Bench ----------------------------------------------
QUESTIONS = {
    "alpaca_eval": [{"instruction": f"Name {n} metals.", "output": "tin", "dataset": "helpful_base"} for n in range(5)],
    "arena_hard": [{"uid": f"a{n}", "category": "arena-hard-v0.1", "prompt": f"Add {n} and 1."} for n in range(5)],
    "mt_bench": [{"question_id": 81 + n, "category": category, "turns": [f"Write {n} lines.", "Now in capitals."]}
                 for n, category in enumerate(("writing", "stem", "math", "unheard-of", "humanities", "coding"))],
}  # fmt: skip


def write_questions(folder, benchmark: str) -> str:
    file = folder / f"{benchmark}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS[benchmark]))
    return str(file)


def export(model: str, questions: str, benchmark: str, folder, names=("sft", "dvpo"), **more) -> None:
    import evaluate

    policies = tuple(f"{name}={model}" for name in names)
    evaluate.main(evaluate.Args(policies, dataset=questions, output_dir=str(folder), export=benchmark, **more))


def check_as_judges_do(benchmark: str, folder, names: list[str], questions: list[dict]) -> dict[str, list]:
    """Read the exported files by the rules of the judges' programs; returns every policy's rows."""
    if benchmark == "alpaca_eval":  # load_or_convert_to_dataframe, get_generator_name, annotate_head2head
        read = {}
        for name in names:
            table = pandas.read_json(folder / name / "model_outputs.json")
            assert list(table["generator"].unique()) == [name]
            assert table["output"].map(type).eq(str).all()
            merged = pandas.merge(pandas.DataFrame(questions), table, on=["instruction"], suffixes=("_1", "_2"))
            assert len(merged) == len(table) == len(questions)
            read[name] = table.to_dict("records")
        return read
    key, read = {"arena_hard": "uid", "mt_bench": "question_id"}[benchmark], {}
    for file in sorted((folder / "model_answer").glob("*.jsonl")):  # load_model_answers of both
        with open(file) as lines:
            rows = [json.loads(line) for line in lines]
        read[file.name[:-6]] = rows
        by_key = {row[key]: row for row in rows}
        assert all(question[key] in by_key for question in questions)  # FastChat's check_data
        assert [row[key] for row in rows] == [question[key] for question in questions]
        if benchmark == "mt_bench":  # run_judge_single
            assert all(len(row["choices"][0]["turns"]) == 2 and row["choices"][0]["index"] == 0 for row in rows)
            assert all(isinstance(turn, str) for row in rows for turn in row["choices"][0]["turns"])
            assert {row["model_id"] for row in rows} == {file.stem} and len({r["answer_id"] for r in rows}) == len(rows)
        else:  # pairwise_judgment, print_leaderboard
            assert all(isinstance(row["messages"][-1]["content"]["answer"], str) for row in rows)
            table = pandas.read_json(file, lines=True)
            assert table.iloc[0]["model"] == file.stem
    assert sorted(read) == sorted(names)
    return read


@pytest.mark.parametrize("benchmark", QUESTIONS)
def test_exports_are_read_as_the_judges_read_them(benchmark, digits_model, tmp_path):
    """All questions, in order, under the names of the policies; the same answers from ranks and micro-batches."""
    questions = write_questions(tmp_path, benchmark)
    export(digits_model, questions, benchmark, tmp_path / "one", response_length=8)
    policies = f"sft={digits_model}", f"dvpo={digits_model}"
    result = run_script("evaluate.py", *policies, "--dataset", questions, "--export", benchmark, "--response-length", 8,
                        "--output-dir", tmp_path / "two", "--micro-batch-size", 1, ranks=2)  # fmt: skip
    assert result.returncode == 0, result.stderr[-3000:]
    one, two = (check_as_judges_do(benchmark, tmp_path / folder, ["sft", "dvpo"], QUESTIONS[benchmark])
                for folder in ("one", "two"))  # fmt: skip
    timeless = lambda rows: [{key: row[key] for key in row if key != "tstamp"} for row in rows]
    assert all(timeless(one[name]) == timeless(two[name]) for name in ("sft", "dvpo"))
    said = {json.dumps(timeless(one[name])).replace(name, "") for name in ("sft", "dvpo")}
    assert len(said) == 1  # one model under two names: common luck
    with pytest.raises(common.UserError, match="exists: remove it"):  # it may have been judged
        export(digits_model, questions, benchmark, tmp_path / "one", response_length=8)


def test_mt_benchs_second_turn_and_temperatures(digits_model, tmp_path, monkeypatch):
    """The second prompt holds the first answer; what was sampled after a prompt stands at its question and turn; each
    category has FastChat's temperature."""
    import evaluate

    tokenizer, asked, real = common.load_tokenizer(digits_model), {}, evaluate.sample

    def spy(name, policy, reference, gvm, prompts, end_ids, pad_id, device, args):
        answers = real(name, policy, reference, gvm, prompts, end_ids, pad_id, device, args)
        texts = [tokenizer.decode(ids[mask], skip_special_tokens=True).strip()
                 for ids, mask in zip(answers["response_ids"], answers["response_mask"])]  # fmt: skip
        asked.update({tuple(prompt): (text, args.temperature) for prompt, text in zip(prompts, texts)})
        return answers

    monkeypatch.setattr(evaluate, "sample", spy)
    export(digits_model, write_questions(tmp_path, "mt_bench"), "mt_bench", tmp_path, names=["sft"], response_length=8,
           temperature=0.3)  # fmt: skip
    rows = check_as_judges_do("mt_bench", tmp_path, ["sft"], QUESTIONS["mt_bench"])["sft"]
    for question, row, temperature in zip(QUESTIONS["mt_bench"], rows, (0.7, 0.1, 0, 0.7, 0.1, 0)):
        chat = [{"role": "user", "content": question["turns"][0]}]
        first, second = row["choices"][0]["turns"]
        assert asked.pop(tuple(common.tokenize_prompt(tokenizer, chat))) == (first, temperature)
        chat += [{"role": "assistant", "content": first}, {"role": "user", "content": question["turns"][1]}]
        prompt = common.tokenize_prompt(tokenizer, chat)
        assert first and first in tokenizer.decode(prompt)
        assert asked.pop(tuple(prompt)) == (second, temperature)
    assert not asked  # nothing else


def test_a_question_that_a_template_refuses_is_told_with_the_policy(digits_model, tmp_path):
    shutil.copytree(digits_model, tmp_path / "strict")
    tokenizer = AutoTokenizer.from_pretrained(digits_model)
    tokenizer.chat_template = "{{ raise_exception('one turn alone') if messages|length > 1 else messages[0].content }}"
    tokenizer.save_pretrained(tmp_path / "strict")
    with pytest.raises(common.UserError, match="strict-one: a question is not as its chat template takes .*one turn"):
        export(tmp_path / "strict", write_questions(tmp_path, "mt_bench"), "mt_bench", tmp_path, ["strict-one"],
               response_length=8)  # fmt: skip


def test_an_export_without_questions_is_refused(digits_model, tmp_path):
    result = run_script("evaluate.py", f"sft={digits_model}", "--export", "mt_bench", "--output-dir", tmp_path)
    assert result.returncode == 2 and not list(tmp_path.iterdir())
    assert result.stderr == "error: --export mt_bench: --dataset is to name its questions\n"


def test_greedy_exports_do_not_depend_on_the_seed(digits_model, tmp_path):
    questions, said = write_questions(tmp_path, "alpaca_eval"), []
    for seed, temperature in ((1, 0.0), (2, 0.0), (1, 1.0), (2, 1.0)):
        folder = tmp_path / f"{seed}{temperature}"
        export(digits_model, questions, "alpaca_eval", folder, ["a"], seed=seed, temperature=temperature)
        said.append((folder / "a" / "model_outputs.json").read_text())
    assert said[0] == said[1] and len({*said[1:]}) == 3


def test_exports_are_cut_and_guided(digits_model, tmp_path):
    """Of one token there is no choice; a value model that is sure of itself changes what is said."""
    gvm = common.load_value_model(digits_model, common.load_tokenizer(digits_model), torch.float32, fresh_head=True)
    torch.nn.init.normal_(gvm.score.weight)
    gvm.save_pretrained(tmp_path / "gvm")
    common.load_tokenizer(digits_model).save_pretrained(tmp_path / "gvm")
    questions, said = write_questions(tmp_path, "alpaca_eval"), []
    guided = {"gvm_path": str(tmp_path / "gvm"), "value_guided": 0.1}
    for settings in ({"temperature": 0.0}, {"top_k": 1}, {"top_k": 1, **guided}, {"top_k": 9}, {"top_k": 9, **guided}):
        folder = tmp_path / str(len(said))
        export(digits_model, questions, "alpaca_eval", folder, ["a"], response_length=8, **settings)
        said.append((folder / "a" / "model_outputs.json").read_text())
    assert said[0] == said[1] == said[2] and len({*said[2:]}) == 3


def test_arena_hards_questions_from_the_hub(digits_model, tmp_path):
    """`lmarena-ai/arena-hard-auto-v0.1` has the questions in older columns, under the same ids."""
    rows = [{"question_id": row["uid"], "category": row["category"], "cluster": "sums",
             "turns": [{"content": row["prompt"]}]} for row in QUESTIONS["arena_hard"]]  # fmt: skip
    (tmp_path / "hub.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    export(digits_model, str(tmp_path / "hub.jsonl"), "arena_hard", tmp_path, ["sft"])
    rows = check_as_judges_do("arena_hard", tmp_path, ["sft"], QUESTIONS["arena_hard"])["sft"]
    assert [row["messages"][0]["content"] for row in rows] == [row["prompt"] for row in QUESTIONS["arena_hard"]]


SHARED = ROOT.parent / "shared" / "data"


@pytest.mark.parametrize("benchmark, file", [("mt_bench", "mt_bench_question.jsonl"),
                                             ("arena_hard", "arena_hard_v0.1_question_first60.jsonl")])  # fmt: skip
@pytest.mark.skipif(not SHARED.exists(), reason="the benchmarks' own question files are not here")
def test_exports_of_the_real_questions(benchmark, file, digits_model, tmp_path):
    questions = [json.loads(line) for line in (SHARED / file).read_text().splitlines()]
    large = tmp_path / "model"
    shutil.copytree(digits_model, large)
    config = json.loads((large / "config.json").read_text())
    (large / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16384}))
    export(str(large), str(SHARED / file), benchmark, tmp_path, ["sft"], response_length=4, micro_batch_size=8)
    check_as_judges_do(benchmark, tmp_path, ["sft"], questions)


@pytest.mark.parametrize("name, benchmark, changes, message", [
    ("../evil", "mt_bench", {}, "'../evil' is to name a file"),
    ("..", "alpaca_eval", {}, "'..' is to name a file"),
    ("a b", "arena_hard", {}, "'a b' is to name a file"),
    ("sft", "mt_bench", {"turns": []}, "each question of mt_bench has question_id and category and turns"),
    ("sft", "mt_bench", {"turns": ["only one"]}, "have not two turns"),
    ("sft", "mt_bench", {"question_id": None}, "each question of mt_bench has"),
    ("sft", "arena_hard", {"uid": None}, "each question of arena_hard has uid and prompt"),
    ("sft", "alpaca_eval", {"instruction": ""}, "each question of alpaca_eval has instruction"),
])  # fmt: skip
def test_exports_are_refused(name, benchmark, changes, message, digits_model, tmp_path):
    rows = [*QUESTIONS[benchmark][:-1], {**QUESTIONS[benchmark][-1], **changes}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(common.UserError, match=message):
        export(digits_model, str(tmp_path / "some.jsonl"), benchmark, tmp_path / "out", [name])
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "some.jsonl"]


# ---- Subsets of a benchmark of pairs ---------------------------------------------------------------------------------
def test_pair_accuracy_by_subset(tiny_model, tiny_gvm, tmp_path, capsys):
    """Rows as RewardBench has them: accuracies per subset, whose mean over pairs is that of all pairs."""
    import evaluate

    rows = [{"prompt": e.prompt[-1]["content"], "chosen": e.chosen, "rejected": e.rejected, "id": i,
             "subset": ("mt-bench-hard", "xstest-should-respond", "hep-cpp")[i % 5 % 3]}
            for i, e in enumerate(task_examples("heldout")[:48])]  # fmt: skip
    (tmp_path / "bench.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    evaluate.main(evaluate.Args((f"a={tiny_model}",), tiny_model, tiny_gvm, f"{tmp_path / 'bench.jsonl'}:all",
                                str(tmp_path / "eval"), num_prompts=2))  # fmt: skip
    report = json.loads((tmp_path / "eval" / "results.json").read_text())["gvm"]
    subsets = report["by_subset"]
    counts = {name: sum(row["subset"] == name for row in rows) for name in subsets}
    assert len(counts) == 3 and {name: row["pairs"] for name, row in subsets.items()} == counts
    for statistic, accuracy in report["pair_accuracy"].items():
        mean = sum(row[statistic] * row["pairs"] for row in subsets.values()) / len(rows)
        assert mean == pytest.approx(accuracy)
    assert len({row["last"] for row in subsets.values()}) > 1
    page, said = (tmp_path / "eval" / "report.html").read_text(), capsys.readouterr().out
    for name, row in subsets.items():
        line = next(line for line in said.splitlines() if line.startswith(name[:20]))
        assert line.split()[1:4] == [str(row["pairs"]), f"{row['mean']:.3f}", f"{row['last']:.3f}"]
        assert f"<td>{name}<td>{row['pairs']}<td>{row['mean']:.3f}<td>" in page


# ---- The paper's two settings, as the README has them ----------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["Base", "Instruction"])
def test_the_readmes_settings_run_from_data_to_the_judges_files(setting, digits_model, tmp_path):
    """The README's very blocks, with local models, data and questions in the place of those of the same names, one
    process, and fewer and shorter answers."""
    section = (ROOT / "README.md").read_text().split("\n## Larger models\n")[1].split("\n## ")[0]
    begin, base, instruction = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    block = begin + {"Base": base, "Instruction": instruction}[setting]
    models = re.findall(r"(?:meta-llama|mistralai)/([\w.-]+)", block)
    assert len(models) == 2
    for model in models:
        shutil.copytree(digits_model, tmp_path / "models" / model)
    data = tmp_path / "data"
    data.mkdir()
    pairs = {e.prompt[-1]["content"]: e for e in task_examples()}
    rows = [{"prompt": prompt, "chosen": e.chosen, "rejected": e.rejected} for prompt, e in pairs.items()][:160]
    (data / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (data / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train_prefs, path: pairs.jsonl}\n---\n"
    )
    for benchmark in QUESTIONS:
        write_questions(tmp_path, benchmark)
    for script in (*SCRIPTS, "common"):
        shutil.copy(ROOT / f"{script}.py", tmp_path)
    local = {
        r"torchrun --nproc_per_node 8": "python",
        r"(meta-llama|mistralai)/": f"{tmp_path}/models/",
        r"HuggingFaceH4/ultrafeedback_binarized": str(data),
        r"(\$Q/)(\w+)(\.json .*)https://\S+": rf"\1\2\3file://{tmp_path}/\2.jsonl",
        r"train_test_split\(\d+": "train_test_split(40",
        r"--response-length \d+": "--response-length 8",
        r"--rollout-batch-size \d+ --num-updates \d+": "--rollout-batch-size 8 --num-updates 2",
    }
    for there, here in local.items():
        block, count = re.subn(there, here, block)
        assert count, there
    assert "https://" not in block
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    result = subprocess.run(["bash", "-e", "-c", block], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    names = [f"{model}-{stage}" for model in models for stage in ("start", "dvpo")]
    for benchmark, questions in QUESTIONS.items():
        check_as_judges_do(benchmark, tmp_path / "runs" / "judges" / benchmark, names, questions)
