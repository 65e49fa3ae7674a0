"""What a checkpoint folder holds, read from config.json, file sizes and safetensors headers alone.

Nothing here needs torch, so a damaged or incomplete download is told in a moment, before anything
large is loaded, and so is the memory a model will need. Whoever made the files may have meant harm: every
size is bounded before it is used, and no file outside the folder is read.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The same as in configuration_chatglm.py and tokenization_chatglm.py, which need torch; a test holds
# them together.
FAMILY_KEYS = {
    "chatglm": ("inner_hidden_size", "position_encoding_2d"),
    "chatglm2": ("padded_vocab_size", "multi_query_attention"),
}
TOKENIZER_FILES = {"chatglm": "ice_text.model", "chatglm2": "tokenizer.model"}
EMBEDDINGS = {
    "chatglm": "transformer.word_embeddings.weight",
    "chatglm2": "transformer.embedding.word_embeddings.weight",
}
# In the order in which transformers looks for them.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
# Keys of a config.json with which transformers loads code: of the folder, or of a kernel on the Hub.
CODE_KEYS = ("auto_map", "attn_implementation", "experts_implementation", "custom_pipelines")
# Read by transformers where they are there.
OPTIONAL_FILES = (
    "generation_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
LARGEST_HEADER = LARGEST_JSON = 10_000_000  # bytes; published headers and indices have up to 100,000
DEEPEST = 30  # lists and objects inside one another in a JSON file; published ones have 5
MOST_DIMENSIONS = 8
# What sizes in a config.json may be at most: more than any ChatGLM has, and little enough to compute with.
LARGEST = {"num_layers": 1000, "num_hidden_layers": 1000, "num_labels": 100_000} | dict.fromkeys(
    "hidden_size inner_hidden_size ffn_hidden_size intermediate_size num_attention_heads num_key_value_heads "
    "kv_channels multi_query_group_num vocab_size padded_vocab_size pre_seq_len".split(),
    10_000_000,
)
DTYPES = ("float32", "float16", "bfloat16", "float64")  # that a config.json may name
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1}
DTYPE_BYTES |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}


@dataclass(frozen=True)
class Tensor:
    """A tensor as a safetensors header describes it."""

    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class WeightFile:
    """One file of weights; ``tensors`` is empty for a .bin, whose pickle is not read here."""

    path: Path
    size: int
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """The numbers that decide how much memory a model needs."""

    num_layers: int
    vocab_size: int
    linear_weights: int  # in the layers: what quantisation packs
    linear_rows: int  # their output rows; a packed row has one half-precision scale
    embedding_weights: int  # the embedding, and the output layer where it is not the same tensor
    other_weights: int  # norms and biases
    cache_values_per_token: int  # keys and values of all layers
    cache_heads_per_token: int  # their heads, each of which has a half-precision scale in an int8 cache

    @property
    def parameters(self) -> int:
        return self.linear_weights + self.embedding_weights + self.other_weights

    def weight_bytes(self, bits: int) -> int:
        """Bytes of the weights in float32 (32), half precision (16), or packed (8, 4).

        Packed models keep embedding, output layer and the rest in half precision.
        """
        if bits in (32, 16):
            return self.parameters * bits // 8
        packed = self.linear_weights * bits // 8 + self.linear_rows * 2
        return packed + (self.embedding_weights + self.other_weights) * 2


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has passed the checks of `read_checkpoint`."""

    folder: Path
    config: dict[str, Any]
    weights: tuple[WeightFile, ...]

    @property
    def family(self) -> str:
        return family_of(self.config)

    @property
    def sizes(self) -> Sizes:
        return sizes_of(self.config)


def read_checkpoint(folder: str | Path) -> Checkpoint:
    """Checks that `folder` holds a whole checkpoint and says what is in it.

    Raises OSError for a file that is missing, cut off or only a git-lfs pointer, and ValueError for
    one whose content is wrong; the message is one sentence that names the file and the way out.
    """
    folder = Path(folder)
    config = read_config(folder)
    weights = tuple(read_weight_file(path) for path in _weight_paths(folder))
    _check_vocabulary(config, weights)
    _check_tokenizer_file(folder, family_of(config))
    check_optional_files(folder)
    return Checkpoint(folder, config, weights)


