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
import evaluate
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


def test_a_guide_too_is_gathered_once(tiny_model, tiny_gvm):
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    mesh, tokenizer = init_device_mesh("cpu", (2,)), common.load_tokenizer(tiny_model)
    args = evaluate.Args(gvm_path=tiny_gvm, top_k=4, value_guided=0.1)
    policy = evaluate.frozen_policy(tiny_model, tokenizer, mesh, torch.float32)
    guide = evaluate.frozen_gvm(tiny_model, tokenizer, mesh, torch.float32, args)
    prompts, no_end = common.pad(PROMPTS, 0, "left"), torch.tensor([-1])
    for length in (2, 12):
        with CollectiveCount() as collectives:
            evaluate.guided_generate(policy, guide, *prompts, torch.zeros(3, length) + 0.5, no_end, 0, args)
        assert collectives.count == 6  # of each model two layers and the root


# ---- Sampling for an evaluation: as in training, cut, or guided by a value model -------------------------------------
@pytest.fixture
def models(processes, model_path, tmp_path):
    """A policy and a value model as `evaluate.py` loads them, and the same two plain."""
    tokenizer = common.load_tokenizer(model_path)
    gvm = common.load_value_model(model_path, tokenizer, torch.float32, fresh_head=True).eval()
    torch.manual_seed(6)
    torch.nn.init.normal_(gvm.score.weight, std=0.1)
    for part in (gvm, tokenizer):
        part.save_pretrained(tmp_path / "gvm")
    mesh, args = init_device_mesh("cpu", (1,)), evaluate.Args(gvm_path=str(tmp_path / "gvm"), value_guided=1.0)
    policy = evaluate.frozen_policy(model_path, tokenizer, mesh, torch.float32)
    guide = evaluate.frozen_gvm(model_path, tokenizer, mesh, torch.float32, args)
    return policy, guide, common.load_policy(model_path, tokenizer, torch.float32).eval(), gvm


def evaluated(policy, guide=None, **settings):
    args = evaluate.Args(**{"response_length": 12, "micro_batch_size": 2, **settings})
    return evaluate.sample("x", policy, policy, guide, PROMPTS, torch.tensor([1]), 0, torch.device("cpu"), args)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_an_evaluation_samples_as_training_does(models, policy, temperature):
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    response_ids, response_mask = rollout(policy, PROMPTS, uniforms, temperature)
    answers = evaluated(models[0], temperature=temperature)
    assert torch.equal(answers["response_ids"], response_ids) and torch.equal(answers["response_mask"], response_mask)
    assert answers["kl"].eq(0).all()


@pytest.mark.parametrize("temperature, top_k, beta", [(1.0, 5, 0.2), (0.7, 5, 0.2), (0.0, 5, 0.2), (1.0, 5, None),
                                                      (0.7, 1, None), (1.0, 1000, 0.2)])  # fmt: skip
def test_guided_sampling_is_that_of_a_plain_loop(models, temperature, top_k, beta):
    """One answer at a time, without any cache: q(a) ~ pi(a) exp(V(s, a) / beta) over the likeliest; KL is that of q."""
    policy, guide, plain, gvm = models
    answers = evaluated(policy, guide if beta else None, temperature=temperature, top_k=top_k, value_guided=beta)
    uniforms = torch.rand(3, 12, generator=torch.Generator().manual_seed(1))
    tilted = 0
    for row, (prompt, u) in enumerate(zip(PROMPTS, uniforms)):
        sequence, kl = list(prompt), 0.0
        for t in range(int(answers["response_mask"][row].sum())):
            token = answers["response_ids"][row, t].item()
            with torch.no_grad():
                logprobs = torch.log_softmax(plain(torch.tensor([sequence])).logits[0, -1] / (temperature or 1), -1)
                candidates = logprobs.argsort(descending=True)[:top_k]
                scores = torch.full_like(logprobs, -torch.inf)
                scores[candidates] = logprobs[candidates]
                if beta:
                    states = gvm.base_model(torch.tensor([[*sequence, candidate] for candidate in candidates]))[0]
                    scores[candidates] += gvm.score(states[:, -1])[:, 0] / beta
            q = scores.softmax(0)
            if not temperature:
                q = (q == q.max()).float()
            tilted += scores.argmax() != logprobs.argmax()
            if temperature:
                assert q.cumsum(0)[token] > u[t] - 1e-4 and (q.cumsum(0) - q)[token] < u[t] + 1e-4
            else:
                assert q[token] == 1
            kl += (q.log() - logprobs)[token].item()
            sequence.append(token)
        assert answers["kl"][row].item() == pytest.approx(kl, abs=1e-4)
    assert tilted > 0 or not beta


def test_limits_of_guided_sampling(models):
    """A weak guide leaves the cut alone; one token leaves no choice; all tokens are no cut."""
    policy, guide = models[:2]
    same = lambda one, other: torch.equal(one["response_ids"], other["response_ids"])
    cut = evaluated(policy, top_k=4)
    assert same(evaluated(policy, guide, top_k=4, value_guided=1e9), cut)
    assert not same(evaluated(policy, guide, top_k=4, value_guided=0.1), cut) and not same(evaluated(policy), cut)
    greedy = evaluated(policy, temperature=0.0)
    assert same(evaluated(policy, top_k=1), greedy)
    torch.testing.assert_close(evaluated(policy, top_k=1)["kl"], greedy["kl"])
    assert same(evaluated(policy, guide, top_k=1, value_guided=0.1), greedy)
    assert same(evaluated(policy, top_k=1000), evaluated(policy))


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
