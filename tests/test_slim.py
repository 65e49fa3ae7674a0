"""A vocabulary slimmed to a corpus writes that corpus, and chats about it, with the same tokens as before."""

from __future__ import annotations

import copy
import hashlib
import pickle
import random
from collections.abc import Iterable
from pathlib import Path

import pytest
from google.protobuf import descriptor_pool
from test_tokenizer import nasty_strings
from transformers import AddedToken
from vocabularies import PUBLISHED, train_vocabulary

from chatglm.find import OURS
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.tools import slim
from chatglm.tools.slim import (
    Corpus,
    SlimVocabulary,
    check_same_ids,
    find_corpus,
    merged_pieces,
    slim_tokenizer,
    slim_vocabulary,
    used_ids,
)

CHINESE = """\
清华大学是中国著名的综合性研究型大学，位于北京市海淀区。
晚上睡不着应该怎么办？可以喝一杯热牛奶，听一听轻柔的音乐。
\t一、选择合适的床垫和枕头；
    二、睡前两小时不要看手机……

“学而时习之，不亦说乎？”——《论语》
价格：３９．５元（含税），电话 010-62782051。
龘靐齉爩，生僻字也要写得出来。
春眠不觉晓，处处闻啼鸟。夜来风雨声，花落知多少。
 行首有一个空格，行尾也有一个空格\x20
"""
ENGLISH = """\
The quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs.
It was the best of times, it was the worst of times.

def fibonacci(n: int) -> list[int]:
    a, b = 0, 1
    while len(numbers) < n:  # the first n numbers
        numbers.clear();\r
\treturn numbers
Don't panic: 42% of the naïve café-goers paid $3.50 (or €3,20)!
  two blanks in front and one behind\x20
Soft tokens such as [MASK], <sop> and </s> are words here; so are soprano and people.
"""
LANGUAGES = {"chinese": CHINESE, "english": ENGLISH}


def write_corpus(folder: Path, text: str) -> Corpus:
    path = folder / "corpus.txt"
    path.write_bytes(text.encode())
    return find_corpus(path)


def slimmed(tokenizer: ChatGLMTokenizer, corpus: Corpus) -> tuple[SlimVocabulary, ChatGLMTokenizer]:
    vocabulary = slim_vocabulary(tokenizer, used_ids(tokenizer, corpus, progress=False))
    return vocabulary, slim_tokenizer(tokenizer, vocabulary)


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def corpus(language: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp(language), LANGUAGES[language])


@pytest.fixture(scope="module")
def both(
    published: ChatGLMTokenizer, corpus: Corpus
) -> tuple[ChatGLMTokenizer, ChatGLMTokenizer, SlimVocabulary]:
    """The published tokenizer, the one slimmed to the corpus, and the smaller vocabulary."""
    vocabulary, new = slimmed(published, corpus)
    return published, new, vocabulary


def mapped(ids: Iterable[int], vocabulary: SlimVocabulary) -> list[int]:
    return [vocabulary.kept[index] for index in ids]


# ---- the published vocabularies


def test_a_vocabulary_shrinks_to_a_fraction_that_fits_the_corpus(both) -> None:
    old, new, vocabulary = both
    assert len(new) == len(vocabulary.kept) < len(old) / (10 if old.family == "chatglm" else 4)
    assert len(vocabulary.model) < len(old.sp_model.serialized_model_proto()) / 4


def test_ids_and_texts_of_the_corpus_are_those_of_the_original(both, language: str) -> None:
    old, new, vocabulary = both
    text = LANGUAGES[language]
    for part in [text, text.replace("\r", ""), *text.split("\n"), *text.splitlines(keepends=True)]:
        ids = new(part)["input_ids"]
        assert mapped(ids, vocabulary) == old(part)["input_ids"], part
        assert new.decode(ids) == old.decode(old(part)["input_ids"])


