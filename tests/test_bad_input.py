"""What people get wrong with models: each mistake is told in one sentence, before anything is computed."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
from helpers import CHATGLM, CHATGLM2, GMASK, SOP, prompt, tiny_config, tiny_model
from safetensors.torch import load_file, save_file

from chatglm.hub.modeling_chatglm import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
)


@pytest.fixture(scope="module")
def ids(family) -> torch.Tensor:
    return prompt(family)


def sentence(error: type[Exception] | tuple[type[Exception], ...], call, *args, **kwargs) -> str:
    """The message of the error that the call raises; it is one line."""
    with pytest.raises(error) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message, message
    return message


# Token ids


@pytest.mark.parametrize("bad", [256, 100000, -1])
@pytest.mark.parametrize("road", ["forward", "generate"])
def test_ids_outside_the_vocabulary_are_told(model, ids, bad, road):
    wrong = ids.clone()
    wrong[0, 2] = bad
    options = {"max_new_tokens": 2} if road == "generate" else {}
    message = sentence(ValueError, getattr(model, road), wrong, **options)
    assert str(bad) in message
    assert "256 rows" in message


def test_a_single_id_outside_the_vocabulary_is_told():
    message = sentence(ValueError, tiny_model(CHATGLM2), torch.tensor([[300]]))
    assert "300" in message
    assert "256 rows" in message


@pytest.mark.parametrize("shape", [(9,), (1, 0), (1, 1, 9)], ids=str)
def test_ids_of_another_shape_than_rows_of_tokens_are_told(model, shape):
    message = sentence(ValueError, model, torch.full(shape, 7))
    assert "input_ids" in message
    assert str(tuple(shape)) in message


def test_ids_that_are_no_whole_numbers_are_told(model):
    assert "input_ids" in sentence((TypeError, ValueError), model, torch.rand(1, 9))


def test_neither_ids_nor_embeddings_is_told(model):
    assert "either input_ids or inputs_embeds" in sentence(ValueError, model)


def test_both_ids_and_embeddings_is_told(model, ids):
    embeds = model.get_input_embeddings()(ids)
    message = sentence(ValueError, model, ids, inputs_embeds=embeds)
    assert "either input_ids or inputs_embeds" in message


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([5, 6, 7, 8], "<sop> (id 244)"),
        ([5, 6, SOP, 8], "[gMASK] (id 241) or [MASK] (id 240)"),
    ],
    ids=["no sop", "no mask token"],
)
def test_a_chatglm_6b_prompt_without_its_special_tokens_names_the_row(row, words):
    rows = torch.tensor([[5, 6, GMASK, SOP], row])
    message = sentence(ValueError, tiny_model(CHATGLM), rows)
    assert message.startswith("Row 1 ")
    assert words in message


# Masks, positions, caches


@pytest.mark.parametrize("shape", [(1, 5), (2, 9), (9,), (1, 9, 9), (1, 1, 9, 5), (1, 1, 5, 5)], ids=str)
@pytest.mark.parametrize("road", ["forward", "generate"])
def test_a_mask_of_the_wrong_shape_is_told_with_both_shapes(model, ids, shape, road):
    mask = torch.ones(shape, dtype=torch.bool if len(shape) == 4 else torch.long)
    message = sentence(ValueError, getattr(model, road), ids, attention_mask=mask)
    assert "attention_mask" in message
    if not (road == "generate" and model.config.family == CHATGLM2 and len(shape) == 4):
        assert str(tuple(shape)) in message


@pytest.mark.parametrize("dtype", [torch.long, torch.float32])
def test_a_four_dimensional_mask_of_numbers_of_the_wrong_shape_is_told(model, ids, dtype):
    mask = torch.zeros(1, 1, 9, 5, dtype=dtype)
    assert "attention_mask" in sentence(ValueError, model, ids, attention_mask=mask)


def test_a_four_dimensional_mask_of_integers_is_told(model, ids):
    """It could mean 1 = keep or True = masked."""
    mask = torch.ones(1, 1, 9, 9, dtype=torch.long)
    assert "attention_mask" in sentence(ValueError, model, ids, attention_mask=mask)


def test_a_mask_that_leaves_out_the_cache_is_told(model, ids):
    with torch.no_grad():
        cache = model(ids).past_key_values
    more = torch.tensor([[20, 30]])
    message = sentence(
        ValueError, model, more, past_key_values=cache, attention_mask=torch.ones(1, 2, dtype=torch.long)
    )
    assert "(1, 2)" in message
    assert "(1, 11)" in message


@pytest.mark.parametrize("shape", [(1, 5), (3, 9), (9,), (1, 2, 5), (1, 3, 9)], ids=str)
def test_positions_of_the_wrong_shape_are_told(model, ids, shape):
    message = sentence(ValueError, model, ids, position_ids=torch.zeros(shape, dtype=torch.long))
    assert "position_ids" in message
    assert str(tuple(shape)) in message


def test_a_cache_of_tuples_is_told(model, ids):
    pair = (torch.zeros(1, 4, 3, 16),) * 2
    message = sentence(ValueError, model, ids, past_key_values=(pair, pair))
    assert "past_key_values is a tuple" in message


# Configs


@pytest.mark.parametrize(("name", "value"), [("num_layers", 0), ("hidden_size", -4), ("quantization_bit", 5)])
def test_a_config_spoilt_after_it_was_made_builds_no_model(family, name, value):
    config = tiny_config(family)
    setattr(config, name, value)
    assert name in sentence(ValueError, ChatGLMForConditionalGeneration, config)


# Folders of weights


@pytest.fixture
def folder(model, tmp_path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, **kwargs):
    return ChatGLMForConditionalGeneration.from_pretrained(folder, **kwargs)


def change_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def embedding_of(family: str) -> str:
    return f"transformer.{'' if family == CHATGLM else 'embedding.'}word_embeddings.weight"


def test_a_vocabulary_of_another_size_is_told_with_both_sizes(folder, family):
    def shorten(weights):
        for key in (embedding_of(family), "transformer.output_layer.weight"):
            if key in weights:
                weights[key] = weights[key][:200].clone()

    change_weights(folder, shorten)
    message = sentence(ValueError, load, folder)
    assert "200" in message
    assert "256" in message
    assert "config.json" in message


def test_missing_weights_are_told_by_name(folder, family):
    block = "transformer.layers.1." if family == CHATGLM else "transformer.encoder.layers.1."
    change_weights(folder, lambda weights: [weights.pop(k) for k in list(weights) if k.startswith(block)])
    assert block in sentence(ValueError, load, folder)


def test_a_new_prefix_is_not_reported_as_missing(folder, family):
    assert load(folder, config=tiny_config(family, pre_seq_len=4)).config.pre_seq_len == 4


def test_a_new_classification_head_is_not_reported_as_missing(folder):
    loaded = ChatGLMForSequenceClassification.from_pretrained(folder, num_labels=3)
    assert loaded.classifier_head.weight.shape[0] == 3


@pytest.mark.parametrize("keep", [0, 5, 200, 20000], ids=lambda n: f"{n} bytes")
def test_a_safetensors_file_cut_short_is_named_with_its_size(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = sentence(OSError, load, folder)
    assert "model.safetensors" in message
    assert f"{keep} bytes" in message
    assert "again" in message


def test_a_safetensors_file_with_a_damaged_header_is_named(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[8:40] = b"x" * 32
    path.write_bytes(bytes(content))
    assert "model.safetensors" in sentence(OSError, load, folder)


def test_a_missing_shard_is_named(model, tmp_path):
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert shard.name in sentence(OSError, load, tmp_path)


def test_a_git_lfs_pointer_is_named(folder):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1018370\n"
    (folder / "model.safetensors").write_text(pointer)
    message = sentence(OSError, load, folder)
    assert "model.safetensors" in message
    assert "git-lfs pointer" in message


def as_bin(folder: Path, **options) -> Path:
    """The folder with its weights as the published pickles are."""
    path = folder / "pytorch_model.bin"
    torch.save(load_file(folder / "model.safetensors"), path, **options)
    (folder / "model.safetensors").unlink()
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "old format"])
def test_published_bin_files_load_equal(folder, model, ids, zipped):
    as_bin(folder, _use_new_zipfile_serialization=zipped)
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, model(ids).logits)


def test_safetensors_come_before_a_bin_file(folder, model, ids):
    torch.save({"wrong": torch.zeros(1)}, folder / "pytorch_model.bin")
    with torch.no_grad():
        assert torch.equal(load(folder)(ids).logits, model(ids).logits)


@pytest.mark.parametrize("keep", [0.5, 0.999], ids=["half", "nearly all"])
def test_a_bin_file_cut_short_is_named(folder, keep):
    path = as_bin(folder)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
    assert "pytorch_model.bin" in sentence(OSError, load, folder)


class Touch:
    """A pickle of it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "plain pickle"])
def test_a_bin_file_that_holds_code_is_refused_and_not_run(folder, tmp_path, zipped):
    trap, path = tmp_path / "trap", as_bin(folder)
    content = {"transformer.x": Touch(trap)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises((OSError, ValueError, pickle.UnpicklingError)) as caught:
        load(folder)
    assert re.search("pytorch_model.bin|weights_only|Unsupported", str(caught.value))
    assert not trap.exists()
