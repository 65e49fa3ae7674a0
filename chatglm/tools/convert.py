"""From one checkpoint to another: safetensors, another dtype, adapters merged, fewer rows, packed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from chatglm.checkpoint import read_json, read_weight_file, readable
from chatglm.hub.configuration_chatglm import CHATGLM, CHATGLM2, ChatGLMConfig
from chatglm.hub.quantization import check_packing
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools.proof import same_answers
from chatglm.tools.slim import (
    Corpus,
    SlimVocabulary,
    check_same_ids,
    find_corpus,
    slim_tokenizer,
    slim_vocabulary,
    used_ids,
)
from chatglm.weights.adapter import merge_lora, read_lora
from chatglm.weights.expected import check_state
from chatglm.weights.parts import WEIGHT_SUFFIXES, Parts, check_apart, read_parts, write_parts
from chatglm.weights.read import read_state
from chatglm.weights.transform import (
    EMBEDDINGS,
    PREFIX,
    add_prefix,
    cast,
    drop_tied_head,
    is_packed,
    keep_rows,
    quantize,
    share_packed_head,
)
from chatglm.weights.write import check_destination, complete_folder, total_bytes

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MAP_FILE = "vocabulary_map.json"  # entry i of "old_ids" is the old id of the new id i
QUESTIONS, LONGEST_QUESTION = 8, 200  # lines of the corpus that are put to both models, and their characters
ROWS = 32  # the embedding has a multiple of so many rows
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PREFIX_FILES = ("model.safetensors", "pytorch_model.bin")


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    dtype: str | None = None,
    merge_adapter: str | Path | None = None,
    prefix: str | Path | None = None,
    slim: bool = False,
    slim_to: Sequence[str | Path] = (),
    quantize: int | None = None,
    group_size: int | None = None,
    quantize_embeddings: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
    progress: bool = True,
) -> Parts:
    """Writes the checkpoint `source` into the folder `dest`, changed as asked, in this order.

    Args:
        source: a folder, one file of weights in a folder, a Hub name, "demo" or "demo-v1".
        dest: the folder to write; it appears complete or not at all.
        merge_adapter: the folder of a LoRA adapter, added to the weights it was trained on.
        prefix: the folder of a P-Tuning v2 prefix, which goes along with the weights.
        slim: drops the 20000 image rows of a ChatGLM-6B v0.1 vocabulary.
        slim_to: text files or folders; only the pieces of the vocabulary that they need are kept.
        quantize: 8 or 4 packs the linear layers into so many bits, in the published format.
        group_size: with 4 bits, 32, 64 or 128 columns that share a scale; the published code stops there.
        quantize_embeddings: packs embedding and output layer too.
        dtype: "float16", "bfloat16" or "float32" for all that is not packed; None: as it was.
        overwrite: replaces a checkpoint that is in `dest`.
        revision: of a Hub name.

    Returns the parts of what was written. Raises OSError for files and disks, ValueError for contents and
    arguments; nothing is left in `dest` then. The memory needed is about one shard, 1 GB.
    """
    dest = Path(dest).expanduser()
    _check_arguments(dtype, quantize, group_size, quantize_embeddings)
    check_destination(dest, overwrite)
    check_apart(source, dest)
    parts = plain(read_parts(source, revision))
    if merge_adapter is not None:
        parts = with_adapter(parts, Path(merge_adapter).expanduser(), dtype)
    if prefix is not None:
        parts = with_prefix(parts, Path(prefix).expanduser())
    if slim_to:
        parts = slimmed_to(parts, find_corpus(slim_to), progress)
    elif slim:
        parts = slimmed(parts)
    if quantize is not None:
        parts = packed(parts, quantize, group_size, quantize_embeddings)
    parts = in_dtype(parts, dtype)
    with complete_folder(dest, overwrite, total_bytes(parts.state)) as folder:
        write_parts(parts, folder, progress)
    return parts


def plain(parts: Parts) -> Parts:
    """The same checkpoint with each tensor once."""
    if tied(parts.config) and not is_packed(parts.state):
        return replace(parts, state=drop_tied_head(parts.state))
    return parts


def with_adapter(parts: Parts, folder: Path, dtype: str | None = None) -> Parts:
    """The LoRA adapter that PEFT saved in `folder`, merged; what it changes is in `dtype` then."""
    lora = read_lora(
        read_json(_one_of(folder, ["adapter_config.json"])), read_state([_one_of(folder, ADAPTER_FILES)])
    )
    sentence = f"A LoRA adapter of rank {lora.settings['r']} was merged into them."
    return parts.with_step(sentence, state=merge_lora(parts.state, lora, DTYPES[dtype] if dtype else None))


def with_prefix(parts: Parts, folder: Path) -> Parts:
    """The prefix encoder of P-Tuning v2 that was saved in `folder`, put beside the weights."""
    state = add_prefix(parts.state, read_state([_one_of(folder, PREFIX_FILES)]))
    embedding = state.get(f"{PREFIX}embedding.weight")
    if embedding is None:
        raise ValueError(
            f"{folder} holds no {PREFIX}embedding.weight; give the folder that P-Tuning v2 saved."
        )
    config = changed(
        parts.config,
        pre_seq_len=embedding.shape[0],
        prefix_projection=f"{PREFIX}trans.0.weight" in state,
    )
    check_state(state, config, folder)
    sentence = f"A P-Tuning v2 prefix of {config.pre_seq_len} tokens was put beside them."
    return parts.with_step(sentence, config=config, state=state)


def slimmed(parts: Parts) -> Parts:
    """Without the 20000 image rows of ChatGLM-6B v0.1, as ChatGLM-6B-Slim was made."""
    images = parts.tokenizer.num_image_tokens
    if not images:
        raise ValueError(
            "The checkpoint has no image rows to drop: only ChatGLM-6B v0.1 has. --slim-to drops all that a "
            "corpus does not need."
        )
    model = parts.tokenizer.sp_model.serialized_model_proto()
    vocabulary = SlimVocabulary(model, list(range(images, len(parts.tokenizer))))
    rows = [*vocabulary.kept, *range(len(parts.tokenizer), parts.config.vocab_size)]
    sentence = f"The {images} rows of image tokens were dropped"
    return _with_vocabulary(parts, vocabulary, rows, slim_tokenizer(parts.tokenizer, vocabulary), sentence)


def slimmed_to(parts: Parts, corpus: Corpus, progress: bool = True) -> Parts:
    """With the pieces of the vocabulary that `corpus` needs, and proof that it reads and answers the same.

    Raises ValueError if the proof fails.
    """
    old = parts.tokenizer
    vocabulary = slim_vocabulary(old, used_ids(old, corpus, progress))
    new = slim_tokenizer(old, vocabulary)
    check_same_ids(old, new, vocabulary.kept, corpus, progress)
    spare = range(len(old), parts.config.vocab_size)  # rows without a token, to fill up
    rows = [*vocabulary.kept, *spare[: -len(vocabulary.kept) % ROWS]]
    sentence = (
        f"{len(rows):,} of {parts.config.vocab_size:,} rows of the vocabulary were kept: what a corpus of "
        f"{corpus.nbytes:,} bytes needs"
    )
    smaller = _with_vocabulary(parts, vocabulary, rows, new, sentence)
    proof = same_answers(parts, smaller, vocabulary.kept, _questions(corpus))
    smaller = replace(smaller, history=(*smaller.history, str(proof)))
    return replace(smaller, notes=smaller.notes | {MAP_FILE: json.dumps({"old_ids": vocabulary.kept})})


def _questions(corpus: Corpus) -> list[str]:
    """A few lines from the beginning of the corpus."""
    passage = next(corpus.passages("", progress=False))
    lines = dict.fromkeys(line.strip()[:LONGEST_QUESTION] for line in passage.lines)
    return [line for line in lines if line][:QUESTIONS]


def _with_vocabulary(
    parts: Parts,
    vocabulary: SlimVocabulary,
    rows: list[int],
    tokenizer: ChatGLMTokenizer,
    sentence: str,
) -> Parts:
    new_ids = vocabulary.new_ids | {None: None}
    new_ids.setdefault(parts.config.pad_token_id, tokenizer.pad_token_id)  # v0.1 may pad with an image
    ids = {
        name: _mapped(value, new_ids)
        for name, value in parts.config.to_dict().items()
        if name.endswith("_token_id")
    }
    sizes = {"vocab_size": len(rows)}
    if parts.config.family == CHATGLM2:
        sizes["padded_vocab_size"] = len(rows)
    generation = copy.deepcopy(parts.generation)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(generation, name, _mapped(getattr(generation, name), new_ids))
    state = keep_rows(parts.state, rows)
    saved = readable(total_bytes(parts.state) - total_bytes(state))
    return parts.with_step(
        f"{sentence}, which saves {saved} of disk and memory.",
        config=changed(parts.config, **sizes, **ids),
        state=state,
        tokenizer=tokenizer,
        generation=generation,
    )


def _mapped(ids: Any, new_ids: dict[Any, Any]) -> Any:
    return [new_ids[one] for one in ids] if isinstance(ids, (list, tuple)) else new_ids[ids]


def packed(parts: Parts, bits: int, group_size: int | None, embeddings: bool) -> Parts:
    """Linear layers as packed integers, as `model.quantize` makes them."""
    if embeddings and parts.config.family == CHATGLM and not tied(parts.config):
        raise ValueError(
            "quantize_embeddings packs embedding and head of ChatGLM-6B as one tensor, but tie_word_embeddings "
            "is false in config.json; leave quantize_embeddings out."
        )
    state = quantize(parts.state, bits, group_size, embeddings)
    if tied(parts.config):
        state = share_packed_head(state)
    config = changed(
        parts.config,
        quantization_bit=bits,
        quantization_group_size=group_size,
        quantization_embeddings=embeddings,
    )
    what = "Linear layers, embedding and output layer were" if embeddings else "The linear layers were"
    scales = f"a scale for {group_size} columns" if group_size else "a scale for a row"
    return parts.with_step(f"{what} packed to {bits} bits, with {scales}.", config=config, state=state)


def in_dtype(parts: Parts, dtype: str | None) -> Parts:
    """All that is not packed in `dtype`; config.json tells the dtype that most of the weights have."""
    state = cast(parts.state, DTYPES[dtype]) if dtype else parts.state
    embedding = next(state[name] for module in EMBEDDINGS for name in _float_names(module) if name in state)
    config = changed(parts.config, dtype=embedding.dtype)
    if not dtype:
        return replace(parts, config=config, state=state)
    return parts.with_step(f"What is not packed was brought to {dtype}.", config=config, state=state)


def tied(config: ChatGLMConfig) -> bool:
    """Whether the output layer is the embedding once more, as in ChatGLM-6B."""
    return config.family == CHATGLM and config.tie_word_embeddings


def changed(config: ChatGLMConfig, **values: Any) -> ChatGLMConfig:
    """A copy of `config` with other values."""
    return ChatGLMConfig.from_dict(config.to_dict() | values)


def _float_names(module: str) -> tuple[str, str]:
    return f"{module}.weight_scale", f"{module}.weight"


def _check_arguments(
    dtype: str | None, bits: int | None, group_size: int | None, quantize_embeddings: bool
) -> None:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; give one of {', '.join(DTYPES)}.")
    if bits is not None:
        check_packing(bits, group_size)
    elif group_size or quantize_embeddings:
        name, value = ("group_size", group_size) if group_size else ("quantize_embeddings", True)
        raise ValueError(f"{name} is {value!r}, but nothing is packed; say quantize 8 or 4 too.")


def _one_of(folder: Path, names: Sequence[str]) -> Path:
    if not folder.is_dir():
        raise OSError(f"There is no folder {folder}; give the folder that the training saved.")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise OSError(
            f"{folder} holds neither {' nor '.join(names)}; give the folder that the training saved."
        )
    return read_weight_file(path).path if path.suffix in WEIGHT_SUFFIXES else path