def test_ids_of_chats_about_the_corpus_are_those_of_the_original(both, language: str) -> None:
    old, new, vocabulary = both
    lines, rng = [line for line in LANGUAGES[language].splitlines() if line], random.Random(0)
    for rounds in (0, 1, 2, 12, 345):
        history = [(rng.choice(lines), rng.choice(lines)) for _ in range(rounds)]
        query = rng.choice(lines)
        assert mapped(new.encode_chat(query, history), vocabulary) == old.encode_chat(query, history)
        if old.family == "chatglm2":
            continued = new.encode_chat_continuation(query, history)
            assert mapped(continued, vocabulary) == old.encode_chat_continuation(query, history)


def test_any_other_text_comes_back_as_from_the_original_and_without_unknown_tokens(both) -> None:
    old, new, _ = both
    unknown = new.convert_tokens_to_ids("<unk>")
    for text in nasty_strings(seed=4, count=400):
        ids = new(text, add_special_tokens=False)["input_ids"]
        before = old(text, add_special_tokens=False)["input_ids"]
        assert new.decode(ids) == old.decode(before), repr(text)
        assert ids.count(unknown) == before.count(old.convert_tokens_to_ids("<unk>"))


def test_every_text_whose_tokens_are_kept_has_the_same_ids(both) -> None:
    old, new, vocabulary = both
    kept, new_ids = set(vocabulary.kept), vocabulary.new_ids
    rng, held = random.Random(5), 0
    for _ in range(3000):
        pieces = rng.sample(vocabulary.kept, rng.randint(1, 6))
        text = old.decode(pieces).replace("\ufffd", "")
        ids = old._encode_plain(text)
        if kept.issuperset(ids):
            held += 1
            assert new._encode_plain(text) == [new_ids[index] for index in ids], repr(text)
    assert held > 1000


def test_a_text_of_one_character_keeps_its_ids(both) -> None:
    old, new, vocabulary = both
    pieces = old.sp_model.id_to_piece(list(range(old.sp_model.get_piece_size())))
    characters = [piece for piece in pieces if len(piece) == 1]
    assert len(characters) > 6000
    for character in characters:
        assert mapped(new.encode(character), vocabulary) == old.encode(character)


def test_pieces_keep_order_score_and_kind_and_low_ids_their_place(both) -> None:
    old, new, vocabulary = both
    assert vocabulary.kept == sorted(set(vocabulary.kept))
    pieces = range(new.sp_model.get_piece_size())
    for question in ("id_to_piece", "get_score", "is_control", "is_byte", "is_unknown", "is_unused"):
        answers = getattr(new.sp_model, question)(list(pieces))
        assert answers == getattr(old.sp_model, question)(vocabulary.kept[: len(pieces)]), question
    low = 6 if old.family == "chatglm" else 259  # up to the blank mark; up to the last byte
    assert vocabulary.kept[:low] == list(range(low))
    assert [new.convert_ids_to_tokens(index) for index in range(len(new))] == [
        old.convert_ids_to_tokens(index) for index in vocabulary.kept
    ]


def test_special_ids_keep_their_distances_and_prompts_their_special_tokens(both) -> None:
    old, new, vocabulary = both
    for name in ("gmask_token_id", "sop_token_id", "eop_token_id", "end_token_id", "pad_token_id"):
        assert vocabulary.new_ids[getattr(old, name)] == getattr(new, name)
    for name in ("[MASK]", "[gMASK]", "[sMASK]"):
        assert vocabulary.new_ids[old.get_command(name)] == new.get_command(name)
    assert new.sop_token_id - new.gmask_token_id == old.sop_token_id - old.gmask_token_id
    messages = [{"role": "user", "content": "a"}]
    assert new.chat_template == old.chat_template
    assert new.apply_chat_template(messages, return_dict=False) == [
        vocabulary.new_ids[index] for index in old.apply_chat_template(messages, return_dict=False)
    ]


