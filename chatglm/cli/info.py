"""`chatglm info MODEL`: what a model is and needs, from its small files and headers alone."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from chatglm.checkpoint import Checkpoint, read_checkpoint, read_config, readable
from chatglm.find import MODEL_HELP, download, local_folder

FAMILY_NAMES = {
    "chatglm": "ChatGLM-6B architecture",
    "chatglm2": "ChatGLM2-6B architecture (also ChatGLM3-6B, CodeGeeX2)",
}
DTYPE_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "I8": "int8", "U8": "uint8"}
CACHE_TOKENS = 1000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", default="demo", help=MODEL_HELP)
    parser.add_argument("--revision", help="branch, tag or commit of a Hub name (default: main)")
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")


def run(arguments: argparse.Namespace) -> None:
    facts = describe(arguments.model, arguments.revision)
    if arguments.json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        print(as_text(facts))


def describe(name: str, revision: str | None = None) -> dict[str, Any]:
    """Returns what `chatglm info` tells, every size in bytes; nothing large is read or fetched."""
    checkpoint = _checkpoint(name, revision)
    config, sizes = checkpoint.config, checkpoint.sizes
    free = free_memory()
    bits = packed_bits(config)
    return {
        "model": name,
        "folder": str(checkpoint.folder),
        "family": checkpoint.family,
        "parameters": sizes.parameters,
        "layers": sizes.num_layers,
        "hidden_size": config["hidden_size"],
        "vocabulary": sizes.vocab_size,
        "context": config.get("seq_length", config.get("max_sequence_length")),
        "cache_values_per_token": sizes.cache_values_per_token,
        "int8_cache_bytes_per_token": sizes.cache_values_per_token + 2 * sizes.cache_heads_per_token,
        "packed_bits": bits,
        "file_dtype": _file_dtype(checkpoint),
        "file_sizes": {file.path.name: file.size for file in checkpoint.weights},
        "memory": [_memory(sizes, each, free) for each in ([bits] if bits else [32, 16, 8, 4])],
        "free_memory": free,
    }


def packed_bits(config: dict[str, Any]) -> int:
    """8 or 4 if the linear weights in the files are packed integers, else 0."""
    settings = config.get("quantization_config") or {}
    return config.get("quantization_bit") or settings.get("bits") or 0


def free_memory() -> dict[str, int]:
    """Bytes free now, of the machine and of each NVIDIA GPU; without torch."""
    free = {"RAM": min(psutil.virtual_memory().available, _container_limit())}
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=index,memory.free", "--format=csv,noheader,nounits"]
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=False)
        for line in answer.stdout.splitlines() if answer.returncode == 0 else ():
            index, mebibytes = line.split(", ")
            free[f"GPU {index}"] = int(mebibytes) << 20
    return free


def as_text(facts: dict[str, Any]) -> str:
    """Lays the facts of `describe` out for people."""
    free = ", ".join(f"{readable(size)} {place}" for place, size in facts["free_memory"].items())
    rows = [
        ("folder", facts["folder"]),
        ("parameters", f"{facts['parameters']:,}"),
        ("layers", f"{facts['layers']}, hidden size {facts['hidden_size']:,}"),
        ("vocabulary", f"{facts['vocabulary']:,}"),
        ("context", f"{facts['context']:,} tokens" if facts["context"] else "not told"),
        ("cache", _cache_text(facts["cache_values_per_token"], facts["int8_cache_bytes_per_token"])),
        ("weights", _weights_text(facts)),
        ("free here", free),
    ]
    lines = [f"{facts['model']}: {FAMILY_NAMES[facts['family']]}"]
    lines += [f"  {name:<12}{value}" for name, value in rows]
    lines += ["", f"  {'loaded as':<12}{'weights':<12}{f'cache of {CACHE_TOKENS} tokens':<24}fits in"]
    for row in facts["memory"]:
        places = [place for place, enough in row["fits"].items() if enough]
        sizes = f"{readable(row['weights']):<12}{readable(row['cache']):<24}"
        lines.append(f"  {row['loaded_as']:<12}{sizes}{', '.join(places) or 'nothing here'}")
    return "\n".join(lines)


def _weights_text(facts: dict[str, Any]) -> str:
    files = facts["file_sizes"]
    packed = f", packed to {facts['packed_bits']} bits" if facts["packed_bits"] else ""
    if not files:
        return f"{facts['file_dtype'] or 'unknown dtype'}{packed}, not downloaded"
    count = f"{len(files)} file{'s' * (len(files) != 1)}"
    return f"{facts['file_dtype']}{packed}, {readable(sum(files.values()))} in {count}"


def _cache_text(values: int, int8: int) -> str:
    return f"{2 * values:,} bytes a token in 16 bits, {4 * values:,} in float32, {int8:,} with int8_cache"


def _checkpoint(name: str, revision: str | None) -> Checkpoint:
    folder = local_folder(name, revision)
    if folder is not None:
        return read_checkpoint(folder)
    folder = download(name, revision=revision, weights=False)
    try:
        return read_checkpoint(folder)
    except OSError:  # not downloaded yet, or in part: config.json tells the rest
        return Checkpoint(folder, read_config(folder), ())


def _file_dtype(checkpoint: Checkpoint) -> str | None:
    """The dtype of most bytes; for .bin files what config.json says."""
    weight: Counter[str] = Counter()
    for file in checkpoint.weights:
        for tensor in file.tensors.values():
            weight[tensor.dtype] += tensor.nbytes
    if not weight:
        return checkpoint.config.get("torch_dtype", checkpoint.config.get("dtype"))
    dtype = weight.most_common(1)[0][0]
    return DTYPE_NAMES.get(dtype, dtype)


def _memory(sizes: Any, bits: int, free: dict[str, int]) -> dict[str, Any]:
    weights = sizes.weight_bytes(bits)
    cache = sizes.cache_values_per_token * CACHE_TOKENS * (4 if bits == 32 else 2)
    names = {32: "float32", 16: "16 bits", 8: "int8", 4: "int4"}
    fits = {place: weights + cache < size for place, size in free.items()}
    return {"loaded_as": names[bits], "weights": weights, "cache": cache, "fits": fits}


def _container_limit() -> int:
    """What the container that we may be in leaves us; psutil sees the whole machine."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = int((group / "memory.max").read_text())
        return limit - int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no container, or "max": no limit
        return psutil.virtual_memory().total
