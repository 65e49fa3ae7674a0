"""Long prompts: ChatGLM2 reads them in chunks, to the same end; ChatGLM-6B at once."""

from __future__ import annotations

import pytest
import torch
from conversations import computed_tokens
from helpers import CHATGLM, CHATGLM2, PAD, assert_close, logits, pad_left, prompt, three_rows, tiny_model

from chatglm.hub import generation_chatglm
from chatglm.hub.generation_chatglm import GrowingCache, PromptCache, read_prompt

GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("chunk", [1, 4, 6, 7])
def test_chunks_give_the_scores_of_one_pass(monkeypatch, chunk):
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2, 13)
    monkeypatch.setattr(generation_chatglm, "CHUNK", chunk)
    with computed_tokens() as lengths:
        scores = read_prompt(model, ids, None, torch.arange(13)[None], GrowingCache(2))
    assert lengths == [chunk] * (13 // chunk) + [13 % chunk] * (13 % chunk > 0)
    assert_close(scores, logits(model, ids)[:, -1])


@pytest.mark.parametrize("chunk", [2, 3, 5, 8])
def test_chunks_of_a_padded_batch_give_the_tokens_of_one_pass(monkeypatch, chunk):
    """The first chunk of the shortest row is padding and nothing else."""
    model = tiny_model(CHATGLM2)
    ids, mask = pad_left(three_rows(CHATGLM2), PAD)
    options = {"attention_mask": mask, "pad_token_id": PAD, **GREEDY}
    expected = model.generate(ids, **options)
    monkeypatch.setattr(generation_chatglm, "CHUNK", chunk)
    assert torch.equal(model.generate(ids, **options), expected)


@pytest.mark.parametrize("options", [{"attn_implementation": "eager"}, {"pre_seq_len": 3}], ids=str)
def test_chunks_give_the_tokens_of_one_pass_on_every_path(monkeypatch, options):
    model, ids = tiny_model(CHATGLM2, **options), prompt(CHATGLM2, 13)
    expected = model.generate(ids, **GREEDY)
    monkeypatch.setattr(generation_chatglm, "CHUNK", 4)
    assert torch.equal(model.generate(ids, **GREEDY), expected)


def test_a_long_turn_on_a_prompt_cache_is_read_in_chunks(monkeypatch):
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2, 30)
    monkeypatch.setattr(generation_chatglm, "CHUNK", 8)
    prompt_cache = PromptCache()
    prompt_cache.generate(model, ids[:, :10], max_new_tokens=1)
    with computed_tokens() as lengths:
        answer = prompt_cache.generate(model, ids, **GREEDY)
    assert lengths[:4] == [8, 8, 4, 1]
    assert torch.equal(answer, model.generate(ids, **GREEDY))


def test_chatglm_6b_reads_its_prompt_at_once(monkeypatch):
    """Its tokens see each other in both directions: a chunk of them has other keys."""
    model, ids = tiny_model(CHATGLM), prompt(CHATGLM, 13)
    expected = model.generate(ids, **GREEDY)
    monkeypatch.setattr(generation_chatglm, "CHUNK", 4)
    with computed_tokens() as lengths:
        assert torch.equal(model.generate(ids, **GREEDY), expected)
    assert lengths[:2] == [13, 1]


def test_only_the_last_chunk_is_scored(monkeypatch):
    model, ids, rows = tiny_model(CHATGLM2), prompt(CHATGLM2, 13), []
    model.get_output_embeddings().register_forward_hook(lambda *args: rows.append(args[1][0].shape[1]))
    monkeypatch.setattr(generation_chatglm, "CHUNK", 4)
    read_prompt(model, ids, None, None, GrowingCache(2))
    assert rows == [1]