def test_the_check_passes_on_the_corpus_and_names_the_first_line_of_another_that_differs(
    both, corpus: Corpus, tmp_path: Path
) -> None:
    old, new, vocabulary = both
    check_same_ids(old, new, vocabulary.kept, corpus, progress=False)
    known = corpus.files[0].read_text(encoding="utf-8").splitlines()
    (tmp_path / "more.txt").write_text(
        "\n".join([*known, "Конституция Российской Федерации 宪法学教科书", *known]), encoding="utf-8"
    )
    with pytest.raises(ValueError, match=rf"Line {len(known) + 1} of .*more\.txt .*Конституция"):
        check_same_ids(old, new, vocabulary.kept, find_corpus(tmp_path), progress=False)


def test_the_check_finds_tokens_that_have_another_text_or_name(both, corpus: Corpus) -> None:
    old, new, vocabulary = both
    for table in ("_surfaces", "_id_to_token"):
        broken = copy.deepcopy(new)
        getattr(broken, table)[777] = "?"
        with pytest.raises(ValueError, match="has other tokens"):
            check_same_ids(old, broken, vocabulary.kept, corpus, progress=False)
    with pytest.raises(ValueError, match="has other tokens"):
        check_same_ids(old, new, vocabulary.kept[::-1], corpus, progress=False)


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])  # noqa: S301
def test_copies_of_a_slimmed_tokenizer_are_equal(both, language: str, copies) -> None:
    _, new, _ = both
    other = copies(new)
    assert other.get_vocab() == new.get_vocab()
    assert other(LANGUAGES[language])["input_ids"] == new(LANGUAGES[language])["input_ids"]


def test_a_slimmed_tokenizer_is_the_same_after_saving_and_loading(both, language, tmp_path: Path) -> None:
    old, new, vocabulary = both
    new.save_pretrained(tmp_path)
    assert (tmp_path / PUBLISHED[old.family].split("/")[1]).read_bytes() == vocabulary.model
    assert not [path for path in tmp_path.glob("*.json") if "tmp" in path.read_text(encoding="utf-8")]
    again = ChatGLMTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == new.get_vocab()
    assert again.special_tokens_map == new.special_tokens_map == old.special_tokens_map
    assert again.added_tokens_decoder == new.added_tokens_decoder
    assert again.encode_chat("a", [(LANGUAGES[language], "b")]) == new.encode_chat(
        "a", [(LANGUAGES[language], "b")]
    )


def test_a_vocabulary_of_which_all_is_kept_has_the_same_bytes(published: ChatGLMTokenizer) -> None:
    vocabulary = slim_vocabulary(published, range(len(published)))
    assert vocabulary.kept == list(range(len(published)))
    assert vocabulary.model == published.sp_model.serialized_model_proto()


def test_without_a_corpus_bytes_special_tokens_and_single_characters_are_all_that_stays(published) -> None:
    vocabulary = slim_vocabulary(published, ())
    tokens = set(published.convert_ids_to_tokens(vocabulary.kept))
    special = {f"<0x{n:02X}>" for n in range(256)} | published._control_tokens | set(published._white_space)
    assert special <= tokens
    assert {len(token.removeprefix("▁")) for token in tokens - special} == {0, 1}


# ---- why the ids are the same


def test_merging_gives_the_pieces_that_sentencepiece_gives(shared: Path) -> None:
    tokenizer = ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED["chatglm2"])
    model = tokenizer.sp_model
    ids = list(range(259, model.get_piece_size()))
    scores = dict(zip(model.id_to_piece(ids), model.get_score(ids), strict=True))
    rng = random.Random(6)
    for piece in rng.sample([piece for piece in scores if len(piece) > 2 and piece[0] == "▁"], 2000):
        alone = model.encode(piece[1:]) == [model.piece_to_id(piece)]  # behind the blank of its own
        assert (merged_pieces(piece, scores)[-1:] == [piece]) == alone, piece


