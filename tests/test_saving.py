"""Folders of weights: saved, loaded, sharded, tied, grown, on other devices."""

from __future__ import annotations

import pytest
import torch
from helpers import CHATGLM, CHATGLM2, assert_close, logits, prompt, tiny_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import published_keys

from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration, ChatGLMModel


def keys_in(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


def test_a_saved_folder_has_the_published_key_names(shared_model, family, tmp_path):
    """Without lm_head, which is the embedding of ChatGLM-6B; the published files may leave it out too."""
    shared_model.save_pretrained(tmp_path)
    assert keys_in(tmp_path) == published_keys(family)


def test_saving_and_loading_gives_the_same_logits(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_saving_in_shards_and_loading_gives_the_same_logits(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_the_bare_model_loads_from_the_same_folder(shared_model, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    bare = ChatGLMModel.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = shared_model.transformer(ids).last_hidden_state
        assert torch.equal(bare(ids).last_hidden_state, expected)


def test_the_head_of_chatglm_6b_is_its_embedding():
    model = tiny_model(CHATGLM)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


@pytest.mark.parametrize("with_head", [False, True], ids=["without lm_head", "with lm_head"])
def test_the_head_of_chatglm_6b_is_its_embedding_after_loading(with_head, tmp_path):
    model = tiny_model(CHATGLM)
    model.save_pretrained(tmp_path)
    if with_head:
        weights = load_file(tmp_path / "model.safetensors")
        weights["lm_head.weight"] = weights["transformer.word_embeddings.weight"].clone()
        save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.word_embeddings.weight
    assert torch.equal(logits(loaded, prompt(CHATGLM)), logits(model, prompt(CHATGLM)))


def test_the_head_of_chatglm2_is_its_own():
    model = tiny_model(CHATGLM2)
    assert model.transformer.output_layer.weight is not model.transformer.embedding.word_embeddings.weight
    assert model.get_output_embeddings() is model.transformer.output_layer


def test_rotary_frequencies_in_old_files_are_passed_over(shared_model, family, ids, tmp_path):
    shared_model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = "layers.0.attention.rotary_emb" if family == CHATGLM else "rotary_pos_emb"
    weights[f"transformer.{name}.inv_freq"] = torch.full((4,), 7.0)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded, info = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"]
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_the_vocabulary_can_grow_and_is_saved_with_its_new_size(model, family, ids, tmp_path):
    before = logits(model, ids)
    model.resize_token_embeddings(300, mean_resizing=False)
    assert_close(logits(model, ids)[..., :256], before)
    model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 300
    assert torch.equal(logits(loaded, ids), logits(model, ids))


@pytest.mark.parametrize("device_map", ["auto", "cpu", {"": "cpu"}], ids=str)
def test_a_device_map_loads_the_same_model(shared_model, ids, device_map, tmp_path):
    shared_model.save_pretrained(tmp_path)
    loaded = ChatGLMForConditionalGeneration.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))


def test_layers_kept_on_disk_give_the_same_logits(shared_model, family, ids, tmp_path):
    shared_model.save_pretrained(tmp_path / "model")
    second_block = "layers.1" if family == CHATGLM else "encoder.layers.1"
    device_map = {"transformer.rotary_pos_emb": "cpu"}
    for name, module in shared_model.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            device_map[name] = "disk" if second_block in name else "cpu"
    loaded = ChatGLMForConditionalGeneration.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert torch.equal(logits(loaded, ids), logits(shared_model, ids))
