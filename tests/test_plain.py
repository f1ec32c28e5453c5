"""Every trainer against a plain loop that does the same: no sharding, no fusing, no padding, one answer at a time."""

import json

import pytest
import torch
from conftest import load_weights, read_metrics, task_examples
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

import common
import sft
import train_dvpo
import train_gvm
import train_ppo_baseline

END = 1


def logprobs_of(model, prompt, answer, temperature=1.0):
    logits = model(torch.tensor([[*prompt, *answer]])).logits[0, len(prompt) - 1 : -1] / temperature
    return torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None])[:, 0]


def values_of(model, prompt, answer):
    hidden = model.model(torch.tensor([[*prompt, *answer]])).last_hidden_state
    return model.score(hidden)[0, len(prompt) - 1 :, 0]


def sampled(model, prompt, uniforms, temperature):
    answer = []
    for u in uniforms:
        probs = torch.softmax(model(torch.tensor([[*prompt, *answer]])).logits[0, -1] / temperature, -1)
        answer.append(int((probs.cumsum(0) <= u * probs.sum()).sum()))
        if answer[-1] == END:
            break
    return answer


def plain_gae(values, rewards, gamma, lam):
    advantages, following = [], 0.0
    for t in reversed(range(len(rewards))):
        following = rewards[t] + gamma * values[t + 1] - values[t] + gamma * lam * following
        advantages.insert(0, following)
    return torch.stack(advantages)


def step(args, optimizer, model, lr):
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def assert_moved_alike(folder, model, start):
    """The weights in `folder` left `start` as `model` did, to a thousandth of the way."""
    weights, before = load_weights(folder), start.state_dict()
    moved = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    way = sum(tensor.square().sum() for tensor in moved.values()).sqrt()
    apart = sum((weights[name] - before[name] - tensor).square().sum() for name, tensor in moved.items()).sqrt()
    assert way > 0.1 and apart < 1e-3 * way