def test_of_equal_merges_the_leftmost_comes_first(tmp_path: Path) -> None:
    scores = {"ab": -1.0, "bc": -1.0, "cd": -2.0, "abcd": -3.0} | dict.fromkeys("▁abcd", -9.0)
    tokenizer = ChatGLMTokenizer(model_file(tmp_path / "tokenizer.model", scores, slim._BPE))
    assert tokenizer.tokenize("abcd") == ["▁", "abcd"]
    assert merged_pieces("abcd", scores) == ["ab", "cd", "abcd"]


def test_pieces_on_the_way_to_a_kept_piece_are_kept(both) -> None:
    old, _, vocabulary = both
    if old.family == "chatglm":
        pytest.skip("unigram pieces do not come about by merging")
    model = old.sp_model
    ids = list(range(259, model.get_piece_size()))
    scores = dict(zip(model.id_to_piece(ids), model.get_score(ids), strict=True))
    kept = set(old.convert_ids_to_tokens(vocabulary.kept))
    for piece in kept & scores.keys():
        assert kept.issuperset(merged_pieces(piece, scores)), piece


def model_file(path: Path, pieces: dict[str, float], kind: int = slim._UNIGRAM) -> Path:
    """A model file with these pieces and scores."""
    proto = slim._message_class("ModelProto")()
    for name, special in (("<unk>", 2), ("<s>", 3), ("</s>", 3)):
        proto.pieces.add(piece=name, type=special)
    for name, score in pieces.items():
        proto.pieces.add(piece=name, score=score)
    proto.trainer_spec = bytes([0x18, kind])  # model_type
    identity = b"\x0a\x08identity"
    path.write_bytes(proto.SerializeToString() + b"\x1a" + bytes([len(identity)]) + identity)
    return path


def test_the_price_of_an_unknown_character_stays_though_the_corpus_lacks_the_lowest_piece(
    tmp_path: Path,
) -> None:
    # ☃ is unknown: by itself it costs 10 more than the lowest piece.
    scores = {"▁": -1.0, "x": -1.0, "yz": -1.0, "x☃y": -30.0, "z": -30.0, "y": -30.0, "rare": -100.0}
    old = ChatGLMTokenizer(model_file(tmp_path / "tokenizer.model", scores))
    assert old.tokenize("x☃yz") == ["▁", "x☃y", "z"]
    vocabulary = slim_vocabulary(old, old.encode("x☃yz") + old.encode("yz"))
    new = slim_tokenizer(old, vocabulary)
    assert "rare" in new.get_vocab()
    assert new.tokenize("x☃yz") == ["▁", "x☃y", "z"]


def test_of_equal_paths_the_same_one_wins(tmp_path: Path) -> None:
    scores = {"▁": -1.0} | dict.fromkeys("abcd", -9.0)
    scores |= dict.fromkeys(["ab", "cd", "abc", "bcd", "bc", "abcd", "da", "dab", "cda"], -4.0)
    old = ChatGLMTokenizer(model_file(tmp_path / "tokenizer.model", scores))
    rng = random.Random(7)
    for _ in range(200):
        text = "".join(rng.choice("abcd") for _ in range(rng.randint(1, 9)))
        vocabulary = slim_vocabulary(old, old.encode(text))
        new = slim_tokenizer_of_model(vocabulary, tmp_path / "new.model")
        assert new.tokenize(text) == old.tokenize(text)


def slim_tokenizer_of_model(vocabulary: SlimVocabulary, path: Path) -> ChatGLMTokenizer:
    path.write_bytes(vocabulary.model)
    return ChatGLMTokenizer(path)


def test_samples_of_the_trainer_that_need_dropped_pieces_are_dropped(tmp_path: Path) -> None:
    file = model_file(tmp_path / "tokenizer.model", {"▁": -1.0, "a": -2.0, "aa": -1.0})
    sample = b"\x0a\x02aa\x12\x06\xe2\x96\x81 aa"
    file.write_bytes(file.read_bytes() + b"\x22" + bytes([len(sample) + 2, 0x0A, len(sample)]) + sample)
    old = ChatGLMTokenizer(file)
    assert not slim._message_class("ModelProto").FromString(slim_vocabulary(old, ()).model).self_test_data


