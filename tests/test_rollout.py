"""Sampling and log-probs of a sharded policy."""

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, StaticCache

import common
import train_dvpo


@pytest.fixture(params=["tiny_model", "tiny_gpt2", "tiny_bloom"])
def model_path(request) -> str:
    """Rotary positions, which only differences matter to, learned ones, which padding must not shift, and ALiBi's,
    which are made of the mask and must be as many as the cache holds."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def policy(processes, model_path):
    tokenizer = common.load_tokenizer(model_path)
    model = common.load_policy(model_path, tokenizer, torch.float32)
    mesh = init_device_mesh("cpu", (1,))
    return train_dvpo.add_methods(
        train_dvpo.shard(model, mesh, torch.float32), train_dvpo.token_logprobs, train_dvpo.generate
    )


def rollout(policy, prompts, uniforms, temperature=1.0, end=1):
    prompt_ids, prompt_mask = common.pad(prompts, 0, "left")
    return policy.generate(prompt_ids, prompt_mask, uniforms, torch.tensor([end]), 0, temperature)


PROMPTS = [[3, 6, 7, 20, 4], [3, 6, 4], [3, 6, 9, 30, 40, 41, 4]]


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_is_inverse_cdf_of_the_plain_models_distribution(policy, model_path, temperature):
    """No top-k, no penalty, no effect of padding or cache: each token is what a plain forward pass says."""
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    response_ids, response_mask = rollout(policy, PROMPTS, uniforms, temperature)
    plain = common.load_policy(model_path, common.load_tokenizer(model_path), torch.float32)
    for prompt, ids, mask, u in zip(PROMPTS, response_ids, response_mask, uniforms):
        sequence = list(prompt)
        for t in range(int(mask.sum())):
            with torch.no_grad():
                probs = torch.softmax(plain(torch.tensor([sequence])).logits[0, -1] / temperature, -1)
            assert probs.cumsum(0)[ids[t]] > u[t] - 1e-4 and (probs.cumsum(0) - probs)[ids[t]] < u[t] + 1e-4
            sequence.append(ids[t].item())


def test_the_end_token_is_inside_the_mask_and_padding_is_not(policy):
    uniforms = torch.rand(64, 30, generator=torch.Generator().manual_seed(1))
    response_ids, response_mask = rollout(policy, [PROMPTS[0]] * 64, uniforms)
    ends = (response_ids == 1) & response_mask
    lengths = response_mask.sum(1)
    assert ends.any() and (lengths[~ends.any(1)] == 30).all()  # some answers end, the others are cut
    for ids, mask, length in zip(response_ids, response_mask, lengths):
        assert mask[:length].all() and not mask[length:].any() and (ids[length:] == 0).all()
        assert not (ids[: length - 1] == 1).any()


def test_padding_and_company_do_not_change_an_answer(policy):
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(2))
    together, _ = rollout(policy, PROMPTS, uniforms)
    for i, prompt in enumerate(PROMPTS):
        alone, _ = rollout(policy, [prompt], uniforms[i : i + 1])
        assert torch.equal(alone[0], together[i])


def test_generation_follows_an_optimizer_step(policy):
    """Weights left gathered would make the next rollout and the next training step use stale ones."""
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(3))
    before, _ = rollout(policy, PROMPTS, uniforms)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.02)
    batch = common.pad_batch(PROMPTS, [[50, 51]] * 3, 0, "cpu")
    losses = []
    for _ in range(2):
        loss = -policy.token_logprobs(**batch, temperature=1.0)[0].sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        after, _ = rollout(policy, PROMPTS, uniforms)
    assert losses[1] < losses[0] and not torch.equal(before, after)


class Recorder(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: notes the operations of a step, to do them again on the very same tensors."""

    def __init__(self):
        super().__init__()
        self.done, self.replays = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.done.append((function, args, kwargs or {}, result))
        return result

    def replay(self):
        self.replays += 1
        for function, args, kwargs, result in self.done:
            again = function(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again)):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def test_a_recorded_step_samples_as_single_steps_do(processes, tiny_model, monkeypatch):
    """So nothing that changes from token to token is a number of Python's."""
    policy = common.load_policy(tiny_model, common.load_tokenizer(tiny_model), torch.float32)
    policy = train_dvpo.shard(policy, init_device_mesh("cpu", (1,)), torch.float32)
    policy = train_dvpo.add_methods(policy, train_dvpo.generate)
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(4))
    growing = rollout(policy, PROMPTS, uniforms, end=-1)
    recorder, uses = Recorder(), []

    class Graph:
        def replay(self):  # on a GPU recording does nothing yet; here it has done the step, so the first does nothing
            uses.append(1)
            if len(uses) > 1:
                recorder.replay()

    static = lambda model, length: StaticCache(model.config, max_cache_len=length)
    monkeypatch.setattr(train_dvpo, "key_value_cache", static)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, capture_error_mode: recorder)
    assert all(map(torch.equal, rollout(policy, PROMPTS, uniforms, end=-1), growing)) and recorder.replays == 9


