"""A run survives what happens to it: kills, signals, damaged checkpoints, full disks, bad numbers, lost processes."""

import gc
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import types

import pytest
import torch
import torch.distributed as dist
from conftest import ROOT, load_weights, read_metrics, run_script, task_examples, torchrun
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import common
import sft
import train_dvpo
import train_gvm
import train_ppo_baseline

MODULES = {"sft": sft, "train_gvm": train_gvm, "train_dvpo": train_dvpo, "train_ppo_baseline": train_ppo_baseline}
EVERY = 3  # updates between checkpoints, of 8


class Interrupted(BaseException):
    """What no script catches, as no script catches a kill."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A file of preference pairs of the embedded task: 64 to train on, 4 held out."""
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    kept, out = [], []
    for example in task_examples()[:200]:
        (out if random.Random(example.prompt[-1]["content"]).random() < 0.05 else kept).append(example)
    rows = [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected, "chosen_policy": e.chosen_policy,
             "rejected_policy": e.rejected_policy} for e in kept[:64] + out[:4]]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def settings(tiny_model, tiny_gvm, pairs):
    """settings(script, folder) -> flags of a run of 8 updates, and for PPO a reward model of as many."""

    def of(script, folder, **more):
        same = {"model_path": tiny_model, "dataset": pairs, "output_dir": str(folder), "checkpoint_every": EVERY}
        own = {
            "sft": {"num_epochs": 1, "num_examples": 64, "batch_size": 8, "answers": "chosen"},
            "train_gvm": {"num_epochs": 1, "num_examples": 32, "batch_size": 8, "num_context_trajectories": 1},
            "train_dvpo": {"gvm_path": tiny_gvm, "num_updates": 8, "rollout_batch_size": 8, "kl_target": 1.0},
            "train_ppo_baseline": {"num_updates": 8, "rollout_batch_size": 8, "kl_target": 1.0,
                                   "reward_output_dir": f"{folder}_rm", "reward_batch_size": 16,
                                   "reward_num_epochs": 1},
        }[script]  # fmt: skip
        return {**same, **own, **more}

    return of


def train(script, flags, **more):
    module = MODULES[script]
    gc.collect()  # a run that failed before gives its folder back, as the end of a process would
    try:
        module.main(module.Args(**{**flags, **more}))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if dist.is_initialized():
            dist.destroy_process_group()


def command_line(flags: dict) -> list[str]:
    return [part for name, value in flags.items()
            for part in (f"--{name.replace('_', '-')}", *([] if value is True else [value]))]  # fmt: skip


def assert_identical(a, b):
    """Bit-identical weights, and metrics with each update once; only the clock and the memory may differ."""
    wall = ("time/",)
    strip = lambda rows: [{k: v for k, v in row.items() if not k.startswith(wall)} for row in rows]
    rows = strip(read_metrics(a))
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    assert rows == strip(read_metrics(b))
    weights = load_weights(b)
    for name, tensor in load_weights(a).items():
        assert torch.equal(tensor, weights[name]), name


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Folders of the runs that nothing interrupted, by script."""
    return {"folder": tmp_path_factory.mktemp("uninterrupted")}


@pytest.fixture
def whole(uninterrupted, settings):
    def run(script):
        folder = uninterrupted["folder"] / script
        if script not in uninterrupted:
            train(script, settings(script, folder))
            uninterrupted[script] = folder
        return folder

    return run


# ---- Resume ----------------------------------------------------------------------------------------------------------
def interrupt(monkeypatch, method: str, at: int, after: bool):
    """Let the `at`-th call of `common.Run.<method>` fail, before or after it has done its work."""
    original, calls = getattr(common.Run, method), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == at and not after:
            raise Interrupted
        result = original(*args, **kwargs)
        if len(calls) == at:
            raise Interrupted
        return result

    monkeypatch.setattr(common.Run, method, failing)


@pytest.mark.parametrize(
    "method, at, after",
    [
        ("start", 1, True),  # nothing learned yet
        ("log", 2, True),  # before the first checkpoint
        ("checkpoint", 3, False),  # logged, not saved
        ("checkpoint", 3, True),  # just saved
        ("log", 5, False),  # computed, not logged
        ("save", 1, False),  # all updates done, the model not yet written
    ],
)
@pytest.mark.parametrize("script", MODULES)
def test_an_interrupted_run_ends_bit_identical(script, method, at, after, whole, settings, tmp_path, monkeypatch):
    flags = settings(script, tmp_path / "run")
    if script == "train_ppo_baseline":
        flags["reward_path"] = str(whole(script)) + "_rm"
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, method, at, after)
        train(script, flags)
    train(script, flags, resume=True)
    assert_identical(whole(script), tmp_path / "run")


@pytest.mark.parametrize("method, at, after", [("checkpoint", 4, False), ("save", 1, True), ("log", 10, True)])
def test_ppo_goes_on_in_the_stage_it_was_in(method, at, after, whole, settings, tmp_path, monkeypatch):
    """Its reward model of 8 updates comes first: the third case is in the policy's second update."""
    flags = settings("train_ppo_baseline", tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, method, at, after)
        train("train_ppo_baseline", flags)
    train("train_ppo_baseline", flags, resume=True)
    assert_identical(whole("train_ppo_baseline"), tmp_path / "run")
    assert_identical(f"{whole('train_ppo_baseline')}_rm", tmp_path / "run_rm")