# ---- other tokenizers


@pytest.mark.parametrize("name", OURS)
def test_the_tokenizers_of_the_demo_models_are_slimmed_too(name: str, corpus: Corpus) -> None:
    old = ChatGLMTokenizer.from_pretrained(OURS[name])
    vocabulary, new = slimmed(old, corpus)
    assert len(new) < len(old) and new.family == old.family
    check_same_ids(old, new, vocabulary.kept, corpus, progress=False)
    for text in nasty_strings(seed=8, count=100):
        assert new.decode(new.encode(text)) == old.decode(old.encode(text))


def before_v1_1(shared: Path, folder: Path) -> Path:
    """The ice_text.model of v0.1 and Slim, which lacks what the tokenizer appends."""
    proto = slim._message_class("ModelProto")()
    proto.ParseFromString((shared / "tokenizers" / PUBLISHED["chatglm"]).read_bytes())
    del proto.pieces[130000:]
    proto.trainer_spec = proto.trainer_spec.replace(b"\x98\x02\x01", b"")  # byte_fallback
    path = folder / "ice_text.model"
    path.write_bytes(proto.SerializeToString())
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert digest == "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"
    return path


@pytest.mark.parametrize("images", [20000, 0], ids=["v0.1", "Slim"])
def test_image_ids_go_and_the_settings_of_the_older_checkpoints_stay(
    shared: Path, tmp_path: Path, corpus: Corpus, images: int
) -> None:
    old = ChatGLMTokenizer(
        before_v1_1(shared, tmp_path), num_image_tokens=images, eos_token="</s>", eop_token="<eop>"
    )
    used = used_ids(old, corpus, progress=False)
    assert min(used) >= images
    vocabulary, new = slimmed(old, corpus)
    assert new.num_image_tokens == 0 and min(vocabulary.kept) == images
    check_same_ids(old, new, vocabulary.kept, corpus, progress=False)
    assert (new.eos_token, new.eop_token_id) == ("</s>", vocabulary.new_ids[old.eop_token_id])
    assert mapped(new.encode("一"), vocabulary) == old.encode("一")
    new.save_pretrained(tmp_path / "new")
    again = ChatGLMTokenizer.from_pretrained(tmp_path / "new")
    assert again.num_image_tokens == 0 and again.get_vocab() == new.get_vocab()
    assert again.build_inputs_with_special_tokens([7]) == new.build_inputs_with_special_tokens([7])


def test_image_ids_alone_are_dropped_when_all_ids_are_used(shared: Path) -> None:
    old = ChatGLMTokenizer(shared / "tokenizers" / PUBLISHED["chatglm"], num_image_tokens=20000)
    vocabulary = slim_vocabulary(old, range(len(old)))
    assert vocabulary.kept == list(range(20000, len(old)))
    assert slim_tokenizer(old, vocabulary).get_vocab().keys() == {
        token for token in old.get_vocab() if not token.startswith("<image_")
    }


def test_added_tokens_move_along_with_their_settings(published: ChatGLMTokenizer, tmp_path: Path) -> None:
    old = copy.deepcopy(published)
    old.add_tokens(["<new>", AddedToken("cat", single_word=True), "Constitution"])
    old.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    piece = old.convert_tokens_to_ids("Constitution")  # which is a piece of one of the two vocabularies
    text = "一只 cat <new>大学<tool> concatenate Constitution."
    vocabulary, new = slimmed(old, write_corpus(tmp_path, text))
    assert piece in vocabulary.kept
    assert mapped(new.encode(text), vocabulary) == old.encode(text)
    assert new.decode(new.encode(text)) == old.decode(old.encode(text))
    for index, token in old.added_tokens_decoder.items():
        assert new.added_tokens_decoder[vocabulary.new_ids[index]] == token
    assert new.extra_special_tokens == ["<tool>"]
    assert len(new) == len(vocabulary.kept) == max(new.get_vocab().values()) + 1


