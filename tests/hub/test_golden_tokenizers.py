"""The tokenizers, loaded as users load them, against what the published tokenizers answered.

Where we differ on purpose, the test says so: no clean-up after decoding unless asked for, ids outside
the vocabulary decode to nothing instead of raising, masks have two dimensions with 1 for "keep", and
no two tokens share the name "".
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
OLD_FILE_SHA256 = "99871e0c85db81ad7af1028854fd091cd5778c8414ae9d94bbbc10d02c831c21"
SIZES = {"v0": {"vocab_size": 150528, "bos_token_id": 150004}, "slim": {"vocab_size": 130528}}

# golden file, which ice_text.model, how the image ids of v0.1 become known
CASES = [
    pytest.param(("v1", "new", None), id="v1.1"),
    pytest.param(("v1", "old", None), id="v1.1-file-of-130000-pieces"),
    pytest.param(("v2", "new", None), id="v2"),
    pytest.param(("v0", "old", "config"), id="v0.1"),
    pytest.param(("v0", "new", "config"), id="v0.1-file-of-130344-pieces"),
    pytest.param(("v0", "old", "argument"), id="v0.1-without-config.json"),
    pytest.param(("slim", "old", "config"), id="slim"),
    pytest.param(("slim", "new", None), id="slim-file-of-130344-pieces"),
]


def without_appended_pieces(model: bytes) -> bytes:
    """Make the 130000-piece ice_text.model of v0.1 and Slim from the later one."""
    output, pieces = bytearray(), 0
    for field, whole, content in fields(model):
        pieces += field == 1
        if field == 2:  # the trainer's settings, without byte_fallback
            settings = b"".join(raw for number, raw, _ in fields(content) if number != 35)
            whole = bytes([0x12]) + varint(len(settings)) + settings
        if field != 1 or pieces <= 130000:
            output += whole
    return bytes(output)


def fields(message: bytes):
    """Yield (number, bytes of the whole field, its content) of a serialised protobuf message."""
    position = 0
    while position < len(message):
        start = position
        key, position = read_varint(message, position)
        if key & 7 == 2:
            length, position = read_varint(message, position)
        elif key & 7 == 0:
            _, end = read_varint(message, position)
            length = end - position
        else:
            length = {1: 8, 5: 4}[key & 7]
        yield key >> 3, message[start : position + length], message[position : position + length]
        position += length


def read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (data[position] & 127) << shift
        position, shift = position + 1, shift + 7
        if data[position - 1] < 128:
            return value, position


def varint(value: int) -> bytes:
    return bytes([value | 128 if value > 127 else value]) + (varint(value >> 7) if value > 127 else b"")


@pytest.fixture(scope="module")
def old_file(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    new = (shared / "tokenizers" / "chatglm-6b" / "ice_text.model").read_bytes()
    path = tmp_path_factory.mktemp("old") / "ice_text.model"
    path.write_bytes(without_appended_pieces(new))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == OLD_FILE_SHA256
    return path


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, shared: Path, old_file: Path, tmp_path_factory: Any):
    """(golden, tokenizer loaded from a folder, name of the golden)."""
    name, file, sizes = request.param
    golden = json.loads((shared / "golden" / f"tokenizer_{name}.json").read_text(encoding="utf-8"))
    family = "chatglm2-6b/tokenizer.model" if name == "v2" else "chatglm-6b/ice_text.model"
    source = old_file if file == "old" else shared / "tokenizers" / family
    folder = tmp_path_factory.mktemp(name)
    shutil.copy(ROOT / "tokenization_chatglm.py", folder)
    shutil.copy(source, folder)
    (folder / "tokenizer_config.json").write_text(json.dumps(golden["tokenizer_config"]))
    if sizes == "config":
        shutil.copy(ROOT / "configuration_chatglm.py", folder)
        config = {
            "model_type": "chatglm",
            "position_encoding_2d": True,
            "auto_map": {"AutoConfig": "configuration_chatglm.ChatGLMConfig"},
            **SIZES[name],
        }
        (folder / "config.json").write_text(json.dumps(config))
    arguments = {"num_image_tokens": 20000} if sizes == "argument" else {}
    return golden, AutoTokenizer.from_pretrained(folder, trust_remote_code=True, **arguments), name


# For v0.1 and Slim only strings, properties and built inputs were recorded.
RECORDED_IN_FULL = pytest.mark.parametrize("case", CASES[:3], indirect=True)


def test_strings_get_the_published_ids_and_come_back_as_the_published_text(case) -> None:
    golden, tokenizer, _ = case
    assert len(golden["strings"]) > 60
    for entry in golden["strings"]:
        text, label = entry["text"], entry["name"]
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == entry["ids"], label
        assert tokenizer(text)["input_ids"] == entry["ids_special"], label
        assert tokenizer.encode(text) == entry["ids_special"], label
        # v0.1 answers None for no ids; its and Slim's decode never cleans up.
        plain = {key: entry.get(f"{key}_noclean", entry[key]) or "" for key in ("decode", "decode_special")}
        assert tokenizer.decode(entry["ids"]) == plain["decode"], label
        assert tokenizer.decode(entry["ids_special"]) == plain["decode_special"], label


def test_decoding_as_published_with_clean_up_and_without_special_tokens(case) -> None:
    golden, tokenizer, name = case
    cleans = name == "v1"  # by default there, on request here
    for entry in [e for e in golden["strings"] if "decode_skip_special" in e]:
        ids, label = entry["ids_special"], entry["name"]
        options = {"clean_up_tokenization_spaces": cleans}
        assert tokenizer.decode(entry["ids"], **options) == entry["decode"], label
        assert tokenizer.decode(ids, **options) == entry["decode_special"], label
        skipped = tokenizer.decode(ids, skip_special_tokens=True, **options)
        assert skipped == entry["decode_skip_special"], label


@RECORDED_IN_FULL
def test_id_lists_that_come_from_no_text_decode_as_published(case) -> None:
    golden, tokenizer, name = case
    for entry in golden["decode_cases"]:
        expected = entry.get("decode_noclean", entry["decode"])
        skipped = entry["decode_skip_special"]
        # The published code raised IndexError outside the vocabulary; ours decodes to nothing.
        expected, skipped = ("" if isinstance(text, dict) else text for text in (expected, skipped))
        assert tokenizer.decode(entry["ids"]) == expected, entry
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": name == "v1"}
        assert tokenizer.decode(entry["ids"], **options) == skipped, entry


def test_properties_are_the_published_ones(case) -> None:
    golden, tokenizer, name = case
    expected = dict(golden["properties"])
    assert len(tokenizer) == expected.pop("len")
    assert {t: tokenizer.convert_tokens_to_ids(t) for t in expected["token_to_id"]} == expected.pop(
        "token_to_id"
    )
    added = expected.pop("num_special_tokens_to_add")
    assert tokenizer.num_special_tokens_to_add(pair=False) == added["single"]
    assert tokenizer.num_special_tokens_to_add(pair=True) == added["pair"]
    if name == "v2":
        assert tokenizer.get_prefix_tokens() == expected.pop("prefix_tokens")
        commands = expected.pop("commands")
        assert {command: tokenizer.get_command(command) for command in commands} == commands
    else:
        # v1.1 names position_ids too and v0.1 no mask; ours returns ids and a mask for all of them.
        expected["model_input_names"] = ["input_ids", "attention_mask"]
    assert {key: getattr(tokenizer, key) for key in expected} == expected


@RECORDED_IN_FULL
def test_every_id_has_the_published_token(case) -> None:
    golden, tokenizer, _ = case
    for index, token in golden["id_to_token"].items():
        ours = tokenizer.convert_ids_to_tokens(int(index))
        if isinstance(token, dict) or int(index) < 0:
            assert ours == "", index  # outside the vocabulary: an error, or a made-up image token
        elif token == "":
            # The published ChatGLM2 code gives seven ids the same name "", which breaks add_tokens.
            assert tokenizer.convert_tokens_to_ids(ours) == int(index)
            assert tokenizer.decode([int(index)]) == ""
        else:
            assert ours == token, index


def test_special_tokens_stand_around_inputs_as_published(case) -> None:
    golden, tokenizer, _ = case
    for entry in golden["build_inputs"]:
        assert tokenizer.build_inputs_with_special_tokens(entry["a"], entry["b"]) == entry["out"], entry


@RECORDED_IN_FULL
def test_prompts_of_a_chat_are_the_published_ones(case) -> None:
    golden, tokenizer, _ = case
    for entry in golden["chat_prompts"]:
        chat = entry["query"], entry["history"]
        assert tokenizer.build_prompt(*chat) == entry["prompt"]
        assert tokenizer.encode_chat(*chat) == entry["input_ids"]
        if "stream_input_ids" in entry:
            encoded = tokenizer(entry["prompt"])
            assert encoded["input_ids"] == entry["input_ids"]
            assert encoded["position_ids"] == entry["position_ids"]
            assert encoded["attention_mask"] == entry["attention_mask"]
            assert tokenizer.encode_chat_continuation(*chat) == entry["stream_input_ids"]


@RECORDED_IN_FULL
def test_answers_are_tidied_as_published(case) -> None:
    golden, tokenizer, _ = case
    module = __import__(type(tokenizer).__module__, fromlist=["process_response"])
    for entry in golden["process_response"]:
        assert module.process_response(tokenizer.family, entry["in"]) == entry["out"], entry


@RECORDED_IN_FULL
def test_batches_are_padded_as_published(case, shared: Path) -> None:
    golden, tokenizer, name = case
    recorded = load_file(shared / "golden" / f"tokenizer_{name}_batches.safetensors")
    for batch in golden["batches"]:
        encoded = tokenizer(batch["text"], batch["text_pair"], return_tensors="pt", **batch["kwargs"])
        label = batch["name"]
        assert encoded["input_ids"].equal(recorded[f"{label}::input_ids"]), label
        if name == "v2":
            assert encoded["attention_mask"].equal(recorded[f"{label}::attention_mask"]), label
            assert encoded["position_ids"].equal(recorded[f"{label}::position_ids"]), label
        else:
            assert list(encoded) == ["input_ids", "attention_mask"], label
            if f"{label}::attention_mask" in recorded:
                # The last row of the published mask sees every token that is no padding.
                hidden = recorded[f"{label}::attention_mask"][:, 0, -1]
                assert encoded["attention_mask"].bool().equal(~hidden), label
            else:  # without padding the published code gave no mask
                assert encoded["attention_mask"].all(), label


def test_saved_and_loaded_again_it_is_the_same_tokenizer(case, tmp_path: Path) -> None:
    golden, tokenizer, _ = case
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tokenization_chatglm.py").is_file()
    again = AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    for entry in golden["strings"]:
        assert again(entry["text"])["input_ids"] == entry["ids_special"], entry["name"]
    for entry in golden["build_inputs"]:
        assert again.build_inputs_with_special_tokens(entry["a"], entry["b"]) == entry["out"], entry
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "tokenizer_config.json").read_text() == (
        tmp_path / "tokenizer_config.json"
    ).read_text()