@pytest.mark.parametrize("script", MODULES)
def test_pairs_alone_are_saved_and_go_on_bit_identical(script, settings, tmp_path, monkeypatch):
    """With LoRA a checkpoint holds what is trained: pairs, value heads and their optimizers' states."""
    pairs = {"lora_rank": 4, "learning_rate": 0.01}
    train(script, settings(script, tmp_path / "whole", **pairs))
    flags = settings(script, tmp_path / "run", **pairs)
    for method, at in [("checkpoint", 3)] + [("log", 10)] * (script == "train_ppo_baseline"):  # its RM first
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, method, at, after=True)
            train(script, flags, resume=True)
    train(script, flags, resume=True)
    for stage in ("", "_rm")[: 1 + (script == "train_ppo_baseline")]:
        assert_identical(f"{tmp_path}/whole{stage}", f"{tmp_path}/run{stage}")
        reader = FileSystemReader(f"{tmp_path}/run{stage}/checkpoints/step_000008")
        saved = reader.read_metadata().state_dict_metadata.items()
        tensors = [name for name, entry in saved if isinstance(entry, TensorStorageMetadata)]
        assert tensors and all(re.search(r"lora_[ab]|score.weight", name) for name in tensors)


@pytest.mark.parametrize("script", ["sft", "train_gvm", "train_ppo_baseline"])
def test_pairs_beside_other_weights_are_refused(script, settings, tiny_model, tiny_gvm, tmp_path, monkeypatch):
    """The checkpoint does not hold what the pairs were trained beside: PPO's critic starts from another model here."""
    own = {"critic_path": str(tmp_path / "model"), "reward_path": tiny_gvm}
    own = own if script == "train_ppo_baseline" else {"model_path": str(tmp_path / "model")}
    shutil.copytree(tiny_gvm if "critic_path" in own else tiny_model, tmp_path / "model")
    flags = settings(script, tmp_path / "run", lora_rank=4, **own)
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, "checkpoint", 3, after=True)
        train(script, flags)
    weights = load_weights(tmp_path / "model")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, tmp_path / "model" / "model.safetensors")
    with pytest.raises(common.UserError, match="or a frozen model has changed since"):
        train(script, flags, resume=True)


def test_a_run_interrupted_again_and_again(whole, settings, tmp_path, monkeypatch):
    flags = settings("train_dvpo", tmp_path / "run", checkpoint_every=1)
    for i in range(6):
        with monkeypatch.context() as patch, pytest.raises(Interrupted):
            interrupt(patch, "checkpoint", 2 if i else 1, after=bool(i % 2))
            train("train_dvpo", flags, **({"resume": True} if i else {}))
    train("train_dvpo", flags, resume=True)
    assert_identical(whole("train_dvpo"), tmp_path / "run")


def test_the_newest_two_checkpoints_are_kept(whole):
    names = [path.name for path in (whole("train_dvpo") / "checkpoints").iterdir()]
    assert sorted(names) == ["step_000006", "step_000008"]


