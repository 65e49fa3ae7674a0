"""The CUDA kernels: compiled for every generation of cards, run on a CPU behind a stand-in for the driver.

A card is needed only by the tests that are marked `gpu`.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import importlib.util
import itertools
import shutil
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from chatglm.hub import quantization_gpu as gpu
from chatglm.hub import quantization_kernels as kernels
from chatglm.hub import quantization_plain as plain

HALVES = [torch.float16, torch.bfloat16]
FLOATS = [*HALVES, torch.float32]
UNITS = list(itertools.product(FLOATS, (8, 4), (0, 32)))
MULTIPLY = ["const number *", "const u8 *", "const void *", "number *", *["int"] * 4]
ANY_CARD = {
    "dequantize": ["const u8 *", "const void *", "number *", "int", "int"],
    "multiply_1": MULTIPLY,
    "multiply_4": MULTIPLY,
}
TENSOR_CORES = {"multiply_tensor_8": MULTIPLY, "multiply_tensor_16": MULTIPLY}
# CUDA 13 no longer compiles for 7.0, CUDA 12.6 does not compile for 10.0 yet.
CARDS = [(12, (7, 0))] + [(13, (m // 10, m % 10)) for m in (75, 80, 86, 89, 90, 100, 120)]


def operands(
    tokens: int, rows: int, columns: int, bits: int, group: int = 0, dtype=torch.float16, scale_dtype=None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight (every byte there is, -128 and -8 too) and scale, on the CPU."""
    generator = torch.Generator().manual_seed(tokens * rows + columns)
    x = torch.randn(tokens, columns, generator=generator).to(dtype)
    weight = torch.randint(-128, 128, (rows, columns * bits // 8), generator=generator).to(torch.int8)
    shape = (rows, columns // group) if group else (rows,)
    scale = (torch.rand(shape, generator=generator) + 0.5) / 2**bits
    return x, weight, scale.to(scale_dtype or dtype)


def exact(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The product in float64."""
    return x.double() @ plain.dequantize_weight(weight, scale.double(), bits).t()


def assert_near(y: torch.Tensor, expected: torch.Tensor) -> None:
    """Roundings to the dtype of y, of numbers of the weight and of the sum, are smaller than its epsilon."""
    assert y.shape == expected.shape
    error = (y.double() - expected).norm() / expected.norm()
    assert error < max(torch.finfo(y.dtype).eps, 1e-6), f"relative error {error:.1e}"


# ---- the compiler


@pytest.fixture
def nvrtc(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    major = getattr(request, "param", 13)
    monkeypatch.setattr(gpu, "cuda_major", lambda: major)
    if gpu.find_cuda_library("nvrtc") is None:
        pytest.skip(f"NVRTC {major} is not installed")
    return major


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nvrtc", "card"), CARDS, ids=[f"sm_{a}{b}" for _, (a, b) in CARDS], indirect=["nvrtc"]
)
def test_every_kernel_compiles_for_every_generation_of_cards(nvrtc, card):
    try:
        gpu.cuda_architecture(gpu.load_nvrtc(), card)
    except gpu.MissingForCuda as missing:
        pytest.skip(str(missing))
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        images = list(pool.map(lambda unit: gpu.compile_cuda(card, *unit), UNITS))
    for (dtype, bits, group), image in zip(UNITS, images, strict=True):
        names = set(ANY_CARD)
        if card >= gpu.TENSOR_CORES_FROM.get(dtype, (99, 0)):
            names |= set(TENSOR_CORES)
        assert image.startswith(b"\x7fELF")
        assert {name for name in names if name.encode() + b"\0" not in image} == set(), (dtype, bits, group)


def test_a_card_newer_than_the_compiler_gets_code_that_its_driver_translates(nvrtc):
    image = gpu.compile_cuda((15, 0), torch.float32, 8, 0)
    assert b".visible .entry multiply_1(" in image and image.endswith(b"\0")


def test_a_card_too_old_for_the_compiler_is_named_in_a_sentence(nvrtc):
    with pytest.raises(gpu.MissingForCuda, match=r"capability 7\.5 and newer, and the card has 7\.0"):
        gpu.compile_cuda((7, 0), torch.float16, 8, 0)


def test_source_that_does_not_compile_raises_with_the_log_of_the_compiler(nvrtc, monkeypatch):
    monkeypatch.setattr(gpu, "CUDA_KERNELS", "KERNEL wrong(int a) { a = undeclared; }")
    with pytest.raises(RuntimeError, match='identifier "undeclared" is undefined'):
        gpu.compile_cuda((8, 0), torch.float16, 8, 0)


def test_a_missing_compiler_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr(gpu, "find_cuda_library", lambda name: None)
    monkeypatch.setattr(gpu, "cuda_major", lambda: 12)
    with pytest.raises(gpu.MissingForCuda, match="NVRTC 12: pip install nvidia-cuda-nvrtc-cu12"):
        gpu.load_nvrtc()


# ---- launches, on a CPU that plays the card


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the kernels and with the functions of cudart, cublasLt and the driver that run them."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        pytest.skip("the CUDA emulator is compiled by g++ on Linux")
    parts, table = [Path(__file__).with_name("cuda_emulator.cpp").read_text()], []
    for dtype, bits, group in UNITS:
        unit = unit_name(dtype, bits, group)
        parts += [
            f"#define {macro}"
            for macro in (f"TYPE {gpu.NUMBER_TYPES[dtype]}", f"BITS {bits}", f"GROUP {group}")
        ]
        parts += ["#define TENSOR_CORES"] if dtype in HALVES else []
        parts += [f"namespace {unit} {{", gpu.CUDA_KERNELS]
        for name, parameters in {**ANY_CARD, **(TENSOR_CORES if dtype in HALVES else {})}.items():
            arguments = ", ".join(f"get<{kind}>(arguments, {i})" for i, kind in enumerate(parameters))
            parts.append(f"void run_{name}(void **arguments) {{ {name}({arguments}); }}")
            table.append(f'{{"{unit} {name}", {unit}::run_{name}}},')
        parts += ["}", *(f"#undef {macro}" for macro in "TYPE BITS GROUP TENSOR_CORES MULTIPLY".split())]
    parts += ["static const Entry entries[] = {", *table, "{nullptr, nullptr}};", FIND]
    folder = tmp_path_factory.mktemp("emulator")
    (folder / "emulator.cpp").write_text("\n".join(parts))
    command = "g++ -std=c++17 -O1 -shared -fPIC -o emulator.so emulator.cpp"
    subprocess.run(command.split(), cwd=folder, check=True)
    return folder / "emulator.so"


FIND = """
static const Entry *find(const std::string &name) {
    for (const Entry *entry = entries; entry->name; entry++)
        if (name == entry->name) return entry;
    return nullptr;
}
"""


def unit_name(dtype: torch.dtype, bits: int, group: int) -> str:
    return f"unit_{gpu.NUMBER_TYPES[dtype]}_{bits}_{group}"


def forget_cpm_kernels() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "cpm_kernels"]:
        del sys.modules[name]
    gpu.load_cpm_kernels.cache_clear()
    gpu.cuda_kernels.cache_clear()


@pytest.fixture
def card(emulator: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """The emulator in the place of the CUDA libraries; cpm_kernels itself is the real one."""
    if importlib.util.find_spec("cpm_kernels") is None:
        pytest.skip("cpm_kernels is not installed")
    find = gpu.find_cuda_library
    monkeypatch.setattr(
        gpu, "find_cuda_library", lambda name: find(name) if name == "nvrtc" else str(emulator)
    )
    monkeypatch.setattr(gpu, "compile_cuda", lambda card, *unit: unit_name(*unit).encode())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: types.SimpleNamespace(cuda_stream=41))
    forget_cpm_kernels()
    yield ctypes.CDLL(str(emulator))
    forget_cpm_kernels()


def last_kernel(card: ctypes.CDLL) -> str:
    return ctypes.c_char_p.in_dll(card, "last_kernel").value.decode().split()[1]


# tokens, rows, columns; one token and many, rows that fill no block, columns that fill no turn of a block's warps
WHOLE = [(1, 40, 512), (3, 37, 416), (8, 16, 64), (9, 20, 128), (16, 33, 1056), (2, 17, 4640)]


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", WHOLE, ids=str)
def test_tensor_cores_multiply_as_the_definition_does(card, shape, dtype, bits, group):
    x, weight, scale = operands(*shape, bits, group, dtype)
    y = gpu.cuda_linear(x, weight, scale, bits)
    assert last_kernel(card) == f"multiply_tensor_{8 if shape[0] <= 8 else 16}"
    assert_near(y, exact(x, weight, scale, bits))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("tokens", [1, 7])
def test_cards_without_tensor_cores_multiply_as_the_definition_does(
    card, monkeypatch, tokens, dtype, bits, group
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 0))
    x, weight, scale = operands(tokens, 19, 416, bits, group, dtype)
    y = gpu.cuda_linear(x, weight, scale, bits)
    assert last_kernel(card) == ("multiply_1" if tokens == 1 else "multiply_4")
    assert_near(y, exact(x, weight, scale, bits))


def test_rows_that_fill_no_piece_are_multiplied_without_tensor_cores(card):
    x, weight, scale = operands(3, 10, 56, 4)
    y = gpu.cuda_linear(x, weight, scale, 4)
    assert last_kernel(card) == "multiply_4"
    assert_near(y, exact(x, weight, scale, 4))


@pytest.mark.parametrize("tokens", [3, 20])
@pytest.mark.parametrize(("bits", "columns"), [(8, 30), (4, 100)])
def test_rows_that_fill_no_word_are_left_to_the_definition(tokens, bits, columns):
    x, weight, scale = operands(tokens, 10, columns, bits, dtype=torch.float32)
    assert torch.equal(gpu.cuda_linear(x, weight, scale, bits), plain.plain_linear(x, weight, scale, bits))


def test_activations_may_begin_at_any_address(card):
    x, weight, scale = operands(4, 9, 128, 8)
    crooked = torch.cat([x[0, :1], x.flatten()])[1:].view_as(x)
    assert_near(gpu.cuda_linear(crooked, weight, scale, 8), exact(x, weight, scale, 8))


def test_activations_may_be_transposed(card):
    x, weight, scale = operands(4, 9, 128, 8)
    assert_near(gpu.cuda_linear(x.t().contiguous().t(), weight, scale, 8), exact(x, weight, scale, 8))


@pytest.mark.parametrize("scale_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("group", [0, 32])
def test_scales_may_have_another_dtype_than_the_activations(card, group, dtype, scale_dtype):
    x, weight, scale = operands(2, 18, 256, 4, group, dtype, scale_dtype)
    assert_near(gpu.cuda_linear(x, weight, scale, 4), exact(x, weight, scale, 4))


@pytest.mark.parametrize("group", [0, 32])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("columns", [96, 4640])
def test_dequantizing_rounds_once(card, columns, dtype, bits, group):
    _, weight, scale = operands(1, 11, columns, bits, group, dtype)
    y = gpu.cuda_dequantize(weight, scale, bits, dtype)
    assert torch.equal(y, plain.dequantize_weight(weight, scale.float(), bits).to(dtype))


def test_more_than_sixteen_tokens_are_multiplied_by_the_dequantized_weight(card):
    x, weight, scale = operands(17, 12, 64, 4)
    y = gpu.cuda_linear(x, weight, scale, 4)
    assert last_kernel(card) == "dequantize"
    assert_near(y, exact(x, weight, scale, 4))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0)], ids=["no tokens", "no rows"])
def test_nothing_is_launched_for_an_empty_product(card, shape):
    tokens, rows = shape
    before = ctypes.c_int.in_dll(card, "launches").value
    x, weight, scale = operands(tokens, rows, 32, 8)
    assert gpu.cuda_linear(x, weight, scale, 8).shape == (tokens, rows)
    assert ctypes.c_int.in_dll(card, "launches").value == before


def test_kernels_are_launched_on_the_stream_that_torch_uses(card):
    gpu.cuda_linear(*operands(1, 8, 64, 8), 8)
    assert ctypes.c_void_p.in_dll(card, "last_stream").value == 41


# ---- what may be missing or wrong


@pytest.fixture
def nvidia_build(monkeypatch: pytest.MonkeyPatch) -> None:
    """A build of torch for NVIDIA cards, as far as `cuda_missing` can see."""
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    forget_cpm_kernels()


def test_the_path_says_what_it_is_for():
    assert "not for cpu" in gpu.cuda_missing("cpu")


def test_a_missing_cpm_kernels_is_named(nvidia_build, monkeypatch):
    monkeypatch.setitem(sys.modules, "cpm_kernels", None)
    assert gpu.cuda_missing("cuda").endswith("pip install cpm_kernels.")


def test_cpm_kernels_without_a_driver_is_a_sentence_and_leaves_nothing_behind(nvidia_build, monkeypatch):
    pytest.importorskip("nvidia", reason="cpm_kernels and NVRTC are not installed")
    monkeypatch.setattr(gpu, "find_cuda_library", lambda name: None)
    before = set(sys.modules)
    assert gpu.cuda_missing("cuda").startswith("cpm_kernels does not run here (")
    assert {name for name in set(sys.modules) - before if "cpm" in name or name == "pkg_resources"} == set()


def test_nothing_is_missing_where_driver_and_compiler_are_there(card, nvidia_build, nvrtc):
    assert gpu.cuda_missing("cuda") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": 3}, r"a weight \[8, 64\] of 3 bits"),
        ({"x": torch.zeros(2, 30)}, r"activations \[2, 30\], a weight \[8, 64\] of 8 bits"),
        ({"x": torch.zeros(64)}, r"activations \[64\]"),
        ({"weight": torch.zeros(8, dtype=torch.int8)}, r"a weight \[8\]"),
        ({"scale": torch.ones(7)}, r"scales \[7\]; scales are \[out\]"),
        ({"scale": torch.ones(8, 4)}, r"scales \[8, 4\]; .* \[out, in / \(32, 64 or 128\)\]"),
        ({"scale": torch.ones(8, 0)}, r"scales \[8, 0\]"),
        ({"scale": torch.ones(())}, r"scales \[\]"),
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, "not torch.float64 by torch.int8"),
        ({"scale": torch.ones(8, dtype=torch.float64)}, "scales of torch.float64"),
        ({"weight": torch.zeros(8, 64, dtype=torch.uint8)}, "by torch.uint8"),
        ({"weight": torch.zeros(64, 8, dtype=torch.int8).t()}, "must be contiguous"),
        ({"weight": torch.zeros(8, 64, dtype=torch.int8, device="meta")}, r"weight on meta.*\.to\('cpu'\)"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_operands_that_do_not_fit_together_are_refused_in_a_sentence(change, message):
    operands = {
        "x": torch.zeros(2, 64),
        "weight": torch.zeros(8, 64, dtype=torch.int8),
        "scale": torch.ones(8),
        "bits": 8,
    }
    with pytest.raises(ValueError, match=message):
        gpu.cuda_linear(**{**operands, **change})


# ---- on a card


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA card")
    reason = kernels.MISSING[request.param]("cuda")
    if reason:
        pytest.skip(reason)
    return kernels.LINEARS[request.param]


ON_CARD = pytest.mark.parametrize("cuda", ["cuda", "triton"], indirect=True)


@pytest.mark.gpu
@ON_CARD
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", FLOATS)
def test_a_card_multiplies_as_the_definition_does(cuda, dtype, bits):
    shapes = [*WHOLE, (3, 10, 100), (40, 96, 256), (1, 4608, 4096), (5, 4096, 13696), (16, 27392, 4096)]
    for group, shape in itertools.product((0, *gpu.GROUPS), shapes):
        if shape[2] % (group or 1) == 0:
            x, weight, scale = (tensor.cuda() for tensor in operands(*shape, bits, group, dtype))
            assert_near(cuda(x, weight, scale, bits), exact(x, weight, scale, bits))


@pytest.mark.gpu
@ON_CARD
def test_a_cuda_graph_replays_the_product_on_new_activations(cuda):
    x, weight, scale = (tensor.cuda() for tensor in operands(1, 256, 512, 4))
    cuda(x, weight, scale, 4)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = cuda(x, weight, scale, 4)
    x.copy_(x.flip(-1).clone())
    graph.replay()
    assert_near(y, exact(x, weight, scale, 4))
