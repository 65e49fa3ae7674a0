"""Whether a checkpoint folder is sound: its files, tensors, numbers and tokenizer, each held against the others.

Nothing of the folder is run, and one tensor at a time is in memory. A check that fails does not keep the
others from being made.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoint import (
    CODE_KEYS,
    check_optional_files,
    existing,
    read_config,
    read_json,
    shown,
    sizes_of,
)
from chatglm.find import local_folder
from chatglm.hub.configuration_chatglm import AUTO_MAP, CHATGLM, ChatGLMConfig
from chatglm.hub.quantization import give_back
from chatglm.hub.tokenization_chatglm import VOCAB_FILES, ChatGLMTokenizer
from chatglm.tools.contents import Contents, module_of
from chatglm.tools.hashes import check_hashes
from chatglm.tools.report import NOT_CHECKED, OK, PROBLEM, Check, Report, byte_bar, result, sentence, some
from chatglm.weights.expected import is_passed_over, may_be_missing
from chatglm.weights.tensors import State, Tensor
from chatglm.weights.transform import EMBEDDINGS, HEADS, dtype_name

TOKENIZER_CLASS = "tokenization_chatglm.ChatGLMTokenizer"
CLASSES = {*AUTO_MAP.values(), TOKENIZER_CLASS, "modeling_chatglm.ChatGLMModel"}
HARMLESS_KEYS = ("_name_or_path", "_commit_hash")  # private, and written by transformers itself
# ChatGLM-6B's output layer, and its embedding, which is the same.
TIED = {f"{HEADS[0]}.{kind}": f"{EMBEDDINGS[0]}.{kind}" for kind in ("weight", "weight_scale")}
CHUNK = 1 << 22  # numbers that are looked at in one piece


def verify(folder: str | Path, sha256: str | Path | None = None, progress: bool = True) -> Report:
    """Checks all there is to check in `folder`, of which every number is read once.

    Args:
        folder: a checkpoint folder, "demo" or "demo-v1".
        sha256: a file in the format of sha256sum whose names are files of the folder.
        progress: shows a bar that counts the bytes, where somebody sees it.

    Raises OSError if there is no such folder or no such list; all else is in the report.
    """
    path = local_folder(folder)
    if path is None:
        raise OSError(f"There is no folder {folder}; fetch it with `chatglm download {folder}`.")
    if sha256 is not None and not Path(sha256).expanduser().is_file():
        raise OSError(f"There is no file {sha256}; give a list that sha256sum wrote.")
    contents = Contents(path)
    numbers = Numbers()
    checks: dict[str, Callable[[], Check]] = {
        "config": lambda: check_config(contents),
        "code": lambda: check_code(contents),
        "files": lambda: check_files(contents),
        "index": lambda: check_index(contents),
        "names": lambda: check_names(contents),
        "shapes": lambda: check_shapes(contents),
        "dtypes": lambda: check_dtypes(contents),
        "numbers": lambda: check_numbers(contents, numbers, progress),
        "tied": lambda: check_tied(contents, numbers),
        "tokenizer": lambda: check_tokenizer(contents),
        "sha256": lambda: check_hashes(path, sha256, progress),
    }
    return Report(path, tuple(_made(name, check) for name, check in checks.items()))


def _made(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as error:  # whatever a folder can bring up is a finding; the other checks go on
        return Check(name, PROBLEM, sentence(error))


# ---- config.json


def check_config(contents: Contents) -> Check:
    keys = read_config(contents.folder)
    sizes = sizes_of(keys)
    config = ChatGLMConfig.from_dict(keys)
    assert contents.model_shapes  # whether a model can be built of it
    check_optional_files(contents.folder)
    kind = "ChatGLM-6B" if config.family == CHATGLM else "ChatGLM2-6B"
    packed = f", packed to {config.quantization_bit} bits" if config.quantization_bit else ""
    prefix = f", a prefix of {config.pre_seq_len} tokens" if config.pre_seq_len else ""
    return Check(
        "config",
        OK,
        f"{kind} architecture with {sizes.num_layers} layers and {sizes.parameters:,} parameters{packed}{prefix}.",
    )


def check_code(contents: Contents) -> Check:
    """Whether the settings name code that is not ChatGLM's. None of it is ever run by this package."""
    if contents.lacks_config:
        return _nothing_to_compare("code", contents)
    config = read_json(contents.folder / "config.json")
    named = dict(_auto_map(config))
    tokenizer = contents.folder / "tokenizer_config.json"
    if tokenizer.exists():
        named |= _auto_map(read_json(tokenizer))
    strange = {auto: target for auto, target in named.items() if _class_name(target) not in CLASSES}
    private = [
        key
        for key, value in config.items()
        if key[:1] == "_" and key not in HARMLESS_KEYS and isinstance(value, (str, list, dict))
    ]
    private += [key for key in CODE_KEYS if key != "auto_map" and config.get(key)]
    problems = []
    if strange:
        targets = some(f"{auto}: {target}" for auto, target in strange.items())
        problems.append(
            f"auto_map names code that is not ChatGLM's ({targets}); chatglm never runs it, but trust_remote_code "
            "would: remove it."
        )
    if private:
        problems.append(
            f"config.json has {some(private)}, with which transformers can be made to load code; chatglm ignores "
            "it: remove it."
        )
    python = sorted(path.name for path in contents.folder.glob("*.py"))
    files = f" Of the Python files in the folder ({some(python)}) chatglm runs none." if python else ""
    return result("code", problems, f"The settings name no code but ChatGLM's own.{files}")


