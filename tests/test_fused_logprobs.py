"""Fused linear + log-softmax + gather against the plain way, in fp64."""

import pytest
import torch

import train_dvpo


def inputs(N=37, H=16, V=53):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(V, (N,), generator=generator)
    return hidden, weight, labels, torch.randn(N, generator=generator, dtype=torch.float64)


def naive(hidden, weight, labels, temperature):
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, -1)
    return logprobs.gather(1, labels[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk_size", [1, 10, 37, 100])
def test_values_and_gradients(temperature, chunk_size):
    hidden, weight, labels, upstream = inputs()
    results = []
    for function in (lambda *a: train_dvpo.fused_logprobs(*a, chunk_size=chunk_size), naive):
        logprobs, entropy = function(hidden, weight, labels, temperature)
        results.append((logprobs, entropy, *torch.autograd.grad(logprobs @ upstream, (hidden, weight))))
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


def test_logits_far_apart_between_slices():
    hidden, weight, labels, upstream = inputs()
    weight = (weight.detach() * torch.linspace(0, 300, len(weight))[:, None]).requires_grad_()  # e^1000 would overflow
    results = []
    for function in (lambda *a: train_dvpo.fused_logprobs(*a, chunk_size=8), naive):
        logprobs, entropy = function(hidden, weight, labels, 1.0)
        results.append((logprobs, entropy, *torch.autograd.grad(logprobs @ upstream, (hidden, weight))))
    assert results[1][0].min() < -1000
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)


def test_frozen_head_and_frozen_hidden():
    hidden, weight, labels, _ = inputs()
    logprobs, _ = train_dvpo.fused_logprobs(hidden, weight.detach(), labels)
    plain, _ = naive(hidden, weight.detach(), labels, 1.0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (logprobs, plain)))
    logprobs, _ = train_dvpo.fused_logprobs(hidden.detach(), weight, labels)
    plain, _ = naive(hidden.detach(), weight, labels, 1.0)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), weight)[0] for x in (logprobs, plain)))


def test_no_tokens():
    hidden, weight, labels, _ = inputs(N=0)
    logprobs, entropy = train_dvpo.fused_logprobs(hidden, weight, labels)
    logprobs.sum().backward()
    assert not entropy.requires_grad
    assert logprobs.shape == entropy.shape == (0,) and weight.grad.eq(0).all()


def test_bf16_inputs_give_fp32_log_probs():
    hidden, weight, labels, _ = inputs()
    hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    logprobs, entropy = train_dvpo.fused_logprobs(hidden, weight, labels)
    plain, _ = naive(hidden.double(), weight.double(), labels, 1.0)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs.double(), plain, rtol=1e-5, atol=1e-5)  # bf16 logits would be off by 1e-2
    logprobs.sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16


def test_bf16_gradients_are_summed_in_fp32():
    """They are rounded to bf16 once, by at most a 256th, however many slices add to them."""
    hidden, weight, labels, upstream = inputs(V=500)
    hidden, weight = hidden.detach().bfloat16().requires_grad_(), weight.detach().bfloat16().requires_grad_()
    logprobs, _ = train_dvpo.fused_logprobs(hidden, weight, labels, chunk_size=1)
    plain, _ = naive(hidden.double(), weight.double(), labels, 1.0)
    gradients = (torch.autograd.grad(x @ upstream.to(x.dtype), (hidden, weight)) for x in (logprobs, plain))
    for fused, exact in zip(*gradients):
        assert (fused.double() - exact.double()).norm() < 0.003 * exact.double().norm()  # summed in bf16: 0.007


def test_nothing_of_size_tokens_by_vocabulary_is_kept():
    hidden, weight, labels, _ = inputs(N=64, H=4, V=1000)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        train_dvpo.fused_logprobs(hidden, weight, labels, chunk_size=8)
    assert kept and max(kept) < 64 * 1000 / 8
