"""The kernel in C: equal to the definition, built in a private folder, not used unless it proves right."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from chatglm.hub import quantization_kernels as kernels
from chatglm.hub import quantization_native as native
from chatglm.hub import quantization_plain as plain
from chatglm.hub.quantization import QuantizedLinear

# Compiling the source takes seconds; tests that only need some library compile this one.
WRONG_SOURCE = "int chatglm_linear(void *linear, void *pool) { return 0; }"


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What one test built or chose is not remembered in the next."""
    yield
    native.native_kernel.cache_clear()
    kernels._choose_path.cache_clear()


needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("cc", "gcc", "clang")), reason="no C compiler"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder with the compiled kernel."""
    if not any(shutil.which(name) for name in ("cc", "gcc", "clang")):
        pytest.skip("no C compiler")
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        native.native_kernel.cache_clear()
        assert native.native_missing() is None
    return cache


@pytest.fixture
def cache(built: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(built))
    return built


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.native_kernel.cache_clear()
    return tmp_path / "cache"


def random_weight(bits: int, out: int, columns: int, group: int = 0, dtype: torch.dtype = torch.float32):
    """Any bytes, so -8 and -128 occur; and a scale."""
    generator = torch.Generator().manual_seed(out * columns)
    weight = torch.randint(-128, 128, (out, columns * bits // 8), dtype=torch.int8, generator=generator)
    shape = (out, columns // group) if group else (out,)
    return weight, (torch.rand(shape, generator=generator) * 0.01 + 0.001).to(dtype)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """By the kernel itself: a fallback to the definition would make every comparison true."""
    group = weight.shape[1] * 8 // bits // scale.shape[1] if scale.dim() == 2 else 0
    return native._run_native(native.native_kernel(), x, weight, scale, bits, group)


def definition(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    return x.double() @ plain.dequantize_weight(weight, scale.double(), bits).T


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    error = ((y.double() - expected).norm() / expected.norm()).item()
    assert error < tolerance, f"relative error {error:.1e}, largest {(y - expected).abs().max():.1e}"


# Activations have 16 bits; 256 random normal numbers reach about 3.5, so a step is 1e-4: error 3e-5. A single sum
# that cancels is further off.
SIXTEEN_BITS = 1e-4

# columns: one vector and less, tails, several blocks and slabs; for 8 bits odd numbers too; rows for two threads
SHAPES = [
    *((4, out, columns, 0) for out, columns in ((1, 2), (3, 30), (5, 32), (7, 34), (67, 258), (33, 8450))),
    *((4, out, columns, 32) for out, columns in ((1, 32), (5, 96), (70, 1120))),
    *((4, out, columns, 64) for out, columns in ((3, 64), (37, 192))),
    *((4, out, columns, 128) for out, columns in ((2, 128), (9, 384))),
    *((8, out, columns, 0) for out, columns in ((1, 1), (3, 15), (5, 17), (67, 301), (33, 8449))),
    *((8, out, columns, 32) for out, columns in ((5, 96), (35, 1120))),
    *((8, out, columns, 64) for out, columns in ((3, 64), (5, 192))),
    *((8, out, columns, 128) for out, columns in ((9, 384),)),
]


@pytest.mark.parametrize(("bits", "out", "columns", "group"), SHAPES)
def test_equals_the_definition_for_few_and_for_many_rows(
    cache: Path, bits: int, out: int, columns: int, group: int
) -> None:
    weight, scale = random_weight(bits, out, columns, group)
    for rows in (*range(1, 9), 16, 31, native.NATIVE_ROWS):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))
        error = product(x, weight, scale, bits) - definition(x, weight, scale, bits)
        # what the summands add up to if none cancels another
        size = (x.double() ** 2 @ plain.dequantize_weight(weight, scale.double(), bits).T ** 2).sqrt()
        assert error.norm() < SIXTEEN_BITS * size.norm(), f"{rows} rows: {(error / size).abs().max():.1e}"


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float32, SIXTEEN_BITS), (torch.bfloat16, 3e-3), (torch.float16, 4e-4)],  # rounding of the output
    ids=str,
)
@pytest.mark.parametrize("group", [0, 32])
def test_takes_every_dtype_of_activations_and_scales(
    cache: Path, dtype: torch.dtype, tolerance: float, scale_dtype: torch.dtype, group: int
) -> None:
    weight, scale = random_weight(4, 40, 576, group, scale_dtype)
    x = torch.randn(3, 576).to(dtype)
    y = product(x, weight, scale, 4)
    assert y.dtype == dtype
    assert_close(y, definition(x, weight, scale, 4), tolerance)


@pytest.mark.parametrize(("bits", "byte"), [(4, -0x78), (8, -0x80)], ids=["-8", "-128"])
def test_the_most_negative_integers_neither_saturate_nor_overflow(cache: Path, bits: int, byte: int) -> None:
    weight = torch.full((5, 16384 * bits // 8), byte, dtype=torch.int8)
    x = torch.full((2, 16384), -3.0)
    y = product(x, weight, torch.ones(5), bits)
    assert torch.equal(y, torch.full((2, 5), 3.0 * 16384 * (8 if bits == 4 else 128)))


def test_subnormal_half_scales_keep_their_value(cache: Path) -> None:
    weight, _ = random_weight(4, 8, 64, 32)
    scale = torch.full((8, 2), 2.0**-24, dtype=torch.float16)
    x = torch.randn(1, 64)
    assert_close(product(x, weight, scale, 4), definition(x, weight, scale, 4), SIXTEEN_BITS)


def test_one_thread_and_two_give_the_same_bits(cache: Path) -> None:
    weight, scale = random_weight(4, 301, 4096)
    x = torch.randn(3, 4096)
    one = product(x, weight, scale, 4)
    torch.set_num_threads(2)
    assert torch.equal(product(x, weight, scale, 4), one)


def test_an_outlier_costs_its_neighbours_only(cache: Path) -> None:
    """The published models have activations a thousand times as large as the others.

    The error is about 0.7 %; with one scale for the whole row of x it would be 2.7 %.
    """
    weight, scale = random_weight(4, 16, 4096)
    x = torch.randn(1, 4096, generator=torch.Generator().manual_seed(5))
    without = x.clone()
    x[0, 5], without[0, 5] = 3000.0, 0.0
    quiet = plain.dequantize_weight(weight, scale.double(), 4)
    y = product(x, weight, scale, 4).double() - 3000.0 * quiet[:, 5]
    assert_close(y, without.double() @ quiet.T, 1.8e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_give_nan_in_their_row_alone(
    cache: Path, value: float, dtype: torch.dtype
) -> None:
    weight, scale = random_weight(4, 8, 512)
    x = torch.randn(2, 512).to(dtype)
    x[0, 300] = value
    y = product(x, weight, scale, 4)
    assert y[0].isnan().all() and y[1].isfinite().all()


def test_a_row_of_zeros_gives_zeros(cache: Path) -> None:
    weight, scale = random_weight(4, 8, 64)
    assert not product(torch.zeros(2, 64), weight, scale, 4).any()


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
@pytest.mark.parametrize("rows", [0, native.NATIVE_ROWS + 1])
def test_other_numbers_of_rows_equal_the_definition(
    cache: Path, rows: int, capability: str, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They take it, or several pieces; as another processor would, too."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    weight, scale = random_weight(4, 8, 64, group)
    x = torch.randn(rows, 64)
    y = native.native_linear(x, weight, scale, 4)
    torch.testing.assert_close(y, definition(x, weight, scale, 4).float(), rtol=1e-4, atol=2e-4)


def test_one_scale_for_a_group_of_odd_size_takes_the_definition(cache: Path) -> None:
    weight, _ = random_weight(4, 8, 1024)
    scale = torch.rand(8, 1)
    x = torch.randn(2, 1024)
    y = native.native_linear(x, weight, scale, 4)
    torch.testing.assert_close(y, definition(x, weight, scale, 4).float(), rtol=1e-4, atol=1e-3)


def test_shapes_that_do_not_fit_are_refused_before_memory_is_read(cache: Path) -> None:
    weight, scale = random_weight(4, 8, 64)
    with pytest.raises(ValueError, match=r"\[8, 64\] cannot be multiplied with 66 columns and 8 scales"):
        product(torch.randn(1, 66), weight, scale, 4)
    with pytest.raises(ValueError, match="64 columns and 7 scales"):
        product(torch.randn(1, 64), weight, scale[:7].contiguous(), 4)


def test_the_environment_variable_chooses_it(
    cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kernels._choose_path.cache_clear()
    monkeypatch.setenv("CHATGLM_KERNELS", "native")
    weight, scale = random_weight(4, 1024, 1024)
    x = torch.randn(2, 1, 1024)
    with caplog.at_level(logging.INFO):
        y = kernels.quantized_linear(x, weight, scale, 4)
    assert "'native'" in caplog.text
    assert torch.equal(y[:, 0], product(x[:, 0], weight, scale, 4))


def test_a_layer_reads_its_weight_where_it_lies(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels._choose_path.cache_clear()
    monkeypatch.setenv("CHATGLM_KERNELS", "native")
    layer = QuantizedLinear(1024, 1024, 4, bias=True).eval()
    weight, scale = random_weight(4, 1024, 1024)
    layer.weight.data.copy_(weight)
    layer.weight_scale.data.copy_(scale)
    address, x = layer.weight.data_ptr(), torch.randn(2, 1, 1024)
    y = layer(x)
    assert torch.equal(y[:, 0], product(x[:, 0], weight, scale, 4))
    assert isinstance(layer.packed, native.NativeWeight)
    assert layer.weight.data_ptr() == address
    assert torch.equal(layer.state_dict()["weight"], weight)
    layer.weight.data.neg_()  # whoever changes it changes the products
    assert torch.equal(layer(x)[:, 0], product(x[:, 0], layer.weight, scale, 4))
    layer.train()
    assert layer.packed is None


def test_a_layer_that_it_does_not_know_stays_with_the_definition(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels._choose_path.cache_clear()
    monkeypatch.setenv("CHATGLM_KERNELS", "native")
    layer = QuantizedLinear(1024, 1024, 4, dtype=torch.float64).eval()  # and so are its scales
    weight, scale = random_weight(4, 1024, 1024)
    layer.weight.data.copy_(weight)
    layer.weight_scale.data.copy_(scale)
    x = torch.randn(3, 1024)
    torch.testing.assert_close(layer(x), definition(x, weight, scale, 4).float(), rtol=1e-4, atol=1e-3)
    assert layer.packed is None


def test_it_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHATGLM_KERNELS", raising=False)
    kernels._choose_path.cache_clear()
    assert kernels.choose_path("cpu") != "native"


# ---- building


def test_a_library_that_was_built_is_used_again(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = next((cache / "chatglm/kernels").iterdir())
    before = library.stat().st_mtime_ns
    assert native._build_native(library.parent) == library
    assert library.stat().st_mtime_ns == before
    assert library.stat().st_mode & 0o777 == 0o700 and library.parent.stat().st_mode & 0o777 == 0o700


@needs_compiler
def test_another_source_or_compiler_is_another_library(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "NATIVE_SOURCE", WRONG_SOURCE)
    first = native._build_native(native._native_folder())
    monkeypatch.setattr(native, "NATIVE_FLAGS", (*native.NATIVE_FLAGS, "-DOTHER"))
    second = native._build_native(native._native_folder())
    assert sorted((empty_cache / "chatglm/kernels").iterdir()) == sorted((first, second))


def test_without_a_compiler_it_falls_back_and_says_so_once(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CHATGLM_KERNELS", "native")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    kernels._choose_path.cache_clear()
    weight, scale = random_weight(4, 1024, 2048)
    x = torch.randn(1, 2048)
    for _ in range(2):
        y = kernels.quantized_linear(x, weight, scale, 4)
    assert_close(y, definition(x, weight, scale, 4), 3e-3)  # whichever path it fell back to
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1 and "install gcc or clang, or name one in CC" in warnings[0]


@needs_compiler
def test_a_compiler_that_fails_is_quoted(empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NATIVE_SOURCE", "int broken(")
    assert "error" in native.native_missing()
    assert not any((empty_cache / "chatglm/kernels").iterdir())


@needs_compiler
def test_a_compiler_without_native_targets_compiles_for_any_processor(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "old-cc"
    compiler.write_text(
        '#!/bin/sh\ncase "$*" in *=native*) echo "error: bad option" >&2; exit 1;; esac\n'
        f'exec {native._find_compiler()[0]} "$@"\n'
    )
    compiler.chmod(0o700)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setattr(native, "NATIVE_SOURCE", WRONG_SOURCE)
    assert native._build_native(native._native_folder()).exists()


@needs_compiler
def test_the_plain_instructions_of_any_processor_pass_the_check(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The narrow vectors and plain C: what is left of the source without -march."""
    monkeypatch.setattr(native, "NATIVE_TARGETS", ((),))
    monkeypatch.setattr(native, "NATIVE_FLAGS", ("-O0", *native.NATIVE_FLAGS[1:]))
    assert native.native_missing() is None


