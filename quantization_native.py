"""Products with packed weights in C: a kernel that is compiled on the user's machine, only if CHATGLM_KERNELS asks.

From the source to its use: the kernel; the product; how it is built once into the user's cache, and checked there
against the definition in quantization_plain.py before anything relies on it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .quantization_plain import Packed, dequantize_weight, plain_on_cpu

logger = logging.getLogger(__name__)

NATIVE_SOURCE = r"""
/* y = x . (integers * scale)^T for rows x, straight from the packed weight; GNU C for gcc and clang.

   Activations become 16-bit integers, block by block of columns, so that sums of products are exact.
   For nibbles they are split into two digits of base 256, because processors multiply bytes best: nibbles are
   made unsigned by adding 8, and -8 times the activations, added up beforehand, puts that right.
   256 bits are as wide as it gets: beyond, memory is the limit. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(__AVX2__)
enum { WIDTH = 32 }; /* bytes of a vector */
#else
enum { WIDTH = 16 };
#endif
enum { FLOAT32, BFLOAT16, FLOAT16 }; /* dtypes of x and scale */
enum { SLAB = 32 }; /* blocks whose factors are computed together */
enum { TILE = 64 }; /* vectors of a row of the weight that four rows of x are multiplied by at a time */
/* Measured: bytes to prefetch, and rows that a thread takes at a time; with 32 it was 15 % slower than with 256. */
enum { AHEAD = 4096, MOST_ROWS = 256, FEWEST_ROWS = 16 };
#define INLINE static inline __attribute__((always_inline))

typedef int8_t bytes __attribute__((vector_size(WIDTH)));
typedef uint8_t ubytes __attribute__((vector_size(WIDTH)));
typedef int16_t shorts __attribute__((vector_size(WIDTH)));
typedef int32_t ints __attribute__((vector_size(WIDTH)));
typedef float floats __attribute__((vector_size(WIDTH)));
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_DOTPROD)
typedef ints partial;
#else
typedef shorts partial; /* four vectors of nibbles may be added: 4 * 2 * 2 * 15 * 128 < 32768 */
#endif

struct linear {
  const int8_t *weight; /* [rows][row_bytes] */
  const void *scale;    /* [rows], or [rows][groups] */
  const void *x;        /* [m][columns] */
  float *y;             /* [m][rows] */
  int64_t rows, columns, m, group; /* group: columns that share a scale, 0 if the whole row does */
  int32_t bits, scale_type, x_type, threads;
  /* from here on ours */
  int64_t row_bytes, groups, blocks;
  int64_t take, next;    /* rows to take at a time, and the first that no thread has taken (of the weight, or x) */
  int32_t block, split;  /* vectors of a block of columns, groups in it */
  int8_t *digits;        /* [m][blocks * block][8 * WIDTH / bits]: four vectors for nibbles, two for bytes */
  ints *bias;            /* [m][blocks]: what a block's sums begin with */
  float *step;           /* [m][blocks][split]: what one unit of the integers is worth */
  void (*multiply_rows)(const struct linear *, int64_t row, int64_t end);
};

/* sum[i] += a[j] * b[j] for the j of lane i: 2 of 16 bits, 4 of 32 */
INLINE partial multiply_add(partial sum, ubytes a, bytes b) {
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
  return (partial)_mm256_dpbusd_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVXVNNI__)
  return (partial)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)a, (__m256i)b);
#elif defined(__AVX2__)
  return sum + (partial)_mm256_maddubs_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_FEATURE_DOTPROD)
  return (partial)vdotq_s32((int32x4_t)sum, (int8x16_t)a, (int8x16_t)b);
#elif defined(__ARM_NEON)
  int16x8_t half = vmlal_s8((int16x8_t)sum, vget_low_s8((int8x16_t)a), vget_low_s8((int8x16_t)b));
  return (partial)vmlal_s8(half, vget_high_s8((int8x16_t)a), vget_high_s8((int8x16_t)b));