def test_ids_between_added_tokens_stay_since_the_model_may_know_them(
    published: ChatGLMTokenizer, tmp_path: Path
) -> None:
    # As ChatGLM3, whose tokenizer_config.json does not name the first of the roles above its vocabulary.
    size = published.vocab_size
    roles = {size + 1: AddedToken("<|user|>", special=True), size + 3: AddedToken("<|bot|>", special=True)}
    published.save_vocabulary(str(tmp_path))
    (file,) = tmp_path.iterdir()
    old = ChatGLMTokenizer(file, added_tokens_decoder=roles)
    vocabulary = slim_vocabulary(old, ())
    new = slim_tokenizer(old, vocabulary)
    assert vocabulary.kept[-4:] == list(range(size, size + 4))
    assert new.convert_tokens_to_ids(["<|user|>", "<|bot|>"]) == [len(new) - 3, len(new) - 1]


def test_lines_and_texts_with_added_tokens_in_them_are_kept_on_both_sides(
    published: ChatGLMTokenizer, tmp_path: Path
) -> None:
    old = copy.deepcopy(published)
    old.add_tokens(["<new>"])
    text = "Constitution<new>Constitution\nuniversity <new>university"
    vocabulary, new = slimmed(old, write_corpus(tmp_path, text))
    for part in ["Constitution", "<new>Constitution", "university<new>university", text]:
        assert mapped(new.encode(part), vocabulary) == old.encode(part)


@pytest.mark.parametrize("index", [-1, 10**6])
def test_an_id_that_the_tokenizer_does_not_have_is_named(tokenizer: ChatGLMTokenizer, index: int) -> None:
    with pytest.raises(ValueError, match=rf"^{index} is no id of the tokenizer, which has {len(tokenizer)}"):
        slim_vocabulary(tokenizer, [7, index])


def test_the_tokenizer_that_is_slimmed_stays_as_it_was(tokenizer: ChatGLMTokenizer, tmp_path: Path) -> None:
    before = tokenizer.get_vocab(), dict(tokenizer.init_kwargs), tokenizer("你好 world")["input_ids"]
    slimmed(tokenizer, write_corpus(tmp_path, "你好"))
    assert before == (tokenizer.get_vocab(), tokenizer.init_kwargs, tokenizer("你好 world")["input_ids"])


def test_many_texts_are_encoded_as_each_alone(published: ChatGLMTokenizer) -> None:
    texts = nasty_strings(seed=9, count=100)
    assert slim._encode(published, texts) == [published._encode_plain(text) for text in texts]


def test_settings_that_change_texts_are_followed(family: str, tmp_path: Path) -> None:
    file = train_vocabulary(family, tmp_path)
    old = ChatGLMTokenizer(file, do_lower_case=True, remove_space=True)
    vocabulary, new = slimmed(old, write_corpus(tmp_path, "HELLO   WORLD"))
    assert (new.do_lower_case, new.remove_space) == (True, True)
    assert mapped(new.encode("HELLO   WORLD"), vocabulary) == old.encode("HELLO   WORLD")


# ---- corpora


def test_folders_are_searched_and_what_is_no_text_is_counted(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "deep.md").write_text("深", encoding="utf-8")
    (tmp_path / "a.txt").write_text("eins\n", encoding="utf-8")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "cut.txt").write_bytes("深".encode()[:2])
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    found = find_corpus([tmp_path, tmp_path / "a.txt"])
    assert [file.name for file in found.files] == ["a.txt", "deep.md"]
    assert (found.skipped, found.nbytes) == (4, 8)


def test_a_named_file_that_is_not_utf_8_is_an_error_with_its_name(tmp_path: Path) -> None:
    path = tmp_path / "old.txt"
    path.write_bytes("中文".encode("gb18030"))
    with pytest.raises(ValueError, match=r"old\.txt is not text in UTF-8"):
        find_corpus(path)


