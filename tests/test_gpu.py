"""What a GPU alone can show, at tiny sizes: `GPU_TESTS=1 pytest tests/test_gpu.py`."""

import math
import shutil

import pytest
import torch
from conftest import load_weights, read_metrics, run_script
from test_fused_logprobs import inputs, naive
from torch.distributed.device_mesh import init_device_mesh
from transformers import DynamicCache

import common
import train_dvpo

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU and GPU_TESTS=1")
TINY = ("--rollout-batch-size", 16, "--micro-batch-size", 4, "--checkpoint-every", 2)


def test_bf16_products_are_fp32():
    hidden, weight, labels, upstream = inputs(N=300, H=64, V=512)
    hidden, weight = (x.detach().cuda().bfloat16().requires_grad_() for x in (hidden, weight))
    logprobs, _ = train_dvpo.fused_logprobs(hidden, weight, labels.cuda(), chunk_size=100)
    plain, _ = naive(hidden.double(), weight.double(), labels.cuda(), 1.0)
    torch.testing.assert_close(logprobs.double(), plain, rtol=1e-4, atol=1e-4)
    upstream = upstream.cuda()
    for fused, exact in zip(
        *(torch.autograd.grad(x @ upstream.to(x.dtype), (hidden, weight)) for x in (logprobs, plain))
    ):
        torch.testing.assert_close(fused.double(), exact.double(), rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize("T", [63, 64, 65, 192, 704])
def test_gradients_under_left_padding_are_finite(T, tiny_model):
    """cuDNN's attention has given NaN at some lengths: `common.init_processes` turns it off."""
    device = common.init_processes()
    tokenizer = common.load_tokenizer(tiny_model)
    policy = common.load_policy(tiny_model, tokenizer, torch.bfloat16).to(device)
    ids = torch.randint(len(tokenizer), (4, T), device=device)
    mask = torch.arange(T, device=device) >= torch.tensor([[0], [1], [T // 3], [T // 2]], device=device)  # (4, T)
    logprobs, _ = train_dvpo.token_logprobs(policy, ids, mask, mask[:, -(T // 4) :], 1.0)
    logprobs.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in policy.parameters())


def test_a_graph_samples_as_single_steps_do(tiny_model, monkeypatch):
    """In two rollouts with a training step between them: the second is recorded anew, with the new weights."""
    device = common.init_processes()
    policy = common.load_policy(tiny_model, common.load_tokenizer(tiny_model), torch.float32)
    policy = train_dvpo.shard(policy.to(device), init_device_mesh("cuda", (1,)), torch.float32)
    policy = train_dvpo.add_methods(policy, train_dvpo.token_logprobs, train_dvpo.generate)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.01)
    prompts = torch.randint(3, 50, (16, 9), device=device)
    mask = torch.arange(9, device=device) >= torch.arange(16, device=device)[:, None] % 7  # (16, 9)
    rollout = lambda: policy.generate(prompts, mask, uniforms, torch.tensor([1], device=device), 0, 1.0)
    recorded_steps, replayed, static = [], train_dvpo.replayed, train_dvpo.key_value_cache
    monkeypatch.setattr(train_dvpo, "replayed", lambda step, inputs: recorded_steps.append(1) or replayed(step, inputs))
    for _ in range(2):
        uniforms = torch.rand(16, 20, device=device)
        monkeypatch.setattr(train_dvpo, "key_value_cache", static)
        recorded = rollout()
        monkeypatch.setattr(train_dvpo, "key_value_cache", lambda model, _: DynamicCache(config=model.config))
        assert all(map(torch.equal, rollout(), recorded))
        ids, answer_mask = recorded
        batch = torch.cat([prompts, ids], 1), torch.cat([mask, answer_mask], 1), answer_mask
        policy.token_logprobs(*batch, 1.0)[0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(recorded_steps) == 2


def run(*arguments):
    done = run_script(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def check_metrics(*folders):
    assert all(math.isfinite(x) for folder in folders for row in read_metrics(folder) for x in row.values())


def test_sft_runs_in_bf16(tmp_path, tiny_model):
    run("sft.py", "--model-path", tiny_model, "--num-examples", 64, "--output-dir", tmp_path)
    check_metrics(tmp_path)


def test_ppo_runs_in_bf16(tmp_path, tiny_model):
    run("train_ppo_baseline.py", "--model-path", tiny_model, *TINY, "--num-updates", 2, "--micro-batch-size", 64,
        "--reward-num-epochs", 1, "--reward-batch-size", 1024, "--output-dir", tmp_path / "ppo",
        "--reward-output-dir", tmp_path / "rm")  # fmt: skip
    check_metrics(tmp_path / "rm", tmp_path / "ppo")


def test_dvpo_runs_in_bf16(tmp_path, tiny_model):
    """And a run that goes on from a checkpoint ends where one does that nothing interrupted."""
    at = lambda name: tmp_path / name
    gvm = ("train_gvm.py", "--model-path", tiny_model, "--num-examples", 64, "--num-context-trajectories", 1)
    run(*gvm, "--num-epochs", 1, "--output-dir", at("gvm"))
    dvpo = ("train_dvpo.py", "--model-path", tiny_model, "--gvm-path", at("gvm"), *TINY, "--num-updates", 4)
    run(*dvpo, "--output-dir", at("dvpo"))
    run("evaluate.py", f"sft={tiny_model}", f"dvpo={at('dvpo')}", "--reference-path", tiny_model, "--gvm-path",
        at("gvm"), "--num-prompts", 8, "--output-dir", at("eval"))  # fmt: skip
    check_metrics(at("gvm"), at("dvpo"))
    first = read_metrics(at("dvpo"))[0]
    assert abs(first["objective/kl"]) < 0.1 and first["val/ratio"] == pytest.approx(1, abs=0.05)
    before = load_weights(at("dvpo"))
    (at("dvpo") / "README.md").unlink()  # as if it had been killed
    shutil.rmtree(at("dvpo") / "checkpoints" / "step_000004")
    run(*dvpo, "--output-dir", at("dvpo"), "--resume")
    for name, weight in load_weights(at("dvpo")).items():
        torch.testing.assert_close(weight, before[name])