@pytest.mark.parametrize("script, stage", [*((script, "run") for script in MODULES), ("train_ppo_baseline", "run_rm")])
def test_two_ranks_save_one_goes_on(script, stage, whole, settings, tmp_path):
    flags = settings(script, tmp_path / "run")
    if script == "train_ppo_baseline" and stage == "run":
        flags["reward_path"] = str(whole(script)) + "_rm"
    result = launch(script, flags, "stop_after(4)", tmp_path, ranks=2)
    assert "stopped by SIGTERM after update 4: the same command with --resume" in result.stdout, result.stderr[-2000:]
    assert len(list((tmp_path / stage / "checkpoints/step_000004").glob("*.distcp"))) == 2
    train(script, flags, resume=True)
    for folder in {stage, "run"}:
        expected = whole(script).with_name(folder.replace("run", script))
        for a, b in zip(read_metrics(expected), read_metrics(tmp_path / folder), strict=True):
            for key in a.keys() & {"objective/kl", "loss/policy", "loss/value", "loss/sft", "gvm/loss", "rm/loss",
                                   "optim/grad_norm", "objective/scores"}:  # fmt: skip
                assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), (folder, a["step"], key)
        weights = load_weights(tmp_path / folder)
        for name, tensor in load_weights(expected).items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-5, atol=1e-5)


def test_micro_batches_may_change_on_the_way(settings, whole, tmp_path, monkeypatch):
    flags = settings("sft", tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, "checkpoint", 4, after=True)
        train("sft", flags)
    train("sft", flags, resume=True, micro_batch_size=2, checkpoint_every=100)
    for a, b in zip(read_metrics(whole("sft")), read_metrics(tmp_path / "run"), strict=True):
        assert a["loss/sft"] == pytest.approx(b["loss/sft"], rel=1e-5)


# ---- Signals and kills, as they come from outside --------------------------------------------------------------------
DRIVER = """
import os, signal, sys
sys.path.insert(0, {root!r})
import common, {script}
import torch
restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0
rank = int(os.environ.get("RANK", 0))

def at_update(update, do):  # when the update is about to be logged
    log = common.Run.log
    def logged(run, number, *rest):
        if number == update and not restarted:
            do()
        return log(run, number, *rest)
    common.Run.log = logged

def stop_after(update, of_rank=0):
    at_update(update, lambda: rank == of_rank and os.kill(os.getpid(), signal.SIGTERM))

def kill_at(update, of_rank=0):
    at_update(update, lambda: rank == of_rank and os.kill(os.getpid(), signal.SIGKILL))

def fail(error):
    raise error

{patch}
with common.one_line_errors():
    {script}.main(common.parse({script}.Args))
"""


def ours(result) -> str:
    """What the script wrote to stderr, without torchrun's own report."""
    return result.stderr.split('Traceback (most recent call last):\n  File "<frozen runpy>"')[0]


def launch(script, flags, patch, tmp_path, ranks=1, launcher=None):
    """The script with `patch`, a line of Python, in processes of its own, by torchrun where flags are given to it."""
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(root=str(ROOT), script=script, patch=patch))
    if launcher is not None:
        return torchrun(driver, *command_line(flags), ranks=ranks, launcher=launcher)
    return run_script(driver, *command_line(flags), ranks=ranks)


@pytest.mark.parametrize("number, ranks", [(signal.SIGINT, 1), (signal.SIGTERM, 2)])
def test_a_signal_saves_and_leaves(number, ranks, whole, settings, tmp_path):
    flags = settings("train_dvpo", tmp_path / "run")
    patch = f"at_update(5, lambda: rank == {ranks - 1} and os.kill(os.getpid(), {int(number)}))"
    result = launch("train_dvpo", flags, patch, tmp_path, ranks=ranks)
    assert f"stopped by {number.name} after update 5: the same command with --resume" in result.stdout
    assert "Traceback" not in ours(result) and result.returncode != 0
    assert (tmp_path / "run" / "checkpoints" / "step_000005" / "manifest.json").exists()
    if ranks == 1:
        assert result.returncode == 128 + number and result.stderr == ""
    train("train_dvpo", flags, resume=True)
    if ranks == 1:
        assert_identical(whole("train_dvpo"), tmp_path / "run")


def test_kill_9_and_resume(whole, settings, tmp_path):
    flags = settings("train_dvpo", tmp_path / "run")
    result = launch("train_dvpo", flags, "kill_at(6)", tmp_path)
    assert result.returncode == -signal.SIGKILL and len(read_metrics(tmp_path / "run")) == 5
    result = run_script("train_dvpo.py", *command_line(flags), "--resume")
    assert result.returncode == 0, result.stderr
    assert_identical(whole("train_dvpo"), tmp_path / "run")


