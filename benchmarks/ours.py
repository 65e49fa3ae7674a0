"""Our own models and layers as contestants, built from random integers in their packed form.

A path is written `WEIGHTS[/KERNELS][@DTYPE]`, e.g. `int4/native@float32`: how the weights are stored, which
kernels CHATGLM_KERNELS asks for, and the dtype of everything that is not packed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Any

from .shapes import SHAPES, Shape
from .worker import Contestant, Worker, serve

PACKED_BITS = {"int4": 4, "int8": 8}
FLOAT_BITS = {"bfloat16": 16, "float16": 16, "float32": 32}
TABLE = 4096  # tokens after the prompt whose rotary tables are made ahead
CHUNK_ROWS = 1024  # of a matrix that is compared in float64
KERNELS = ("auto", "plain", "torch", "native")
PATTERN = re.compile(r"(?P<weights>[a-z0-9]+)(-g(?P<group>\d+))?(/(?P<kernels>\w+))?(@(?P<dtype>\w+))?")


@dataclass(frozen=True)
class Path:
    """One way that our package takes; `name` is what the user wrote."""

    name: str
    weights: str
    group_size: int
    kernels: str
    dtype: str

    @classmethod
    def parse(cls, name: str) -> Path:
        """Raises ValueError, naming what may stand there."""
        match = PATTERN.fullmatch(name)
        parts = match.groupdict() if match else {}
        weights, kernels = parts.get("weights"), parts.get("kernels") or "auto"
        dtype = weights if weights in FLOAT_BITS else parts.get("dtype") or "float32"
        known = (
            (weights in PACKED_BITS or weights in FLOAT_BITS) and kernels in KERNELS and dtype in FLOAT_BITS
        )
        if not known:
            raise ValueError(
                f"{name!r} is no path; write WEIGHTS[/KERNELS][@DTYPE] with WEIGHTS int4, int4-g32, int8, bfloat16, "
                f"float16 or float32, KERNELS {', '.join(KERNELS)}, DTYPE {', '.join(FLOAT_BITS)}."
            )
        return cls(name, weights, int(parts["group"] or 0), kernels, dtype)

    @property
    def bits(self) -> int:
        """Of a weight in a block's matrices."""
        return PACKED_BITS.get(self.weights) or FLOAT_BITS[self.weights]

    @property
    def packed(self) -> bool:
        return self.weights in PACKED_BITS

    @property
    def kind(self) -> str:
        """The file of the peers that holds as many bits."""
        return {4: "q4_0", 8: "q8_0"}.get(self.bits, "f16")

    def start(self, threads: int, **arguments: Any) -> Worker:
        environment = {"CHATGLM_KERNELS": self.kernels, "OMP_NUM_THREADS": str(threads)}
        return Worker(
            self.name, "ours", {"path": self.name, "threads": threads, **arguments}, environment=environment
        )


def model_bytes(shape: Shape, layers: int, bits: int, head_bits: int) -> int:
    """Roughly what the weights of a model take."""
    tables = 1 if shape.family == "chatglm" else 2
    return (layers * shape.block_weights * bits + tables * shape.vocabulary * shape.hidden * head_bits) // 8


# What follows runs in the contestant's process and imports torch only there.


def start(path: str, threads: int, task: str, **arguments: Any) -> Any:
    """A contestant for `task` "model" or "layers"."""
    import torch

    torch.set_num_threads(threads)
    return (Model if task == "model" else Layers)(Path.parse(path), **arguments)


