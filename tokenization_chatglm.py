"""Text: the tokenizer of both families, streams, and prompts.

One tokenizer class over SentencePiece serves ChatGLM-6B (v0.1, v1.1, Slim), ChatGLM2-6B, ChatGLM3-6B and
CodeGeeX2-6B. Which family it is, is told from the model file: `ice_text.model` has a piece `<n>` for the
newline ("chatglm"), `tokenizer.model` has not ("chatglm2"). Below the class stand the streaming decoder,
the prompts, and what reads a model file. The methods that chat are in chat_chatglm.py.

It does not download, and it never turns what people type in a chat into control tokens: see
`encode_chat`. What `tokenizer(...)` itself does with such spellings is said at `tokenize`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from sentencepiece import SentencePieceProcessor
from transformers import AddedToken, PreTrainedTokenizer

CHATGLM = "chatglm"
CHATGLM2 = "chatglm2"

History = list[tuple[str, str]]  # (query, response) of the rounds before

VOCAB_FILES = {CHATGLM: "ice_text.model", CHATGLM2: "tokenizer.model"}
# A tokenizer file beyond these is refused before it is read: the published ones have 1.0 and 2.7 MB, and 64,789
# and 130,344 pieces.
LARGEST_VOCAB_FILE = 16_000_000  # bytes
MOST_PIECES = 250_000
IMAGE_TOKENS = 20000  # ids in front of the text pieces of v0.1; the text model never uses them
BLANK = "▁"  # how SentencePiece writes a space
# Pieces of ice_text.model that stand for white space.
WHITE_SPACE = {"<n>": "\n", "<|tab|>": "\t"} | {f"<|blank_{n}|>": " " * n for n in range(2, 81)}
REPLACEMENT = "\ufffd"

# Special tokens that the library knows of. In the first family they are recognised inside a text.
CHATGLM_TOKENS = {
    "bos_token": "<sop>",  # start of the answer; what stands before is read in both directions
    "eos_token": "<eop>",  # end of the answer; v0.1 and Slim say "</s>" here, but answer with <eop>
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "mask_token": "[MASK]",  # a blank to fill inside the text
}
CHATGLM2_TOKENS = {"eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
CHATGLM2_APPENDED = ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]  # follow the pieces of the file
CALL_OPTIONS = ("padding", "truncation", "max_length", "return_tensors")  # for the tokenizer call
CHATGLM2_COMMANDS = {"<bos>": "<s>", "<eos>": "</s>", "<pad>": "<unk>"}

# Rendered with `tokenize=False`; with `tokenize=True` the ids come from `encode_chat`, see
# `ChatGLMTokenizer.apply_chat_template`. A test holds the two together.
_TEMPLATE_HEAD = """
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- else -%}{%- for part in content -%}{{ part.text }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- set system = text(messages[0].content) if messages[0].role == 'system' else '' -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- set rounds = (turns | length + 1) // 2 -%}
{%- for message in turns -%}
{%- if message.role != ('assistant' if loop.index0 % 2 else 'user') -%}
{{- raise_exception('After an optional system message, user and assistant must take turns.') -}}
{%- endif -%}
{%- endfor -%}
"""
CHAT_TEMPLATES = {
    CHATGLM: _TEMPLATE_HEAD
    + """
{%- for message in turns -%}
{%- set last_round = loop.index0 // 2 + 1 == rounds -%}
{%- if loop.index0 % 2 == 0 -%}
{{- '[Round ' ~ loop.index0 // 2 ~ ']\n问：' if rounds > 1 else '' -}}
{{- (system if loop.first else '') ~ text(message.content) -}}
{%- if not loop.last or add_generation_prompt -%}
{{- ('\n答：' if rounds > 1 else '') ~ ('[gMASK]<sop>' if last_round else '') -}}
{%- endif -%}
{%- else -%}
{{- text(message.content) ~ ('<eop>' if loop.last else '\n') -}}
{%- endif -%}
{%- endfor -%}
""",
    CHATGLM2: _TEMPLATE_HEAD
    + """
{{- '[gMASK]sop' -}}
{%- for message in turns -%}
{%- if loop.index0 % 2 == 0 -%}
{{- '[Round ' ~ (loop.index0 // 2 + 1) ~ ']\n\n问：' -}}
{{- (system if loop.first else '') ~ text(message.content) -}}
{{- '\n\n答：' if not loop.last or add_generation_prompt else '' -}}
{%- else -%}
{{- text(message.content) ~ ('</s>' if loop.last else '\n\n') -}}
{%- endif -%}
{%- endfor -%}
""",
}


def _id_of(chatglm: str, chatglm2: str) -> property:
    """A property of the tokenizer: the id of a special token, by its spelling in each family."""
    return property(lambda self: self._token_to_id[chatglm if self.family == CHATGLM else chatglm2])


class ChatGLMTokenizer(PreTrainedTokenizer):
    """Turns text into ids and back, as the published tokenizers of both families do.

    >>> tokenizer = AutoTokenizer.from_pretrained("THUDM/chatglm-6b", trust_remote_code=True)
    >>> tokenizer("你好")["input_ids"]
    [5, 74874, 130001, 130004]

    `vocab_file` is an `ice_text.model` or a `tokenizer.model`; `from_pretrained` finds them under
    these names (`spm_file` is the second one) and passes the folder's config.json as `config_file`.
    `num_image_tokens` is 20000 for v0.1 and 0 elsewhere; left out, it is read off the config.json.
    Raises ValueError when the file is missing, damaged or does not fit the config.json.
    """

    vocab_files_names: ClassVar = {
        "vocab_file": VOCAB_FILES[CHATGLM],
        "spm_file": VOCAB_FILES[CHATGLM2],
        "config_file": "config.json",
    }
    model_input_names: ClassVar = ["input_ids", "attention_mask"]
    padding_side = "left"
    _auto_class = "AutoTokenizer"  # save_pretrained copies this file too

    gmask_token = "[gMASK]"  # a blank to fill at the end: every prompt of a chat has it
    end_token = "</s>"  # ends the answers of ChatGLM2
    eop_token = "<eop>"  # ends the answers of ChatGLM-6B, also where eos_token is "</s>"

    def __init__(
        self,
        vocab_file: str | os.PathLike[str] | None = None,
        do_lower_case: bool = False,
        remove_space: bool = False,
        num_image_tokens: int | None = None,
        spm_file: str | os.PathLike[str] | None = None,
        config_file: str | os.PathLike[str] | None = None,
        **kwargs: Any,
    ) -> None:
        path = _the_one_file(vocab_file, spm_file)
        self.sp_model, self.family = load_sentencepiece(path)
        self.do_lower_case = do_lower_case
        self.remove_space = remove_space
        config = _read_config(Path(config_file) if config_file else path.with_name("config.json"))
        self.num_image_tokens = (
            count_image_tokens(self.sp_model, num_image_tokens, config) if self.family == CHATGLM else 0
        )
        self._build_tables()
        _check_rows(path, self.vocab_size, config)
        kwargs = self._with_special_tokens(kwargs)
        kwargs.setdefault("chat_template", CHAT_TEMPLATES[self.family])
        # Folders that older transformers saved again carry its old default here, which damages code.
        kwargs.pop("clean_up_tokenization_spaces", None)
        if self.family == CHATGLM2:
            kwargs.setdefault("model_input_names", [*self.model_input_names, "position_ids"])
        super().__init__(**kwargs)
        saved = ["do_lower_case", "remove_space"]
        if self.family == CHATGLM:
            saved += ["num_image_tokens", "eop_token" if self._before_v1_1 else "end_token"]
        self.init_kwargs.update({name: getattr(self, name) for name in saved})

    def _build_tables(self) -> None:
        """Fill the tables id -> token, token -> id, and id -> what it looks like in a text."""
        model = self.sp_model
        ids = list(range(model.get_piece_size()))
        pieces = model.id_to_piece(ids)
        controls = [piece for piece, hidden in zip(pieces, model.is_control(ids), strict=True) if hidden]
        surfaces: dict[str, str | bytes] = {piece: piece.replace(BLANK, " ") for piece in pieces}
        for piece, is_byte in zip(pieces, model.is_byte(ids), strict=True):
            if is_byte:
                surfaces[piece] = bytes([int(piece[1:-1], 16)])
        unknown = pieces[model.unk_id()]
        surfaces[unknown] = model.decode([model.unk_id()]) if self.family == CHATGLM else ""  # " ⁇ "
        self._white_space = {}
        if self.family == CHATGLM:
            self._white_space = {piece: text for piece, text in WHITE_SPACE.items() if piece in surfaces}
            surfaces.update(self._white_space)
            self._white_space_pieces = {text: piece for piece, text in self._white_space.items()}
            longest_first = sorted(self._white_space_pieces, key=len, reverse=True)
            # A blank alone stays, and is the most frequent: the look-ahead passes over it at once.
            self._white_space_runs = re.compile(rf"(?=\n|\t|  )(?:{'|'.join(longest_first)})")
        else:
            clash = [name for name in CHATGLM2_APPENDED if name in surfaces]
            if clash:
                raise ValueError(
                    f"The tokenizer file has a piece {clash[0]!r}, the name of a special token that ChatGLM2 "
                    "adds to it; train the vocabulary without this piece."
                )
            controls += CHATGLM2_APPENDED
        surfaces.update(dict.fromkeys(controls, ""))
        images = [f"<image_{i}>" for i in range(self.num_image_tokens)]  # they have no text
        self._surfaces = [""] * len(images) + list(surfaces.values())
        self._id_to_token = [*images, *surfaces]
        self._token_to_id = {token: index for index, token in enumerate(self._id_to_token)}
        self._control_tokens = {*controls, unknown}
        blank = model.piece_to_id(BLANK)
        # Whether a text loses one or all of the blanks in front, as the model file says.
        self._drops_first_blank = model.decode([blank]) == ""
        self._drops_all_blanks = model.decode([blank, blank]) == ""

    def _with_special_tokens(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Return `kwargs` with the special tokens that the family registers with the library.

        transformers 5 would recognise every `*_token` it is given inside texts. The published rule is
        narrower: five names in the first family, none in the second.
        """
        kwargs = {**kwargs.pop("model_specific_special_tokens", {}), **kwargs}
        self._before_v1_1 = "eop_token" in kwargs or str(kwargs.get("eos_token")) == "</s>"
        for name in ("gmask_token", "end_token", "eop_token"):
            kwargs.pop(name, None)
        names = CHATGLM_TOKENS if self.family == CHATGLM else CHATGLM2_TOKENS
        for attribute, token in names.items():
            kwargs[attribute] = kwargs.get(attribute) or token
        # What users added stays as it was saved; the special tokens of the family are ours to describe.
        saved = kwargs.pop("added_tokens_decoder", {})
        added = {index: token for index, token in saved.items() if str(token) not in self._control_tokens}
        for token in {str(kwargs[attribute]) for attribute in CHATGLM_TOKENS if attribute in kwargs}:
            if self.family == CHATGLM and token in self._token_to_id:
                added[self._token_to_id[token]] = AddedToken(
                    token, lstrip=True, rstrip=True, normalized=False, special=True
                )
        self._added_tokens_decoder = added
        return kwargs

    @property
    def vocab_size(self) -> int:
        """Number of ids, without tokens that users added."""
        return len(self._id_to_token)

    def get_vocab(self) -> dict[str, int]:
        """Return token -> id, added tokens included; no two tokens share an id."""
        return {**self._token_to_id, **self._added_tokens_encoder}

    def _update_total_vocab_size(self) -> None:
        self.total_vocab_size = max([self.vocab_size - 1, *self._added_tokens_decoder]) + 1

    def _add_tokens(self, new_tokens: Iterable[str | AddedToken], special_tokens: bool = False) -> int:
        """Give each new token the next id above all that are in use; return how many were new.

        The base class counts entries instead of looking at ids, and hits a used one when there is a gap.
        The second family's own special tokens stay what they are: never recognised inside a text.
        """
        before = len(self)
        for token in new_tokens or []:
            if not isinstance(token, (str, AddedToken)):
                raise TypeError(f"Cannot add {token!r} as a token: it must be a str or an AddedToken.")
            content = str(token)
            fixed = self.family == CHATGLM2 and content in self._control_tokens
            if not content or fixed or content in self._added_tokens_encoder:
                continue
            special = special_tokens or content in self.all_special_tokens
            if isinstance(token, str):
                token = AddedToken(token, normalized=not special, special=special)
            elif special_tokens:
                token.special = True
            if token.special and content not in self.all_special_tokens:
                self._extra_special_tokens.append(token)
            index = self._token_to_id.get(content, len(self))
            self._added_tokens_decoder[index] = token
            self._added_tokens_encoder[content] = index
            self._update_total_vocab_size()
        self._update_trie()
        self._update_total_vocab_size()
        return len(self) - before

    def _convert_token_to_id(self, token: str) -> int:
        return self._token_to_id.get(token, self.num_image_tokens + self.sp_model.unk_id())

    def _convert_id_to_token(self, index: int) -> str:
        return self._id_to_token[index] if 0 <= index < self.vocab_size else ""

    def get_command(self, token: str) -> int:
        """Return the id of a special token by its name, or by `<bos>`, `<eos>`, `<pad>` in ChatGLM2."""
        name = CHATGLM2_COMMANDS.get(token, token) if self.family == CHATGLM2 else token
        if name not in self._control_tokens:
            names = ", ".join(sorted(self._control_tokens))
            raise ValueError(f"{token!r} is not a special token of this tokenizer, which has {names}.")
        return self._token_to_id[name]

    gmask_token_id = _id_of("[gMASK]", "[gMASK]")
    sop_token_id = _id_of("<sop>", "sop")
    eop_token_id = _id_of("<eop>", "eop")
    end_token_id = _id_of("</s>", "</s>")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token; None for ChatGLM2, as published: its `<unk>` is the padding."""
        return self._convert_token_to_id("<unk>") if self.family == CHATGLM else None

    def tokenize(self, text: str, **kwargs: Any) -> list[str]:
        """Split `text` into tokens.

        ChatGLM-6B recognises `[MASK]`, `<sop>`, `<eop>`, `<pad>`, `<unk>` (v0.1 and Slim: `</s>`, not
        `<eop>`) in the text, drops the white space around them, and starts anew behind them;
        `split_special_tokens=True` makes them plain text. In ChatGLM2 all such spellings are plain
        text. Both recognise what users added, and with `whole_prompt=True` a rendered chat template.

        >>> tokenizer.tokenize("今天 [MASK] 很好")
        ['▁今天', '[MASK]', '▁', '很好']
        """
        _check_text(text)
        if kwargs.pop("split_special_tokens", self.split_special_tokens):
            return self._tokenize(text)
        if kwargs.pop("whole_prompt", False):
            if self.family == CHATGLM2 and text.startswith("[gMASK]sop"):
                rest = text.removeprefix("[gMASK]sop")
                if rest.startswith(tuple(self._added_tokens_encoder)):  # ChatGLM3's own template: <|user|>…
                    return ["[gMASK]", "sop", *self.tokenize(rest)]
            before, chat, after = self._split_rendered_chat(text)
            if before or after:
                return before + self._tokenize(chat) + after
        tokens: list[str] = []
        for i, part in enumerate(self._split_added_tokens(text)):
            tokens += [part] if i % 2 else self._tokenize(part)
        return tokens

    def _encode_plus(self, *args: Any, add_special_tokens: bool = True, **kwargs: Any) -> Any:
        # Whoever wants no special tokens added may have a text that has them: see `_split_rendered_chat`.
        kwargs["whole_prompt"] = not add_special_tokens
        return super()._encode_plus(*args, add_special_tokens=add_special_tokens, **kwargs)

    def _split_rendered_chat(self, text: str) -> tuple[list[str], str, list[str]]:
        """Take the special tokens off a prompt that `apply_chat_template(tokenize=False)` made.

        Only where they stand and only together: people's text between them stays plain.
        """
        if self.family == CHATGLM and text.endswith("[gMASK]<sop>"):
            return [], text.removesuffix("[gMASK]<sop>"), ["[gMASK]", "<sop>"]
        if self.family == CHATGLM2 and text.startswith("[gMASK]sop[Round 1]\n\n问："):
            return ["[gMASK]", "sop"], text.removeprefix("[gMASK]sop"), []
        return [], text, []

    def _split_added_tokens(self, text: str) -> list[str]:
        """Return [text, token, text, token, …, text], the longest token first where several match."""
        names = [name for name in self._added_tokens_encoder if name in text]
        if not names:
            return [text]
        tokens = {name: self._added_tokens_decoder[self._added_tokens_encoder[name]] for name in names}
        patterns = [
            rf"(?<!\S){re.escape(name)}(?!\S)" if tokens[name].single_word else re.escape(name)
            for name in sorted(names, key=len, reverse=True)
        ]
        parts = re.split(f"({'|'.join(patterns)})", text)
        for i in range(1, len(parts), 2):
            if tokens[parts[i]].lstrip:
                parts[i - 1] = parts[i - 1].rstrip()
            if tokens[parts[i]].rstrip:
                parts[i + 1] = parts[i + 1].lstrip()
        return parts

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._id_to_token[index] for index in self._encode_plain(text)]

    def _encode_plain(self, text: str) -> list[int]:
        """Return the ids of `text` as ordinary text: special spellings in it are just letters."""
        _check_text(text)
        if self.family == CHATGLM:
            text = self._write_white_space(text)
        return [index + self.num_image_tokens for index in self.sp_model.encode(text)]

    def _write_white_space(self, text: str) -> str:
        """Write newlines, tabs and runs of blanks as pieces; SentencePiece would merge them."""
        if self.remove_space:
            text = " ".join(text.split())
        if self.do_lower_case:
            text = text.lower()
        return self._white_space_runs.sub(lambda run: self._white_space_pieces[run[0]], text)

    def get_prefix_tokens(self) -> list[int]:
        """Return the ids in front of every ChatGLM2 input; ChatGLM-6B has none there."""
        return [self.gmask_token_id, self.sop_token_id] if self.family == CHATGLM2 else []

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Put the special tokens around a source A and a target B, as published.

        ChatGLM2      [gMASK] sop A B </s>
        ChatGLM-6B    A [gMASK] <sop> B <eop>; v0.1 and Slim add no [gMASK] to an A that has a mask
        """
        source, target = list(token_ids_0), list(token_ids_1 or [])
        pair = token_ids_1 is not None
        if self.family == CHATGLM2:
            end = [self._token_to_id["</s>"]] if pair else []
            return self.get_prefix_tokens() + source + target + end
        if not self._before_v1_1:
            end = [self._convert_token_to_id_with_added_voc(str(self.eos_token))] if pair else []
            return [*source, self.gmask_token_id, self.sop_token_id, *target, *end]
        if self.num_image_tokens:  # v0.1 knew no target
            return self._with_one_mask(source + target)
        end = [self.eop_token_id] if pair and target[-1:] != [self.eop_token_id] else []
        return self._with_one_mask(source) + target + end

    def _with_one_mask(self, ids: list[int]) -> list[int]:
        masks = {self.gmask_token_id, self._token_to_id[CHATGLM_TOKENS["mask_token"]]}
        if masks.isdisjoint(ids):
            ids = [*ids, self.gmask_token_id]
        if ids[-1] not in masks:
            ids = [*ids, self._token_to_id["</s>"]]
        return [*ids, self.sop_token_id]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for special and 0 for other tokens of the input that is built from the ids."""
        ids = token_ids_0
        if not already_has_special_tokens:
            ids = self.build_inputs_with_special_tokens(token_ids_0, token_ids_1)
        special = {self._token_to_id[token] for token in self._control_tokens}
        special.update(self.all_special_ids)
        return [int(index in special) for index in ids]

    def _pad(self, encoded_inputs: Any, *args: Any, padding_side: str | None = None, **kwargs: Any) -> Any:
        """Pad one row; ChatGLM2 rows also get `position_ids`: 0, 1, … on the text, 0 on padding."""
        length = len(encoded_inputs[self.model_input_names[0]])
        encoded = super()._pad(encoded_inputs, *args, padding_side=padding_side, **kwargs)
        if "position_ids" in self.model_input_names:
            positions = list(encoded.get("position_ids", range(length)))
            padding = [0] * (len(encoded[self.model_input_names[0]]) - length)
            left = (padding_side or self.padding_side) == "left"
            encoded["position_ids"] = padding + positions if left else positions + padding
        return encoded

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        **kwargs: Any,
    ) -> str:
        """Return the text of `token_ids`; ids outside the vocabulary have none."""
        decoder = self.stream_decoder(skip_special_tokens)
        text = decoder.put(token_ids) + decoder.flush()
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def convert_tokens_to_string(self, tokens: Iterable[str]) -> str:
        """Return the text of `tokens`; strings that are no token of the vocabulary stay as they are."""
        decoder = self.stream_decoder()
        vocab = self.get_vocab()
        parts = [decoder.put(vocab[t]) if t in vocab else decoder.put_text(t) for t in tokens]
        return "".join(parts) + decoder.flush()

    def token_bytes(self, index: int) -> bytes:
        """Return what an id stands for in a text: UTF-8, perhaps a part of a character, or nothing."""
        text = self._surfaces[index] if 0 <= index < len(self._surfaces) else ""
        return text if isinstance(text, bytes) else text.encode()

    def stream_decoder(self, skip_special_tokens: bool = False) -> StreamDecoder:
        """Return a decoder that takes ids as they are generated and gives out whole characters."""
        return StreamDecoder(self, skip_special_tokens)

    def build_prompt(self, query: str, history: History | None = None) -> str:
        """Return the text that the model reads for `query` after `history`."""
        return build_prompt(self.family, query, history)

    def encode_chat(self, query: str, history: History | None = None) -> list[int]:
        """Return the ids of the prompt, special tokens included.

        The words of people and model are encoded as plain text: nobody can write a control token.
        """
        ids = self._encode_plain(self.build_prompt(query, history))
        if self.family == CHATGLM2:
            return self.get_prefix_tokens() + ids
        return [*ids, self.gmask_token_id, self.sop_token_id]

    def encode_chat_continuation(self, query: str, history: History | None = None) -> list[int]:
        """Return what a further round adds to a cache that holds the rounds of `history` (ChatGLM2)."""
        if self.family == CHATGLM:
            raise ValueError(
                "ChatGLM-6B cannot continue a conversation on a cache, because it reads its prompt in both directions; "
                "leave out past_key_values and return_past_key_values, and encode all of it with encode_chat."
            )
        if not history:
            return self.encode_chat(query)
        rounds = check_history(query, history)
        ids = self._encode_plain("\n\n" + _chatglm2_round(len(rounds) + 1, query))
        # The blank that SentencePiece puts in front of a text does not stand inside a conversation.
        return ids[1:] if ids[0] == self._token_to_id.get(BLANK) else ids

    def apply_chat_template(
        self,
        conversation: Any,
        tools: list[Any] | None = None,
        documents: list[Any] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        **kwargs: Any,
    ) -> Any:
        """Turn messages `{"role": …, "content": …}` into the prompt of `encode_chat`, or its text.

        With `tokenize=True` contents are encoded as plain text. A system message stands in front of
        the first user message; an assistant message at the end is encoded on its own, as in the
        published fine-tuning. Other templates than the published prompt go through transformers.
        """
        ours = chat_template is None and self.chat_template == CHAT_TEMPLATES[self.family]
        if ours and (tools or documents):
            raise ValueError(
                "The ChatGLM prompt has no place for tools or documents; write them into a message, or "
                "pass a chat_template that renders them."
            )
        if not (ours and tokenize) or kwargs.get("return_assistant_tokens_mask"):
            return super().apply_chat_template(
                conversation, tools=tools, documents=documents, chat_template=chat_template,
                add_generation_prompt=add_generation_prompt, continue_final_message=continue_final_message,
                tokenize=tokenize, **kwargs,
            )  # fmt: skip
        several = bool(conversation) and (
            isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
        )
        ids = [
            self._encode_messages(messages, add_generation_prompt, continue_final_message)
            for messages in (conversation if several else [conversation])
        ]
        options = {name: kwargs[name] for name in CALL_OPTIONS if name in kwargs}
        options.update(kwargs.get("tokenizer_kwargs") or {})
        encoded = self(ids if several else ids[0], add_special_tokens=False, **options)
        return encoded if kwargs.get("return_dict", True) else encoded["input_ids"]

    def _encode_messages(
        self, messages: Sequence[Mapping[str, Any]], generation_prompt: bool, unfinished: bool
    ) -> list[int]:
        history, query, answer = split_messages(getattr(messages, "messages", messages))
        if answer is None and not generation_prompt:
            cue = "\n\n答：" if self.family == CHATGLM2 else "\n答：" if history else ""
            prompt = self.build_prompt(query, history).removesuffix(cue)
            return self.get_prefix_tokens() + self._encode_plain(prompt)
        ids = self.encode_chat(query, history)
        if answer is None:
            return ids
        if generation_prompt:
            raise ValueError(
                "The last message is the assistant's already; leave out add_generation_prompt, or end "
                "with a user message."
            )
        end = self.eop_token_id if self.family == CHATGLM else self._token_to_id["</s>"]
        return ids + self._encode_plain(answer) + ([] if unfinished else [end])

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str, ...]:
        """Write the SentencePiece model under its published name; return the path."""
        prefix = f"{filename_prefix}-" if filename_prefix else ""
        path = Path(save_directory) / (prefix + VOCAB_FILES[self.family])
        path.write_bytes(self.sp_model.serialized_model_proto())
        return (str(path),)


class StreamDecoder:
    """Turns ids into text piece by piece, holding back characters whose bytes are not complete.

    >>> decoder = tokenizer.stream_decoder()
    >>> [decoder.put(i) for i in (243, 162, 155, 131)], decoder.flush()  # the bytes of one emoji
    (['', '', '', '😀'], '')

    All that `put` and the last `flush` return, joined, is `tokenizer.decode` of all ids. The rules are
    SentencePiece's: no blank in front of the text, U+FFFD for each byte of a broken character.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer, skip_special_tokens: bool = False) -> None:
        self._tokenizer = tokenizer
        self._parts: list[str] = []
        self._bytes = b""
        self._at_start = tokenizer._drops_first_blank
        # Dropped before decoding, so that bytes on both sides meet; other special ids part them.
        self._dropped = {tokenizer.pad_token_id} if tokenizer.family == CHATGLM else set()
        if skip_special_tokens:
            known = tokenizer.vocab_size if tokenizer.family == CHATGLM2 else 0
            self._dropped |= {index for index in tokenizer.all_special_ids if index >= known}

    @property
    def text(self) -> str:
        """All text given out so far."""
        return "".join(self._parts)

    @property
    def pending(self) -> bool:
        """True while the bytes of an unfinished character are held back."""
        return bool(self._bytes)

    def put(self, token_ids: int | Sequence[int]) -> str:
        """Take one id or several and return the text that they complete."""
        if hasattr(token_ids, "tolist"):
            token_ids = token_ids.tolist()
        if isinstance(token_ids, int):
            token_ids = [token_ids]
        return self._give("".join(self._texts(token_ids)))

    def put_text(self, text: str) -> str:
        """Take a piece of text that is no token of the vocabulary."""
        return self._give(self._broken_bytes() + text)

    def flush(self) -> str:
        """End the text: return U+FFFD for each byte that was held back."""
        return self._give(self._broken_bytes())

    def _give(self, text: str) -> str:
        if text:
            self._parts.append(text)
            self._at_start = False
        return text

    def _texts(self, token_ids: Iterable[int]) -> Iterator[str]:
        surfaces, added = self._tokenizer._surfaces, self._tokenizer._added_tokens_decoder
        for token_id in token_ids:
            token_id = int(token_id)
            if token_id in self._dropped:
                continue
            known = 0 <= token_id < len(surfaces)
            surface = surfaces[token_id] if known else str(added.get(token_id, ""))
            if isinstance(surface, bytes):
                text, self._bytes = complete_characters(self._bytes + surface)
            else:
                text = self._broken_bytes()
                self._at_start = self._at_start and not text
                if self._at_start and self._tokenizer._convert_id_to_token(token_id).startswith(BLANK):
                    self._at_start = self._tokenizer._drops_all_blanks
                    surface = surface[1:]
                text += surface
            if text:
                self._at_start = False
                yield text

    def _broken_bytes(self) -> str:
        broken, self._bytes = self._bytes, b""
        return REPLACEMENT * len(broken)


def complete_characters(data: bytes) -> tuple[str, bytes]:
    """Decode UTF-8 as far as it is decided; return the text and the bytes of an unfinished character.

    A byte that cannot belong to a character becomes U+FFFD alone, as in SentencePiece; Python's own
    "replace" gives one U+FFFD for several such bytes.
    """
    text = ""
    while True:
        try:
            return text + data.decode(), b""
        except UnicodeDecodeError as error:
            text += data[: error.start].decode()
            data = data[error.start :]
            if error.reason == "unexpected end of data":
                return text, data
            text, data = text + REPLACEMENT, data[1:]


def build_prompt(family: str, query: str, history: History | None = None) -> str:
    """Return the one prompt of a family: "chatglm" (rounds from 0) or "chatglm2" (rounds from 1).

    `history` holds (query, response) pairs of the rounds before. Raises ValueError for anything else.
    """
    rounds = check_history(query, history)
    if family == CHATGLM2:
        past = [f"{_chatglm2_round(i, q)}{r}\n\n" for i, (q, r) in enumerate(rounds, 1)]
        return "".join(past) + _chatglm2_round(len(rounds) + 1, query)
    if family != CHATGLM:
        raise ValueError(f"Unknown family {family!r}: it must be {CHATGLM!r} or {CHATGLM2!r}.")
    if not rounds:
        return query
    past = [f"[Round {i}]\n问：{q}\n答：{r}\n" for i, (q, r) in enumerate(rounds)]
    return "".join(past) + f"[Round {len(rounds)}]\n问：{query}\n答："


def _chatglm2_round(number: int, query: str) -> str:
    return f"[Round {number}]\n\n问：{query}\n\n答："


def check_history(query: str, history: History | None) -> History:
    """Return the history as a list; ValueError where query or history are not what a prompt needs."""
    _check_text(query, "The query")
    if history is None:
        return []
    if not isinstance(history, (list, tuple)):
        raise ValueError(
            f"history is {type(history).__name__}; it must be a list of (query, response) pairs."
        )
    for i, turn in enumerate(history):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2:
            raise ValueError(
                f"history[{i}] is {str(turn)[:80]!r}; it must be a pair (query, response) of strings."
            )
        _check_text(turn[0], f"The query in history[{i}]")
        _check_text(turn[1], f"The response in history[{i}]")
    return history


def split_messages(messages: Sequence[Mapping[str, Any]]) -> tuple[History, str, str | None]:
    """Return (history, query, answer) of chat messages; the answer is None if a user speaks last.

    A leading system message is put in front of the first user message, without a separator.
    Raises ValueError unless user and assistant take turns.
    """
    roles = [message.get("role") for message in messages]
    texts = [_content_text(message.get("content"), i) for i, message in enumerate(messages)]
    if roles[:1] == ["system"]:
        roles, texts = roles[1:], [texts[0] + text if i == 0 else text for i, text in enumerate(texts[1:])]
    if not roles or roles != [("user", "assistant")[i % 2] for i in range(len(roles))]:
        raise ValueError(
            f"The messages have the roles {roles}; after an optional system message, user and assistant "
            "must take turns, beginning with user."
        )
    answer = texts.pop() if len(texts) % 2 == 0 else None
    return list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1], answer


def _content_text(content: Any, index: int) -> str:
    """Return the text of a message, which may come in parts `{"type": "text", "text": …}`."""
    parts = content if isinstance(content, (list, tuple)) else [{"text": content}]
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(
            f"The content of message {index} is {type(content).__name__}; it must be a str or a list of text parts."
        )
    return "".join(texts)


WIDE_MARKS = dict(zip(",!:;?", "，！：；？", strict=True))
NARROW_MARKS = re.compile(r"(?<=[\u4e00-\u9fff])[,!:;?]|[,!:;?](?=[\u4e00-\u9fff])")


def process_response(family: str, text: str) -> str:
    """Tidy an answer as the published `chat` does.

    Both families fill in the training year; ChatGLM-6B also writes , ! : ; ? next to a Chinese
    character in full width.
    """
    text = text.strip().replace("[[训练时间]]", "2023年")
    return NARROW_MARKS.sub(lambda mark: WIDE_MARKS[mark[0]], text) if family == CHATGLM else text


def _check_text(text: Any, what: str = "The text") -> None:
    """Raise ValueError unless `text` is a string that can be written as UTF-8."""
    if not isinstance(text, str):
        raise ValueError(f"{what} is {type(text).__name__}; it must be a str.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{what} has half of a surrogate pair, {text[error.start]!r}, at position {error.start}, which "
            'is no character; repair it with text.encode("utf-16", "surrogatepass").decode("utf-16", '
            '"replace").'
        ) from None


def _the_one_file(vocab_file: str | os.PathLike[str] | None, spm_file: str | os.PathLike[str] | None) -> Path:
    found = {str(Path(file)) for file in (vocab_file, spm_file) if file is not None}
    if not found:
        raise ValueError(
            f"No tokenizer file found: the folder must hold {VOCAB_FILES[CHATGLM]} (ChatGLM-6B) or "
            f"{VOCAB_FILES[CHATGLM2]} (ChatGLM2-6B); download it from where the weights came from."
        )
    if len(found) > 1:
        raise ValueError(
            f"Found two tokenizer files, {' and '.join(sorted(found))}; remove the one that does not belong "
            "to the weights."
        )
    return Path(found.pop())


def load_sentencepiece(path: Path) -> tuple[SentencePieceProcessor, str]:
    """Read a tokenizer file; return the processor and the family. Raises ValueError if it is damaged."""
    if not path.is_file():
        raise ValueError(f"There is no tokenizer file {path}; download it from where the weights came from.")
    if path.stat().st_size > LARGEST_VOCAB_FILE:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes, more than a tokenizer file of ChatGLM (at most "
            f"{LARGEST_VOCAB_FILE:,} are read); download it again."
        )
    proto, model = path.read_bytes(), SentencePieceProcessor()
    if proto.startswith(b"version https://git-lfs.github.com/spec/v1"):
        raise ValueError(
            f"{path} ({len(proto)} bytes) is only the Git-LFS pointer to the tokenizer file; run "
            "`git lfs pull` in its folder, or download the file itself."
        )
    fields = _proto_fields(proto)
    if len(fields) > MOST_PIECES:
        raise ValueError(
            f"{path} has more than {MOST_PIECES:,} pieces, which no tokenizer of ChatGLM has; download it again."
        )
    try:  # pieces, trainer's and normaliser's settings: cut off otherwise
        whole = {1, 2, 3} <= set(fields) and model.LoadFromSerializedProto(proto)
    except RuntimeError:
        whole = False
    if not whole:
        raise ValueError(
            f"{path} ({len(proto)} bytes) is not a complete SentencePiece model; download it again."
        )
    if model.piece_to_id("<n>") == model.unk_id():
        return model, CHATGLM2
    if model.piece_to_id("[gMASK]") == model.unk_id():  # v0.1 and Slim
        model.LoadFromSerializedProto(proto + appended_pieces())
    return model, CHATGLM


def _proto_fields(proto: bytes) -> list[int]:
    """Return the numbers of the message's fields; none if the bytes are not a list of messages.

    Stops beyond MOST_PIECES fields; each piece is one (number 1).
    """
    fields: list[int] = []
    position = 0
    while position < len(proto) and len(fields) <= MOST_PIECES:
        key, length, shift = proto[position], 0, 0
        while True:
            position += 1
            if key & 7 != 2 or position >= len(proto) or shift > 28:  # a length has five bytes at most
                return []
            length |= (proto[position] & 127) << shift
            shift += 7
            if proto[position] < 128:
                break
        fields.append(key >> 3)
        position += 1 + length
    return fields if position == len(proto) or len(fields) > MOST_PIECES else []


def appended_pieces() -> bytes:
    """Return the 344 pieces that v0.1 and Slim add to their ice_text.model, as SentencePiece stores them.

    Bytes appended to a serialised model are read as further pieces, and settings as newer ones.
    """
    control, user_defined, byte = 3, 4, 6  # SentencePiece's piece types
    controls = ["[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>"]
    pieces = [(piece, control) for piece in controls]
    pieces += [(piece, user_defined) for piece in WHITE_SPACE if piece != "<n>"]
    pieces += [(f"<0x{n:02X}>", byte) for n in range(256)]
    data = bytearray()
    for piece, kind in pieces:
        name = piece.encode()
        # piece: field 1, text; score: field 2, float 0.0; type: field 3
        entry = bytes([0x0A, len(name), *name, 0x15, 0, 0, 0, 0, 0x18, kind])
        data += bytes([0x0A, len(entry), *entry])
    byte_fallback = bytes([0x98, 0x02, 0x01])  # field 35 of the trainer's settings: true
    return bytes(data) + bytes([0x12, len(byte_fallback), *byte_fallback])


def _read_config(path: Path) -> Mapping[str, Any]:
    """Return what the config.json says, or nothing if there is none."""
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is not valid JSON; download it again.") from None
    return config if isinstance(config, dict) else {}


def count_image_tokens(model: SentencePieceProcessor, asked: int | None, config: Mapping[str, Any]) -> int:
    """Return the id of the first text piece: what was asked for, else what config.json shows."""
    if asked is not None:
        if not isinstance(asked, int) or asked < 0:
            raise ValueError(
                f"num_image_tokens is {asked!r}; it must be {IMAGE_TOKENS} for ChatGLM-6B v0.1, "
                "and 0 for all others."
            )
        return asked
    pieces, rows, bos = model.get_piece_size(), config.get("vocab_size"), config.get("bos_token_id")
    counts = set()
    if bos is not None:
        counts.add(bos - model.piece_to_id("<sop>"))
    if rows is not None:
        counts.add(IMAGE_TOKENS if rows >= pieces + IMAGE_TOKENS else 0)
    if len(counts) > 1 or not counts <= {0, IMAGE_TOKENS}:
        raise ValueError(
            f"The tokenizer file has {pieces} pieces, config.json says vocab_size {rows} and "
            f"bos_token_id {bos}: this is neither ChatGLM-6B v0.1 ({IMAGE_TOKENS} image ids in front) nor "
            "another (none); take both files from one checkpoint, or pass num_image_tokens."
        )
    return counts.pop() if counts else 0


def _check_rows(path: Path, vocab_size: int, config: Mapping[str, Any]) -> None:
    """Raise ValueError if the model of this config.json has fewer rows than the tokenizer has ids."""
    rows = config.get("padded_vocab_size", config.get("vocab_size"))
    if rows is not None and rows < vocab_size:
        raise ValueError(
            f"{path.name} makes a vocabulary of {vocab_size} ids, but config.json says that the model has "
            f"{rows} rows; take both files from one checkpoint."
        )