def read_config(folder: Path) -> dict[str, Any]:
    """Returns config.json less what may name code: CODE_KEYS and the keys with a leading _."""
    if not folder.is_dir():
        raise OSError(f"There is no folder {folder}; give the folder that holds config.json.")
    config = read_json(folder / "config.json")
    if config.get("model_type") != "chatglm":
        raise ValueError(
            f"{folder / 'config.json'} says model_type {config.get('model_type')!r}; only "
            "'chatglm', the type of ChatGLM-6B, ChatGLM2-6B and their kin, can be loaded here."
        )
    family_of(config)
    _check_sizes(config)
    _check_dtype(config)
    return {key: value for key, value in config.items() if key not in CODE_KEYS and key[:1] != "_"}


def family_of(config: dict[str, Any]) -> str:
    """Returns "chatglm" (ChatGLM-6B) or "chatglm2" (ChatGLM2-6B, ChatGLM3-6B, CodeGeeX2)."""
    families = [name for name, keys in FAMILY_KEYS.items() if any(key in config for key in keys)]
    if len(families) != 1:
        problem = "has keys of both families" if families else "has the keys of no known family"
        raise ValueError(
            f"config.json {problem} ({FAMILY_KEYS['chatglm'][0]} belongs to ChatGLM-6B, "
            f"{FAMILY_KEYS['chatglm2'][0]} to ChatGLM2-6B); take the one that was published with "
            "the weights."
        )
    return families[0]


def sizes_of(config: dict[str, Any]) -> Sizes:
    """Counts the parameters of the model that `config` describes, prefix encoders aside."""
    layers, hidden = _number(config, "num_layers"), _number(config, "hidden_size")
    if family_of(config) == "chatglm":
        vocabulary, embeddings = _number(config, "vocab_size"), 1  # tied to the output layer
        linear, key_values = _chatglm_layer(config, hidden), hidden
        heads = _number(config, "num_attention_heads")
        biased, norm_size, norms = set(linear), 2 * hidden, 2 * layers + 1
    else:
        vocabulary, embeddings = _number(config, "padded_vocab_size"), 2
        linear, key_values = _chatglm2_layer(config, hidden)
        heads = key_values // _number(config, "kv_channels")
        biased = set(linear) if config.get("add_bias_linear") else set()
        biased |= {"query_key_value"} if config.get("add_qkv_bias") else set()
        norm_size = hidden if config.get("rmsnorm", True) else 2 * hidden
        norms = 2 * layers + bool(config.get("post_layer_norm", True))
    return Sizes(
        num_layers=layers,
        vocab_size=vocabulary,
        linear_weights=layers * sum(rows * columns for rows, columns in linear.values()),
        linear_rows=layers * sum(rows for rows, _ in linear.values()),
        embedding_weights=embeddings * vocabulary * hidden,
        other_weights=layers * sum(linear[name][0] for name in biased) + norms * norm_size,
        cache_values_per_token=2 * layers * key_values,
        cache_heads_per_token=2 * layers * heads,
    )