def test_kill_9_during_the_first_save(whole, settings, tmp_path, monkeypatch):
    """There is no checkpoint before: the run starts again."""
    flags = settings("train_dvpo", tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(common, "sha256", lambda file: (_ for _ in ()).throw(Interrupted()))
        patch.setattr(common, "fingerprint", lambda *rest: "any")
        train("train_dvpo", flags)
    assert not (tmp_path / "run/checkpoints/step_000003/manifest.json").exists()
    train("train_dvpo", flags, resume=True)
    assert_identical(whole("train_dvpo"), tmp_path / "run")


def test_kill_9_during_a_save(whole, settings, tmp_path):
    """Tensors are written, the manifest is not: the checkpoint before is used."""
    flags = settings("train_dvpo", tmp_path / "run")
    patch = (
        "original = common.sha256\n"
        "def sha256(file):\n"
        "    if 'step_000006' in str(file):\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return original(file)\n"
        "common.sha256 = sha256"
    )
    launch("train_dvpo", flags, patch, tmp_path)
    assert sorted(p.name for p in (tmp_path / "run/checkpoints").iterdir()) == ["step_000003", "step_000006"]
    train("train_dvpo", flags, resume=True)
    assert_identical(whole("train_dvpo"), tmp_path / "run")


@pytest.mark.slow
def test_torchrun_restarts_and_the_run_goes_on(settings, tmp_path):
    """One of two ranks is killed: `--max-restarts` with `--resume` is all it takes, from the first start on."""
    flags = {**settings("train_dvpo", tmp_path / "a"), "resume": True}
    restarted = launch("train_dvpo", flags, "kill_at(5, of_rank=1)", tmp_path, 2, ["--max-restarts", "1"])
    assert restarted.returncode == 0, restarted.stderr[-2000:]
    assert "going on from the start" in restarted.stdout or "going on from step_000003" in restarted.stdout
    whole = run_script("train_dvpo.py", *command_line(settings("train_dvpo", tmp_path / "b")), ranks=2)
    assert whole.returncode == 0, whole.stderr[-2000:]
    assert_identical(tmp_path / "a", tmp_path / "b")


@pytest.mark.slow
def test_restarts_keep_the_guards_and_their_voice(settings, tmp_path):
    """Another run's folder is refused in every attempt, one line each; none hangs."""
    flags = settings("train_dvpo", tmp_path / "run")
    train("train_dvpo", flags)
    result = launch("train_dvpo", {**flags, "seed": 2}, "pass", tmp_path, 2, ["--max-restarts", "1"])
    assert result.returncode != 0 and len(errors(result)) == 2, result.stderr[-3000:]
    assert all("holds a run" in line for line in errors(result)), errors(result)
    assert len(read_metrics(tmp_path / "run")) == 8


# ---- Damaged checkpoints and full disks ------------------------------------------------------------------------------
@pytest.fixture
def stopped(settings, tmp_path, monkeypatch):
    """Flags and folder of a run that stopped after its seventh update, with checkpoints of the third and sixth."""
    flags = settings("train_dvpo", tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, "log", 7, after=True)
        train("train_dvpo", flags)
    return flags, tmp_path / "run"


def flip_a_byte(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def truncate(file):
    file.write_bytes(file.read_bytes()[:-64])


DAMAGES = {
    "a flipped bit in the tensors": lambda c: flip_a_byte(c / "__0_0.distcp"),
    "truncated tensors": lambda c: truncate(c / "__0_0.distcp"),
    "no tensors": lambda c: (c / "__0_0.distcp").unlink(),
    "a flipped bit in the metadata": lambda c: flip_a_byte(c / ".metadata"),
    "other progress": lambda c: (c / "state.json").write_text((c / "state.json").read_text() + " "),
    "no manifest": lambda c: (c / "manifest.json").unlink(),
    "a manifest that is no JSON": lambda c: (c / "manifest.json").write_text("{"),
    "a manifest of nothing": lambda c: (c / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(damage, stopped, whole, capsys):
    flags, folder = stopped
    DAMAGES[damage](folder / "checkpoints" / "step_000006")
    train("train_dvpo", flags, resume=True)
    printed = capsys.readouterr().out
    assert "step_000006: " in printed and "trying the one before" in printed and "going on from step_000003" in printed
    assert_identical(whole("train_dvpo"), folder)


def test_no_checkpoint_is_whole(stopped):
    flags, folder = stopped
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        truncate(checkpoint / "__0_0.distcp")
    with pytest.raises(common.UserError, match="none of its checkpoints can be used"):
        train("train_dvpo", flags, resume=True)


def test_a_full_disk_keeps_the_checkpoint_before(stopped, whole, monkeypatch, capsys):
    """Files larger than 20 kB cannot be written while the next checkpoint is saved: one line, and the one before."""
    flags, folder = stopped
    save = common.Run.save_checkpoint

    def on_a_full_disk(*args):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            save(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left, common.one_line_errors():
        patch.setattr(common.Run, "save_checkpoint", on_a_full_disk)
        train("train_dvpo", flags, resume=True)
    assert left.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("error: a file cannot be written (") and error.count("\n") == 1
    assert error.endswith("then use --resume\n")
    train("train_dvpo", flags, resume=True)
    assert "step_000008: not whole" in capsys.readouterr().out
    assert_identical(whole("train_dvpo"), folder)


# ---- Guards ----------------------------------------------------------------------------------------------------------
def test_a_finished_run_is_not_overwritten(settings, tmp_path, capsys):
    flags = settings("sft", tmp_path / "run")
    train("sft", flags)
    before = (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns
    with pytest.raises(common.UserError, match="holds a run: --resume or remove it"):
        train("sft", flags)
    train("sft", flags, resume=True)
    assert "is finished already" in capsys.readouterr().out
    with pytest.raises(common.UserError, match="cannot go on with other settings: --learning-rate was 0.0015, now 0.1"):
        train("sft", flags, resume=True, learning_rate=0.1)
    assert (tmp_path / "run" / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize("resume", [False, True])
def test_a_model_that_stands_in_the_folder_is_safe(resume, settings, tiny_gvm):
    with pytest.raises(common.UserError, match="holds other files than a run's"):
        train("sft", settings("sft", tiny_gvm), resume=resume)


def test_other_settings_are_refused_with_the_differences(stopped):
    flags, _ = stopped
    with pytest.raises(common.UserError, match="--kl-coef was 0.05, now 0.3; --seed was 1, now 2"):
        train("train_dvpo", flags, resume=True, seed=2, kl_coef=0.3)


@pytest.mark.parametrize("text", ["", "7"])
def test_settings_that_cannot_be_read(text, stopped):
    flags, folder = stopped
    (folder / "args.json").write_text(text)
    with pytest.raises(common.UserError, match="args.json: cannot be read"):
        train("train_dvpo", flags, resume=True)


@pytest.mark.parametrize("damage", ["torn", "a row less", "gone"])
def test_a_damaged_log_is_mended(damage, stopped, whole):
    """Every checkpoint holds the rows up to it."""
    flags, folder = stopped
    file = folder / "metrics.jsonl"
    rows = file.read_text().splitlines(keepends=True)
    if damage == "gone":
        file.unlink()
    else:
        rows[2] = rows[2][:20] + "\n" if damage == "torn" else ""
        file.write_text("".join(rows))
    train("train_dvpo", flags, resume=True)
    assert_identical(whole("train_dvpo"), folder)


def test_a_model_that_is_not_finite_is_not_saved(settings, tmp_path, monkeypatch):
    whole = common.dcp_state.get_model_state_dict
    broken = lambda *args, **more: {name: tensor * torch.nan for name, tensor in whole(*args, **more).items()}
    monkeypatch.setattr(common.dcp_state, "get_model_state_dict", broken)
    with pytest.raises(common.UserError, match="not saved, as .* is not finite"):
        train("sft", settings("sft", tmp_path / "run"))
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_reader_that_leaves_does_not_end_a_run(settings, tmp_path):
    """`python train_dvpo.py | head`: what is printed is dropped."""
    patch = "def close():\n    r, w = os.pipe(); os.dup2(w, 1); os.close(r); os.close(w)\nat_update(2, close)"
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path)
    assert result.returncode == 0 and result.stderr == "" and len(read_metrics(tmp_path / "run")) == 8


def test_other_data_are_refused(stopped, pairs, tmp_path):
    flags, _ = stopped
    before = open(pairs).read()
    open(pairs, "w").write("".join(before.splitlines(keepends=True)[5:]))
    try:
        with pytest.raises(common.UserError, match="--dataset or a frozen model has changed since"):
            train("train_dvpo", flags, resume=True)
    finally:
        open(pairs, "w").write(before)


def test_another_gvm_is_refused(settings, tiny_gvm, tmp_path, monkeypatch):
    """At the same path, trained anew while the run lay still."""
    shutil.copytree(tiny_gvm, tmp_path / "gvm")
    flags = settings("train_dvpo", tmp_path / "run", gvm_path=str(tmp_path / "gvm"))
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        interrupt(patch, "log", 5, after=True)
        train("train_dvpo", flags)
    weights = load_weights(tmp_path / "gvm")
    weights["score.weight"] += 1
    save_file(weights, tmp_path / "gvm" / "model.safetensors", {"format": "pt"})
    with pytest.raises(common.UserError, match="or a frozen model has changed since"):
        train("train_dvpo", flags, resume=True)


def test_models_from_the_hub_are_told_apart(tiny_gvm, tmp_path):
    """By their weights in the hub's cache, as folders are."""
    prints = []
    for weight in (0.0, 1.0):
        snapshot = tmp_path / "hub/models--owner--name/snapshots/0123"
        shutil.copytree(tiny_gvm, snapshot, dirs_exist_ok=True)
        save_file({"score.weight": torch.full((1, 4), weight)}, snapshot / "model.safetensors")
        (snapshot.parents[1] / "refs").mkdir(exist_ok=True)
        (snapshot.parents[1] / "refs" / "main").write_text("0123")
        code = (
            f"import sys; sys.path.insert(0, {str(ROOT)!r}); import common; print(common.fingerprint([], 'owner/name'))"
        )
        result = subprocess.run([sys.executable, "-c", code], env={**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub")},
                                capture_output=True, text=True)  # fmt: skip
        prints.append(result.stdout)
        assert result.returncode == 0, result.stderr
    assert prints[0] != prints[1]


@pytest.mark.parametrize("track", ["tensorboard", "wandb"])
def test_metrics_go_to_a_tracker(track, settings, tmp_path, monkeypatch):
    begun, logged = [], []
    writer = types.SimpleNamespace(add_scalar=lambda name, value, step: logged.append((name, step)))
    fake = types.SimpleNamespace(SummaryWriter=lambda folder, purge_step: begun.append((folder, purge_step)) or writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **kwargs: begun.append(kwargs)))
    train("sft", settings("sft", tmp_path / "run", track=track))
    assert begun[-1] == (tmp_path / "run" / "tensorboard", 1) and ("loss/sft", 8) in logged
    assert (begun[0] == begun[-1]) if track == "tensorboard" else begun[0]["sync_tensorboard"]


def test_a_tracker_that_is_not_installed(settings, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(common.UserError, match="--track wandb: pip install"):
        train("sft", settings("sft", tmp_path / "run", track="wandb"))


def test_other_peoples_files_are_safe(settings, tmp_path):
    """A folder of another tool may look like a run's: `args.json`, `checkpoints/`, weights."""
    (tmp_path / "run/checkpoints/best").mkdir(parents=True)
    for name in ("README.md", "args.json", "model-lora.safetensors", "checkpoints/best/weights.pt"):
        (tmp_path / "run" / name).write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    for more in ({}, {"resume": True}):
        with pytest.raises(common.UserError, match="holds other files than a run's: choose another"):
            train("sft", settings("sft", tmp_path / "run", **more))
    assert sorted(tmp_path.rglob("*")) == before


def test_copies_beside_the_checkpoints_are_safe(stopped, whole):
    flags, folder = stopped
    for name in ("best", "step_000006_best", "note"):
        shutil.copytree(folder / "checkpoints/step_000006", folder / "checkpoints" / name)
    train("train_dvpo", flags, resume=True)
    kept = {path.name for path in (folder / "checkpoints").iterdir()}
    assert kept == {"best", "step_000006_best", "note", "step_000006", "step_000008"}
    assert_identical(whole("train_dvpo"), folder)


def test_an_unfinished_run_is_not_started_again_by_chance(stopped):
    flags, folder = stopped
    with pytest.raises(common.UserError, match="holds a run: --resume or remove it"):
        train("train_dvpo", flags)
    (folder / "metrics.jsonl").unlink()  # whatever else is missing
    with pytest.raises(common.UserError, match="holds a run"):
        train("train_dvpo", flags)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step_000003", "step_000006"]


# ---- Numbers ---------------------------------------------------------------------------------------------------------
def poisoned(monkeypatch, module, name, at, row):
    """Let the `at`-th result of a function of log-probs, values or losses be NaN in one row."""
    original, calls = getattr(module, name), []

    def function(*args, **kwargs):
        calls.append(1)
        result = original(*args, **kwargs)
        first = result[0] if isinstance(result, tuple) else result
        if len(calls) == at:
            first = first.clone()
            first[row] = first[row] * torch.nan
        return (first, *result[1:]) if isinstance(result, tuple) else first

    function.__name__ = name  # by which it becomes a method of the model
    monkeypatch.setattr(module, name, function)


@pytest.mark.parametrize(
    "script, name, at, message",
    [
        ("sft", "token_logprobs", 7, "update 5: the loss or its gradient is not finite"),
        # One call held out after a quarter of the updates and one after half of them.
        ("train_gvm", "token_values", 7, "update 5: the loss or its gradient is not finite"),
        # Per update: old and reference log-probs, then four steps.
        ("train_dvpo", "token_logprobs", 25, "update 5: log-probs or values are not finite"),
        ("train_dvpo", "token_logprobs", 28, "update 5: the loss or its gradient is not finite"),
        ("train_dvpo", "token_values", 5, "update 5: log-probs or values are not finite"),
        ("train_ppo_baseline", "bradley_terry_loss", 5, "update 5: the loss or its gradient is not finite"),
    ],
)
def test_what_is_not_finite_is_caught_before_the_step(script, name, at, message, settings, tmp_path, monkeypatch):
    flags = settings(script, tmp_path / "run")
    with monkeypatch.context() as patch, pytest.raises(common.UserError, match=message):
        poisoned(patch, MODULES[script], name, at, 2)
        train(script, flags)
    folder = tmp_path / ("run_rm" if script == "train_ppo_baseline" else "run")
    assert len(read_metrics(folder)) == 4
    train(script, flags, resume=True)  # the last checkpoint is good
    assert len(read_metrics(folder)) == 8


def test_a_gradient_that_is_not_finite(settings, tmp_path, monkeypatch):
    """Finite losses, infinite gradient: it is seen in the norm."""
    loss = train_dvpo.ppo_clip_loss

    def steep(new_logprobs, *rest):
        value, sums = loss(new_logprobs, *rest)
        zero = (new_logprobs - new_logprobs.detach()).sum()
        return value + torch.sqrt(zero.abs()), sums  # the slope of a root at 0

    monkeypatch.setattr(train_dvpo, "ppo_clip_loss", steep)
    with pytest.raises(common.UserError, match="update 1: the loss or its gradient is not finite"):
        train("train_dvpo", settings("train_dvpo", tmp_path / "run"))


@pytest.mark.parametrize("script", ["train_dvpo", "train_ppo_baseline"])
def test_a_collapsed_policy_stops_the_run(script, settings, tmp_path):
    flags = settings(script, tmp_path / "run", learning_rate=0.05, kl_coef=0.0, kl_target=None, max_kl=0.5)
    with pytest.raises(common.UserError, match=r"update \d: .* nats per answer to the reference are above --max-kl"):
        train(script, flags)
    train(script, flags, resume=True, max_kl=1e9)  # it may be told to go on
    assert len(read_metrics(tmp_path / "run")) == 8


@pytest.mark.parametrize("function", ["generate", "ppo_clip_loss", "shard"])
def test_out_of_memory_says_what_to_lower(function, settings, tmp_path, monkeypatch, capsys):
    def greedy(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    greedy.__name__ = function
    monkeypatch.setattr(train_dvpo, function, greedy)
    with pytest.raises(SystemExit) as left, common.one_line_errors():
        train("train_dvpo", settings("train_dvpo", tmp_path / "run"))
    assert left.value.code == 1 and capsys.readouterr().err.startswith("error: out of memory: lower --micro-batch-size")


def test_the_first_updates_are_the_widest(settings, tmp_path, monkeypatch):
    """So that memory runs out at once or never."""
    for script, name in (("sft", "token_logprobs"), ("train_gvm", "token_values"), ("train_dvpo", "token_logprobs")):
        function, widths = getattr(MODULES[script], name), []

        def noted(model, input_ids, *rest, function=function, widths=widths, **kwargs):
            rest = kwargs or dict(zip(("attention_mask", "response_mask"), rest))
            widths.append((input_ids.shape[1], rest["response_mask"].shape[1], torch.is_grad_enabled()))
            return function(model, input_ids, **kwargs) if kwargs else function(model, input_ids, *rest.values(), 1.0)

        with monkeypatch.context() as patch:
            noted.__name__ = name
            patch.setattr(MODULES[script], name, noted)
            one_step = {"rollout_batch_size": 1, "num_epochs": 1, "num_minibatches": 1}
            small = one_step if script == "train_dvpo" else {"batch_size": 2}
            train(script, settings(script, tmp_path / script, **small))
        trained = [width[:2] for width in widths if width[2]]
        assert trained[0] == trained[1] and all(trained[0] >= width for width in trained)
        assert any(trained[0] > width for width in trained[2:]), (script, trained)


# ---- Several processes -----------------------------------------------------------------------------------------------
def errors(result) -> list[str]:
    return [line for line in result.stderr.splitlines() if line.startswith("error:")]


def test_a_folder_that_vanishes_is_told(settings, tmp_path, monkeypatch, capsys):
    log = common.Run.log

    def vanish(run, update, *rest):
        if update == 2:
            shutil.rmtree(run.folder)
        log(run, update, *rest)

    monkeypatch.setattr(common.Run, "log", vanish)
    with pytest.raises(SystemExit) as left, common.one_line_errors():
        train("train_dvpo", settings("train_dvpo", tmp_path / "run"))
    error = capsys.readouterr().err
    assert left.value.code == 1
    assert error.startswith("error: a file cannot be written") and "metrics.jsonl" in error


@pytest.mark.parametrize("lost", [0, 1])
def test_a_lost_process_is_reported_once(lost, settings, tmp_path):
    """Also where it is the one that holds the store."""
    start = time.monotonic()
    patch = f"kill_at(5, of_rank={lost})"
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path, ranks=2)
    assert result.returncode != 0 and time.monotonic() - start < 100
    assert len(errors(result)) == 1 and errors(result)[0].startswith("error: lost another process, killed perhaps")
    assert "Traceback" not in ours(result)


def test_a_silent_process_is_given_up(settings, tmp_path):
    """One of two hangs without dying; here it wakes up again, so that torchrun need not wait to kill it."""
    patch = (
        "import datetime; common.timedelta = lambda minutes: datetime.timedelta(seconds=15)\n"
        "def hang():\n"
        "    if rank == 1:\n"
        "        import subprocess\n"
        "        subprocess.Popen(['sh', '-c', f'sleep 30; kill -CONT {os.getpid()}'])\n"
        "        os.kill(os.getpid(), signal.SIGSTOP)\n"
        "at_update(5, hang)"
    )
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path, ranks=2)
    assert result.returncode != 0
    assert errors(result) and all(line.startswith("error: lost another process") for line in errors(result))
    assert len(read_metrics(tmp_path / "run")) == 5  # rank 0 had finished this update


def test_the_first_error_is_the_one_that_is_told(settings, tmp_path):
    """Rank 1 alone has a bad row; rank 0 only notices that it is gone."""
    patch = "at_update(5, lambda: rank == 1 and fail(common.UserError('row 3 is bad')))"
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path, ranks=2)
    assert result.returncode != 0 and errors(result) == ["error: row 3 is bad"]


def test_numbers_of_one_rank_stop_all_alike(settings, tmp_path):
    patch = (
        "original = train_dvpo.token_values\n"
        "train_dvpo.token_values = lambda *a, **k: original(*a, **k) * (float('nan') if rank == 1 else 1.0)\n"
        "train_dvpo.token_values.__name__ = 'token_values'"
    )
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path, ranks=2)
    assert len(errors(result)) == 1
    assert "update 1: log-probs or values are not finite" in errors(result)[0]


def test_a_bug_shows_its_traceback_once(settings, tmp_path):
    patch = "at_update(2, lambda: fail(KeyError('bug')))"
    result = launch("train_dvpo", settings("train_dvpo", tmp_path / "run"), patch, tmp_path, ranks=2)
    assert result.stderr.count("KeyError: 'bug'") == 1 and not errors(result)


@pytest.mark.slow
def test_two_machines(settings, tmp_path):
    """Two torchrun agents on loopback, hybrid sharding, one folder."""
    flags = settings("train_dvpo", tmp_path / "run", dp_replicate=2, num_updates=3)
    port = str(20_000 + os.getpid() % 20_000)
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(i),
             "--nproc_per_node", "1",
             "--master_addr", "127.0.0.1", "--master_port", port, str(ROOT / "train_dvpo.py"),
             *map(str, command_line(flags))],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for i in (0, 1)
    ]  # fmt: skip
    outputs = [agent.communicate(timeout=200) for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert len(read_metrics(tmp_path / "run")) == 3
