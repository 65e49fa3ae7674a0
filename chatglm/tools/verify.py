"""Whether a checkpoint folder is sound: its files, tensors, numbers and tokenizer, each held against the others.

Nothing of the folder is run, and one tensor at a time is in memory. A check that fails does not keep the
others from being made.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm

from chatglm.checkpoint import (
    CODE_KEYS,
    LARGEST_JSON,
    check_optional_files,
    existing,
    find_weights,
    leaves,
    read_config,
    read_index,
    read_json,
    read_weight_file,
    shown,
    sizes_of,
)
from chatglm.find import local_folder
from chatglm.hub.configuration_chatglm import AUTO_MAP, CHATGLM, ChatGLMConfig
from chatglm.hub.quantization import give_back
from chatglm.hub.tokenization_chatglm import VOCAB_FILES, ChatGLMTokenizer
from chatglm.weights.expected import HEAD, expected_shapes, is_passed_over, may_be_missing
from chatglm.weights.read import read_state
from chatglm.weights.tensors import State, Tensor
from chatglm.weights.transform import EMBEDDINGS, HEADS, PREFIX, dtype_name

OK, PROBLEM, NOT_CHECKED = "ok", "problem", "not checked"
FEW = 3  # of the names that a problem has, how many are told
TOKENIZER_CLASS = "tokenization_chatglm.ChatGLMTokenizer"
CLASSES = {*AUTO_MAP.values(), TOKENIZER_CLASS, "modeling_chatglm.ChatGLMModel"}
HARMLESS_KEYS = ("_name_or_path", "_commit_hash")  # private, and written by transformers itself
# ChatGLM-6B's output layer, and its embedding, which is the same.
TIED = {f"{HEADS[0]}.{kind}": f"{EMBEDDINGS[0]}.{kind}" for kind in ("weight", "weight_scale")}
CHUNK = 1 << 22  # numbers that are looked at in one piece
HASH_LINE = re.compile(r"\\?([0-9a-fA-F]{64})[ \t][ *]?(.+)")  # sha256sum: hash, blank, blank or *, name


@dataclass(frozen=True)
class Check:
    """One line of the report: what was checked, "ok", "problem" or "not checked", and a sentence."""

    name: str
    result: str
    text: str


@dataclass(frozen=True)
class Report:
    folder: Path
    checks: tuple[Check, ...]

    @property
    def sound(self) -> bool:
        """Whether no check found a problem."""
        return all(check.result != PROBLEM for check in self.checks)


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
        return Check(name, PROBLEM, _sentence(error))


def _sentence(error: Exception) -> str:
    if isinstance(error, (OSError, ValueError)):
        return str(error)
    first = (str(error).splitlines() or [""])[0]
    return f"It cannot be checked ({type(error).__name__}: {first[:200]}); take another copy."


def _result(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, PROBLEM, " ".join(problems)) if problems else Check(name, OK, fine)


def _some(names: Iterable[str]) -> str:
    """A few of the names, and how many more there are."""
    names = [name if name.isprintable() and len(name) < 100 else shown(name) for name in names]
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return ", ".join(names[:FEW]) + more


def _bar(name: str, total: int, progress: bool) -> tqdm:
    """Counts bytes; None: on a terminal only."""
    return tqdm(desc=name, total=total, unit="B", unit_scale=True, disable=None if progress else True)


# ---- what is in the folder


@dataclass
class Contents:
    """What can be read of a folder; the faults of its weight files are kept beside."""

    folder: Path
    faults: list[str] = field(default_factory=list)

    @cached_property
    def config(self) -> ChatGLMConfig | None:
        """None if config.json is not one of ours."""
        try:
            keys = read_config(self.folder)
            sizes_of(keys)
            return ChatGLMConfig.from_dict(keys)
        except Exception:  # check_config says what is wrong
            return None

    @cached_property
    def index(self) -> Path | None:
        try:
            first = find_weights(self.folder)
        except OSError:
            return None
        return first if first.suffix == ".json" else None

    @cached_property
    def weight_map(self) -> dict[str, str]:
        return read_index(self.index) if self.index else {}

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights that loading reads, whether they are there or not."""
        try:
            first = find_weights(self.folder)
            names = sorted(set(self.weight_map.values())) if self.index else [first.name]
        except (OSError, ValueError) as error:
            self.faults.append(str(error))
            return []
        return [self.folder / name for name in names]

    @cached_property
    def states(self) -> dict[str, State]:
        """The tensors of each file of weights that can be read, by the name of the file."""
        states = {}
        for path in self.files:
            try:
                read_weight_file(path)
                states[path.name] = read_state([path])
            except Exception as error:  # one damaged file does not hide the others
                self.faults.append(_sentence(error))
        return states

    @cached_property
    def state(self) -> State:
        """All tensors; of those that two files hold, one."""
        return {name: tensor for state in self.states.values() for name, tensor in state.items()}

    @cached_property
    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the model that chats."""
        assert self.config is not None
        return expected_shapes(self.config)

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that the folder should hold."""
        assert self.config is not None
        shapes = self.model_shapes
        if self.is_classifier:
            labels = self.config.num_labels
            shapes = {name: shape for name, shape in shapes.items() if _module(name) not in HEADS}
            shapes[f"{HEAD}weight"], shapes[f"{HEAD}bias"] = (labels, self.config.hidden_size), (labels,)
        if self.is_prefix_alone:
            shapes = {name: shape for name, shape in shapes.items() if name.startswith(PREFIX)}
        return shapes

    @property
    def is_classifier(self) -> bool:
        """ChatGLMForSequenceClassification: a head for labels in place of the output layer."""
        return any(name.startswith(HEAD) for name in self.state)

    @property
    def is_prefix_alone(self) -> bool:
        """What P-Tuning v2 saves: the prefix encoder, to be loaded beside the weights it was trained on."""
        return bool(self.state) and all(name.startswith(PREFIX) for name in self.state)


