"""Products with packed weights on graphics cards: CUDA C through cpm_kernels, and the same in Triton.

The CUDA kernels are compiled for the card at hand by NVRTC, which torch's pip packages bring. Both must equal the
definition in quantization_plain.py.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import importlib.util
import os
import pkgutil
import shutil
import sys
import types
from collections.abc import Callable
from typing import Any

import torch

from .quantization_plain import multiply_in_chunks, plain_linear

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

# ---------------------------------------------------------------------------------------------------------------
# CUDA C through cpm_kernels
# ---------------------------------------------------------------------------------------------------------------

FEW_ROWS = 16  # on a GPU: up to here a product is as good as free beside reading the weight

# What needs the instructions of the card. The source includes no header, so NVRTC compiles it wherever it is found.
# A pair is two numbers of TYPE in 32 bits, the first in the lower half.
CUDA_INSTRUCTIONS = r"""
#define KERNEL extern "C" __global__ void __launch_bounds__(256)
typedef unsigned short u16;
typedef unsigned int u32;

float half_to_float(u16 bits) { float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits)); return x; }
u16 float_to_half(float x) { u16 bits; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); return bits; }

#if TYPE == 0
#define NUMBERS "f16"
#else
#define NUMBERS "bf16"
#endif
#if TYPE != 2 && (__CUDA_ARCH__ >= 800 || (__CUDA_ARCH__ >= 750 && TYPE == 0))
#define TENSOR_CORES

