"""The tokenizer beyond the recorded answers: rules on random texts, bad input, saving, added tokens."""

from __future__ import annotations

import copy
import json
import pickle
import random
import re
import shutil
import time
from pathlib import Path

import pytest
import sentencepiece
from transformers import AddedToken, AutoTokenizer
from vocabularies import FILES, PUBLISHED, train_ice_text, train_tokenizer_model, train_vocabulary

from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

CONTROL_SPELLINGS = {
    "chatglm": ["[MASK]", "<sop>", "<eop>", "<pad>", "<unk>"],
    "chatglm2": ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<s>", "</s>", "<unk>", "<eos>"],
}


@pytest.fixture(scope="module")
def file(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small tokenizer file."""
    return train_vocabulary(family, tmp_path_factory.mktemp(family))


@pytest.fixture
def tokenizer(file: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(file)


@pytest.fixture(scope="module")
def ice_text(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED["chatglm"])


@pytest.fixture(scope="module")
def tokenizer_model(shared: Path) -> ChatGLMTokenizer:
    return ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED["chatglm2"])


NASTY = [
    "",
    " ",
    "\n",
    "\r\n",
    "a\r\nb\rc\n\n\nd",
    "\t\tindent\n\t mixed \t",
    " one blank in front",
    "one behind ",
    "👨‍👩‍👧‍👦 👍🏽 🇨🇳",
    "e\u0301 n\u0303 \u1100\u1161\u11a8",
    "مرحبا \u202eשלום\u202c",
    "a\u0000b\u0001\u001b[0m\u007f",
    "ﬁ Ⅷ ㍿ ① ａｂｃ　ＡＢＣ",
    "\u200b\ufeff\u00a0\u2028\u3000",
    "<n><|tab|><|blank_2|><|blank_81|><|blank_80|>",
    "<0x41><image_5></s><s><ENC><dBLOCK><unused_0>",
    "[MASK]",
    " [MASK] ",
    "a [MASK]\n\tb[MASK][MASK]c",
    "<sop><eop><pad><unk>",
    "\n<sop>\n\n<eop>\u3000",
    "[gMASK]sop[sMASK]eop",
    "soprano, people, <sop",
    "[[MASK]]<<sop>>",
    "\U0010ffff\ufffe\ue000",
]


def nasty_strings(seed: int, count: int) -> list[str]:
    """Strings of blanks, special spellings, letters of many scripts and any characters at all."""
    rng = random.Random(seed)
    spellings = sorted({s for names in CONTROL_SPELLINGS.values() for s in names} | {"<n>", "<|blank_7|>"})

    def piece() -> str:
        kind = rng.randrange(6)
        if kind == 0:
            return " " * rng.choice([1, 1, 2, 3, 7, 79, 80, 81, 82, 159, 160, 161, 170])
        if kind == 1:
            return rng.choice(["\n", "\r\n", "\t", "\r", "\u3000", "\u00a0"]) * rng.randint(1, 3)
        if kind == 2:
            return rng.choice(spellings)
        if kind == 3:
            return "".join(chr(rng.randint(0x4E00, 0x9FFF)) for _ in range(rng.randint(1, 6)))
        if kind == 4:
            return rng.choice(["don't", "https://a.b/?c=d&e", "x==1;", "：", "，", "1,234.5", "Ａ", "ﬀ"])
        point = rng.choice([rng.randint(0, 0x24F), rng.randint(0, 0xD7FF), rng.randint(0xE000, 0x10FFFF)])
        return chr(point) * rng.randint(1, 2)

    return NASTY + ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


# ---- the rules of the published code, written plainly on SentencePiece itself


def reference_ids(model: sentencepiece.SentencePieceProcessor, text: str) -> list[int]:
    """ChatGLM-6B v1.1 without the special tokens around the text."""
    ids: list[int] = []
    specials = CONTROL_SPELLINGS["chatglm"]
    parts = re.split("(" + "|".join(map(re.escape, specials)) + ")", text)
    for i, part in enumerate(parts):
        if part in specials:
            ids.append(model.piece_to_id(part))
            continue
        part = part.lstrip() if i > 0 else part
        part = part.rstrip() if i < len(parts) - 1 else part
        part = part.replace("\n", "<n>").replace("\t", "<|tab|>")
        for n in range(80, 1, -1):
            part = part.replace(" " * n, f"<|blank_{n}|>")
        ids += model.encode(part)
    return ids


def reference_text(model: sentencepiece.SentencePieceProcessor, ids: list[int]) -> str:
    text = model.decode([i for i in ids if i != 3]).replace("<n>", "\n").replace("<|tab|>", "\t")
    for n in range(80, 1, -1):
        text = text.replace(f"<|blank_{n}|>", " " * n)
    return text


def test_v1_ids_and_texts_follow_the_published_rule_on_random_strings(ice_text: ChatGLMTokenizer) -> None:
    model = ice_text.sp_model
    for text in nasty_strings(seed=1, count=600):
        ids = ice_text(text, add_special_tokens=False)["input_ids"]
        assert ids == reference_ids(model, text), repr(text)
        assert ice_text.decode(ids) == reference_text(model, ids), repr(text)


def test_v2_ids_are_sentencepieces_own_and_every_string_comes_back(
    tokenizer_model: ChatGLMTokenizer,
) -> None:
    for text in nasty_strings(seed=2, count=600):
        ids = tokenizer_model(text, add_special_tokens=False)["input_ids"]
        assert ids == tokenizer_model.sp_model.encode(text), repr(text)
        assert tokenizer_model.decode(ids) == text.replace("▁", " "), repr(text)


def test_random_ids_decode_as_sentencepiece_decodes_them(published: ChatGLMTokenizer) -> None:
    rng = random.Random(3)
    model = published.sp_model
    for _ in range(300):
        ids = random_ids(published, rng)
        if published.family == "chatglm":
            expected = reference_text(model, ids)
        else:  # the names of special ids are "" to SentencePiece
            pieces = ["" if i in (0, 1, 2) or i >= 64789 else model.id_to_piece(i) for i in ids]
            expected = model.decode(pieces)
        assert published.decode(ids) == expected, ids


def random_ids(tokenizer: ChatGLMTokenizer, rng: random.Random) -> list[int]:
    """Ids of all kinds: common pieces, lone bytes, blanks, special tokens, in runs and mixed."""
    vocab = tokenizer.get_vocab()
    byte = [vocab[f"<0x{n:02X}>"] for n in range(256)]
    special = [vocab[token] for token in tokenizer._control_tokens]

    def some() -> list[int]:
        kind = rng.randrange(6)
        if kind == 0:
            return [rng.choice(byte) for _ in range(rng.randint(1, 4))]
        if kind == 1:
            return [byte[b] for b in chr(rng.randint(0x80, 0x10FFFF)).encode(errors="replace")]
        if kind == 2:
            return [rng.choice(special)]
        if kind == 3:
            return [vocab["▁"]] * rng.randint(1, 2)
        return [rng.randrange(tokenizer.num_image_tokens, tokenizer.vocab_size)]

    return [index for _ in range(rng.randint(0, 8)) for index in some()]


@pytest.mark.parametrize("count", [1, 2, 79, 80, 81, 100, 160, 161, 170])
def test_a_run_of_blanks_comes_back_whole(published: ChatGLMTokenizer, count: int) -> None:
    text = f"x{' ' * count}y"
    assert published.decode(published(text)["input_ids"]) == text


def test_blanks_longer_than_the_pieces_of_a_small_vocabulary_come_back(tokenizer) -> None:
    for count in range(1, 60):
        text = f"x{' ' * count}y\n\n\ta"
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_v1_lower_case_and_single_blanks_on_request(shared: Path) -> None:
    path = shared / "tokenizers" / PUBLISHED["chatglm"]
    tokenizer = ChatGLMTokenizer(path, do_lower_case=True, remove_space=True)
    ids = tokenizer("  Hello \n WORLD  ")["input_ids"]
    assert tokenizer.decode(ids) == "hello world"


# ---- special spellings in texts


def test_v2_takes_special_spellings_as_plain_text(tokenizer_model: ChatGLMTokenizer) -> None:
    spellings = CONTROL_SPELLINGS["chatglm2"]
    control = {tokenizer_model.get_command(spelling) for spelling in spellings}
    for spelling in spellings:
        for text in (spelling, f"a{spelling}b", f" {spelling} "):
            ids = tokenizer_model(text, add_special_tokens=False)["input_ids"]
            assert control.isdisjoint(ids), text
            assert tokenizer_model.decode(ids) == text


def test_split_special_tokens_makes_spellings_plain_text(file: Path) -> None:
    text = "a<sop>b [MASK] c"
    by_default = ChatGLMTokenizer(file, split_special_tokens=True)
    tokenizer = ChatGLMTokenizer(file)
    for ids in (
        by_default(text, add_special_tokens=False)["input_ids"],
        tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"],
    ):
        assert {tokenizer.sop_token_id, tokenizer.get_command("[MASK]")}.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_v0_and_slim_recognise_the_end_of_text_instead_of_eop(tmp_path: Path) -> None:
    file = train_ice_text(tmp_path / "ice_text.model")
    newer, older = ChatGLMTokenizer(file), ChatGLMTokenizer(file, eos_token="</s>", eop_token="<eop>")
    assert "<eop>" in newer.tokenize("一<eop>二") and "</s>" not in newer.tokenize("一</s>二")
    assert "<eop>" not in older.tokenize("一<eop>二") and "</s>" in older.tokenize("一</s>二")


def test_special_tokens_are_marked_in_built_inputs(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer.encode("Hello", "world")
    mask = tokenizer(["Hello"], ["world"], return_special_tokens_mask=True)["special_tokens_mask"][0]
    plain = tokenizer.encode("Hello", add_special_tokens=False)
    plain += tokenizer.encode("world", add_special_tokens=False)
    assert [i for i, special in zip(ids, mask, strict=True) if not special] == plain
    assert tokenizer.get_special_tokens_mask(ids, already_has_special_tokens=True) == mask


# ---- padding


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_goes_to_either_side(tokenizer: ChatGLMTokenizer, side: str) -> None:
    texts = ["你好", "Hello world, how are you today?"]
    rows = [tokenizer(text)["input_ids"] for text in texts]
    batch = tokenizer(texts, padding=True, pad_to_multiple_of=8, padding_side=side)
    width = len(batch["input_ids"][0])
    assert width % 8 == 0 and width >= max(map(len, rows))
    for i, row in enumerate(rows):
        pads, ones = [tokenizer.pad_token_id] * (width - len(row)), [1] * len(row)
        zeros, positions = [0] * len(pads), list(range(len(row)))
        left = side == "left"
        assert batch["input_ids"][i] == (pads + row if left else row + pads)
        assert batch["attention_mask"][i] == (zeros + ones if left else ones + zeros)
        if tokenizer.family == "chatglm2":
            assert batch["position_ids"][i] == (zeros + positions if left else positions + zeros)
        else:
            assert "position_ids" not in batch


def test_rows_encoded_one_by_one_are_padded_later(tokenizer: ChatGLMTokenizer) -> None:
    texts = ["你好", "Hello world, how are you today?"]
    features = [dict(tokenizer(text)) for text in texts]
    assert dict(tokenizer.pad(features)) == dict(tokenizer(texts, padding=True))


# ---- added tokens


def test_added_tokens_get_ids_of_their_own(tokenizer: ChatGLMTokenizer) -> None:
    size = tokenizer.vocab_size
    assert len(tokenizer) == size
    assert tokenizer.add_tokens(["<new>", "<newer>", "<new>"]) == 2
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]}) == 1
    assert tokenizer.convert_tokens_to_ids(["<new>", "<newer>", "<tool>"]) == [size, size + 1, size + 2]
    assert (tokenizer.vocab_size, len(tokenizer)) == (size, size + 3)
    vocab = tokenizer.get_vocab()
    assert sorted(vocab.values()) == list(range(size + 3))
    assert all(tokenizer.convert_ids_to_tokens(i) == token for token, i in vocab.items())
    ids = tokenizer("a<newer>b<tool>", add_special_tokens=False)["input_ids"]
    assert size + 1 in ids and ids[-1] == size + 2
    assert tokenizer.decode(ids) == "a<newer> b<tool>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a<newer> b"


def test_a_gap_in_the_added_ids_is_never_filled_twice(file: Path) -> None:
    size = ChatGLMTokenizer(file).vocab_size
    # As in the ChatGLM3 folders, whose tokenizer_config.json names some ids above the vocabulary.
    roles = {size + 1: AddedToken("<|user|>", special=True), size + 2: AddedToken("<|bot|>", special=True)}
    tokenizer = ChatGLMTokenizer(file, added_tokens_decoder=roles)
    tokenizer.add_tokens(["<new>"])
    assert tokenizer.get_added_vocab()["<new>"] == size + 3
    assert len(tokenizer) == size + 4
    assert tokenizer.decode([size]) == ""


def test_names_of_v2_special_tokens_stay_plain_text_whatever_is_added(tmp_path: Path) -> None:
    file = train_tokenizer_model(tmp_path / "tokenizer.model")
    size = ChatGLMTokenizer(file).vocab_size
    special = {size - 4: AddedToken("[gMASK]", special=True), size - 2: AddedToken("sop", special=True)}
    tokenizer = ChatGLMTokenizer(file, added_tokens_decoder=special)
    assert tokenizer.add_tokens(["sop", "eop"], special_tokens=True) == 0
    assert tokenizer.add_special_tokens({"pad_token": "</s>"}) == 0
    tokenizer.add_tokens(["<x>"])
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    ids = tokenizer("soprano, people<x></s>[gMASK]", add_special_tokens=False)["input_ids"]
    assert {2, size - 4, size - 2}.isdisjoint(ids)


def test_the_template_of_chatglm3_keeps_its_control_tokens(tmp_path: Path) -> None:
    file = train_tokenizer_model(tmp_path / "tokenizer.model")
    template = "[gMASK]sop{% for m in messages %}<|{{ m.role }}|>\n {{ m.content }}{% endfor %}<|assistant|>"
    tokenizer = ChatGLMTokenizer(
        file, chat_template=template, extra_special_tokens=["<|user|>", "<|assistant|>"]
    )
    chat = [{"role": "user", "content": "soprano"}]
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.apply_chat_template(chat, return_dict=False))
    assert tokens[:3] == ["[gMASK]", "sop", "<|user|>"] and tokens[-1] == "<|assistant|>"
    assert "sop" not in tokens[3:]


def test_an_added_word_is_found_only_as_a_word_when_asked(tokenizer: ChatGLMTokenizer) -> None:
    tokenizer.add_tokens([AddedToken("cat", single_word=True)])
    assert "cat" in tokenizer.tokenize("a cat sat")
    assert "cat" not in tokenizer.tokenize("concatenate")


def test_the_longest_added_token_wins(tokenizer: ChatGLMTokenizer) -> None:
    tokenizer.add_tokens(["<a>", "<a><b>"])
    assert [t for t in tokenizer.tokenize("<a><b><a>") if t.startswith("<a")] == ["<a><b>", "<a>"]


# ---- copies


def same(one: ChatGLMTokenizer, other: ChatGLMTokenizer) -> bool:
    texts = ["你好 <new> world", "a   b\n<eop></s>", "😀"]
    return (
        one.get_vocab() == other.get_vocab()
        and len(one) == len(other)
        and one.special_tokens_map == other.special_tokens_map
        and one(texts, ["x", "y", "z"]) == other(texts, ["x", "y", "z"])
    )


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])  # noqa: S301
def test_copies_are_equal_and_apart(tokenizer: ChatGLMTokenizer, copies) -> None:
    tokenizer.add_tokens(["<new>"])
    other = copies(tokenizer)
    assert same(tokenizer, other)
    other.add_tokens(["<more>"])
    assert len(other) == len(tokenizer) + 1


@pytest.mark.parametrize("older", [False, True])
def test_a_saved_tokenizer_is_the_same_after_loading(file: Path, tmp_path: Path, older: bool) -> None:
    settings = {"padding_side": "right", "model_max_length": 77}
    if older and file.name == "ice_text.model":
        settings |= {"eos_token": "</s>", "num_image_tokens": 20000, "do_lower_case": True}
    tokenizer = ChatGLMTokenizer(file, **settings)
    tokenizer.add_tokens(["<new>"])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    assert {"tokenization_chatglm.py", file.name} <= {path.name for path in tmp_path.iterdir()}
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert same(tokenizer, again)
    assert (again.padding_side, again.model_max_length) == ("right", 77)
    assert again.extra_special_tokens == ["<tool>"]
    assert again.num_image_tokens == tokenizer.num_image_tokens
    assert again.build_inputs_with_special_tokens([7], [9]) == tokenizer.build_inputs_with_special_tokens(
        [7], [9]
    )


def test_the_130000_piece_file_is_saved_with_its_appended_pieces(tmp_path: Path) -> None:
    old = tmp_path / "old" / "ice_text.model"
    old.parent.mkdir()
    train_tokenizer_model(old)  # any model without the names; one with <n> is told to be of v1
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["一二三四五 one two three four five"] * 9),
        model_prefix=str(old.with_suffix("")),
        vocab_size=40,
        pad_id=3,
        user_defined_symbols=["<n>"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = ChatGLMTokenizer(old)
    tokenizer.save_pretrained(tmp_path / "new")
    again = ChatGLMTokenizer(tmp_path / "new" / "ice_text.model")
    assert tokenizer.get_vocab() == again.get_vocab()
    assert (
        tokenizer.sop_token_id == sentencepiece.SentencePieceProcessor(model_file=str(old)).vocab_size() + 4
    )
    assert tokenizer.decode(again("六  😀\t")["input_ids"]) == "六  😀\t"


# ---- v0.1 and Slim are told apart by config.json


def ice_folder(folder: Path, rows: int | None, bos: int | None) -> tuple[Path, int, int]:
    """A folder whose config.json gives rows and bos above the pieces and <sop> of its tokenizer file."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(train_ice_text(folder / "ice_text.model")))
    pieces, sop = model.get_piece_size(), model.piece_to_id("<sop>")
    config = {"model_type": "chatglm"}
    config |= {} if rows is None else {"vocab_size": pieces + rows}
    config |= {} if bos is None else {"bos_token_id": sop + bos}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, pieces, sop


@pytest.mark.parametrize(
    ("rows", "bos", "count"),
    [
        (None, None, 0),
        (0, None, 0),
        (184, 0, 0),
        (20184, None, 20000),
        (None, 20000, 20000),
        (20184, 20000, 20000),
    ],
)
def test_image_tokens_are_counted_from_the_config(tmp_path: Path, rows, bos, count: int) -> None:
    folder, pieces, sop = ice_folder(tmp_path, rows, bos)
    for tokenizer in (
        ChatGLMTokenizer(folder / "ice_text.model"),
        ChatGLMTokenizer.from_pretrained(folder),
    ):
        assert tokenizer.num_image_tokens == count
        assert (tokenizer.vocab_size, tokenizer.sop_token_id) == (pieces + count, sop + count)
        assert tokenizer.decode([*range(count), *tokenizer.encode("你好")]) == "你好"
    assert ChatGLMTokenizer(folder / "ice_text.model", num_image_tokens=0).num_image_tokens == 0


def test_without_config_there_are_no_image_tokens(tmp_path: Path) -> None:
    assert ChatGLMTokenizer(train_ice_text(tmp_path / "ice_text.model")).num_image_tokens == 0


@pytest.mark.parametrize(("rows", "bos"), [(20184, 0), (0, 20000), (0, 129996), (None, 1)])
def test_an_unknown_mix_of_sizes_is_an_error_that_names_them(tmp_path: Path, rows, bos) -> None:
    folder, pieces, sop = ice_folder(tmp_path, rows, bos)
    size = None if rows is None else pieces + rows
    numbers = rf"{pieces} pieces.*vocab_size {size} and bos_token_id {sop + bos}"
    with pytest.raises(ValueError, match=numbers):
        ChatGLMTokenizer.from_pretrained(folder)


def test_a_model_with_fewer_rows_than_ids_is_an_error_that_names_both(file: Path, tmp_path: Path) -> None:
    size = ChatGLMTokenizer(file).vocab_size
    shutil.copy(file, tmp_path)
    key = "vocab_size" if file.name == "ice_text.model" else "padded_vocab_size"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "chatglm", key: 100}))
    with pytest.raises(ValueError, match=rf"{size} ids.*100 rows"):
        ChatGLMTokenizer(tmp_path / file.name)