#else
  for (int i = 0; i < WIDTH / 2; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

/* sum[i] += a[j] * b[j] for the two j of lane i */
INLINE ints multiply_add_shorts(ints sum, shorts a, shorts b) {
#if defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__ARM_NEON)
  int32x4_t half = vmlal_s16((int32x4_t)sum, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
  return (ints)vmlal_s16(half, vget_high_s16((int16x8_t)a), vget_high_s16((int16x8_t)b));
#else
  for (int i = 0; i < WIDTH / 4; i++) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

INLINE ints join(ints sum, partial high, partial low) {
  if (sizeof high[0] == 4) return sum + ((ints)high << 8) + (ints)low;
  const shorts one = (shorts){0} + 1;
  return multiply_add_shorts(multiply_add_shorts(sum, (shorts)high, one << 8), (shorts)low, one);
}

INLINE shorts widen(const int8_t *p) {
#if defined(__AVX2__) /* gcc 12 makes four instructions of the general form */
  return (shorts)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)p));
#else
  int8_t narrow __attribute__((vector_size(WIDTH / 2)));
  memcpy(&narrow, p, WIDTH / 2);
  return __builtin_convertvector(narrow, shorts);
#endif
}

INLINE bytes vector(const int8_t *p) {
  bytes v;
  memcpy(&v, p, WIDTH);
  return v;
}

INLINE float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

/* n numbers of p from `start` on */
static void load(float *out, const void *p, int64_t start, int64_t n, int type) {
  const uint16_t *halves = (const uint16_t *)p + start;
  if (type == FLOAT32) memcpy(out, (const float *)p + start, n * sizeof *out);
  if (type == BFLOAT16)
    for (int64_t i = 0; i < n; i++) out[i] = from_bits((uint32_t)halves[i] << 16);
  int64_t i = 0;
#if defined(__F16C__)
  for (; type == FLOAT16 && i + 8 <= n; i += 8)
    _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(halves + i))));
#endif
  if (type == FLOAT16)
    for (; i < n; i++) {
      uint32_t rest = (uint32_t)(halves[i] & 0x7fff) << 13, sign = (uint32_t)(halves[i] & 0x8000) << 16;
      float finite = from_bits(sign | rest) * 0x1p112f; /* the biases of the exponents differ by 112 */
      out[i] = rest < 0x0f800000 ? finite : from_bits(sign | 0x7f800000 | rest); /* inf, nan */
    }
}

/* Block b of row m of x to integers of at most 32639, which have two signed digits; zeros beyond the last column.
   A block with inf or nan gives nan. */
static void quantize(const struct linear *t, int64_t m, int64_t b) {
  const int64_t width = t->block * WIDTH * 8 / t->bits, at = m * t->blocks + b;
  const int64_t count = t->columns - b * width < width ? t->columns - b * width : width;
  float values[WIDTH * 8] = {0};
  uint32_t bits, largest = 0; /* absolute floats order like their bits, and nan comes last */
  load(values, t->x, m * t->columns + b * width, count, t->x_type);
  for (int64_t i = 0; i < width; i++) {
    memcpy(&bits, values + i, 4);
    largest = (bits & 0x7fffffff) > largest ? bits & 0x7fffffff : largest;
  }
  float peak = from_bits(largest), inverse = peak > 1e-30f ? 32639 / peak : 0;
  for (int i = 0; i < t->split; i++) t->step[at * t->split + i] = largest < 0x7f800000 ? peak / 32639 : NAN;
  if (largest >= 0x7f800000) memset(values, 0, sizeof values);
  int16_t integers[WIDTH * 8];
  for (int64_t i = 0; i < width; i++) integers[i] = (int16_t)rintf(values[i] * inverse);
  int8_t *restrict out = t->digits + at * width * 2;
  if (t->bits == 8) {
    memcpy(out, integers, width * 2);
    return;
  }
  ints bias = {0};
  for (int64_t v = 0; v < t->block; v++, out += 4 * WIDTH) {
    int8_t digits[4][WIDTH];
    for (int i = 0; i < WIDTH; i++) {
      int16_t even = integers[2 * (v * WIDTH + i)], odd = integers[2 * (v * WIDTH + i) + 1];
      digits[0][i] = (int8_t)((even + 128) >> 8), digits[1][i] = (int8_t)((odd + 128) >> 8);
      digits[2][i] = (int8_t)even, digits[3][i] = (int8_t)odd; /* the low byte, signed */
    }
    memcpy(out, digits, sizeof digits);
    const int16_t *x = integers + 2 * WIDTH * v;
    for (int i = 0; i < WIDTH / 4; i++)
      for (int j = 0; j < 8; j++) bias[i] -= 8 * x[8 * i + j];
  }
  t->bias[at] = bias;
}