# ---- DVPO and PPO ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("method", ["DVPO", "PPO", "PPO with a critic of its own"])
def test_policy_updates(method, tiny_model, tiny_gvm, tmp_path):
    dvpo, tokenizer = method == "DVPO", common.load_tokenizer(tiny_model)
    module = train_dvpo if dvpo else train_ppo_baseline
    ppo = {"reward_path": tiny_gvm, "reward_batch_size": 3, "missing_eos_penalty": 0.7}  # the 3 is not used: no error
    more = {"gvm_path": tiny_gvm} if dvpo else {**ppo, "critic_learning_rate": 3e-3}
    judge, critic = (AutoModelForSequenceClassification.from_pretrained(tiny_gvm) for _ in range(2))
    if method.endswith("its own"):
        more["critic_path"] = str(tmp_path / "critic")
        with torch.no_grad():
            critic.score.weight += 0.1
        critic.save_pretrained(more["critic_path"])
        tokenizer.save_pretrained(more["critic_path"])
    args = module.Args(
        tiny_model, output_dir=str(tmp_path / "out"), num_updates=3, rollout_batch_size=12, micro_batch_size=4,
        response_length=9, temperature=0.7, gamma=0.98, gae_lambda=0.9, kl_coef=0.3, kl_target=2.0, learning_rate=4e-3,
        max_grad_norm=0.3, **more,
    )  # fmt: skip
    module.main(args)

    policy, reference = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    optimizer = torch.optim.AdamW(policy.parameters(), eps=1e-5, weight_decay=0.0)
    critic_optimizer = torch.optim.AdamW(critic.parameters(), eps=1e-5, weight_decay=0.0)
    prompts = list(dict.fromkeys(str(e.prompt[0]["content"]) for e in task_examples()))
    prompts = [common.tokenize_prompt(tokenizer, [{"role": "user", "content": text}]) for text in prompts]
    B, kl_coef, clipped_tokens, unfinished = args.rollout_batch_size, args.kl_coef, 0, 0
    for update, metrics in enumerate(read_metrics(args.output_dir), 1):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + update)
        asked = [prompts[i] for i in common.shuffled_batch(len(prompts), update, B, args.seed)]
        uniforms = torch.rand(B, args.response_length, generator=generator)
        with torch.no_grad():
            answers = [sampled(policy, prompt, u, args.temperature) for prompt, u in zip(asked, uniforms)]
            rows = list(zip(asked, answers))
            old = [logprobs_of(policy, *row, args.temperature) for row in rows]
            kl = [logprobs - logprobs_of(reference, *row, args.temperature) for logprobs, row in zip(old, rows)]
            verdicts = [values_of(judge, *row)[-1] for row in rows]
            values = [values_of(judge if dvpo else critic, *row) for row in rows]
        rewards = [-kl_coef * k for k in kl]
        if not dvpo:
            for b in range(B):
                rewards[b][-1] += verdicts[b] - 0.7 * float(answers[b][-1] != END)
                values[b][-1] = 0.0
        advantages = [plain_gae(v, r, args.gamma, args.gae_lambda) for v, r in zip(values, rewards)]
        returns = [a + v[:-1] for a, v in zip(advantages, values)]
        if dvpo:  # less the mean of the other answers at that token
            reach = lambda t, b, a=advantages: [other[t] for c, other in enumerate(a) if c != b and t < len(other)]
            advantages = [torch.stack([x - sum(reach(t, b)) / max(1, len(reach(t, b))) for t, x in enumerate(row)])
                          for b, row in enumerate(advantages)]  # fmt: skip
        every = torch.cat(advantages)
        advantages = [(row - every.mean()) / every.std(correction=0) for row in advantages]
        losses, norms, value_losses = [], [], []
        lr = args.learning_rate * (1 - (update - 1) / args.num_updates)
        shuffled = [torch.randperm(B, generator=generator) for _ in range(args.num_epochs)]
        for minibatch in [part.tolist() for order in shuffled for part in order.chunk(args.num_minibatches)]:
            loss, value_loss, count = 0.0, 0.0, sum(len(answers[b]) for b in minibatch)
            for b in minibatch:
                ratio = (logprobs_of(policy, *rows[b], args.temperature) - old[b]).exp()
                clipped = ratio.clamp(1 - args.clip_coef, 1 + args.clip_coef)
                loss -= torch.min(ratio * advantages[b], clipped * advantages[b]).sum() / count
                clipped_tokens += (ratio != clipped).sum().item()
                if not dvpo:
                    new = values_of(critic, *rows[b])[:-1]
                    near = values[b][:-1] + (new - values[b][:-1]).clamp(-args.value_clip_coef, args.value_clip_coef)
                    errors = torch.max((new - returns[b]) ** 2, (near - returns[b]) ** 2)
                    value_loss += 0.5 * errors.sum() / count
            loss.backward()
            norms.append(step(args, optimizer, policy, lr))
            losses.append(loss.item())
            if not dvpo:
                value_loss.backward()
                step(args, critic_optimizer, critic, lr / args.learning_rate * args.critic_learning_rate)
                value_losses.append(value_loss.item())
        unfinished += sum(answer[-1] != END for answer in answers)
        sequence_kl = sum(k.sum().item() for k in kl) / B
        mean = lambda x: sum(x) / len(x)
        expected = {"objective/kl": sequence_kl, "objective/kl_coef": kl_coef, "objective/scores": mean(verdicts),
                    "loss/policy": mean(losses), "optim/grad_norm": mean(norms), "optim/lr": lr}  # fmt: skip
        if not dvpo:
            expected["loss/value"] = mean(value_losses)
        for name, value in expected.items():
            assert metrics[name] == pytest.approx(float(value), rel=2e-3, abs=2e-5), (update, name)
        kl_coef *= 1 + 0.1 * max(-0.2, min(0.2, sequence_kl / args.kl_target - 1))
    assert clipped_tokens and unfinished  # it was no easy case
    assert kl_coef != args.kl_coef and max(norms) > args.max_grad_norm
    assert_moved_alike(args.output_dir, policy, reference)


# ---- LoRA ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_switched_off_and_merged(dtype, tiny_model, tmp_path, processes):
    """New pairs change nothing and pairs switched off are the model as it was, both exactly; merged ones are saved."""
    tokenizer, mesh = common.load_tokenizer(tiny_model), init_device_mesh("cpu", (1,))
    sharded = lambda model: train_dvpo.add_methods(train_dvpo.shard(model, mesh, dtype), train_dvpo.token_logprobs)
    rows = [([2, 5, 3], [7, 9, 1]), ([4], [8, 6, 5, 1])]
    batch = common.pad_batch(*zip(*rows), 0, "cpu")
    policy = common.load_policy(tiny_model, tokenizer, dtype)
    args = sft.Args(lora_rank=4, output_dir=str(tmp_path / "out"))
    policy = sharded(common.prepare(policy, args))
    with torch.no_grad():
        logprobs = lambda model: model.token_logprobs(**batch, temperature=1.0)[0]
        start = logprobs(sharded(common.load_policy(tiny_model, tokenizer, dtype)))
        assert torch.equal(logprobs(policy), start)
        torch.manual_seed(0)
        for name, parameter in policy.named_parameters():
            assert parameter.requires_grad == ("lora_" in name)
            assert parameter.dtype == (torch.float32 if "lora_" in name else dtype)
            if "lora_b" in name:
                parameter.normal_(std=0.1)
        moved = logprobs(policy)
        policy.lora_on = False
        assert torch.equal(logprobs(policy), start)
        policy.lora_on = True
        assert torch.equal(logprobs(policy), moved) and (moved - start).abs().max() > 0.1
        run = common.Run(args, sft.__file__)
        (tmp_path / "out").mkdir()
        run.save(policy, dtype, tokenizer, "merged")
        merged = logprobs(sharded(common.load_policy(str(tmp_path / "out"), tokenizer, dtype)))
    torch.testing.assert_close(merged, moved, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.05)


