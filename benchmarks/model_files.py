"""Files of random weights that llama.cpp (GGUF) and chatglm.cpp (its own "ggml" file) read.

Blocks are drawn packed, from a small pool, and streamed to the file: no float copy is ever in memory.
ChatGLM2-6B is an architecture of both. llama.cpp knows no ChatGLM-6B, so its file for that shape says
"gptneox": the same matrices with the same biases, LayerNorm and GELU, but a causal mask and one-dimensional
positions, which cost the same.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from .shapes import Shape

POOL_NUMBERS = 1 << 18
GGML_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}
BLOCK = 32  # numbers of a quantized block; each block has one float16 scale before its integers
BLOCK_BYTES = {"q4_0": 2 + BLOCK // 2, "q8_0": 2 + BLOCK}
FLOAT_FORMATS = {"f32": "f", "f16": "e"}  # of the module `struct`
STANDARD_DEVIATION = 0.02
GGUF_ALIGNMENT, GGML_ALIGNMENT = 32, 16
CHATGLM_CPP_MODELS = {"chatglm": 1, "chatglm2": 2}
ROPE_BASE = 10000.0
NORM_EPSILON = 1e-5


@dataclass(frozen=True)
class Tensor:
    """A matrix of `kind`, or a float32 vector (`columns` 0) filled with `value`. Numbers per row: columns."""

    name: str
    rows: int
    columns: int = 0
    kind: str = "f32"
    value: float = 0.0

    @property
    def nbytes(self) -> int:
        numbers = self.rows * (self.columns or 1)
        if self.kind in BLOCK_BYTES:
            return numbers // BLOCK * BLOCK_BYTES[self.kind]
        return numbers * struct.calcsize(FLOAT_FORMATS[self.kind])


def random_pool(kind: str) -> bytes:
    """POOL_NUMBERS numbers as they are stored, with mean 0 and a standard deviation of 0.02."""
    source = random.Random(0)
    if kind in FLOAT_FORMATS:
        numbers = [source.gauss(0, STANDARD_DEVIATION) for _ in range(POOL_NUMBERS)]
        return struct.pack(f"<{POOL_NUMBERS}{FLOAT_FORMATS[kind]}", *numbers)
    spread = {"q4_0": 4.6, "q8_0": 74}[kind]  # standard deviation of uniform integers of that width
    scale = struct.pack("<e", STANDARD_DEVIATION / spread)
    size = BLOCK_BYTES[kind] - 2
    return b"".join(scale + source.randbytes(size) for _ in range(POOL_NUMBERS // BLOCK))


def write_data(file: BinaryIO, tensor: Tensor, pool: bytes) -> None:
    """The numbers of one tensor; a matrix repeats the pool, each time from another place of it."""
    if not tensor.columns:
        file.write(struct.pack("<f", tensor.value) * tensor.rows)
        return
    step = BLOCK_BYTES.get(tensor.kind) or struct.calcsize(FLOAT_FORMATS[tensor.kind])
    left, source = tensor.nbytes, random.Random(tensor.name)
    while left:
        start = source.randrange(len(pool) // step // 2) * step
        part = pool[start : start + left]
        file.write(part)
        left -= len(part)


def write_gguf(path: Path, shape: Shape, layers: int, kind: str) -> None:
    """Write a file for llama.cpp."""
    tensors, fields = gguf_tensors(shape, layers, kind), _gguf_fields(shape, layers)
    pool = random_pool(kind)
    with path.open("wb") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(fields)))
        for name, value in fields.items():
            file.write(_gguf_string(name) + _gguf_value(value))
        offset = 0
        for tensor in tensors:
            sizes = (tensor.columns, tensor.rows) if tensor.columns else (tensor.rows,)
            place = struct.pack("<IQ", GGML_TYPES[tensor.kind], offset)
            file.write(
                _gguf_string(tensor.name) + struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes) + place
            )
            offset += -(-tensor.nbytes // GGUF_ALIGNMENT) * GGUF_ALIGNMENT
        for tensor in tensors:
            _align(file, GGUF_ALIGNMENT)
            write_data(file, tensor, pool)
        _align(file, GGUF_ALIGNMENT)


def _gguf_fields(shape: Shape, layers: int) -> dict[str, str | int | float | bool]:
    glm2 = shape.family == "chatglm2"
    name = "chatglm" if glm2 else "gptneox"
    feed_forward = shape.down_columns
    fields = {
        "general.architecture": name,
        "general.name": "random",
        "tokenizer.ggml.model": "no_vocab",
        f"{name}.vocab_size": shape.vocabulary,
        f"{name}.context_length": 2048,
        f"{name}.embedding_length": shape.hidden,
        f"{name}.feed_forward_length": feed_forward,
        f"{name}.block_count": layers,
        f"{name}.attention.head_count": shape.heads,
        f"{name}.attention.head_count_kv": shape.key_value_heads,
        f"{name}.rope.dimension_count": shape.head_dim // (2 if glm2 else 1),
        f"{name}.rope.freq_base": ROPE_BASE,
    }
    if glm2:
        return fields | {f"{name}.attention.layer_norm_rms_epsilon": NORM_EPSILON}
    return fields | {
        f"{name}.attention.layer_norm_epsilon": NORM_EPSILON,
        f"{name}.use_parallel_residual": False,
    }


def gguf_tensors(shape: Shape, layers: int, kind: str) -> list[Tensor]:
    """The tensors of llama.cpp's file, in its order; the embedding comes first."""
    return list(_gguf_tensors(shape, layers, kind))