/* A block of a row of the weight times that of M rows of x, added to sum. */
INLINE void multiply(ints *sum, const int8_t *w, const int8_t *x, int64_t span, int M, int bits, int block) {
  partial high[4], low[4];
  for (int m = 0; m < M; m++) high[m] = low[m] = (partial){0};
  for (int v = 0; v < block; v++, w += WIDTH, x += 16 * WIDTH / bits) {
    const ubytes nibbles = (ubytes)vector(w) ^ 0x88, even = nibbles >> 4, odd = nibbles & 15;
    for (int m = 0; m < M; m++) {
      const int8_t *d = x + m * span;
      if (bits == 4) {
        high[m] = multiply_add(multiply_add(high[m], even, vector(d)), odd, vector(d + WIDTH));
        low[m] = multiply_add(multiply_add(low[m], even, vector(d + 2 * WIDTH)), odd, vector(d + 3 * WIDTH));
      } else {
        sum[m] = multiply_add_shorts(sum[m], widen(w), (shorts)vector(d));
        sum[m] = multiply_add_shorts(sum[m], widen(w + WIDTH / 2), (shorts)vector(d + WIDTH));
      }
    }
  }
  for (int m = 0; m < M && bits == 4; m++) sum[m] = join(sum[m], high[m], low[m]);
}

/* The factor of a block, or two of them for a half each. */
INLINE floats spread(const float *factor, int split) {
#if defined(__AVX2__)
  if (split == 2) return (floats)_mm256_set_m128(_mm_set1_ps(factor[1]), _mm_set1_ps(factor[0]));
#endif
  (void)split;
  return (floats){0} + factor[0];
}

/* Blocks `from` to `to` of a row of the weight times those of M rows of x from `first` on; all but the first ones are
   added to what is in y. `ahead` is how far to prefetch, 0 for not. The compiler knows M, bits, block and split. */