def _chatglm_layer(config: dict[str, Any], hidden: int) -> dict[str, tuple[int, int]]:
    """The linear layers of a ChatGLM-6B block, as (rows, columns) of their weights."""
    inner = _number(config, "inner_hidden_size")
    return {
        "query_key_value": (3 * hidden, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (inner, hidden),
        "dense_4h_to_h": (hidden, inner),
    }


def _chatglm2_layer(config: dict[str, Any], hidden: int) -> tuple[dict[str, tuple[int, int]], int]:
    """The same of a ChatGLM2-6B block, and the width of its keys (and of its values)."""
    channels, groups = _number(config, "kv_channels"), _number(config, "num_attention_heads")
    inner, queries = _number(config, "ffn_hidden_size"), channels * groups
    if config.get("multi_query_attention"):
        groups = _number(config, "multi_query_group_num")
    keys = channels * groups
    shapes = {
        "query_key_value": (queries + 2 * keys, hidden),
        "dense": (hidden, queries),
        "dense_h_to_4h": (2 * inner, hidden),  # gate and up
        "dense_4h_to_h": (hidden, inner),
    }
    return shapes, keys


def is_lfs_pointer(path: Path) -> bool:
    """Whether git left its small stand-in at `path` in place of a large file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def check_optional_files(folder: Path) -> None:
    """Raises OSError or ValueError for a small file that transformers would read and should not."""
    for path in (folder / name for name in OPTIONAL_FILES):
        if path.suffix == ".json" and path.exists():
            read_json(path)
        elif path.exists():
            existing(path)


def find_weights(folder: Path) -> Path:
    """The file that loading begins with: the weights, or the index of several files."""
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise OSError(
            f"{folder} holds no weights, neither model.safetensors nor pytorch_model.bin nor the "
            "index of several such files; download them into it."
        )
    return found


def read_index(path: Path) -> dict[str, str]:
    """The file of each tensor, by an index; every one is a name in its own folder, of the index's kind."""
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{path} names no files of weights (weight_map); download it again.")
    kind = Path(path.name.removesuffix(".index.json")).suffix
    for name in weight_map.values():
        if not isinstance(name, str) or "\0" in name or Path(name).name != name or Path(name).suffix != kind:
            raise ValueError(
                f"{path} names {shown(name)}, which is no {kind} file of its own folder; download it again."
            )
    return weight_map


def _weight_paths(folder: Path) -> list[Path]:
    found = find_weights(folder)
    if found.suffix != ".json":
        return [found]
    names = sorted(set(read_index(found).values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise OSError(
            f"{folder} lacks {len(missing)} of the {len(names)} files of weights that {found.name} "
            f"names, {missing[0]} for one; download the missing files into it."
        )
    return [folder / name for name in names]


# check_weight_files in configuration_chatglm.py tells the most frequent of these faults to users without this
# package. Sharing would take a root file of its own, to travel with every copy of the weights: importing
# any of those that are there takes torch, and they must not need this one.
def read_weight_file(path: Path) -> WeightFile:
    """Checks that one file of weights is whole and says what its header does."""
    existing(path)
    if path.suffix == ".safetensors":
        return WeightFile(path, path.stat().st_size, _read_header(path))
    _check_archive(path)
    return WeightFile(path, path.stat().st_size, {})


def _read_header(path: Path) -> dict[str, Tensor]:
    # 8 bytes: length n of the header; n bytes: the header as JSON; then the tensors, one behind the other.
    size = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        if start > min(size, LARGEST_HEADER):
            raise OSError(
                f"{path} is cut off or no safetensors file: it has {size:,} bytes but its header "
                f"alone would end at byte {start:,}; download it again."
            )
        try:
            header = parse_json(file.read(start - 8))
            if not isinstance(header, dict):
                raise ValueError("it is no JSON object")
            header.pop("__metadata__", None)
            tensors = {name: _tensor(name, entry) for name, entry in header.items()}
            end = _end_of_data({name: entry["data_offsets"] for name, entry in header.items()})
        except ValueError as error:
            raise ValueError(f"{path} has a damaged header ({error}); download it again.") from None
    if size != start + end:
        raise OSError(f"{path} has {size:,} bytes where its header says {start + end:,}; download it again.")
    return tensors


def _tensor(name: str, entry: Any) -> Tensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape[:MOST_DIMENSIONS], begin, end]
        whole = len(shape) <= MOST_DIMENSIONS and all(type(n) is int and 0 <= n < 1 << 60 for n in numbers)
        itemsize = DTYPE_BYTES[dtype]
    except (KeyError, TypeError, ValueError):
        whole, itemsize = False, 0
    if not whole:
        raise ValueError(f"{shown(name)} has no known dtype, shape and data_offsets")
    if math.prod(shape) * itemsize != end - begin:
        raise ValueError(f"{shown(name)} is {dtype} {shape}, which does not take {end - begin:,} bytes")
    return Tensor(dtype, tuple(shape), end - begin)


def _end_of_data(offsets: dict[str, list[int]]) -> int:
    """Where the last tensor ends; ValueError if they overlap or leave holes."""
    position = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != position:
            fault = "overlaps" if begin < position else "leaves a hole behind"
            raise ValueError(f"{shown(name)} {fault} the tensor before it")
        position = end
    return position


def _check_archive(path: Path) -> None:
    with path.open("rb") as file:
        archive = file.read(2) == b"PK"
    if not archive:
        return
    # A zip archive has its table of contents at the end: it is missing where a download stopped.
    if not zipfile.is_zipfile(path):
        raise OSError(
            f"{path} is cut off: it has {path.stat().st_size:,} bytes but no end of the archive; "
            "download it again."
        )
    try:
        with zipfile.ZipFile(path) as contents:
            entries = contents.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise ValueError(f"{path} is a damaged archive ({error}); download it again.") from None
    for entry in entries:  # what torch writes is never compressed, so nothing grows when it is read
        pickled = entry.filename.endswith(".pkl")
        if entry.compress_type != zipfile.ZIP_STORED or (pickled and entry.file_size > LARGEST_HEADER):
            raise ValueError(
                f"{path} is no file of torch: {shown(entry.filename)} in it is compressed, or far too large; "
                "download it again."
            )


def _check_vocabulary(config: dict[str, Any], weights: tuple[WeightFile, ...]) -> None:
    name, expected = EMBEDDINGS[family_of(config)], sizes_of(config).vocab_size
    for file in weights:
        tensor = file.tensors.get(name)
        if tensor is not None and tensor.shape[:1] != (expected,):
            raise ValueError(
                f"{file.path} has embeddings for {tensor.shape[0] if tensor.shape else 0} tokens but config.json says "
                f"{expected}; take both files from the same release."
            )


def _check_tokenizer_file(folder: Path, family: str) -> None:
    path = existing(folder / TOKENIZER_FILES[family])
    if path.stat().st_size == 0:
        raise OSError(f"{path} is empty; download it again.")


def existing(path: Path) -> Path:
    """Returns `path`; OSError if it is no file of its folder, or only git's stand-in for one."""
    if not path.is_file():
        raise OSError(f"{path} is missing; download it into the folder.")
    if leaves(path, path.parent):
        raise OSError(
            f"{path} is a link to {path.resolve()}, outside of its folder; put the file itself into the folder."
        )
    if is_lfs_pointer(path):
        with path.open("rb") as file:
            size = re.search(rb"^size (\d+)$", file.read(1000), re.MULTILINE)
        expected = f" of {int(size[1]):,} bytes" if size else ""
        raise OSError(
            f"{path} is a git-lfs pointer of {path.stat().st_size} bytes, not the file{expected} "
            "that belongs there; run `git lfs pull` in the folder or download the file itself."
        )
    return path


def leaves(path: Path, folder: Path) -> bool:
    """Whether `path` is, or leads to, something outside of `folder`."""
    home = folder.resolve()
    inside, repository = [home], home.parent.parent
    if home.parent.name == "snapshots" and repository.name.startswith("models--"):
        # In the Hub's cache files are links to the blobs of their repository, and these to a store of all.
        inside += [repository / "blobs", repository.parent / "blobs"]
    return not any(path.resolve().is_relative_to(place) for place in inside)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint."""
    existing(path)
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(f"{path} has {size:,} bytes, far more than belong there; download it again.")
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); download it again.") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object; download it again.")
    return content


def parse_json(text: bytes) -> Any:
    """What JSON text says; ValueError also where a key is there twice, or values are nested too deeply."""
    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    level = [content]
    for _ in range(DEEPEST):
        level = [child for item in level for child in _children(item)]
    if level:
        raise ValueError("nested too deeply")
    return content


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(twice)} is there twice")
    return content


def _children(item: Any) -> list[Any]:
    return list(item.values()) if isinstance(item, dict) else item if isinstance(item, list) else []


def shown(name: Any) -> str:
    """A name out of a file as it may be printed: no control characters, not endless."""
    text = repr(name)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _check_sizes(config: dict[str, Any]) -> None:
    for key, largest in LARGEST.items():
        value = config.get(key)
        if isinstance(value, int) and value > largest:
            raise ValueError(
                f"config.json has {key} {shown(value)}, more than any ChatGLM has (at most {largest:,} is taken); "
                "take the one that was published with the weights."
            )


def _check_dtype(config: dict[str, Any]) -> None:
    for key in ("dtype", "torch_dtype"):
        value = config.get(key)
        if value is not None and str(value).removeprefix("torch.") not in DTYPES:
            raise ValueError(f"config.json has {key} {shown(value)}; it must be one of {', '.join(DTYPES)}.")


def _number(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"config.json has {key} {value!r} where a whole number above 0 belongs.")
    return value


def readable(size: int) -> str:
    """Bytes for people: 3.9 GB."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"