@needs_compiler
@pytest.mark.parametrize(
    "wrong",
    [("nibbles & 15", "nibbles & 7"), (", w + whole * size, rest)", ", last, 0)"), None],
    ids=["wrong nibbles", "last columns forgotten", "nothing computed"],
)
def test_a_build_that_computes_something_else_is_not_used(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, wrong: tuple[str, str] | None
) -> None:
    source = native.NATIVE_SOURCE.replace(*wrong) if wrong else WRONG_SOURCE
    assert source != native.NATIVE_SOURCE
    monkeypatch.setattr(native, "NATIVE_SOURCE", source)
    monkeypatch.setattr(native, "NATIVE_FLAGS", ("-O0", *native.NATIVE_FLAGS[1:]))
    assert "fails its check against the definition" in native.native_missing()


@needs_compiler
def test_a_library_without_the_function_is_not_used(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "NATIVE_SOURCE", "int something_else;")
    assert "chatglm_linear" in native.native_missing()


@needs_compiler
@pytest.mark.parametrize("which", ["chatglm", "chatglm/kernels"])
def test_a_folder_that_others_can_write_to_is_refused(empty_cache: Path, which: str) -> None:
    folder = native._native_folder()
    (empty_cache / which).chmod(0o777)
    message = native.native_missing()
    assert message is not None and str(empty_cache / which) in message and "XDG_CACHE_HOME" in message
    assert not any(folder.iterdir())


def test_a_folder_or_library_of_another_owner_is_refused(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native.native_kernel.cache_clear()
    monkeypatch.setattr(os, "getuid", lambda: os.stat(cache).st_uid + 1)
    assert "which others can write to or own" in native.native_missing()


@needs_compiler
@pytest.mark.parametrize("planted", ["writable", "link"])
def test_a_planted_library_is_not_loaded(
    empty_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: str
) -> None:
    monkeypatch.setattr(native, "NATIVE_SOURCE", WRONG_SOURCE)
    library = native._build_native(native._native_folder())
    if planted == "writable":
        library.chmod(0o777)
    else:
        library.rename(tmp_path / "elsewhere.so")
        library.symlink_to(tmp_path / "elsewhere.so")
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: pytest.fail(f"loaded {path}"))
    assert str(library) in native.native_missing()


def test_a_cache_that_cannot_be_written_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    native.native_kernel.cache_clear()
    assert "could not be built or loaded" in native.native_missing()