INLINE void multiply_part(const struct linear *t, int64_t row, int64_t first, int64_t from, int64_t to, int64_t ahead,
                          int M, int bits, int block, int split) {
  const int64_t size = block * WIDTH, whole = t->row_bytes / size, rest = t->row_bytes % size;
  const int64_t unit = size * 16 / bits, span = t->blocks * unit;
  const int8_t *w = t->weight + row * t->row_bytes, *x = t->digits + first * span;
  int8_t last[8 * WIDTH]; /* the last columns, filled up with zeros */
  if (rest && to == t->blocks) memcpy(memset(last, 0, size), w + whole * size, rest);
  floats total[4];
  for (int m = 0; m < M; m++) total[m] = (floats){0};
  for (int64_t slab = from; slab < to; slab += SLAB) {
    const int64_t n = to - slab < SLAB ? to - slab : SLAB, groups = t->groups - slab * split;
    const float *factor = t->step + (first * t->blocks + slab) * split;
    int64_t next = t->blocks * split; /* from the factors of one row of x to those of the next */
    float scale[2 * SLAB], product[4][2 * SLAB];
    if (t->group) {
      scale[n * split - 1] = 0; /* the last vector may be half a group too long */
      load(scale, t->scale, row * t->groups + slab * split, groups < n * split ? groups : n * split,
           t->scale_type);
      for (int m = 0; m < M; m++)
        for (int64_t i = 0; i < n * split; i++) product[m][i] = scale[i] * factor[m * next + i];
      factor = product[0], next = 2 * SLAB;
    }
    for (int64_t b = slab; b < slab + n; b++) {
      ints sum[4];
      for (int m = 0; m < M; m++) sum[m] = bits == 4 ? t->bias[(first + m) * t->blocks + b] : (ints){0};
      for (int p = 0; p < size && ahead; p += 64) __builtin_prefetch(w + b * size + p + ahead);
      multiply(sum, b < whole ? w + b * size : last, x + b * unit, span, M, bits, block);
      for (int m = 0; m < M; m++)
        total[m] += __builtin_convertvector(sum[m], floats) * spread(factor + m * next + (b - slab) * split, split);
    }
  }
  for (int m = 0; m < M; m++) {
    float sum = 0, scale = 1, *y = t->y + (first + m) * t->rows + row;
    for (int i = 0; i < WIDTH / 4; i++) sum += total[m][i];
    if (!t->group) load(&scale, t->scale, row, 1, t->scale_type);
    *y = (from ? *y : 0) + sum * scale;
  }
}

/* A function for each shape of a block, so that the compiler can unroll it. One row of x goes along the weight as it
   lies in memory; four rows take tiles of it, so that their own part stays in the nearest cache. */
#define MULTIPLY_ROWS(name, bits, block, split)                                                              \
  static void name(const struct linear *t, int64_t row, int64_t end) {                                       \
    const int64_t tile = TILE / block;                                                                       \
    int64_t m = 0;                                                                                           \
    for (; m + 4 <= t->m; m += 4)                                                                            \
      for (int64_t from = 0; from < t->blocks; from += tile)                                                 \
        for (int64_t r = row, to = from + tile < t->blocks ? from + tile : t->blocks; r < end; r++)          \
          multiply_part(t, r, m, from, to, m ? 0 : t->row_bytes, 4, bits, block, split);                     \
    for (int64_t r = row; r < end; r++)                                                                      \
      for (int64_t rest = m; rest < t->m; rest++)                                                            \
        multiply_part(t, r, rest, 0, t->blocks, rest ? 0 : AHEAD, 1, bits, block, split);                    \
  }
MULTIPLY_ROWS(nibbles_half, 4, 1, 2)
MULTIPLY_ROWS(nibbles_1, 4, 1, 1)
MULTIPLY_ROWS(nibbles_2, 4, 2, 1)
MULTIPLY_ROWS(nibbles_4, 4, 4, 1)
MULTIPLY_ROWS(bytes_1, 8, 1, 1)
MULTIPLY_ROWS(bytes_2, 8, 2, 1)
MULTIPLY_ROWS(bytes_4, 8, 4, 1)
MULTIPLY_ROWS(bytes_8, 8, 8, 1)

/* Every thread takes the next rows that nobody has taken. */
static void quantize_rows(void *data) {
  struct linear *t = data;
  for (int64_t m; (m = __atomic_fetch_add(&t->next, 1, __ATOMIC_RELAXED)) < t->m;)
    for (int64_t b = 0; b < t->blocks; b++) quantize(t, m, b);
}

static void multiply_all(void *data) {
  struct linear *t = data;
  for (int64_t row; (row = __atomic_fetch_add(&t->next, t->take, __ATOMIC_RELAXED)) < t->rows;)
    t->multiply_rows(t, row, row + t->take < t->rows ? row + t->take : t->rows);
}

typedef void run_parallel(void (*)(void *), void *, unsigned threads, unsigned flags); /* as GOMP_parallel */

