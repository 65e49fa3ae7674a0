"""A smaller vocabulary: from a tokenizer and a corpus to the pieces that the corpus needs, and the proof.

    corpus = find_corpus(["texts/"])
    vocabulary = slim_vocabulary(tokenizer, used_ids(tokenizer, corpus))
    smaller = slim_tokenizer(tokenizer, vocabulary)
    check_same_ids(tokenizer, smaller, vocabulary.kept, corpus)

Row i of the smaller model's embedding is row `vocabulary.kept[i]` of the old one; the weights are not
touched here. Any other text can still be written, with other and mostly more ids: bytes and single
characters stay.
"""

from __future__ import annotations

import codecs
import functools
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from google.protobuf import descriptor_pb2, text_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from tqdm import tqdm

from chatglm.hub.tokenization_chatglm import BLANK, CHATGLM, VOCAB_FILES, ChatGLMTokenizer

# A prompt of 8192 tokens, ChatGLM2-6B's default limit, holds fewer rounds; so many lines are one text, too.
ROUNDS = 1000
PASSAGE = 1 << 20  # bytes of a corpus that are in memory at a time, or its longest line if that is more
LONGEST_LINE = 1 << 24  # bytes; SentencePiece takes about 100 bytes of memory for each byte of a text

# The parts of a SentencePiece model file that matter here; protobuf keeps all others as they are.
_SCHEMA = """
name: "sentencepiece_model.proto"  package: "sentencepiece"  syntax: "proto2"
message_type { name: "TrainerSpec"
  field { name: "model_type" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL default_value: "1" }
}
message_type { name: "SentencePiece"
  field { name: "piece" number: 1 type: TYPE_STRING label: LABEL_OPTIONAL }
  field { name: "score" number: 2 type: TYPE_FLOAT label: LABEL_OPTIONAL }
  field { name: "type" number: 3 type: TYPE_INT32 label: LABEL_OPTIONAL default_value: "1" }
}
message_type { name: "ModelProto"
  field { name: "pieces" number: 1 type: TYPE_MESSAGE type_name: ".sentencepiece.SentencePiece" label: LABEL_REPEATED }
  field { name: "trainer_spec" number: 2 type: TYPE_BYTES label: LABEL_OPTIONAL }
  field { name: "self_test_data" number: 4 type: TYPE_BYTES label: LABEL_OPTIONAL }
}
"""
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # types of pieces
_UNIGRAM, _BPE = 1, 2  # types of models


@dataclass(frozen=True)
class Corpus:
    """Text files; `skipped` counts the files of the folders that hold something else."""

    files: tuple[Path, ...]
    skipped: int
    nbytes: int

    def passages(self, label: str, progress: bool = True) -> Iterator[Passage]:
        """Reads all files, some lines at a time, with a progress bar of bytes."""
        with tqdm(total=self.nbytes, desc=label, unit="B", unit_scale=True, disable=not progress) as bar:
            for file in self.files:
                with file.open("rb") as stream:
                    for passage in _passages(file, stream):
                        yield passage
                        bar.update(passage.nbytes)


@dataclass(frozen=True)
class Passage:
    """Lines of a file with their line ends; the first one is the last one of the passage before."""

    file: Path
    first_line: int  # its number in the file, from 1
    lines: list[str]
    nbytes: int  # of what is new in it


@dataclass(frozen=True)
class SlimVocabulary:
    """A SentencePiece model of fewer pieces, and the old id of each id of its tokenizer.

    `model` is the content of a model file. `kept` counts all ids: pieces, the names that ChatGLM2 appends to
    them, and tokens that users added. It ascends, and image ids of v0.1 are not in it.
    """

    model: bytes
    kept: list[int]

    @property
    def new_ids(self) -> dict[int, int]:
        """Old id -> new id, of those that are kept."""
        return {old: new for new, old in enumerate(self.kept)}


# ---- reading a corpus