u32 multiply_add(u32 a, u32 b, u32 c) {  // a * b + c of pairs
    u32 d;
    asm("fma.rn." NUMBERS "x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}

// sums [16, 8] += a [16, 16] . b [16, 8], spread over a warp as the PTX manual draws it under mma.m16n8k16.
void matrix_multiply_add(float *sums, const u32 *a, const u32 *b) {
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k16.row.col.f32." NUMBERS "." NUMBERS ".f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    for (int half = 0; half < 2; half++)
        asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
            "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
            : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
            : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
#endif
}
#endif
"""

# Compiled once for each TYPE of activations (0 float16, 1 bfloat16, 2 float32), BITS (8, 4) and GROUP (columns that
# share a scale, 0 for one scale a row). `rows` and `columns` are those of the weight, `tokens` are the rows of x.
CUDA_KERNELS = r"""
typedef long long i64;
typedef unsigned char u8;

float bfloat16_to_float(u16 bits) { return __int_as_float((int)((u32)bits << 16)); }

u16 float_to_bfloat16(float x) {  // to the nearest, ties to even
    u32 bits = __float_as_int(x);
    return x != x ? 0x7FC0 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}

#if TYPE == 2
typedef float number;
float to_float(number x) { return x; }
number from_float(float x) { return x; }
#else
typedef u16 number;
float to_float(number x) { return TYPE == 0 ? half_to_float(x) : bfloat16_to_float(x); }
number from_float(float x) { return TYPE == 0 ? float_to_half(x) : float_to_bfloat16(x); }
#endif

// The scale of a row and column; its type has the numbers of TYPE.
float scale_of(const void *scale, int type, i64 row, int column, int columns) {
    i64 index = GROUP ? row * (columns / (GROUP + !GROUP)) + column / (GROUP + !GROUP) : row;
    if (type == 2) return ((const float *)scale)[index];
    u16 bits = ((const u16 *)scale)[index];
    return type == 0 ? half_to_float(bits) : bfloat16_to_float(bits);
}

// The integer of column i among those in `word`. It goes into the lowest bits of 2^23, without its sign.
float integer(u32 word, int i) {
    const u32 sign = 1 << (BITS - 1), mask = 2 * sign - 1;
    const int shift = BITS == 8 ? 8 * i : 4 * (i ^ 1);  // high nibbles come first
    return __int_as_float(0x4B000000 | ((word >> shift & mask) ^ sign)) - (8388608.0f + sign);
}

const int IN_WORD = 32 / BITS;  // columns in four bytes
struct __align__(IN_WORD * sizeof(number) < 16 ? IN_WORD * sizeof(number) : 16) Numbers { number at[IN_WORD]; };

// One row of the weight a block.
KERNEL dequantize(const u8 *weight, const void *scale, number *y, int columns, int scale_type) {
    const i64 row = blockIdx.x;
    for (int column = threadIdx.x * IN_WORD; column < columns; column += 256 * IN_WORD) {
        const u32 word = *(const u32 *)(weight + (row * columns + column) * BITS / 8);
        const float factor = scale_of(scale, scale_type, row, column, columns);
        Numbers numbers;
        for (int i = 0; i < IN_WORD; i++) numbers.at[i] = from_float(integer(word, i) * factor);
        *(Numbers *)(y + row * columns + column) = numbers;
    }
}

// A warp for each row of the weight, on any card; grid (rows / 8, tokens / TOKENS).
template <int TOKENS>
void multiply(const number *x, const u8 *weight, const void *scale, number *y,
              int tokens, int rows, int columns, int scale_type) {
    const i64 row = (i64)blockIdx.x * 8 + threadIdx.x / 32;
    const int lane = threadIdx.x % 32, first = blockIdx.y * TOKENS;
    if (row >= rows) return;
    float sums[TOKENS] = {};
#pragma unroll(TOKENS == 1 ? 4 : 1)
    for (int column = lane * IN_WORD; column < columns; column += 32 * IN_WORD) {
        const u32 word = *(const u32 *)(weight + (row * columns + column) * BITS / 8);
        const float factor = GROUP ? scale_of(scale, scale_type, row, column, columns) : 1;
        for (int token = 0; token < TOKENS && first + token < tokens; token++) {
            const Numbers numbers = *(const Numbers *)(x + (i64)(first + token) * columns + column);
            float sum = 0;
            for (int i = 0; i < IN_WORD; i++) sum += integer(word, i) * to_float(numbers.at[i]);
            sums[token] += sum * factor;
        }
    }
    for (int token = 0; token < TOKENS && first + token < tokens; token++) {
        for (int other = 16; other; other /= 2) sums[token] += __shfl_xor_sync(~0u, sums[token], other);
        const float factor = GROUP ? 1 : scale_of(scale, scale_type, row, 0, columns);
        if (lane == 0) y[(i64)(first + token) * rows + row] = from_float(sums[token] * factor);
    }
}

#define MULTIPLY(name, function) \
KERNEL name(const number *x, const u8 *weight, const void *scale, number *y, \
            int tokens, int rows, int columns, int scale_type) { \
    function(x, weight, scale, y, tokens, rows, columns, scale_type); \
}
MULTIPLY(multiply_1, multiply<1>)
MULTIPLY(multiply_4, multiply<4>)

#ifdef TENSOR_CORES
const u32 ONE = TYPE == 0 ? 0x3C003C00 : 0x3F803F80, MINUS_ZERO = 0x80008000;
// A pair whose lowest bits count ones: 1024 in float16, 128 in bfloat16.
const u32 BASE = TYPE == 0 ? 0x64006400 : 0x43004300;
const int IN_PIECE = 128 / BITS;  // columns in sixteen bytes

// Four columns of two rows of the weight, in the order of the first operand of matrix_multiply_add; `which` counts
// the fours in a word. With 4 bits they are columns 0, 4, 1, 5 or 2, 6, 3, 7 of the word: pairs lie 16 bits apart.
void four_columns(u32 *a, const u32 *words, int which, const u32 *factors) {
    for (int i = 0; i < 4; i++) {
        const u32 word = words[i % 2];
        u32 base, minus;
        if (BITS == 8) {  // the seven low bits, and the sign bit, which counts -128
            const u32 bytes = __byte_perm(word, 0, i < 2 ? 0x4140 : 0x4342);
            base = BASE | (bytes & 0x007F007F);
            minus = MINUS_ZERO | BASE | (bytes & 0x00800080);
        } else {
            base = (word >> (8 * which + (i < 2 ? 4 : 0)) & 0x000F000F) ^ (BASE | 0x00080008);
            minus = MINUS_ZERO | BASE | 0x00080008;
        }
        a[i] = multiply_add(base, ONE, minus);
        if (GROUP) a[i] = multiply_add(a[i], factors[i % 2], MINUS_ZERO);
    }
}

// The same columns of x, which lie in order in two (8 bits) or four (4 bits) pairs.
void four_columns_of_x(u32 *b, const u32 *pairs, int which) {
    if (BITS == 8) {
        b[0] = pairs[0], b[1] = pairs[1];
    } else {
        b[0] = __byte_perm(pairs[which], pairs[which + 2], 0x5410);
        b[1] = __byte_perm(pairs[which], pairs[which + 2], 0x7632);
    }
}

struct Words { u32 at[4]; };

Words load(const void *pointer, bool inside) {
    const uint4 v = inside ? __ldcs((const uint4 *)pointer) : uint4{0, 0, 0, 0};
    return {{v.x, v.y, v.z, v.w}};
}

// A block multiplies 16 rows of the weight by up to 8 * TILES tokens; grid (rows / 16). Its eight warps take turns
// along the columns. In a warp, lane 4 q + m reads pieces of sixteen bytes: of rows q and q + 8 of the weight and of
// tokens q and q + 8 of x, four neighbouring pieces for m = 0 ... 3. Which column goes under which number of the
// matrix product does not matter, as long as both sides agree.
template <int TILES>
void multiply_tensor(const number *x, const u8 *weight, const void *scale, number *y,
                     int tokens, int rows, int columns, int scale_type) {
    const int AHEAD = 4;  // pieces of a row on their way at a time
    const int warp = threadIdx.x / 32, q = threadIdx.x % 32 / 4, m = threadIdx.x % 4, pieces = columns / IN_PIECE;
    const i64 top = (i64)blockIdx.x * 16;
    i64 row[2];
    for (int i = 0; i < 2; i++) row[i] = top + q + 8 * i < rows ? top + q + 8 * i : rows - 1;
    float sums[TILES][4] = {};
    for (int start = warp * 4; start < pieces; start += 32 * AHEAD) {
        Words read[AHEAD][2];
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++)
            for (int i = 0; i < 2; i++) {
                const int piece = start + 32 * ahead + m;
                read[ahead][i] = load(weight + (row[i] * pieces + piece) * 16, piece < pieces);
            }
#pragma unroll
        for (int ahead = 0; ahead < AHEAD; ahead++) {
            const int piece = start + 32 * ahead + m;
            if (piece - m >= pieces) break;
            u32 factors[2] = {};
            for (int i = 0; GROUP && piece < pieces && i < 2; i++)
                factors[i] = 0x10001 * (u32)from_float(scale_of(scale, scale_type, row[i], piece * IN_PIECE, columns));
            Words here[TILES][IN_PIECE / 8];
            for (int tile = 0; tile < TILES; tile++)
                for (int i = 0; i < IN_PIECE / 8; i++) {
                    const int token = tile * 8 + q;
                    here[tile][i] = load(x + (i64)token * columns + piece * IN_PIECE + 8 * i,
                                         token < tokens && piece < pieces);
                }
            for (int word = 0; word < 4; word++)
                for (int which = 0; which < 8 / BITS; which++) {
                    const u32 both[2] = {read[ahead][0].at[word], read[ahead][1].at[word]};
                    u32 a[4], b[2];
                    four_columns(a, both, which, factors);
                    for (int tile = 0; tile < TILES; tile++) {
                        four_columns_of_x(b, &here[tile][0].at[0] + word * IN_WORD / 2, which);
                        matrix_multiply_add(sums[tile], a, b);
                    }
                }
        }
    }
    __shared__ float partial[8][8 * TILES][16];  // [warp, token, row]
    for (int tile = 0; tile < TILES; tile++)
        for (int i = 0; i < 4; i++) partial[warp][tile * 8 + 2 * m + i % 2][q + i / 2 * 8] = sums[tile][i];
    __syncthreads();
    const int token = threadIdx.x / 16, r = threadIdx.x % 16;
    if (token >= 8 * TILES || token >= tokens || top + r >= rows) return;
    float sum = 0;
    for (int other = 0; other < 8; other++) sum += partial[other][token][r];
    const float factor = GROUP ? 1 : scale_of(scale, scale_type, top + r, 0, columns);
    y[(i64)token * rows + top + r] = from_float(sum * factor);
}

MULTIPLY(multiply_tensor_8, multiply_tensor<1>)
MULTIPLY(multiply_tensor_16, multiply_tensor<2>)
#endif
"""

NUMBER_TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
TENSOR_CORES_FROM = {torch.float16: (7, 5), torch.bfloat16: (8, 0)}  # compute capability
GROUPS = (32, 64, 128)


def cuda_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x [M, in] times a packed weight on an NVIDIA card: [M, out] in the dtype of x, summed in float32.

    Up to 16 rows are multiplied by the packed weight, more by pieces of it dequantized to the dtype of x.
    The first call compiles the kernels; later ones launch on torch's current stream and do nothing else, so a
    CUDA graph can hold them. Raises ValueError for operands that do not fit together.
    """
    group = check_operands(x, weight, scale, bits)
    tokens, rows, columns = len(x), len(weight), x.shape[1]
    if columns * bits % 32 or weight.data_ptr() % 16:  # rows that cannot be read a word at a time
        return plain_linear(x, weight, scale, bits)
    if tokens > FEW_ROWS:
        return multiply_in_chunks(
            x, rows, lambda part: cuda_dequantize(weight[part], scale[part], bits, x.dtype)
        )
    y = x.new_empty(tokens, rows)
    if not y.numel():
        return y
    x = x.contiguous() if x.data_ptr() % 16 == 0 else x.clone(memory_format=torch.contiguous_format)
    kernels = cuda_kernels(x.device.index, x.dtype, bits, group)
    if "multiply_tensor_8" in kernels and columns * bits % 128 == 0:
        name, grid = f"multiply_tensor_{8 if tokens <= 8 else 16}", (-(-rows // 16), 1, 1)
    else:
        at_once = 1 if tokens == 1 else 4
        name, grid = f"multiply_{at_once}", (-(-rows // 8), -(-tokens // at_once), 1)
    _launch(kernels[name], grid, (x, weight, scale, y), (tokens, rows, columns, NUMBER_TYPES[scale.dtype]))
    return y


def cuda_dequantize(weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype) -> torch.Tensor:
    """The real weight [out, in] in `dtype`, on an NVIDIA card; in * bits is a multiple of 32."""
    y = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype, device=weight.device)
    group = check_operands(y, weight, scale, bits)
    if y.numel():
        kernel = cuda_kernels(weight.device.index, dtype, bits, group)["dequantize"]
        _launch(kernel, (len(y), 1, 1), (weight, scale, y), (y.shape[1], NUMBER_TYPES[scale.dtype]))
    return y


def check_operands(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> int:
    """Raise ValueError unless x [M, in] can be multiplied; return the columns of a group, 0 for a scale a row."""
    sizes = f"activations {list(x.shape)}, a weight {list(weight.shape)} of {bits} bits, scales {list(scale.shape)}"
    if x.dim() != 2 or bits not in (8, 4) or tuple(weight.shape[1:]) != (x.shape[1] * bits / 8,):
        raise ValueError(
            f"These do not fit together: {sizes}; a weight is [out, in] or, in 4 bits, [out, in / 2]."
        )
    group = x.shape[1] / scale.shape[1] if scale.dim() == 2 and scale.shape[1] else 0
    if scale.shape[:1] != weight.shape[:1] or (scale.dim() != 1 and group not in GROUPS):
        raise ValueError(
            f"These do not fit together: {sizes}; scales are [out] or [out, in / (32, 64 or 128)]."
        )
    if not weight.device == scale.device == x.device:
        raise ValueError(
            f"The activations are on {x.device}, the packed weight on {weight.device} and its scales on "
            f"{scale.device}; move the layer with .to({str(x.device)!r})."
        )
    if weight.dtype != torch.int8 or not {x.dtype, scale.dtype} <= NUMBER_TYPES.keys():
        raise ValueError(
            f"The kernels multiply float16, bfloat16 and float32 by int8, not {x.dtype} by {weight.dtype} with "
            f"scales of {scale.dtype}; CHATGLM_KERNELS=plain may."
        )
    if not weight.is_contiguous() or not scale.is_contiguous():
        raise ValueError("A packed weight and its scales must be contiguous; call .contiguous() on them.")
    return int(group)


def _launch(
    kernel: Callable, grid: tuple, tensors: tuple[torch.Tensor, ...], numbers: tuple[int, ...]
) -> None:
    arguments = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
    arguments += [ctypes.c_int(number) for number in numbers]
    with torch.cuda.device_of(tensors[0]):
        kernel(grid, (256, 1, 1), 0, torch.cuda.current_stream().cuda_stream, arguments)


@functools.cache
def cuda_kernels(device: int, dtype: torch.dtype, bits: int, group: int) -> dict[str, Callable]:
    """Kernels for activations of `dtype` by name, compiled for the card with the index `device`."""
    capability = torch.cuda.get_device_capability(device)
    names = ["dequantize", "multiply_1", "multiply_4"]
    if capability >= TENSOR_CORES_FROM.get(dtype, (99, 0)):
        names += ["multiply_tensor_8", "multiply_tensor_16"]
    launcher = load_cpm_kernels()
    module = launcher.LazyKernelCModule(compile_cuda(capability, dtype, bits, group))
    return {name: launcher.KernelFunction(module, name) for name in names}


class MissingForCuda(RuntimeError):
    """What keeps the CUDA kernels from running, in a sentence."""


def cuda_missing(device_type: str) -> str | None:
    """What the CUDA kernels lack on devices of this type, in a sentence, or None if they can run there."""
    if device_type != "cuda" or torch.version.cuda is None:
        return f"The 'cuda' path is for NVIDIA cards, not for {device_type} in this build of torch."
    try:
        load_cpm_kernels()
        cuda_architecture(load_nvrtc(), torch.cuda.get_device_capability())
    except MissingForCuda as missing:
        return str(missing)
    return None


@functools.cache
def load_cpm_kernels() -> Any:
    """The module cpm_kernels.kernels.base on the CUDA libraries of torch; MissingForCuda where it does not load.

    Version 1.0.11 looks for the libraries in the system alone, raises RuntimeError or OSError where there is no
    driver, and reads its own kernels through pkg_resources, which setuptools no longer has. So its module
    library/base.py, which looks for them, is loaded first and told where they are.
    """
    finder = "cpm_kernels.library.base"
    stand_in = types.ModuleType("pkg_resources")
    stand_in.resource_string, stand_in.resource_exists = pkgutil.get_data, lambda package, name: True
    before = set(sys.modules)
    try:
        package = importlib.util.find_spec("cpm_kernels")
        if package is None:
            raise MissingForCuda("The CUDA kernels need cpm_kernels: pip install cpm_kernels.")
        if finder not in sys.modules:
            path = os.path.join(package.submodule_search_locations[0], "library", "base.py")
            spec = importlib.util.spec_from_file_location(finder, path)
            module = sys.modules[finder] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            module.unix_find_lib = module.windows_find_lib = find_cuda_library
        sys.modules.setdefault("pkg_resources", stand_in)
        base = importlib.import_module("cpm_kernels.kernels.base")
        base.Device(torch.cuda.current_device())  # knows the card only if it found the libraries
        return base
    except (ImportError, OSError, RuntimeError, AttributeError, IndexError) as error:
        for name in set(sys.modules) - before:
            if name.startswith("cpm_kernels"):
                del sys.modules[name]
        if isinstance(error, MissingForCuda):
            raise
        raise MissingForCuda(f"cpm_kernels does not run here ({error}).") from error
    finally:
        if sys.modules.get("pkg_resources") is stand_in:
            del sys.modules["pkg_resources"]


def find_cuda_library(name: str) -> str | None:
    """A file by which "cuda" (the driver), "cudart", "cublasLt" or "nvrtc" of torch's CUDA release loads."""
    major = cuda_major()
    if sys.platform == "win32":
        file = "nvcuda.dll" if name == "cuda" else f"{name}64_{major}{'0_0' if name == 'nvrtc' else ''}.dll"
    else:
        file = "libcuda.so.1" if name == "cuda" else f"lib{name}.so.{major}"
    torch_folder = os.path.dirname(torch.__file__)
    candidates = []
    for folder in ("nvidia/*/lib", "nvidia/*/bin", "nvidia/*/bin/x86_64", "torch/lib"):
        candidates += sorted(glob.glob(os.path.join(os.path.dirname(torch_folder), folder, file)))
    # The plain name means what torch has loaded already, whose state the others must share, or the system's.
    candidates.insert(len(candidates) if name == "nvrtc" else 0, file)
    for candidate in candidates:
        try:
            ctypes.CDLL(candidate)
        except OSError:
            continue
        return candidate
    return None


def cuda_major() -> int:
    return int((torch.version.cuda or "13").split(".")[0])


def load_nvrtc() -> ctypes.CDLL:
    """NVIDIA's run-time compiler, from the pip package that torch brings or from the system."""
    path = find_cuda_library("nvrtc")
    if path is None:
        package = "nvidia-cuda-nvrtc" + ("" if cuda_major() > 12 else f"-cu{cuda_major()}")
        raise MissingForCuda(f"The CUDA kernels need NVRTC {cuda_major()}: pip install {package}.")
    # Release 13.0 does not look for its other half beside itself.
    for pattern in ("libnvrtc-builtins.so.*", "nvrtc-builtins64_*.dll"):
        for builtins in glob.glob(os.path.join(os.path.dirname(path) or os.curdir, pattern)):
            ctypes.CDLL(builtins)
    return ctypes.CDLL(path)


def cuda_architecture(nvrtc: ctypes.CDLL, capability: tuple[int, int]) -> str:
    """What to compile for: "sm_80", or "compute_80" where the card is newer than the compiler."""
    count = ctypes.c_int()
    nvrtc.nvrtcGetNumSupportedArchs(ctypes.byref(count))
    known = (ctypes.c_int * count.value)()
    nvrtc.nvrtcGetSupportedArchs(known)
    wanted = 10 * capability[0] + capability[1]
    older = [arch for arch in known if 70 <= arch <= wanted]
    if not older:
        raise MissingForCuda(
            f"NVRTC {cuda_major()} compiles for compute capability {max(70, min(known)) / 10} and newer, "
            f"and the card has {wanted / 10}."
        )
    # Machine code runs on later cards of the same generation; others translate the intermediate code.
    return f"{'sm' if max(older) // 10 == capability[0] else 'compute'}_{max(older)}"


def compile_cuda(capability: tuple[int, int], dtype: torch.dtype, bits: int, group: int) -> bytes:
    """Compile the kernels for activations of `dtype` to what the driver loads; RuntimeError with the log."""
    nvrtc, program, size = load_nvrtc(), ctypes.c_void_p(), ctypes.c_size_t()
    target = cuda_architecture(nvrtc, capability)
    source = (CUDA_INSTRUCTIONS + CUDA_KERNELS).encode()
    options = [f"--gpu-architecture={target}", "--std=c++17", "--device-as-default-execution-space"]
    options += [f"-DTYPE={NUMBER_TYPES[dtype]}", f"-DBITS={bits}", f"-DGROUP={group}"]
    arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))

    def fetch(what: str) -> bytes:
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, text)
        return text.raw

    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"chatglm.cu", 0, None, None)
    try:
        if nvrtc.nvrtcCompileProgram(program, len(options), arguments):
            raise RuntimeError(
                f"NVRTC does not compile the kernels for {target}: {fetch('ProgramLog').decode()}"
            )
        return fetch("CUBIN" if target.startswith("sm") else "PTX")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


# ---------------------------------------------------------------------------------------------------------------
# Triton
# ---------------------------------------------------------------------------------------------------------------

if triton is not None:

    @triton.jit
    def _triton_weight(packed, scale, row, byte, rows, columns, BITS: tl.constexpr, SECOND: tl.constexpr,
                       GROUP: tl.constexpr):  # fmt: skip
        """The numbers in `packed`, times the scale of their group; their columns."""
        column = byte if BITS == 8 else 2 * byte + SECOND
        if BITS == 4:
            packed = (packed << 4) >> 4 if SECOND else packed >> 4
        numbers = packed.to(tl.float32)
        if GROUP:
            inside = (row < rows) & (column < columns)
            numbers *= tl.load(scale + row * (columns // GROUP) + column // GROUP, inside, other=0).to(
                tl.float32
            )
        return numbers, column

    @triton.jit(do_not_specialize=["tokens"])
    def _triton_multiply(x, weight, scale, y, tokens, rows, columns, BITS: tl.constexpr, GROUP: tl.constexpr,
                         TOKENS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):  # fmt: skip
        """ROWS rows of the weight times all tokens; grid (rows / ROWS)."""
        row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[None, :]
        token = tl.arange(0, TOKENS)[:, None]
        width = columns * BITS // 8
        sums = tl.zeros((TOKENS, ROWS), dtype=tl.float32)
        for start in range(0, width, BYTES):
            byte = start + tl.arange(0, BYTES)[:, None]
            packed = tl.load(
                weight + row * width + byte, (row < rows) & (byte < width), other=0
            )  # [BYTES, ROWS]
            for second in tl.static_range(8 // BITS):
                numbers, column = _triton_weight(packed, scale, row, byte, rows, columns, BITS, second, GROUP)
                column = tl.trans(column)
                part = tl.load(
                    x + token.to(tl.int64) * columns + column, (token < tokens) & (column < columns), other=0
                )
                sums = tl.dot(part, numbers.to(part.dtype), sums, input_precision="ieee")
        if not GROUP:
            sums *= tl.load(scale + row, row < rows, other=0).to(tl.float32)
        inside = (token < tokens) & (row < rows)
        tl.store(y + token * rows + row, sums.to(y.dtype.element_ty), inside)

    @triton.jit
    def _triton_dequantize(weight, scale, y, rows, columns, BITS: tl.constexpr, GROUP: tl.constexpr,
                           BYTES: tl.constexpr):  # fmt: skip
        """BYTES bytes of a row; grid (rows, columns / BYTES)."""
        row = tl.program_id(0).to(tl.int64)
        byte = tl.program_id(1) * BYTES + tl.arange(0, BYTES)
        width = columns * BITS // 8
        packed = tl.load(weight + row * width + byte, byte < width, other=0)
        for second in tl.static_range(8 // BITS):
            numbers, column = _triton_weight(packed, scale, row, byte, rows, columns, BITS, second, GROUP)
            if not GROUP:
                numbers *= tl.load(scale + row).to(tl.float32)
            tl.store(y + row * columns + column, numbers.to(y.dtype.element_ty), byte < width)


def triton_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """The same as `cuda_linear`, by Triton, on any card that Triton knows."""
    group = check_operands(x, weight, scale, bits)
    if len(x) > FEW_ROWS:
        return multiply_in_chunks(
            x, len(weight), lambda rows: triton_dequantize(weight[rows], scale[rows], bits, x.dtype)
        )
    x, y = x.contiguous(), x.new_empty(len(x), len(weight))
    if y.numel():
        grid, size = (triton.cdiv(len(weight), 16),), 64 if x.dtype == torch.float32 else 128
        with torch.cuda.device_of(x):
            _triton_multiply[grid](
                x, weight, scale, y, len(x), len(weight), x.shape[1], bits, group, 16, 16, size
            )
    return y


def triton_dequantize(
    weight: torch.Tensor, scale: torch.Tensor, bits: int, dtype: torch.dtype
) -> torch.Tensor:
    """The same as `cuda_dequantize`, by Triton."""
    y = torch.empty(len(weight), weight.shape[1] * 8 // bits, dtype=dtype, device=weight.device)
    group = check_operands(y, weight, scale, bits)
    if y.numel():
        grid = (len(weight), triton.cdiv(weight.shape[1], 512))
        with torch.cuda.device_of(weight):
            _triton_dequantize[grid](weight, scale, y, *y.shape, bits, group, 512)
    return y


def triton_missing(device_type: str) -> str | None:
    """What the Triton kernels lack on devices of this type, in a sentence, or None if they can run there."""
    if device_type != "cuda":
        return f"The 'triton' path is for graphics cards, not for {device_type}."
    if triton is None:
        return "The Triton kernels need triton: pip install triton."
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler: install gcc or clang."
    return None