static void run(void work(void *), struct linear *t, run_parallel *parallel) {
  t->next = 0;
  if (parallel && t->threads > 1) parallel(work, t, t->threads, 0);
  else work(t);
}

/* Returns 0, or 1 if there is no memory. */
int chatglm_linear(struct linear *t, run_parallel *parallel) {
  const int64_t columns = WIDTH * 8 / t->bits; /* of a vector */
  t->row_bytes = t->columns * t->bits / 8;
  t->groups = t->group ? t->columns / t->group : 0;
  t->split = t->group && t->group < columns ? columns / t->group : 1;
  t->block = t->group ? (t->group + columns - 1) / columns : 4;
  t->blocks = (t->columns + t->block * columns - 1) / (t->block * columns);
  t->take = t->rows / (8 * t->threads); /* several times for each thread, since one may be held up */
  t->take = t->take > MOST_ROWS ? MOST_ROWS : t->take < FEWEST_ROWS ? FEWEST_ROWS : t->take;
  if (t->split == 2) t->multiply_rows = nibbles_half;
  else if (t->bits == 4) t->multiply_rows = t->block == 1 ? nibbles_1 : t->block == 2 ? nibbles_2 : nibbles_4;
  else t->multiply_rows = t->block == 1 ? bytes_1 : t->block == 2 ? bytes_2 : t->block == 4 ? bytes_4 : bytes_8;
  const int64_t n = t->m * t->blocks, size = t->block * columns * 2;
  const int64_t needed = n * (size + sizeof(ints) + t->split * sizeof(float));
  char *memory = aligned_alloc(WIDTH, (needed + WIDTH - 1) / WIDTH * WIDTH);
  if (!memory) return 1;
  t->digits = (int8_t *)memory;
  t->bias = (ints *)(memory + n * size);
  t->step = (float *)(t->bias + n);
  run(quantize_rows, t, t->m > 1 ? parallel : NULL);
  run(multiply_all, t, parallel);
  free(memory);
  return 0;
}
"""

# Without -fno-tree-ter gcc computes all products of a block before it adds them, which takes more registers than there
# are: 1.3 to 1.5 times as slow with 4 rows and more. clang ignores it.
NATIVE_FLAGS = ("-O3", "-fno-tree-ter", "-fno-math-errno", "-std=gnu11", "-shared", "-fPIC")
# For the processor at hand: the first that the compiler knows.
NATIVE_TARGETS = (("-march=native",), ("-mcpu=native",), ())
NATIVE_ROWS = 128  # multiplied at a time, so that their integers stay in the caches
_NATIVE_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _NativeLinear(ctypes.Structure):
    """`struct linear` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in "weight scale x y".split()),
        *((name, ctypes.c_int64) for name in "rows columns m group".split()),
        *((name, ctypes.c_int32) for name in "bits scale_type x_type threads".split()),
        *((name, ctypes.c_int64) for name in "row_bytes groups blocks take next".split()),
        *((name, ctypes.c_int32) for name in "block split".split()),
        *((name, ctypes.c_void_p) for name in "digits bias step multiply_rows".split()),
    ]


def native_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> torch.Tensor:
    """x [M, in] times the packed weight by the kernel in C, where it takes this weight: [M, out]."""
    takes = NativeWeight.takes(weight, scale, bits)
    return NativeWeight(weight, scale, bits)(x) if takes else plain_on_cpu(x, weight, scale, bits)