class Said(logging.Handler):
    """Keeps what the package logs, so that the results show which kernels it chose."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        logger = logging.getLogger("chatglm")
        logger.addHandler(self)
        logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage().replace(os.path.expanduser("~"), "~"))


def versions() -> str:
    import torch
    import transformers

    import chatglm

    return (
        f"chatglm {chatglm.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    )


def fill(module: Any) -> None:
    """Give every parameter of a module on the meta device numbers, without a float copy of packed ones.

    Integers and float matrices repeat a small random pool; scales bring the numbers to a standard deviation
    of 0.02, norms are 1 and biases 0.
    """
    import torch

    pools = {
        torch.int8: torch.randint(-127, 128, (1 << 22,), dtype=torch.int8),
        "float": torch.randn(1 << 22) * 0.02,
    }
    filled: dict[int, torch.nn.Parameter] = {}  # tied parameters stay tied
    for name, parent, key, parameter in list(_parameters(module)):
        if id(parameter) not in filled:
            values = torch.empty(parameter.shape, dtype=parameter.dtype)
            if name.endswith("weight_scale"):
                values.fill_(0.02 / (73 if parent.bits == 8 else 4.6))
            elif parameter.dim() == 1:
                values.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                _repeat(pools.get(parameter.dtype, pools["float"]), values)
            filled[id(parameter)] = torch.nn.Parameter(values, requires_grad=False)
        parent._parameters[key] = filled[id(parameter)]


def _parameters(module: Any) -> Any:
    for prefix, parent in module.named_modules():
        for key, parameter in parent._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{key}", parent, key, parameter


def _repeat(pool: Any, values: Any) -> None:
    flat, pool = values.view(-1), pool.to(values.dtype)
    for start in range(0, flat.numel(), pool.numel()):
        part = flat[start : start + pool.numel()]
        part.copy_(pool[: part.numel()])


def build_model(path: Path, model: str, layers: int, head: str, **sizes: int) -> Any:
    """The language model of the real shapes; `head` "quantized" packs embedding and head too.

    `sizes` replaces fields of the published configuration.
    """
    import torch

    from chatglm.hub.configuration_chatglm import ChatGLMConfig
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration

    make = ChatGLMConfig.chatglm_6b if SHAPES[model].family == "chatglm" else ChatGLMConfig
    with torch.device("meta"):
        glm = ChatGLMForConditionalGeneration(make(num_layers=layers, **sizes)).eval()
        glm.to(getattr(torch, path.dtype))
        if path.packed:
            options = {"group_size": path.group_size} if path.group_size else {}
            glm.quantize(path.bits, quantize_embeddings=head == "quantized", **options)
    fill(glm)
    rotary = glm.transformer.rotary_pos_emb
    rotary.inv_freq = rotary.inverse_frequencies(torch.device("cpu"))
    return glm


class Model(Contestant):
    """ChatGLMForConditionalGeneration, called step by step on its cache as our decoding loop does."""

    def __init__(self, path: Path, model: str, layers: int, head: str) -> None:
        self.said = Said()
        self.glm = build_model(path, model, layers, head)
        self.bytes_read = self._bytes_read()
        if path.kernels != "plain":
            self.glm.prepack()

    def _bytes_read(self) -> int:
        """Weights and scales of one token, as stored before any packing for the processor."""
        head = {id(parameter) for parameter in self.glm.get_output_embeddings().parameters()}
        looked_up = {id(parameter) for parameter in self.glm.get_input_embeddings().parameters()} - head
        return sum(p.nbytes for p in self.glm.parameters() if id(p) not in looked_up)

    def about(self) -> dict[str, Any]:
        return {"version": versions(), "bytes read": self.bytes_read, "said": self.said.messages}

    def read(self, ids: list[int]) -> None:
        import torch

        from chatglm.hub.generation_chatglm import GrowingCache

        config = self.glm.config
        if config.family == "chatglm":  # its prompts end in two special tokens
            ids = [*ids[:-2], config.gmask_token_id, config.bos_token_id]
        self.cache = GrowingCache(config.num_layers, self.glm.cache_dtype)
        with torch.no_grad():
            self.glm(torch.tensor([ids]), past_key_values=self.cache, logits_to_keep=1)
            first = self.glm.next_position(self.cache, None, None)
            self.one_token = self.glm.one_token_step()
            self.tables = self.one_token.tables(first + torch.arange(TABLE))
        self.read_tokens = len(ids)

    def rewind(self, length: int) -> None:
        surplus = self.cache.get_seq_length() - length
        if surplus:
            self.cache.crop(-surplus)

    def step(self, token: int) -> int:
        import torch

        i = self.cache.get_seq_length() - self.read_tokens
        rotary = tuple(table[:, :, i : i + 1] for table in self.tables)
        with torch.no_grad():
            return int(self.one_token(torch.tensor([[token]]), rotary, None, self.cache).argmax())


class Layers:
    """Single layers of a block, several copies of each, so that no cache holds the one that comes next."""

    def __init__(self, path: Path, model: str, copies: int) -> None:
        import torch

        self.said = Said()
        self.dtype = getattr(torch, path.dtype)
        # The layers of a model, so that they are what users get; it needs no real vocabulary for that.
        glm = build_model(path, model, copies, "float", vocab_size=256, bos_token_id=4, eos_token_id=5)
        names = SHAPES[model].matrices
        self.blocks = [
            {name: next(m for n, m in block.named_modules() if n.endswith(f".{name}")) for name in names}
            for block in glm.transformer.blocks
        ]
        self.bytes_read = {
            name: sum(p.nbytes for p in layer.parameters()) for name, layer in self.blocks[0].items()
        }
        self.inputs: dict[tuple[int, int], torch.Tensor] = {}
        self.expected = {name: self._expected(layer, path.bits) for name, layer in self.blocks[0].items()}
        if path.kernels != "plain":
            glm.prepack()

    def about(self) -> dict[str, Any]:
        return {
            "version": versions(),
            "bytes read": self.bytes_read,
            "copies": len(self.blocks),
            "relative error": self._error(),
            "said": self.said.messages,
        }

    def input(self, rows: int, columns: int) -> Any:
        import torch

        if (rows, columns) not in self.inputs:
            self.inputs[rows, columns] = torch.randn(rows, columns).to(self.dtype)
        return self.inputs[rows, columns]

    def run(self, rows: int, seconds: float) -> dict[str, float]:
        """Mean seconds of each of the four layers on `rows` rows, over `seconds` or one pass at least."""
        import torch

        spent, calls = dict.fromkeys(self.bytes_read, 0.0), 0
        end = time.perf_counter() + seconds
        with torch.no_grad():
            while not calls or time.perf_counter() < end:
                for block in self.blocks:
                    for name, layer in block.items():
                        x = self.input(rows, layer.in_features)
                        start = time.perf_counter()
                        layer(x)
                        spent[name] += time.perf_counter() - start
                    calls += 1
        means = {name: total / calls for name, total in spent.items()}
        return means | {"": sum(means.values())}

    def _expected(self, layer: Any, bits: int) -> Any:
        """What `layer` makes of one row, in float64, before anything is packed for the processor."""
        import torch

        from chatglm.hub.quantization import dequantize_weight

        x, outputs = self.input(1, layer.in_features).double(), []
        for start in range(0, layer.out_features, CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            weight = layer.weight[rows].detach()
            if bits in PACKED_BITS.values():
                weight = dequantize_weight(weight, layer.weight_scale[rows].detach().double(), bits)
            outputs.append(x @ weight.double().t())
        return torch.cat(outputs, dim=-1)

    def _error(self) -> float:
        """Largest error of the four layers on one row, relative to float64."""
        import torch

        with torch.no_grad():
            errors = []
            for name, layer in self.blocks[0].items():
                expected = self.expected[name]  # the biases are 0
                errors.append(
                    (layer(self.input(1, layer.in_features)).double() - expected).norm() / expected.norm()
                )
        return float(max(errors))


if __name__ == "__main__":
    serve(start, json.loads(sys.argv[1]))