def find_corpus(paths: str | Path | Sequence[str | Path]) -> Corpus:
    """Finds the UTF-8 text files among files and folders, which are searched with all folders in them.

    Raises OSError for a path that is not there, ValueError for a file named by itself that is no UTF-8
    text, for a line that is too long, and where there is no text at all. The message names the file.
    """
    files: dict[Path, bool] = {}  # whether a file is text
    named = [Path(path).expanduser() for path in ([paths] if isinstance(paths, (str, Path)) else paths)]
    for path in named:
        if path.is_dir():
            files |= {file: _is_text(file) for file in _files_in(path)}
        elif not path.is_file():
            raise OSError(f"There is no file or folder {path}; give text files, or folders that hold some.")
        elif not _is_text(path):
            raise ValueError(f"{path} is not text in UTF-8; save it in UTF-8, or leave it out.")
        else:
            files[path] = True
    texts = tuple(file for file, is_text in files.items() if is_text)
    skipped, size = len(files) - len(texts), sum(file.stat().st_size for file in texts)
    if not size:
        raise ValueError(
            f"{', '.join(map(str, named))} holds no text in UTF-8 ({skipped} files of other kinds were found); "
            "give the texts of the corpus."
        )
    return Corpus(texts, skipped, size)


def _files_in(folder: Path) -> Iterator[Path]:
    def refuse(error: OSError) -> NoReturn:  # os.walk passes over folders that it may not read
        raise error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _is_text(file: Path) -> bool:
    """Whether all of `file` is UTF-8; ValueError if one of its lines is too long."""
    if not file.is_file():
        return False
    decoder, longest = codecs.getincrementaldecoder("utf-8")(), 0
    length = 0  # of the line that has not ended yet
    try:
        with file.open("rb") as stream:
            while block := stream.read(PASSAGE):
                decoder.decode(block)
                head, newline, _ = block.partition(b"\n")
                longest = max(longest, length + len(head))
                length = len(block) - block.rfind(b"\n") - 1 if newline else length + len(block)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    if longest > LONGEST_LINE:
        raise ValueError(
            f"{file} has a line of {longest:,} bytes, more than {LONGEST_LINE:,}; break it into lines."
        )
    return True


def _passages(file: Path, stream: Any) -> Iterator[Passage]:
    first_line, last = 1, []
    while read := stream.readlines(PASSAGE):
        size = sum(map(len, read))
        if not last:
            read[0] = read[0].removeprefix(codecs.BOM_UTF8)
        lines = last + [line.decode() for line in read]
        yield Passage(file, first_line, lines, size)
        first_line += len(lines) - 1
        last = lines[-1:]


# ---- what a corpus needs


def used_ids(tokenizer: ChatGLMTokenizer, corpus: Corpus, progress: bool = True) -> set[int]:
    """The ids with which the corpus is written, and conversations about it of up to 1000 rounds.

    Each line is encoded by itself, within the running text, and as question and answer of a conversation.
    """
    used: set[int] = set()
    rounds = tokenizer.build_prompt("", [("", "")] * ROUNDS)
    used.update(*_encode(tokenizer, [rounds]))
    for passage in corpus.passages("reading the corpus", progress):
        used.update(*_encode(tokenizer, _texts(tokenizer, passage.lines)))
    return {tokenizer.num_image_tokens + piece for piece in used}


def _texts(tokenizer: ChatGLMTokenizer, lines: list[str]) -> list[str]:
    """All the texts in which a model may meet the lines."""
    texts = _running_texts(lines)
    distinct = list(dict.fromkeys(line.removesuffix("\n").removesuffix("\r") for line in lines))
    texts += distinct
    # Special tokens of ChatGLM-6B and added ones part a text; in a conversation they are plain words.
    texts += [part for text in texts for part in tokenizer._split_added_tokens(text)[::2] if part != text]
    for start in range(0, len(distinct), ROUNDS):
        history = [(line, line) for line in distinct[start : start + ROUNDS]]
        texts.append(tokenizer.build_prompt("", history))
    return texts