def _module(name: str) -> str:
    return name.rpartition(".")[0]


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
        targets = _some(f"{auto}: {target}" for auto, target in strange.items())
        problems.append(
            f"auto_map names code that is not ChatGLM's ({targets}); chatglm never runs it, but trust_remote_code "
            "would: remove it."
        )
    if private:
        problems.append(
            f"config.json has {_some(private)}, with which transformers can be made to load code; chatglm ignores "
            "it: remove it."
        )
    python = sorted(path.name for path in contents.folder.glob("*.py"))
    files = f" Of the Python files in the folder ({_some(python)}) chatglm runs none." if python else ""
    return _result("code", problems, f"The settings name no code but ChatGLM's own.{files}")


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
    others = f" Loading does not read {_some(names)}." if names else ""
    files = f"{len(states)} file{'s' * (len(states) != 1)}"
    return _result("files", contents.faults, f"{files}, whole, with {size:,} bytes of weights.{others}")


def check_index(contents: Contents) -> Check:
    twice = [name for name, count in _count(contents.states).items() if count > 1]
    problems = [f"Several files hold {_some(twice)}; download the checkpoint again."] if twice else []
    if contents.index is None:
        return _result("index", problems, "There is none, and none is needed.")
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
            problems.append(f"{contents.index.name} {fault}: {_some(names)}; download the checkpoint again.")
    shards = _shards_beside(contents.index, weight_map)
    if shards:
        problems.append(f"{contents.index.name} does not name {_some(shards)}; remove what is not its own.")
    return _result("index", problems, f"Every tensor is in the file that is said.{_total(contents)}")


def _count(states: dict[str, State]) -> Counter[str]:
    return Counter(name for state in states.values() for name in state)


def _shards_beside(index: Path, weight_map: dict[str, str]) -> list[str]:
    stem, _, kind = index.name.removesuffix(".index.json").rpartition(".")
    found = (path.name for path in index.parent.glob(f"{stem}-*-of-*.{kind}"))
    return sorted(name for name in found if name not in weight_map.values())


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
            f"{_some(missing)}; download the checkpoint again, with all of its files."
        )
    if unknown:
        problems.append(
            f"{len(unknown)} tensors are of no model with this config.json: {_some(unknown)}; take the one that was "
            "published with the weights."
        )
    extras = [name for name in state if name not in contents.expected]
    kind = " They are a P-Tuning v2 prefix alone, without its model." if contents.is_prefix_alone else ""
    kind = " The model has a head for classes." if contents.is_classifier else kind
    unused = f" Held but not used, as in published files: {_some(extras)}." if extras else ""
    here = len(state) - len(extras)
    return _result("names", problems, f"All {here} tensors of the model are there.{kind}{unused}")


def _is_extra(name: str, contents: Contents) -> bool:
    return is_passed_over(name) or (contents.is_classifier and _module(name) in HEADS)


def check_shapes(contents: Contents) -> Check:
    if contents.config is None or not contents.state:
        return _nothing_to_compare("shapes", contents)
    shapes = {name: contents.state[name].shape for name in contents.expected if name in contents.state}
    wrong = [name for name, shape in shapes.items() if shape != contents.expected[name]]
    problems = []
    if wrong:
        told = _some(f"{name} is {shapes[name]}, not {contents.expected[name]}" for name in wrong)
        problems.append(
            f"{len(wrong)} tensors have another shape than config.json says: {told}; take weights and config.json from "
            "one checkpoint."
        )
    return _result("shapes", problems, f"{len(shapes)} tensors have the shapes of the config.")


