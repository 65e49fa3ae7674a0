"""The streaming decoder: whole characters only, and together exactly what `decode` returns."""

from __future__ import annotations

import copy
import random
import time

import numpy
import pytest
import torch

from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer, complete_characters

TEXT = "你好 👋🏽, 世界!\n\tdef f(x):\n        return x  # é 한국어 𠮷"


def random_ids(tokenizer: ChatGLMTokenizer, rng: random.Random) -> list[int]:
    """Ids of every kind, also broken characters and ids outside the vocabulary."""
    vocab = tokenizer.get_vocab()
    byte = [vocab[f"<0x{n:02X}>"] for n in range(256)]
    special = [vocab[token] for token in sorted(tokenizer._control_tokens)]
    kinds = [
        lambda: [rng.choice(byte) for _ in range(rng.randint(1, 5))],
        lambda: [byte[b] for b in chr(rng.randint(0x10000, 0x10FFFF)).encode()[: rng.randint(1, 4)]],
        lambda: [rng.choice(special)],
        lambda: [vocab["▁"]] * rng.randint(1, 3),
        lambda: [rng.choice([-1, tokenizer.vocab_size + 5, 2**40])],
        lambda: [rng.randrange(tokenizer.vocab_size) for _ in range(3)],
        lambda: tokenizer._encode_plain("x" + " " * rng.randint(1, 90) + "\n\t好😀")[rng.randint(0, 3) :],
    ]
    return [index for _ in range(rng.randint(0, 9)) for index in rng.choice(kinds)()]


@pytest.mark.parametrize("skip", [False, True], ids=["all", "skip-special"])
def test_deltas_join_to_decode_for_any_ids(published: ChatGLMTokenizer, skip: bool) -> None:
    rng = random.Random(7)
    for _ in range(250):
        ids = random_ids(published, rng)
        one_by_one, in_chunks = published.stream_decoder(skip), published.stream_decoder(skip)
        single = [one_by_one.put(index) for index in ids] + [one_by_one.flush()]
        chunks, rest = [], list(ids)
        while rest:
            size = rng.randint(1, 4)
            chunks.append(in_chunks.put(rest[:size]))
            rest = rest[size:]
        chunks.append(in_chunks.flush())
        expected = published.decode(ids, skip_special_tokens=skip)
        assert "".join(single) == one_by_one.text == expected, ids
        assert "".join(chunks) == in_chunks.text == expected, ids


def test_half_a_character_is_never_shown(tokenizer: ChatGLMTokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer._encode_plain(TEXT)
    shown, held_back = "", 0
    for index in ids:
        shown += decoder.put(index)
        held_back += decoder.pending
        assert "\ufffd" not in shown
        assert tokenizer.decode(ids).startswith(shown)
    assert held_back > 10, "the small vocabulary must spell rare characters in bytes"
    assert decoder.flush() == "" and shown == tokenizer.decode(ids)


def test_an_unfinished_character_at_the_end_becomes_one_mark_a_byte(tokenizer: ChatGLMTokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    vocab = tokenizer.get_vocab()
    ids = [vocab[f"<0x{byte:02X}>"] for byte in "😀".encode()[:3]]
    assert decoder.put(ids) == "" and decoder.pending
    assert decoder.flush() == "\ufffd" * 3 == tokenizer.decode(ids)
    assert not decoder.pending and decoder.flush() == ""


def test_the_blank_in_front_is_dropped_once_and_only_there(tokenizer: ChatGLMTokenizer) -> None:
    blank = tokenizer.convert_tokens_to_ids("▁")
    decoder = tokenizer.stream_decoder()
    letter = tokenizer.convert_tokens_to_ids("<0x61>")
    texts = [decoder.put(i) for i in (tokenizer.sop_token_id, blank, letter, blank, letter)]
    assert "".join(texts) == "a a"


def test_ids_come_as_numbers_lists_tensors_and_arrays(tokenizer: ChatGLMTokenizer) -> None:
    ids = tokenizer._encode_plain(TEXT)
    for many in (ids, tuple(ids), torch.tensor(ids), numpy.array(ids)):
        decoder = tokenizer.stream_decoder()
        assert decoder.put(many) + decoder.flush() == tokenizer.decode(ids)
    decoder = tokenizer.stream_decoder()
    for one in torch.tensor(ids):
        decoder.put(one)
    for one in numpy.array(ids):
        decoder.put(one)
    assert decoder.text.startswith(tokenizer.decode(ids))


def test_added_tokens_are_shown_unless_special_ones_are_skipped(tokenizer: ChatGLMTokenizer) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    ids = tokenizer("a<tool>", add_special_tokens=False)["input_ids"]
    assert tokenizer.stream_decoder().put(ids) == "a<tool>"
    assert tokenizer.stream_decoder(skip_special_tokens=True).put(ids) == "a"


def test_a_token_costs_the_same_at_the_end_of_a_long_text(tokenizer: ChatGLMTokenizer) -> None:
    decoder = tokenizer.stream_decoder()
    ids = tokenizer._encode_plain(TEXT) * 20

    def seconds() -> float:
        start = time.perf_counter()
        for index in ids:
            decoder.put(index)
        return time.perf_counter() - start

    seconds()
    first = min(seconds() for _ in range(3))
    decoder.put(ids * 200)
    last = min(seconds() for _ in range(3))
    assert last < 5 * first


@pytest.mark.parametrize(
    ("data", "text", "rest"),
    [
        (b"", "", b""),
        ("你".encode(), "你", b""),
        ("你".encode()[:2], "", "你".encode()[:2]),
        (b"\xe4A", "\ufffdA", b""),
        (b"\xe4\xbdA", "\ufffd\ufffdA", b""),
        (b"\x80\xff", "\ufffd\ufffd", b""),
        (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd", b""),
        (b"\xc0\x80", "\ufffd\ufffd", b""),
        (b"\xf4\x90", "\ufffd\ufffd", b""),
        ("a\ufffd".encode() + b"\xf0\x9f", "a\ufffd", b"\xf0\x9f"),
    ],
)
def test_bytes_become_characters_as_far_as_they_are_decided(data: bytes, text: str, rest: bytes) -> None:
    assert complete_characters(data) == (text, rest)