# ---- bad input


def test_a_folder_without_tokenizer_file_says_which_is_missing(tmp_path: Path) -> None:
    auto_map = {"AutoTokenizer": ["tokenization_chatglm.ChatGLMTokenizer", None]}
    config = {"tokenizer_class": "ChatGLMTokenizer", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    root = Path(__file__).resolve().parents[1]
    shutil.copy(root / "tokenization_chatglm.py", tmp_path)
    with pytest.raises(ValueError, match=r"ice_text.model .* or tokenizer.model"):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    with pytest.raises(ValueError, match=r"no tokenizer file .*nowhere.model"):
        ChatGLMTokenizer(tmp_path / "nowhere.model")


def test_two_tokenizer_files_in_one_folder_are_refused(tmp_path: Path) -> None:
    for family in FILES:
        train_vocabulary(family, tmp_path)
    with pytest.raises(ValueError, match=r"ice_text.model and .*tokenizer.model"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_a_git_lfs_pointer_is_named_with_the_way_out(file: Path, tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:5e97\nsize 2706249\n"
    (tmp_path / file.name).write_text(pointer)
    with pytest.raises(ValueError, match=rf"{file.name} \({len(pointer)} bytes\) .*git lfs pull"):
        ChatGLMTokenizer.from_pretrained(tmp_path)


def test_a_damaged_model_file_is_refused_wherever_it_ends(file: Path, tmp_path: Path) -> None:
    whole, damaged = file.read_bytes(), tmp_path / file.name
    rng = random.Random(5)
    ends = [0, 1, 2, *(rng.randrange(len(whole)) for _ in range(150)), len(whole) - 1]
    for data in [*(whole[:end] for end in ends), b"garbage", b"\n\x02hi" * 99, whole + b"x"]:
        damaged.write_bytes(data)
        with pytest.raises(ValueError, match=rf"{file.name} \({len(data)} bytes\) is not a complete"):
            ChatGLMTokenizer.from_pretrained(tmp_path)


def test_a_broken_config_beside_the_tokenizer_is_named(file: Path, tmp_path: Path) -> None:
    shutil.copy(file, tmp_path)
    (tmp_path / "config.json").write_text('{"vocab_size": ')
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        ChatGLMTokenizer(tmp_path / file.name)


def test_a_v2_vocabulary_with_a_piece_named_as_a_special_token_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f g"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=30,
        model_type="bpe",
        user_defined_symbols=["sop"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    with pytest.raises(ValueError, match="a piece 'sop'"):
        ChatGLMTokenizer(tmp_path / "tokenizer.model")


def test_lone_surrogates_are_named_with_position_and_way_out(tokenizer: ChatGLMTokenizer) -> None:
    text = "你好\ud83d!"
    for call in (tokenizer, tokenizer.tokenize, tokenizer.encode_chat, lambda t: tokenizer([t, "a"])):
        with pytest.raises(ValueError, match=r"'\\ud83d', at position 2.*surrogatepass"):
            call(text)
    with pytest.raises(ValueError, match=r"response in history\[1\].*position 0"):
        tokenizer.encode_chat("q", [("a", "b"), ("c", "\udfff")])
    repaired = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer(repaired)["input_ids"]).startswith("你好")


@pytest.mark.parametrize("text", [5, 5.0, b"bytes", object()])
def test_texts_that_are_no_strings_are_refused(tokenizer: ChatGLMTokenizer, text: object) -> None:
    for call in (tokenizer, lambda t: tokenizer(["a", t]), tokenizer.tokenize, tokenizer.encode_chat):
        with pytest.raises(ValueError, match="str"):
            call(text)


@pytest.mark.parametrize("count", [-1, "20000", 1.5])
def test_a_strange_number_of_image_tokens_is_refused(tmp_path: Path, count: object) -> None:
    file = train_ice_text(tmp_path / "ice_text.model")
    with pytest.raises(ValueError, match=rf"num_image_tokens is {count!r}"):
        ChatGLMTokenizer(file, num_image_tokens=count)


def test_unknown_commands_are_refused_with_the_known_ones(tokenizer: ChatGLMTokenizer) -> None:
    with pytest.raises(ValueError, match=r"'你' is not a special token.*\[gMASK\]"):
        tokenizer.get_command("你")


def test_ids_outside_the_vocabulary_have_no_text(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer("你好")["input_ids"]
    strange = [-1, -(10**9), tokenizer.vocab_size, 65023, 150527, 2**63]
    assert tokenizer.decode([*strange, *ids, *strange]) == "你好"
    assert tokenizer.convert_ids_to_tokens(strange) == [""] * len(strange)
    assert [tokenizer.decode(i) for i in strange] == [""] * len(strange)


def test_unknown_tokens_have_the_id_of_the_unknown_token(tokenizer: ChatGLMTokenizer) -> None:
    assert tokenizer.convert_tokens_to_ids("no-such-token") == tokenizer.convert_tokens_to_ids("<unk>")


def test_tokens_join_to_the_text_they_came_from(tokenizer: ChatGLMTokenizer) -> None:
    text = "Hello 世界\n  😀"
    assert tokenizer.convert_tokens_to_string(tokenizer.tokenize(text)) == text
    assert tokenizer.convert_tokens_to_string(["▁", "no-such-token", "▁", "<0xE4>"]) == "no-such-token \ufffd"


def test_a_text_of_ten_megabytes_comes_back_in_reasonable_time(published: ChatGLMTokenizer) -> None:
    line = "清华大学是中国著名的综合性研究型大学,位于北京。\n"
    text = line * (10_000_000 // len(line.encode()))
    start = time.monotonic()
    ids = published.encode_chat(text)
    assert len(ids) > len(text) // 4
    assert published.decode(ids).count("清华大学") == text.count("清华大学")
    assert time.monotonic() - start < 60  # a few seconds; the limit only catches what grows faster
