"""Return-to-go against plain loops and hand-made cases."""

import math

import pytest
import torch

import common
import evaluate
import train_dvpo
import train_gvm
import train_ppo_baseline

MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)  # one answer is cut at R


def random_case():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    rewards = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return values, rewards


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_td_lambda_returns_equal_a_plain_loop(gamma, lam):
    values, rewards = random_case()
    expected = torch.zeros_like(values)
    for b in range(3):
        T = int(MASK[b].sum())
        expected[b, T] = rewards[b, T - 1]
        for t in reversed(range(T)):
            reward = rewards[b, t - 1] if t > 0 else 0.0
            expected[b, t] = reward + gamma * ((1 - lam) * values[b, t + 1] + lam * expected[b, t + 1])
    torch.testing.assert_close(common.td_lambda_returns(values, rewards, MASK, gamma, lam), expected)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_gae_equals_a_plain_loop(gamma, lam):
    values, rewards = random_case()
    expected = torch.zeros_like(rewards)
    for b in range(3):
        advantage = 0.0
        for t in reversed(range(int(MASK[b].sum()))):
            delta = rewards[b, t] + gamma * values[b, t + 1] - values[b, t]
            advantage = delta + gamma * lam * advantage
            expected[b, t] = advantage
    torch.testing.assert_close(common.gae(values, rewards, MASK, gamma, lam), expected)


def test_what_lies_outside_the_mask_does_not_matter():
    values, rewards = random_case()
    junk_values, junk_rewards = values.clone(), rewards.clone()
    junk_rewards[~MASK] = float("nan")
    junk_values[:, 1:][~MASK] = float("nan")
    for function in (common.gae, common.td_lambda_returns):
        clean, junk = function(values, rewards, MASK, 0.9, 0.8), function(junk_values, junk_rewards, MASK, 0.9, 0.8)
        torch.testing.assert_close(clean, junk)


def test_long_answers_stay_finite_and_exact():
    values, mask = torch.zeros(1, 4097), torch.ones(1, 4096, dtype=torch.bool)
    rewards = torch.zeros(1, 4096).index_fill_(1, torch.tensor([4095]), 1.0)
    assert common.td_lambda_returns(values, rewards, mask, 1.0, 1.0).eq(1).all()
    assert common.gae(values, rewards, mask, 1.0, 0.95).isfinite().all()


def test_gvm_targets_of_a_hand_made_answer():
    """Three tokens, worth +1: what each of the four values is pulled towards."""
    values = torch.tensor([[0.1, 0.2, 0.4, 0.7, 9.0]], requires_grad=True)
    mask = torch.tensor([[True, True, True, False]])

    def targets(lam):  # the gradient of 0.5 (V - G)^2 is V - G
        loss = train_gvm.td_loss(values, torch.tensor([1.0]), mask, gamma=1.0, lam=lam)
        return values.detach() - torch.autograd.grad(loss, values)[0]

    torch.testing.assert_close(targets(1.0), torch.tensor([[1.0, 1.0, 1.0, 1.0, 9.0]]))  # Monte Carlo: the label
    torch.testing.assert_close(targets(0.0), torch.tensor([[0.2, 0.4, 0.7, 1.0, 9.0]]))  # one step: the next value
    torch.testing.assert_close(targets(0.5), torch.tensor([[0.4125, 0.625, 0.85, 1.0, 9.0]]))


def test_whitening_uses_the_mask_alone():
    x = torch.tensor([[1.0, 3.0, 100.0]])
    mask = torch.tensor([[True, True, False]])
    torch.testing.assert_close(common.masked_whiten(x, mask), torch.tensor([[-1.0, 1.0, 0.0]]))


def probability_of_ending_after_one_step(estimator: str) -> float:
    """A good answer may end (judged 0.9) or ramble on for five tokens (judged ever worse) and then end.

    One rollout of each and of a bad answer; one PPO step on the probability to end where the good answer is complete.
    """
    gvm_values = torch.tensor([[0.0, 0.8, 0.9, 0, 0, 0, 0, 0],
                               [0.0, 0.8, 0.6, 0.6, 0.6, 0.6, 0.6, 0.5],
                               [0.0, -0.7, -0.8, 0, 0, 0, 0, 0]])  # fmt: skip
    mask = torch.tensor([[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]], dtype=torch.bool)
    advantages = train_dvpo.dvpo_advantages(gvm_values, torch.zeros(3, 7), mask, estimator, 1.0, 0.95)
    logit = torch.zeros((), requires_grad=True)
    decision = torch.stack([torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)])
    at_the_decision = torch.tensor([[True], [True]])
    loss, _ = train_dvpo.ppo_clip_loss(
        decision[:, None], decision.detach()[:, None], advantages[:2, 1:2], at_the_decision, clip_coef=0.2
    )
    loss.backward()
    return torch.sigmoid(logit.detach() - 0.1 * logit.grad).item()