def _gguf_tensors(shape: Shape, layers: int, kind: str) -> Iterator[Tensor]:
    names = {
        "query_key_value": "attn_qkv",
        "dense": "attn_output",
        "dense_h_to_4h": "ffn_up",
        "dense_4h_to_h": "ffn_down",
    }
    yield Tensor("token_embd.weight", shape.vocabulary, shape.hidden, kind)
    for layer in range(layers):
        for norm in ("attn_norm", "ffn_norm"):
            yield from _norm(shape, f"blk.{layer}.{norm}")
        for matrix, (rows, columns) in shape.matrices.items():
            yield from _linear(shape, f"blk.{layer}.{names[matrix]}", matrix, rows, columns, kind)
    yield from _norm(shape, "output_norm")
    yield Tensor("output.weight", shape.vocabulary, shape.hidden, kind)


def _gguf_string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _gguf_value(value: str | int | float | bool) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _gguf_string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    return struct.pack("<II", 4, value) if isinstance(value, int) else struct.pack("<If", 6, value)


def write_ggml(path: Path, shape: Shape, layers: int, kind: str, vocabulary: bytes) -> None:
    """Write a file for chatglm.cpp.

    `vocabulary` is any sentencepiece model: the file must carry one, and token ids never meet it here.
    """
    tensors = ggml_tensors(shape, layers, kind)
    pool = random_pool(kind)
    sizes = (
        shape.vocabulary, shape.hidden, shape.heads, shape.key_value_heads, layers, shape.down_columns,
    )  # fmt: skip
    with path.open("wb") as file:
        file.write(
            b"ggml" + struct.pack("<ii", CHATGLM_CPP_MODELS[shape.family], 2)
        )  # 2: version of the header
        file.write(struct.pack("<i6i", GGML_TYPES[kind], *sizes))
        no_prefix, longest, end, padding = 0, 2048, 2, 0
        file.write(struct.pack("<fifiii", NORM_EPSILON, no_prefix, ROPE_BASE, longest, end, padding))
        file.write(struct.pack("<i", len(vocabulary)) + vocabulary)
        for tensor in tensors:
            sizes = (tensor.rows, tensor.columns) if tensor.columns else (tensor.rows,)
            file.write(struct.pack("<i", len(tensor.name)) + tensor.name.encode())
            file.write(struct.pack(f"<{2 + len(sizes)}i", len(sizes), *sizes, GGML_TYPES[tensor.kind]))
            _align(file, GGML_ALIGNMENT)
            write_data(file, tensor, pool)


def ggml_tensors(shape: Shape, layers: int, kind: str) -> list[Tensor]:
    """The tensors of chatglm.cpp's file, in its order; the embedding comes first."""
    return list(_ggml_tensors(shape, layers, kind))


def _ggml_tensors(shape: Shape, layers: int, kind: str) -> Iterator[Tensor]:
    glm2 = shape.family == "chatglm2"
    stack, embedding = ("encoder.", "embedding.") if glm2 else ("", "")
    attention = "self_attention" if glm2 else "attention"
    part = {
        "query_key_value": attention,
        "dense": attention,
        "dense_h_to_4h": "mlp",
        "dense_4h_to_h": "mlp",
    }
    yield Tensor(f"transformer.{embedding}word_embeddings.weight", shape.vocabulary, shape.hidden, kind)
    for layer in range(layers):
        place = f"transformer.{stack}layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield from _norm(shape, f"{place}.{norm}")
        for matrix, (rows, columns) in shape.matrices.items():
            yield from _linear(shape, f"{place}.{part[matrix]}.{matrix}", matrix, rows, columns, kind)
    yield from _norm(shape, f"transformer.{stack}final_layernorm")
    if glm2:
        yield Tensor("transformer.output_layer.weight", shape.vocabulary, shape.hidden, kind)


def _norm(shape: Shape, name: str) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", shape.hidden, value=1.0)
    if shape.family == "chatglm":
        yield Tensor(f"{name}.bias", shape.hidden)


def _linear(shape: Shape, name: str, matrix: str, rows: int, columns: int, kind: str) -> Iterator[Tensor]:
    yield Tensor(f"{name}.weight", rows, columns, kind)
    if shape.family == "chatglm" or matrix == "query_key_value":
        yield Tensor(f"{name}.bias", rows)


def _align(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))