def _running_texts(lines: list[str]) -> list[str]:
    """The lines joined to texts that overlap by a line, so that each line stands behind its newline in one."""
    return ["".join(lines[max(start - 1, 0) : start + ROUNDS]) for start in range(0, len(lines), ROUNDS)]


def _encode(tokenizer: ChatGLMTokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Piece numbers of the texts as plain text, which is what `tokenizer._encode_plain` gives one by one.

    SentencePiece encodes a list in as many threads as there are processors.
    """
    if tokenizer.family == CHATGLM:
        texts = [tokenizer._write_white_space(text) for text in texts]
    return tokenizer.sp_model.encode(list(texts))


# ---- the smaller vocabulary


def slim_vocabulary(tokenizer: ChatGLMTokenizer, used: Iterable[int]) -> SlimVocabulary:
    """The vocabulary of `used`, of all that is no ordinary piece, and of all single characters.

    A single character is one that stands alone or behind the blank mark "▁", so that a text of one
    character keeps its ids. Pieces stay in their order, with their scores, and the normaliser stays.
    Added tokens stay, and so do the ids between them, which ChatGLM3 gives to tokens it does not name.

    Every text whose ids are all kept has them still, but for the map. The reason in each type of model:

    unigram: SentencePiece takes the path of the highest score through the text. All paths that are left had
        their scores before, and the best one is left. It also wins ties as before: of equal paths to one
        character the first that is met wins, and none of those before it was as good. An unknown character
        scores 10 less than the lowest piece, which is therefore kept too.
    BPE: SentencePiece merges the neighbours that make the piece of the highest score, until none make a
        piece. Fewer pieces mean fewer merges to choose from, so the steps are the same if the pieces that
        were made on the way are all left. Those within a piece of the result depend on nothing outside
        of it: they are what the merges make of its characters alone.

    Raises ValueError for an id that the tokenizer does not have.
    """
    used = set(used)
    beyond = [index for index in used if not 0 <= index < len(tokenizer)]
    if beyond:
        raise ValueError(f"{min(beyond)} is no id of the tokenizer, which has {len(tokenizer)}.")
    proto = _message_class("ModelProto").FromString(tokenizer.sp_model.serialized_model_proto())
    first, end = tokenizer.num_image_tokens, tokenizer.num_image_tokens + len(proto.pieces)
    used |= tokenizer._added_tokens_decoder.keys()  # some are names of pieces
    wanted = {index - first for index in used if first <= index < end}
    wanted |= {number for number, piece in enumerate(proto.pieces) if _always_stays(piece)}
    wanted |= _needed_with(wanted, proto)
    pieces = sorted(wanted)
    kept = [first + number for number in pieces] + list(range(end, len(tokenizer)))
    return SlimVocabulary(_with_pieces(proto, pieces), kept)


def _always_stays(piece: Any) -> bool:
    return piece.type != _NORMAL or len(piece.piece.removeprefix(BLANK)) <= 1


def _needed_with(wanted: set[int], proto: Any) -> set[int]:
    """The pieces without which those in `wanted` would not come about as before."""
    model_type = _message_class("TrainerSpec").FromString(proto.trainer_spec).model_type
    if model_type == _UNIGRAM:
        normal = {number: piece.score for number, piece in enumerate(proto.pieces) if piece.type == _NORMAL}
        return {min(normal, key=normal.__getitem__)} if normal else set()
    if model_type != _BPE:  # whole words or characters, which are looked up
        return set()
    # No text becomes one of the others by merging.
    mergeable = {
        piece.piece: number
        for number, piece in enumerate(proto.pieces)
        if piece.type not in (_UNKNOWN, _CONTROL, _BYTE)
    }
    scores = {piece: proto.pieces[number].score for piece, number in mergeable.items()}
    results = scores.keys() & {proto.pieces[number].piece for number in wanted}
    return {mergeable[piece] for result in results for piece in merged_pieces(result, scores)}


def merged_pieces(text: str, scores: Mapping[str, float]) -> list[str]:
    """The pieces that BPE makes of the characters of `text`, one after the other.

    >>> merged_pieces("aaab", {"aa": -1.0, "ab": -2.0, "aaab": -3.0})
    ['aa', 'ab', 'aaab']
    """
    symbols, made = list(text), []
    while True:
        pairs = [left + right for left, right in pairwise(symbols)]
        places = [place for place, pair in enumerate(pairs) if pair in scores]
        if not places:
            return made
        best = max(places, key=lambda place: scores[pairs[place]])  # the leftmost of equals
        symbols[best : best + 2] = [pairs[best]]
        made.append(pairs[best])


def _with_pieces(proto: Any, numbers: list[int]) -> bytes:
    slim = type(proto)()
    slim.CopyFrom(proto)
    slim.ClearField("pieces")
    slim.pieces.extend(proto.pieces[number] for number in numbers)
    # What the trainer expected of some sentences; SentencePiece before 0.2.3 loads no model that fails it.
    slim.ClearField("self_test_data")
    return slim.SerializeToString()


@functools.cache
def _message_class(name: str) -> type[Message]:
    """A message of `_SCHEMA`, in a pool of its own.

    sentencepiece and transformers have generated modules for it, but only one of them can be in a process,
    and sentencepiece's refuses every protobuf that is older than the one it was generated with.
    """
    pool, file = DescriptorPool(), descriptor_pb2.FileDescriptorProto()
    pool.AddSerializedFile(text_format.Parse(_SCHEMA, file).SerializeToString())
    return GetMessageClass(pool.FindMessageTypeByName(f"sentencepiece.{name}"))


def slim_tokenizer(tokenizer: ChatGLMTokenizer, vocabulary: SlimVocabulary) -> ChatGLMTokenizer:
    """A tokenizer of the smaller vocabulary with all other settings of `tokenizer`.

    It has no image ids, and thus reads pairs of texts as ChatGLM-6B-Slim does where the old one was v0.1.
    """
    new_ids = vocabulary.new_ids
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save_pretrained(folder)
        (folder / VOCAB_FILES[tokenizer.family]).write_bytes(vocabulary.model)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        added = settings["added_tokens_decoder"]
        settings["added_tokens_decoder"] = {new_ids[int(old)]: token for old, token in added.items()}
        if tokenizer.family == CHATGLM:
            settings["num_image_tokens"] = 0
        file.write_text(json.dumps(settings), encoding="utf-8")
        smaller = type(tokenizer).from_pretrained(folder)
    smaller.name_or_path = tokenizer.name_or_path
    return smaller


# ---- the proof


def check_same_ids(
    old: ChatGLMTokenizer,
    new: ChatGLMTokenizer,
    kept: Sequence[int],
    corpus: Corpus,
    progress: bool = True,
) -> None:
    """Encodes the corpus with both tokenizers, in all the ways of `used_ids`, and compares what ids mean.

    `kept` holds the old id of each new one. Raises ValueError with the first line whose ids differ but for
    this map, or where a token has another name or text than before, so that decoding would differ.
    """
    ids, kept = list(range(len(new))), list(kept)
    if new.convert_ids_to_tokens(ids) != old.convert_ids_to_tokens(kept) or new.decode(ids) != old.decode(
        kept
    ):
        raise ValueError("The smaller vocabulary has other tokens than those that were to be kept.")
    pieces = [index - old.num_image_tokens for index in kept]

    def agree(lines: list[str]) -> bool:
        texts = _texts(old, lines)
        both = zip(_encode(old, texts), _encode(new, texts), strict=True)
        return all([pieces[index] for index in after] == before for before, after in both)

    for passage in corpus.passages("checking", progress):
        if not agree(passage.lines):
            numbered = enumerate(passage.lines, passage.first_line)
            number, line = next((pair for pair in numbered if not agree([pair[1]])), (passage.first_line, ""))
            raise ValueError(
                f"Line {number} of {passage.file} is not written with the same tokens as before, {line[:80]!r}; "
                "make the smaller vocabulary from the same corpus."
            )
