"""The Triton kernels, run on a CPU by Triton's interpreter.

The interpreter must be chosen before Triton is first imported, so one test starts a process in which the
functions `interpreted_...` are the tests. On a card they run in test_cuda_kernels.py.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from chatglm.hub import quantization_gpu as gpu
from chatglm.hub import quantization_plain as plain

FLOATS = [torch.float16, torch.bfloat16, torch.float32]
LIMIT = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 1e-6}
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def test_every_triton_kernel_equals_the_definition_in_the_interpreter():
    pytest.importorskip("triton", reason="triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(
        [*command, "-o", "python_functions=interpreted_*"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(autouse=INTERPRETED)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton 3.7's interpreter keeps bfloat16 as integers, and its `tl.dot` multiplies these."""
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder

    dot = InterpreterBuilder.create_dot

    def create_dot(builder, *operands):
        wide = (builder.cast_impl(o, float32) if o.dtype.scalar == bfloat16 else o for o in operands[:2])
        return dot(builder, *wide, *operands[2:])

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def operands(
    tokens: int, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight (every byte there is, -128 and -8 too) and scale."""
    generator = torch.Generator().manual_seed(tokens * rows + columns)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (rows, columns * bits // 8), generator=generator).to(torch.int8)
    shape = (rows, columns // group) if group else (rows,)
    return x, weight, (torch.rand(shape, generator=generator) + 0.5) / 2**bits


def assert_is_the_product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
    y = gpu.triton_linear(x, weight, scale, bits)
    expected = x.double() @ plain.dequantize_weight(weight, scale.double(), bits).t()
    assert y.dtype == x.dtype and y.shape == expected.shape
    assert (y.double() - expected).norm() / expected.norm() < LIMIT[x.dtype]


@pytest.mark.parametrize("group", [0, 32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def interpreted_products_are_those_of_the_definition(dtype, bits, group):
    x, weight, scale = operands(3, 19, 384, bits, group, dtype)
    assert_is_the_product(x, weight, scale.to(dtype), bits)


@pytest.mark.parametrize("scale_dtype", FLOATS)
def interpreted_scales_may_have_another_dtype_than_the_activations(scale_dtype):
    x, weight, scale = operands(2, 9, 64, 4, 32, torch.float16)
    assert_is_the_product(x, weight, scale.to(scale_dtype), 4)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "shape", [(1, 16, 256), (16, 17, 100), (5, 1, 30), (2, 40, 1058), (17, 9, 64)], ids=str
)
def interpreted_products_of_any_size_are_those_of_the_definition(shape, bits):
    assert_is_the_product(*operands(*shape, bits, 0, torch.float16), bits)


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def interpreted_dequantizing_rounds_once(dtype, bits, group):
    _, weight, scale = operands(1, 3, 1056, bits, group, dtype)
    y = gpu.triton_dequantize(weight, scale.to(dtype), bits, dtype)
    expected = plain.dequantize_weight(weight, scale.to(dtype).float(), bits).to(dtype)
    # The interpreter cuts bits off where a card rounds to the nearest bfloat16.
    torch.testing.assert_close(y, expected, atol=0, rtol=2**-7 if dtype == torch.bfloat16 else 0)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=["no tokens", "no rows"])
def interpreted_empty_products_are_empty(shape):
    assert gpu.triton_linear(*operands(*shape, 32, 8, 0, torch.float16), 8).shape == shape


def test_the_path_says_what_it_is_for():
    assert "not for cpu" in gpu.triton_missing("cpu")


def test_a_missing_triton_is_named(monkeypatch):
    monkeypatch.setattr(gpu, "triton", None)
    assert gpu.triton_missing("cuda").endswith("pip install triton.")


def test_a_missing_compiler_is_named(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "install gcc or clang" in gpu.triton_missing("cuda")