def test_gae_rewards_ending_a_good_answer_and_the_released_estimator_punishes_it():
    assert probability_of_ending_after_one_step("gae") > 0.5
    assert probability_of_ending_after_one_step("gae_uncentered") > 0.5
    assert probability_of_ending_after_one_step("q") > 0.5
    assert probability_of_ending_after_one_step("released") < 0.5


def test_static_q_is_the_value_after_the_token():
    values, kl = random_case()
    advantages = train_dvpo.dvpo_advantages(values, -0.1 * kl, MASK, "q", 0.9, 0.95)
    torch.testing.assert_close(advantages, common.masked_whiten(values[:, 1:] - 0.1 * kl, MASK))


def test_the_released_estimator_equals_a_plain_loop():
    """Whitened values of the states before each token, none after the last."""
    values, kl = random_case()
    before = [values[i, :-1][MASK[i]] for i in range(3)]
    every, expected = torch.cat(before), torch.zeros_like(kl)
    for i, row in enumerate(before):
        following, after = 0.0, 0.0
        for t in reversed(range(len(row))):
            value = (row[t] - every.mean()) / every.std(correction=0)
            expected[i, t] = following = -0.1 * kl[i, t] + 0.9 * after - value + 0.9 * 0.95 * following
            after = value
    advantages = train_dvpo.dvpo_advantages(values, -0.1 * kl, MASK, "released", 0.9, 0.95)
    torch.testing.assert_close(advantages, common.masked_whiten(expected, MASK))