def _auto_map(settings: dict[str, Any]) -> dict[str, Any]:
    """The class for each Auto class; AutoTokenizer has two, of which the second may be None."""
    named = settings.get("auto_map") or {}
    if not isinstance(named, dict):
        return {"auto_map": named}
    return {
        f"{auto}{i or ''}": target
        for auto, targets in named.items()
        for i, target in enumerate(targets if isinstance(targets, list) else [targets])
        if target is not None
    }


def _class_name(target: Any) -> str:
    return str(target).rpartition("--")[2]  # in front of it, another repository of the Hub


# ---- files


def check_files(contents: Contents) -> Check:
    states = contents.states
    size = sum(tensor.nbytes for tensor in contents.state.values())
    unused = [path for kind in ("safetensors", "bin") for path in contents.folder.glob(f"*.{kind}")]
    names = sorted(path.name for path in unused if path not in contents.files)
    others = f" Loading does not read {some(names)}." if names else ""
    files = f"{len(states)} file{'s' * (len(states) != 1)}"
    return result("files", contents.faults, f"{files}, whole, with {size:,} bytes of weights.{others}")


def check_index(contents: Contents) -> Check:
    twice = [name for name, count in _count(contents.states).items() if count > 1]
    problems = [f"Several files hold {some(twice)}; download the checkpoint again."] if twice else []
    if contents.index is None:
        return result("index", problems, "There is none, and none is needed.")
    weight_map = contents.weight_map
    held = {name: file for file, state in contents.states.items() for name in state}
    lacking = [name for name, file in weight_map.items() if file in contents.states and name not in held]
    elsewhere = [name for name, file in held.items() if weight_map.get(name, file) != file]
    unknown = [name for name in held if name not in weight_map]
    for names, fault in (
        (lacking, "names tensors that their files do not hold"),
        (elsewhere, "names another file for tensors than the one that holds them"),
        (unknown, "does not name all tensors that the files hold"),
    ):
        if names:
            problems.append(f"{contents.index.name} {fault}: {some(names)}; download the checkpoint again.")
    shards = _shards_beside(contents.index, weight_map)
    if shards:
        problems.append(f"{contents.index.name} does not name {some(shards)}; remove what is not its own.")
    return result("index", problems, f"Every tensor is in the file that is said.{_total(contents)}")


def _count(states: dict[str, State]) -> Counter[str]:
    return Counter(name for state in states.values() for name in state)


def _shards_beside(index: Path, weight_map: dict[str, str]) -> list[str]:
    stem, _, kind = index.name.removesuffix(".index.json").rpartition(".")
    found = (path.name for path in index.parent.glob(f"{stem}-*-of-*.{kind}"))
    return sorted(set(found).difference(weight_map.values()))


def _total(contents: Contents) -> str:
    """What the index says of the size, if it is wrong; no harm, and ChatGLM-6B was published so."""
    assert contents.index is not None
    metadata = read_json(contents.index).get("metadata")
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    size = sum(tensor.nbytes for tensor in contents.state.values())
    if said in (None, size):
        return ""
    return f" Its total_size is {shown(said)} where the tensors take {size}; nothing reads it."


# ---- names, shapes and dtypes