@pytest.mark.parametrize(
    "config, kind",
    [({}, StaticCache),
     ({"attn_implementation": "eager"}, DynamicCache),
     ({"model_type": "mistral", "sliding_window": 4096}, DynamicCache),  # Python counts the tokens in the window
     ({"model_type": "mistral", "sliding_window": None}, StaticCache),
     ({"model_type": "mixtral", "sliding_window": None, "num_local_experts": 2}, DynamicCache),
     ({"model_type": "bloom"}, DynamicCache)],
)  # fmt: skip
def test_a_graph_is_only_made_of_steps_that_are_alike(config, kind, monkeypatch):
    config = {"model_type": "llama", "vocab_size": 50, "hidden_size": 32, "intermediate_size": 32,
              "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, **config}  # fmt: skip
    attention = config.pop("attn_implementation", None)
    config = AutoConfig.for_model(**config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert type(train_dvpo.key_value_cache(model, 32)) is kind


class CollectiveCount(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def test_weights_are_gathered_once_per_rollout_not_once_per_token(tiny_model):
    """On one of two ranks whose other is fake: what is gathered is garbage, how often is not."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    model = common.load_policy(tiny_model, common.load_tokenizer(tiny_model), torch.float32)
    policy = train_dvpo.shard(model, init_device_mesh("cpu", (2,)), torch.float32)
    policy = train_dvpo.add_methods(policy, train_dvpo.generate)
    gathers = []
    for length in (2, 12):
        with CollectiveCount() as collectives:
            rollout(policy, PROMPTS, torch.zeros(3, length) + 0.5, end=-1)
        gathers.append(collectives.count)
    assert gathers[0] == gathers[1] == 3  # two layers and the root


def test_log_probs_equal_the_plain_models(policy, model_path):
    batch = common.pad_batch(PROMPTS, [[8, 9, 1], [10], [11, 12]], 0, "cpu")
    logprobs, entropy = policy.token_logprobs(**batch, temperature=0.8)
    plain = common.load_policy(model_path, common.load_tokenizer(model_path), torch.float32)
    for i, (prompt, answer) in enumerate(zip(PROMPTS, [[8, 9, 1], [10], [11, 12]])):
        logits = plain(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1] / 0.8
        expected = torch.log_softmax(logits, -1)
        for t, token in enumerate(answer):
            assert logprobs[i, t].item() == pytest.approx(expected[t, token].item(), abs=2e-5)
            assert entropy[i, t].item() == pytest.approx(-(expected[t].exp() @ expected[t]).item(), abs=2e-5)
        assert logprobs[i, len(answer) :].eq(0).all()


def test_the_kl_estimate_equals_the_exact_categorical_kl(policy, model_path):
    """Averaged over every possible first token, log pi - log ref is what plain forward passes say of KL(pi || ref)."""
    plain = common.load_policy(model_path, common.load_tokenizer(model_path), torch.float32)
    reference = common.load_policy(model_path, common.load_tokenizer(model_path), torch.float32)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    train_dvpo.add_methods(reference, train_dvpo.token_logprobs)
    V = reference.config.vocab_size
    batch = common.pad_batch([PROMPTS[0]] * V, [[token] for token in range(V)], 0, "cpu")
    with torch.no_grad():
        logprobs, _ = policy.token_logprobs(**batch, temperature=1.0)
        ref_logprobs, _ = reference.token_logprobs(**batch, temperature=1.0)
        prompt = torch.tensor([PROMPTS[0]])
        p, r = (torch.log_softmax(model(prompt).logits[0, -1], 0) for model in (plain, reference))  # (V,)
    estimate = (logprobs.exp() * (logprobs - ref_logprobs)).sum()
    exact = torch.nn.functional.kl_div(r, p, log_target=True, reduction="sum")
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-6) and exact > 1e-3