class NativeWeight(Packed):
    """A packed weight as it lies, and what the kernel in C has to know of it. Many rows may go by the definition.

    Activations are rounded to 16 bits of the largest of 256 (or of their group): the error is about 3e-5.
    """

    in_place = True

    def __init__(self, weight: torch.Tensor, scale: torch.Tensor, bits: int) -> None:
        self.weight, self.scale, self.bits, self.group = weight, scale, bits, group_of(weight, scale, bits)
        self.out_features, self.kernel = len(weight), native_kernel()
        self.most_rows = NATIVE_ROWS if many_are_faster_as_floats(self.group) else sys.maxsize

    @staticmethod
    def takes(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> bool:
        """Whether the kernel knows such weights."""
        known = scale.dtype in _NATIVE_DTYPES and group_of(weight, scale, bits) in (0, 32, 64, 128)
        return known and weight.is_contiguous() and scale.is_contiguous()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > self.most_rows or x.dtype not in _NATIVE_DTYPES:
            return plain_on_cpu(x, self.weight, self.scale, self.bits)
        return _run_native(self.kernel, x.contiguous(), self.weight, self.scale, self.bits, self.group)

    def unpack(self) -> torch.Tensor:
        return self.weight


def group_of(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> int:
    """The columns that share a scale; 0 if the whole row does."""
    return weight.shape[1] * 8 // bits // scale.shape[1] if scale.dim() == 2 else 0


def many_are_faster_as_floats(group: int) -> bool:
    """Whether more than NATIVE_ROWS are multiplied faster in floating point than by their integers.

    Measured with AVX2 and 512 rows: integers 1.1 to 1.3 times as fast, with groups of 32 and 64 0.75 to 0.87 times.
    Elsewhere floating point is assumed to be faster.
    """
    return group in (32, 64) or torch.backends.cpu.get_cpu_capability() != "AVX2"


def native_missing(device_type: str = "cpu") -> str | None:
    """What the native kernel lacks here, in a sentence, or None. Builds it where that was not done yet."""
    if device_type != "cpu":
        return f"The 'native' path is for the CPU, not for {device_type}."
    try:
        native_kernel()
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def native_kernel() -> Callable[[_NativeLinear], int]:
    """The kernel, compiled if the user's cache does not hold it, after its check against the definition.

    Raises RuntimeError, in a sentence, where there is none.
    """
    if os.name != "posix":
        raise RuntimeError("The 'native' path is for Linux and macOS; leave CHATGLM_KERNELS unset.")
    try:
        library = _build_native(_native_folder())
        _check_private(library)
        function = ctypes.CDLL(str(library)).chatglm_linear
    except (OSError, AttributeError, subprocess.SubprocessError) as error:
        raise RuntimeError(f"The 'native' kernel could not be built or loaded: {error}.") from error
    # The thread pool is torch's own; with a second OpenMP runtime both would want all cores.
    parallel = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    if parallel is None:
        logger.info("This build of torch does not lend its threads; the native kernel runs on one.")
    pool = ctypes.cast(parallel, ctypes.c_void_p)

    def kernel(job: _NativeLinear) -> int:
        return function(ctypes.byref(job), pool)

    _check_native(kernel, library)
    return kernel


def _run_native(
    kernel: Callable[[_NativeLinear], int],
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bits: int,
    group: int,
) -> torch.Tensor:
    # .shape, because len() of a tensor takes longer than all of these lines.
    m, out, columns = x.shape[0], weight.shape[0], weight.shape[1] * 8 // bits
    if x.shape[1] != columns or scale.shape[0] != out:
        raise ValueError(
            f"A weight [{out}, {columns}] cannot be multiplied with {x.shape[1]} columns and {scale.shape[0]} scales."
        )
    y = torch.empty(m, out, dtype=torch.float32)
    row_of_x, row_of_y = columns * x.element_size(), out * y.element_size()
    for first in range(0, m, NATIVE_ROWS):
        rows = min(NATIVE_ROWS, m - first)
        job = _NativeLinear(
            weight.data_ptr(), scale.data_ptr(), x.data_ptr() + first * row_of_x, y.data_ptr() + first * row_of_y,
            out, columns, rows, group, bits, _NATIVE_DTYPES[scale.dtype], _NATIVE_DTYPES[x.dtype],
            torch.get_num_threads(),
        )  # fmt: skip
        if kernel(job):
            raise MemoryError(f"No memory for {rows} rows of {columns} activations.")
    return y.to(x.dtype)


def _native_folder() -> Path:
    """A folder in the user's cache that nobody else can write to."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    folder = cache / "chatglm" / "kernels"
    for part in (cache, folder.parent, folder):
        part.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_private(folder.parent)
    _check_private(folder)
    return folder


def _check_private(path: Path) -> None:
    """Code that another user may have put there is not loaded."""
    status = path.lstat()
    if stat.S_ISLNK(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise RuntimeError(
            f"The 'native' path does not load code from {path}, which others can write to or own; remove it, "
            "or set XDG_CACHE_HOME to a folder of your own."
        )


def _build_native(folder: Path) -> Path:
    """The library for this source, compiler and processor in `folder`."""
    compiler = _find_compiler()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=60).stdout
    identity = (NATIVE_SOURCE, *NATIVE_FLAGS, *compiler, version, platform.machine(), _processor())
    library = folder / f"linear-{hashlib.sha256(chr(0).join(identity).encode()).hexdigest()[:24]}.so"
    if library.exists():
        return library
    descriptor, name = tempfile.mkstemp(dir=folder, suffix=".part")
    os.close(descriptor)
    start = time.perf_counter()
    try:
        for target in NATIVE_TARGETS:
            command = [*compiler, *NATIVE_FLAGS, *target, "-x", "c", "-", "-o", name, "-lm"]
            done = subprocess.run(command, input=NATIVE_SOURCE, capture_output=True, text=True, timeout=300)
            if done.returncode == 0:
                os.chmod(name, 0o700)
                os.replace(name, library)  # another process sees the whole file or none
                logger.info("Compiled %s in %.1f s.", library, time.perf_counter() - start)
                return library
    finally:
        Path(name).unlink(missing_ok=True)
    said = next((line for line in done.stderr.splitlines() if "error" in line), "no reason given")
    raise RuntimeError(f"The 'native' kernel could not be compiled by {shlex.join(compiler)}: {said}.")


def _find_compiler() -> list[str]:
    for command in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        words = shlex.split(command)
        if words and shutil.which(words[0]):
            return words
    raise RuntimeError("The 'native' path needs a C compiler: install gcc or clang, or name one in CC.")


def _processor() -> str:
    """What -march=native depends on, so that a home directory may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(names)}))