def test_pairs_of_full_rank_learn_what_full_training_does(tiny_model, pairs, tmp_path):
    """The first update has full training's loss. With A = 1, the gradient of B is that of the weight beside it."""
    losses = []
    for rank in (0, 64):
        args = sft.Args(tiny_model, pairs, str(tmp_path / str(rank)), num_epochs=1, batch_size=8, lora_rank=rank)
        sft.main(args)
        losses.append([row["loss/sft"] for row in read_metrics(args.output_dir)])
    assert losses[0][0] == losses[1][0] and losses[0][-1] != losses[1][-1]

    tokenizer = common.load_tokenizer(tiny_model)
    full, beside = (common.load_policy(tiny_model, tokenizer, torch.float32) for _ in range(2))
    beside = common.prepare(beside, sft.Args(lora_rank=64))  # as wide as its widest layer
    for module in beside.modules():
        if hasattr(module, "lora_a"):
            torch.nn.init.eye_(module.lora_a)
    for model in (full, beside):
        logprobs_of(model, [2, 5, 3], [7, 9, 1]).sum().backward()
    found = dict(beside.named_parameters())
    for name, parameter in full.named_parameters():
        if "proj" in name:
            pair = found[name.replace("weight", "lora_b")]
            torch.testing.assert_close(pair.grad[:, : parameter.shape[1]], parameter.grad, rtol=1e-4, atol=1e-6)
        assert found[name].grad is None


# ---- What is trained on given answers --------------------------------------------------------------------------------
@pytest.fixture
def pairs(tmp_path) -> str:
    rows = [{"prompt": e.prompt, "chosen": e.chosen, "rejected": e.rejected, "score_chosen": e.score_chosen,
             "score_rejected": e.score_rejected} for e in task_examples()[:60]]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "pairs.jsonl")


def tokens(tokenizer, examples, *sides, max_length=20):
    """(prompt, answer) of each example and side, in this order."""
    texts = [getattr(example, side) for example in examples for side in sides]
    answers = common.tokenize_answers(tokenizer, texts, max_length)
    prompts = [common.tokenize_prompt(tokenizer, example.prompt) for example in examples for _ in sides]
    return list(zip(prompts, answers))


@torch.no_grad()
def pair_accuracy(model, tokenizer, examples):
    rows = tokens(tokenizer, examples, "chosen", "rejected")
    last = [values_of(model, *row)[-1] for row in rows]
    return sum((chosen > rejected).item() for chosen, rejected in zip(last[::2], last[1::2])) / len(examples)


def test_sft_updates(tiny_model, pairs, tmp_path):
    args = sft.Args(tiny_model, pairs, str(tmp_path / "out"), batch_size=8, micro_batch_size=4, warmup_fraction=0.0,
                    response_length=7, max_grad_norm=0.5, learning_rate=4e-3)  # fmt: skip
    sft.main(args)
    policy, start = (AutoModelForCausalLM.from_pretrained(tiny_model) for _ in range(2))
    rows = tokens(common.load_tokenizer(tiny_model), common.load_examples(pairs, "answers")[0], "chosen", max_length=7)
    optimizer, metrics = torch.optim.AdamW(policy.parameters(), weight_decay=0.0), read_metrics(args.output_dir)
    assert len(metrics) == args.num_epochs * len(rows) // 8
    for update, row in enumerate(metrics, 1):
        batch = [rows[i] for i in common.shuffled_batch(len(rows), update, 8, args.seed)]
        loss = -torch.cat([logprobs_of(policy, *answer) for answer in batch]).mean()
        loss.backward()
        norm = step(args, optimizer, policy, args.learning_rate * (1 - (update - 1) / len(metrics)))
        assert [row["loss/sft"], row["optim/grad_norm"]] == pytest.approx([loss.item(), norm], rel=1e-4)
    assert_moved_alike(args.output_dir, policy, start)