def _nothing_to_compare(name: str, contents: Contents) -> Check:
    reason = "no weights could be read" if contents.config else "config.json is not valid"
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
            f"Weights are floating-point numbers, or int8 with scales where they are packed, but {_some(wrong)}; "
            "take another copy."
        )
    told = ", ".join(
        f"{dtype} ({100 * count / sum(size.values()):.3g}%)" for dtype, count in size.most_common()
    )
    mixed = " (a mixture is usual: norms in float32, packed weights in int8)" if len(size) > 1 else ""
    return _result("dtypes", problems, f"Of the bytes: {told}{mixed}.")


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
            self.unread.append(f"{name} ({_sentence(error)})")
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
    with _bar("numbers", sum(tensor.nbytes for tensor in state.values()), progress) as bar:
        for name, tensor in state.items():
            numbers.look_at(name, state)
            bar.update(tensor.nbytes)
    problems = []
    for names, fault in (
        (numbers.unread, "cannot be read"),
        (numbers.broken, "hold NaN or infinity"),
        (numbers.scales, "hold scales that are negative, or zero where the packed weights are not"),
    ):
        if names:
            problems.append(f"{len(names)} tensors {fault}: {_some(names)}; download their files again.")
    return _result("numbers", problems, f"All numbers of {len(state)} tensors are finite.")


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
            f"{_some(different)} differ, but the model has one tensor for both; take all files from one checkpoint."
        )
    both = (
        f"{HEADS[0]} and {EMBEDDINGS[0]} are equal"
        if pairs
        else f"There is no {HEADS[0]} beside the embedding"
    )
    return _result("tied", problems, f"{both}, as the model has one tensor for both.")


# ---- tokenizer


def check_tokenizer(contents: Contents) -> Check:
    config = contents.config
    if config is None:
        return Check("tokenizer", NOT_CHECKED, "Not possible, as config.json is not valid.")
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
                f"config.json and the tokenizer have different special tokens: {_some(wrong)}; take both from one "
                "checkpoint."
            )
    fine = f"{len(tokenizer):,} ids fit the model's {config.vocab_size:,} rows, and the special ones are the same."
    return _result("tokenizer", problems, fine)


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


# ---- hashes


def check_hashes(folder: Path, sha256: str | Path | None, progress: bool) -> Check:
    if sha256 is None:
        return Check("sha256", NOT_CHECKED, "No list of hashes was given (--sha256).")
    listed = read_hashes(Path(sha256).expanduser())
    outside = [name for name in listed if _is_outside(name, folder)]
    inside = {name: digest for name, digest in listed.items() if name not in outside}
    missing = [name for name in inside if not (folder / name).is_file()]
    paths = {name: folder / name for name in inside if name not in missing}
    different = []
    total = sum(path.stat().st_size for path in paths.values())
    with _bar("sha256", total, progress) as bar:
        for name, path in paths.items():
            if _sha256(path, bar) != inside[name]:
                different.append(name)
    problems = []
    for names, fault in (
        (outside, "are no files of the folder and were not looked at"),
        (missing, "are missing"),
        (different, "have other contents than listed; download them again"),
    ):
        if names:
            problems.append(f"{len(names)} of the {len(listed)} files on the list {fault}: {_some(names)}.")
    return _result(
        "sha256", problems, f"The {len(listed)} files on the list have the contents they should have."
    )


def read_hashes(path: Path) -> dict[str, str]:
    """The sha256 of each file on a list in the format of sha256sum; ValueError for another format."""
    size = path.stat().st_size
    if size > LARGEST_JSON:
        raise ValueError(
            f"{path} has {size:,} bytes, too many for a list of hashes; give what sha256sum wrote."
        )
    listed = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = HASH_LINE.fullmatch(line)
        if match:
            listed[match[2].removeprefix("./")] = match[1].lower()
        elif line.strip():
            raise ValueError(
                f"Line {number} of {path} is not `hash  name`; give a list that sha256sum wrote."
            )
    if not listed:
        raise ValueError(f"{path} is empty; give a list that sha256sum wrote.")
    return listed


def _is_outside(name: str, folder: Path) -> bool:
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        return True
    return leaves(folder / name, folder)


def _sha256(path: Path, bar: tqdm) -> str:
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        bar.update(len(block))
    return digest.hexdigest()


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            yield block