def test_a_path_that_is_not_there_is_an_error_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"no file or folder .*nowhere"):
        find_corpus([tmp_path / "nowhere"])


def test_a_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "image.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"holds no text in UTF-8 \(1 files of other kinds were found\)"):
        find_corpus(str(tmp_path))


def test_a_line_too_long_for_memory_is_an_error_with_its_file(tmp_path: Path) -> None:
    path = tmp_path / "one-line.json"
    path.write_bytes(b"short\n" + b"x" * slim.LONGEST_LINE + b"y\nshort")
    with pytest.raises(ValueError, match=rf"one-line\.json has a line of {slim.LONGEST_LINE + 1:,} bytes"):
        find_corpus(path)
    path.write_bytes(b"short\n" + b"x" * slim.LONGEST_LINE + b"\nshort")
    assert find_corpus(path).files == (path,)


def test_a_large_file_is_read_in_passages_that_overlap_by_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slim, "PASSAGE", 64)
    lines = [f"第{number}行\r\n" for number in range(100)]
    corpus = write_corpus(tmp_path, "\ufeff" + "".join(lines))
    passages = list(corpus.passages("reading", progress=False))
    assert len(passages) > 5 and max(passage.nbytes for passage in passages) < 128
    assert sum(passage.nbytes for passage in passages) == corpus.nbytes
    read = list(passages[0].lines)
    for passage in passages[1:]:
        assert passage.lines[0] == read[-1] == lines[passage.first_line - 1]
        read += passage.lines[1:]
    assert read == lines  # without the byte order mark


@pytest.mark.parametrize("passage", [1, 1 << 20])
def test_what_stands_behind_a_newline_is_kept_wherever_a_passage_ends(
    published: ChatGLMTokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passage: int
) -> None:
    monkeypatch.setattr(slim, "PASSAGE", passage)
    monkeypatch.setattr(slim, "ROUNDS", 1)  # so many lines are one text
    text = "Constitution\n//university\n**laboratory\n"  # "//" is "▁//" in front and "://" in a chat
    vocabulary, new = slimmed(published, write_corpus(tmp_path, text))
    assert mapped(new.encode(text), vocabulary) == published.encode(text)


def test_lines_that_end_as_on_windows_are_kept_with_either_line_end(tmp_path: Path) -> None:
    scores = {"▁": -1.0, "xy": -1.0, "xy\r": -1.0} | dict.fromkeys("xy\r\n", -9.0)
    old = ChatGLMTokenizer(model_file(tmp_path / "tokenizer.model", scores))
    used = used_ids(old, write_corpus(tmp_path, "xy\r\n"), progress=False)
    assert used >= set(old.convert_tokens_to_ids(["xy", "xy\r"]))


def test_numbers_of_rounds_that_are_pieces_are_kept(tmp_path: Path) -> None:
    scores = {"▁": -1.0, "345": -1.0} | dict.fromkeys("0123456789", -2.0)
    old = ChatGLMTokenizer(model_file(tmp_path / "tokenizer.model", scores))
    corpus = write_corpus(tmp_path, "x")
    assert old.convert_tokens_to_ids("345") in used_ids(old, corpus, progress=False)


def test_progress_is_shown_in_bytes_and_only_when_asked(
    tokenizer: ChatGLMTokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_corpus(tmp_path, "x\n" * 5000)
    used_ids(tokenizer, corpus, progress=False)
    assert capsys.readouterr() == ("", "")
    used_ids(tokenizer, corpus)
    out, err = capsys.readouterr()
    assert out == "" and "reading the corpus: 100%" in err and "10.0k/10.0k" in err


# ---- protobuf


def test_our_message_meets_no_other_module_for_sentencepiece_files() -> None:
    # sentencepiece and transformers register such modules in the pool of the process, where they clash.
    assert slim._message_class("ModelProto").DESCRIPTOR.file.pool is not descriptor_pool.Default()