def check_names(contents: Contents) -> Check:
    state, config = contents.state, contents.config
    if config is None or not state:
        return _nothing_to_compare("names", contents)
    missing = [name for name in contents.expected if name not in state and not may_be_missing(name, config)]
    unknown = [name for name in state if name not in contents.expected and not _is_extra(name, contents)]
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of the {len(contents.expected)} tensors that config.json asks for are missing: "
            f"{some(missing)}; download the checkpoint again, with all of its files."
        )
    if unknown:
        problems.append(
            f"No model with this config.json has {some(unknown)}; take the one that was published with the weights."
        )
    extras = [name for name in state if name not in contents.expected]
    kind = " They are a P-Tuning v2 prefix alone, without its model." if contents.is_prefix_alone else ""
    kind = " The model has a head for classes." if contents.is_classifier else kind
    unused = f" Held but not used, as in published files: {some(extras)}." if extras else ""
    here = len(state) - len(extras)
    return result("names", problems, f"All {here} tensors of the model are there.{kind}{unused}")


def _is_extra(name: str, contents: Contents) -> bool:
    return is_passed_over(name) or (contents.is_classifier and module_of(name) in HEADS)


def check_shapes(contents: Contents) -> Check:
    if contents.config is None or not contents.state:
        return _nothing_to_compare("shapes", contents)
    shapes = {name: contents.state[name].shape for name in contents.expected if name in contents.state}
    wrong = [name for name, shape in shapes.items() if shape != contents.expected[name]]
    problems = []
    if wrong:
        told = some(f"{name} is {shapes[name]}, not {contents.expected[name]}" for name in wrong)
        problems.append(
            f"config.json asks for other shapes: {told}; take weights and config.json from one checkpoint."
        )
    return result("shapes", problems, f"{len(shapes)} tensors have the shapes of the config.")


def _nothing_to_compare(name: str, contents: Contents) -> Check:
    reason = "no weights could be read" if contents.config else "config.json is not valid"
    if contents.lacks_config:
        reason = "config.json is missing"
    return Check(name, NOT_CHECKED, f"Not possible, as {reason}.")


def check_dtypes(contents: Contents) -> Check:
    """Which there are; integers must be packed weights, and packed weights integers."""
    if not contents.state:
        return Check("dtypes", NOT_CHECKED, "Not possible, as no weights could be read.")
    size: Counter[str] = Counter()
    for tensor in contents.state.values():
        size[dtype_name(tensor.dtype)] += tensor.nbytes
    wrong = [
        f"{name} is {dtype_name(tensor.dtype)}"
        for name, tensor in contents.state.items()
        if not _has_fitting_dtype(name, tensor, contents.state)
    ]
    problems = []
    if wrong:
        problems.append(
            f"Weights are floating-point numbers, or int8 with scales where they are packed, but {some(wrong)}; "
            "take another copy."
        )
    told = ", ".join(
        f"{dtype} ({100 * count / sum(size.values()):.3g}%)" for dtype, count in size.most_common()
    )
    mixed = " (a mixture is usual: norms in float32, packed weights in int8)" if len(size) > 1 else ""
    return result("dtypes", problems, f"Of the bytes: {told}{mixed}.")


def _has_fitting_dtype(name: str, tensor: Tensor, state: State) -> bool:
    packed = f"{name}_scale" in state
    return tensor.dtype == torch.int8 if packed else tensor.dtype.is_floating_point


# ---- numbers


@dataclass
class Numbers:
    """What was found in the numbers of the tensors, and hashes of those that must be equal."""

    broken: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    def look_at(self, name: str, state: State) -> None:
        """Reads one tensor, which is gone when this returns."""
        try:
            tensor = state[name].load()
        except Exception as error:  # one that cannot be read does not hide the others
            self.unread.append(f"{name} ({sentence(error)})")
            return
        count = count_not_finite(tensor)
        if count:
            self.broken.append(f"{name} ({count:,} of {tensor.numel():,})")
        elif name.endswith(".weight_scale") and has_wrong_scale(
            tensor, state.get(name.removesuffix("_scale"))
        ):
            self.scales.append(name)
        if name in {*TIED, *TIED.values()}:
            self.hashes[name] = _hash(tensor)
        give_back(tensor)