@pytest.mark.parametrize("label_source", ["preference", "score"])
def test_gvm_updates(label_source, tiny_model, tiny_gvm, pairs, tmp_path):
    args = train_gvm.Args(tiny_gvm, pairs, str(tmp_path / "out"), batch_size=8, micro_batch_size=4, gamma=0.98,
                          warmup_fraction=0.0, td_lambda=0.9, bt_coef=0.5, max_grad_norm=0.5, learning_rate=4e-3,
                          num_epochs=1, label_source=label_source)  # fmt: skip
    train_gvm.main(args)
    gvm, start = (AutoModelForSequenceClassification.from_pretrained(tiny_gvm) for _ in range(2))
    tokenizer, (examples, heldout) = common.load_tokenizer(tiny_model), common.load_examples(pairs, "scores")
    rows = tokens(tokenizer, examples, "chosen", "rejected")
    labels = torch.tensor([1.0, -1.0] * len(examples))
    if label_source == "score":
        scores = torch.tensor([x for e in examples for x in (e.score_chosen, e.score_rejected)])
        labels = (scores - scores.mean()) / scores.std()
    optimizer, metrics = torch.optim.AdamW(gvm.parameters(), weight_decay=0.0), read_metrics(args.output_dir)
    assert len(metrics) == len(rows) // 8
    for update, row in enumerate(metrics, 1):
        batch = common.shuffled_batch(len(examples), update, 4, args.seed)
        squares, bradley_terry = [], 0.0
        for i in batch:
            last = []
            for j in (2 * i, 2 * i + 1):
                values = values_of(gvm, *rows[j])
                targets, following = [labels[j]], labels[j]
                for value in reversed(values.detach()[1:]):
                    following = args.gamma * ((1 - args.td_lambda) * value + args.td_lambda * following)
                    targets.insert(0, following)
                squares.append(0.5 * (values - torch.stack(targets)) ** 2)
                last.append(values[-1])
            bradley_terry -= logsigmoid(last[0] - last[1]) / len(batch)
        td = torch.cat(squares).mean()
        (td + (args.bt_coef * bradley_terry if label_source == "preference" else 0.0)).backward()
        norm = step(args, optimizer, gvm, args.learning_rate * (1 - (update - 1) / len(metrics)))
        assert [row["gvm/loss"], row["optim/grad_norm"]] == pytest.approx([td.item(), norm], rel=1e-4)
    assert_moved_alike(args.output_dir, gvm, start)
    assert metrics[-1]["gvm/pair_accuracy"] == pair_accuracy(gvm, tokenizer, heldout) != 0.5


def test_reward_model_updates(tiny_model, pairs, tmp_path):
    args = train_ppo_baseline.Args(
        tiny_model, dataset=pairs, output_dir=str(tmp_path / "out"), reward_output_dir=str(tmp_path / "rm"),
        num_updates=1, rollout_batch_size=4, reward_batch_size=8, micro_batch_size=4, reward_num_epochs=2,
        reward_warmup_fraction=0.0, reward_center_coef=0.1, reward_learning_rate=4e-3, max_grad_norm=0.1,
    )  # fmt: skip
    train_ppo_baseline.main(args)
    tokenizer = common.load_tokenizer(tiny_model)
    rm, start = (common.load_value_model(tiny_model, tokenizer, torch.float32, fresh_head=True) for _ in range(2))
    examples, heldout = common.load_examples(pairs, "pairs")
    rows = tokens(tokenizer, examples, "chosen", "rejected")
    optimizer, metrics = torch.optim.AdamW(rm.parameters(), weight_decay=0.0), read_metrics(args.reward_output_dir)
    for update, row in enumerate(metrics, 1):
        loss = 0.0
        for i in common.shuffled_batch(len(examples), update, 4, args.seed):
            chosen, rejected = values_of(rm, *rows[2 * i])[-1], values_of(rm, *rows[2 * i + 1])[-1]
            loss += (-logsigmoid(chosen - rejected) + 0.1 * (chosen + rejected) ** 2) / 4
        loss.backward()
        norm = step(args, optimizer, rm, args.reward_learning_rate * (1 - (update - 1) / len(metrics)))
        assert [row["rm/loss"], row["optim/grad_norm"]] == pytest.approx([loss.item(), norm], rel=1e-3)
    assert_moved_alike(args.reward_output_dir, rm, start)
    assert metrics[-1]["rm/pair_accuracy"] == pair_accuracy(rm, tokenizer, heldout) != 0.5
