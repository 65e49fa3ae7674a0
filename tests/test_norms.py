"""The norm of ChatGLM2 on a CPU, which is made of other operators than torch's, against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from chatglm.hub.layers_chatglm import RMSNorm, constant

SHAPES = [(1, 1, 64), (2, 7, 96), (0, 5, 64), (3, 4096)]


def make_norm(size: int, dtype: torch.dtype = torch.float32) -> RMSNorm:
    norm = RMSNorm(size, eps=1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight, generator=torch.Generator().manual_seed(1))
    return norm


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def with_gradients(function, x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The result, and the gradients of x and weight for some gradient of the result."""
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), *torch.autograd.grad(y, (x, weight), random(*y.shape))


@pytest.mark.parametrize("size", [0.0, 1e-6, 1.0, 1e6])  # the first two are as small as eps, or smaller
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_gradients_are_those_of_torch(shape, size):
    norm, x = make_norm(shape[-1]), random(*shape) * size
    ours = with_gradients(norm, x, norm.weight)
    torchs = with_gradients(lambda x: F.rms_norm(x, (shape[-1],), norm.weight, norm.eps), x, norm.weight)
    for own, other in zip(ours, torchs, strict=True):
        largest = float(other.abs().max()) if other.numel() else 0.0
        torch.testing.assert_close(own, other, rtol=2e-6, atol=2e-6 * largest)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_take_the_norm_of_torch(dtype):
    norm, x = make_norm(64, dtype), random(2, 3, 64).to(dtype)
    assert torch.equal(norm(x), F.rms_norm(x, (64,), norm.weight, norm.eps))


def test_a_row_with_nan_or_infinity_harms_no_other():
    norm, x = make_norm(64), random(3, 64)
    y = norm(x)
    x[1, 5] = torch.nan
    x[2, 5] = torch.inf
    spoilt = norm(x)
    assert torch.equal(spoilt[0], y[0])
    assert spoilt[1:].isnan().any(dim=-1).all()


def test_it_can_be_trained_after_it_ran_in_inference_mode():
    constant.cache_clear()
    norm, x = make_norm(64), random(2, 64)
    with torch.inference_mode():
        norm(x)
    norm(x).sum().backward()
    assert norm.weight.grad.isfinite().all()