def test_the_kl_reward_has_the_right_sign():
    """Tokens that the reference finds unlikely lose."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    kl = torch.tensor([[2.0, -2.0]])
    for estimator in ("gae", "gae_uncentered", "q", "released"):
        advantages = train_dvpo.dvpo_advantages(torch.zeros(1, 3), -0.1 * kl, mask, estimator, 1.0, 0.0)
        assert advantages[0, 0] < 0 < advantages[0, 1]


def test_centring_equals_a_plain_loop():
    """Less the mean over the other answers that reach the token; an answer that alone reaches it stays as it is."""
    values, kl = random_case()
    uncentered = common.gae(values, -0.1 * kl, MASK, 1.0, 0.95)
    expected = uncentered.clone()
    for t in range(5):
        for b in range(3):
            others = [uncentered[i, t] for i in range(3) if i != b and MASK[i, t]]
            expected[b, t] -= sum(others) / len(others) if others else 0.0
    advantages = train_dvpo.dvpo_advantages(values, -0.1 * kl, MASK, "gae", 1.0, 0.95)
    torch.testing.assert_close(advantages, common.masked_whiten(expected, MASK))


def test_centring_makes_values_that_have_fallen_behind_as_good_as_current_ones():
    """What the frozen values miss at every answer alike must not move the policy; uncentred, it does."""
    generator = torch.Generator().manual_seed(0)
    mask, rewards = torch.ones(8, 5, dtype=torch.bool), torch.zeros(8, 5)
    current = torch.randn(8, 6, generator=generator)
    behind = current - torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])  # nothing is missed at the end
    for estimator, same in (("gae", True), ("gae_uncentered", False)):
        a, b = (train_dvpo.dvpo_advantages(v, rewards, mask, estimator, 1.0, 0.95) for v in (current, behind))
        assert torch.allclose(a, b, atol=1e-5) is same


def test_ppo_clip_by_hand():
    old = torch.zeros(1, 4)
    new = torch.tensor([1.5, 1.5, 0.5, 0.5]).log()[None]
    advantages = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    mask = torch.tensor([[True, True, True, True]])
    loss, (_, clipped, ratio, ratio_squared) = train_dvpo.ppo_clip_loss(new, old, advantages, mask, clip_coef=0.2)
    assert loss.item() == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8))
    assert clipped.item() == 4 and ratio.item() == pytest.approx(4.0) and ratio_squared.item() == pytest.approx(5.0)
    k3 = train_dvpo.ppo_clip_loss(new, old, advantages, torch.tensor([[True, False, False, False]]), 0.2)[1][0]
    assert k3.item() == pytest.approx(0.5 - math.log(1.5))


@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (0.9, 1.0), (1.0, 0.0)])
def test_ppo_advantages_against_a_plain_loop(gamma, lam):
    """KL on every token, the score on the last, nothing after it; answers of 1, 3 and 4 tokens."""
    torch.manual_seed(0)
    values, kl, scores = torch.randn(3, 5), torch.randn(3, 4), torch.randn(3)
    mask = torch.arange(4) < torch.tensor([[1], [3], [4]])
    advantages, returns = train_ppo_baseline.ppo_advantages(values, scores, kl, mask, gamma, lam, kl_coef=0.1)
    expected = torch.zeros(3, 4)
    for i in range(3):
        following = 0.0
        for t in reversed(range(int(mask[i].sum()))):
            last = t == mask[i].sum() - 1
            reward = -0.1 * kl[i, t] + (scores[i] if last else 0.0)
            delta = reward + gamma * (0.0 if last else values[i, t + 1]) - values[i, t]
            expected[i, t] = following = delta + gamma * lam * following
    torch.testing.assert_close(returns[mask], (expected + values[:, :-1])[mask])
    torch.testing.assert_close(advantages, common.masked_whiten(expected, mask))


def test_clipped_value_loss_by_hand():
    """The larger of the two errors counts, so a value cannot gain by leaving the neighbourhood of the old one."""
    values, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    new_values, returns = torch.tensor([[0.5, -0.1, 9.0]]), torch.tensor([[1.0, 0.3, 0.0]])
    loss = train_ppo_baseline.clipped_value_loss(new_values, values, returns, mask, clip_coef=0.2)
    assert loss.item() == pytest.approx(0.5 * ((0.2 - 1.0) ** 2 + (-0.1 - 0.3) ** 2))


def test_bradley_terry_by_hand():
    scores = torch.tensor([1.0, 0.0, -1.0, 1.0], requires_grad=True)  # one pair ranked rightly, one wrongly
    loss = train_gvm.bradley_terry_loss(scores)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0.313262, 2.126928], abs=1e-5)
    torch.testing.assert_close(scores.grad, torch.tensor([-0.268941, 0.268941, -0.880797, 0.880797]))


def test_token_statistics_by_hand():
    values, mask = torch.tensor([[9.0, 1.0, 2.0, 3.0, 7.0]]), torch.tensor([[True, True, True, False]])
    statistics = {name: x.item() for name, x in evaluate.token_statistics(values, mask).items()}
    assert (statistics["mean"], statistics["last"], statistics["at_0"], statistics["at_1"]) == (2, 3, 9, 3)
    assert (statistics["at_0.25"], statistics["at_0.5"], statistics["at_0.75"]) == (1, 2, 2)
    assert (statistics["p10"], statistics["p90"]) == pytest.approx((1.2, 2.8))


def test_explained_variance_by_hand():
    actual = torch.tensor([0.0, 2.0, 4.0])
    assert evaluate.explained_variance(torch.tensor([5.0, 7.0, 9.0]), actual) == 1  # a constant error explains no less
    assert evaluate.explained_variance(torch.tensor([0.0, 1.0, 2.0]), actual) == pytest.approx(0.75)
    assert evaluate.explained_variance(actual, torch.ones(3)) == 0


def test_value_report_by_hand():
    """Two pairs: one ranked rightly at the end, one wrongly."""
    values = torch.tensor([[0.0, 0.5, 1.0], [0.0, 0.5, -1.0], [0.0, 0.0, 0.1], [0.0, 0.4, 0.2]])
    mask = torch.ones(4, 2, dtype=torch.bool)
    report = evaluate.value_report(
        evaluate.token_statistics(values, mask), torch.tensor([1.0, -1.0, 1.0, -1.0]), torch.tensor([[0, 1], [2, 3]])
    )
    assert report["pair_accuracy"]["last"] == 0.5
    assert report["pair_accuracy"]["mean"] == 0.5
    assert report["by_fraction"]["0"] == {"pair_accuracy": 0.5, "explained_variance": 0.0, "correlation": 0.0}
    assert report["by_fraction"]["0.5"]["pair_accuracy"] == 0.25  # a tie and an error
    assert report["by_fraction"]["1"]["correlation"] > 0