def _check_native(kernel: Callable[[_NativeLinear], int], library: Path) -> None:
    """Compare with the definition, every path through the source once; a compiler may be wrong, or a file."""
    generator = torch.Generator().manual_seed(0)
    for bits, m, out, columns, group in (
        (4, 1, 71, 768, 0), (4, 5, 3, 4354, 0), (4, 1, 5, 34, 0), (4, 16, 35, 550, 0), (4, 1, 69, 1088, 32),
        (4, 7, 3, 96, 32), (4, 3, 37, 192, 64), (4, 1, 6, 384, 128), (8, 1, 71, 768, 0), (8, 6, 5, 301, 0),
        (8, 2, 34, 96, 32), (8, 1, 3, 192, 64), (8, 4, 5, 384, 128),
    ):  # fmt: skip
        weight = torch.randint(
            -128, 128, (out, columns * bits // 8), dtype=torch.int8, generator=generator
        )  # every byte, thus every pair of nibbles
        scale = torch.rand((out, columns // group) if group else (out,), generator=generator)
        x = torch.randn(m, columns, generator=generator)
        y = _run_native(kernel, x, weight, scale, bits, group)
        expected = x.double() @ dequantize_weight(weight, scale.double(), bits).T
        if not (y - expected).abs().max() < 1e-3 * expected.abs().max():  # nan is not less
            raise RuntimeError(
                f"The 'native' kernel is not used, because {library} fails its check against the definition "
                f"({bits} bits, {m} rows, {out} x {columns}, groups of {group}); try another compiler in CC."
            )