def check_numbers(contents: Contents, numbers: Numbers, progress: bool) -> Check:
    """Reads every tensor once: all numbers finite, and the scales of packed weights positive."""
    state = contents.state
    if not state:
        return Check("numbers", NOT_CHECKED, "Not possible, as no weights could be read.")
    with byte_bar("numbers", sum(tensor.nbytes for tensor in state.values()), progress) as bar:
        for name, tensor in state.items():
            numbers.look_at(name, state)
            bar.update(tensor.nbytes)
    problems = [
        f"{fault} {some(names)}; download the file again."
        for names, fault in (
            (numbers.unread, "There is no reading"),
            (numbers.broken, "There is NaN or infinity in"),
            (
                numbers.scales,
                "There are scales that are negative, or zero where the packed weights are not, in",
            ),
        )
        if names
    ]
    return result("numbers", problems, f"All numbers of {len(state)} tensors are finite.")


def count_not_finite(tensor: torch.Tensor) -> int:
    """How many numbers of `tensor` are NaN or infinite."""
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    if torch.isfinite(torch.stack(torch.aminmax(tensor))).all():  # fast, and the usual case
        return 0
    return sum(int((~torch.isfinite(part)).sum()) for part in tensor.flatten().split(CHUNK))


def has_wrong_scale(scale: torch.Tensor, weight: Tensor | None) -> bool:
    """Whether the scale of a row is negative, or any is zero although its packed numbers are not.

    Those of groups (two dimensions) may be negative: see quantization.py.
    """
    if scale.dim() == 1 and (scale < 0).any():
        return True
    empty = scale == 0
    if not empty.any() or weight is None or weight.shape[:1] != scale.shape[:1]:
        return False
    numbers = weight.load()
    if numbers.numel() % scale.numel():
        return False  # check_shapes says so
    return bool(numbers.view(*scale.shape, -1)[empty].any())


def _hash(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy()).hexdigest()


def check_tied(contents: Contents, numbers: Numbers) -> Check:
    """ChatGLM-6B has one tensor as embedding and output layer; files that hold both must hold it twice."""
    config, state = contents.config, contents.state
    if config is None or not state:
        return _nothing_to_compare("tied", contents)
    if config.family != CHATGLM or not config.tie_word_embeddings:
        return Check("tied", NOT_CHECKED, "Embedding and output layer of this model are two tensors.")
    pairs = {head: embedding for head, embedding in TIED.items() if head in state}
    different = [
        f"{head} and {embedding}"
        for head, embedding in pairs.items()
        if numbers.hashes.get(head) != numbers.hashes.get(embedding)
    ]
    problems = []
    if different:
        problems.append(
            f"{some(different)} differ, but the model has one tensor for both; take all files from one checkpoint."
        )
    both = (
        f"{HEADS[0]} and {EMBEDDINGS[0]} are equal"
        if pairs
        else f"There is no {HEADS[0]} beside the embedding"
    )
    return result("tied", problems, f"{both}, as the model has one tensor for both.")


# ---- tokenizer


def check_tokenizer(contents: Contents) -> Check:
    config = contents.config
    if config is None:
        return _nothing_to_compare("tokenizer", contents)
    check_optional_files(contents.folder)
    existing(contents.folder / VOCAB_FILES[config.family])
    tokenizer = ChatGLMTokenizer.from_pretrained(contents.folder)
    problems = []
    if tokenizer.family != config.family:
        problems.append(f"{VOCAB_FILES[config.family]} holds the vocabulary of another family of models.")
    elif len(tokenizer) > config.vocab_size:
        problems.append(
            f"The tokenizer has {len(tokenizer):,} ids, but the model {config.vocab_size:,} rows; take both from one "
            "checkpoint."
        )
    else:
        wrong = [
            f"{name} {shown(getattr(config, name))} is not {token}"
            for name, token in _special_ids(tokenizer).items()
            if token not in _ids(getattr(config, name))
        ]
        if wrong:
            problems.append(
                f"config.json and the tokenizer have different special tokens: {some(wrong)}; take both from one "
                "checkpoint."
            )
    fine = f"{len(tokenizer):,} ids fit the model's {config.vocab_size:,} rows, and the special ones are the same."
    return result("tokenizer", problems, fine)


def _special_ids(tokenizer: ChatGLMTokenizer) -> dict[str, int]:
    """The ids by the tokenizer, under the names that they have in config.json."""
    if tokenizer.family != CHATGLM:
        return {"eos_token_id": tokenizer.end_token_id, "pad_token_id": tokenizer.pad_token_id}
    return {
        "bos_token_id": tokenizer.sop_token_id,
        "eos_token_id": tokenizer.eop_token_id,
        "mask_token_id": tokenizer.mask_token_id,
        "gmask_token_id": tokenizer.gmask_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }


def _ids(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]
