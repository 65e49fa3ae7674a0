"""Generation by every road that transformers has: all greedy ones give the same tokens."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import (
    CHATGLM,
    CHATGLM2,
    EOP,
    GMASK,
    MASK,
    PAD,
    SOP,
    assert_close,
    pad_left,
    prompt,
    three_rows,
    tiny_model,
)
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from chatglm.hub.modeling_chatglm import InvalidScoreLogitsProcessor
from chatglm.hub.positions_chatglm import glm_positions, unpack_positions

NEW = 12


@pytest.fixture(scope="module")
def ids(family) -> torch.Tensor:
    return prompt(family)


def greedy(model, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    return model.generate(ids, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


@pytest.fixture(scope="module")
def expected(shared_model, ids) -> torch.Tensor:
    """The greedy answer, one full pass a token, without any cache."""
    sequence = ids
    with torch.no_grad():
        for _ in range(NEW):
            token = shared_model(sequence, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            sequence = torch.cat((sequence, token), dim=1)
    answer = sequence[0, ids.shape[1] :].tolist()
    assert len(set(answer)) >= 5, "an answer that repeats itself tests nothing"
    assert shared_model.config.eos_token_id not in answer
    return sequence


@pytest.mark.parametrize(
    "road",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prompt_lookup_num_tokens": 3},
        {"num_beams": 1, "num_return_sequences": 1},
    ],
    ids=["dynamic cache", "no cache", "static cache", "prompt lookup", "explicit"],
)
def test_greedy_generation_equals_full_passes(model, ids, expected, road):
    assert torch.equal(greedy(model, ids, **road), expected)


@pytest.mark.parametrize("seed", [0, 5], ids=["same weights", "other weights"])
def test_assisted_generation_equals_full_passes(model, family, ids, expected, seed):
    assert torch.equal(greedy(model, ids, assistant_model=tiny_model(family, seed=seed)), expected)


def test_prompt_lookup_of_a_prompt_that_repeats_itself_equals_greedy_generation(model, family):
    """Candidates are copied from the prompt, special tokens included."""
    half = prompt(family, 12)[:, :-2].repeat(1, 3)
    ids = torch.cat((half, prompt(family)[:, -2:]), dim=1)
    assert torch.equal(greedy(model, ids, prompt_lookup_num_tokens=8), greedy(model, ids))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_both_attention_functions_generate_the_same(family, ids, expected, implementation):
    model = tiny_model(family)
    model.set_attn_implementation(implementation)
    assert torch.equal(greedy(model, ids), expected)
    assert torch.equal(greedy(model, ids, cache_implementation="static"), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch's own compiler
def test_flex_attention_generates_the_same(family, ids, expected):
    model = tiny_model(family)
    model.set_attn_implementation("flex_attention")
    new = 4  # each length is compiled anew
    assert torch.equal(greedy(model, ids, max_new_tokens=new), expected[:, : ids.shape[1] + new])


def test_embeddings_instead_of_ids_generate_the_same_answer(model, family, ids, expected):
    embeds = model.get_input_embeddings()(ids)
    positions = {"position_ids": glm_positions(ids, None, model.config)} if family == CHATGLM else {}
    answer = greedy(model, None, inputs_embeds=embeds, **positions)
    assert torch.equal(answer, expected[:, ids.shape[1] :])


def test_ids_may_come_as_the_inputs_argument(model, ids, expected):
    assert torch.equal(model.generate(inputs=ids, max_new_tokens=NEW, do_sample=False), expected)


def test_quantized_models_generate(family, ids):
    for bits in (8, 4):
        assert greedy(tiny_model(family).quantize(bits), ids).shape == (1, ids.shape[1] + NEW)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["half", "bfloat16"])
def test_low_precision_models_generate_the_same_on_both_caches(family, ids, dtype):
    model = tiny_model(family).to(dtype)
    static = greedy(model, ids, cache_implementation="static", max_new_tokens=5)
    assert torch.equal(static, greedy(model, ids, max_new_tokens=5))


# Batches


@pytest.mark.parametrize(
    "road",
    [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 3}],
    ids=["dynamic cache", "static cache", "no cache", "beams"],
)
@pytest.mark.parametrize("pre_seq_len", [None, 4], ids=["full", "prefix"])
def test_a_left_padded_batch_answers_as_its_rows_alone(family, road, pre_seq_len):
    model = tiny_model(family, pre_seq_len=pre_seq_len)
    rows = three_rows(family)
    ids, mask = pad_left(rows, model.config.pad_token_id)
    batched = greedy(model, ids, attention_mask=mask, **road)[:, ids.shape[1] :]
    for row, alone in zip(batched, rows, strict=True):
        answer = greedy(model, alone, **road)[0, alone.shape[1] :]
        assert torch.equal(row[: len(answer)], answer)


def test_a_batch_of_both_mask_tokens_answers_as_its_rows_alone():
    model = tiny_model(CHATGLM)
    rows = [torch.tensor([[5, MASK, 7, 8, SOP]]), torch.tensor([[15, 16, 17, 18, MASK, GMASK, SOP]])]
    ids, mask = pad_left(rows, PAD)
    batched = greedy(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    for row, alone in zip(batched, rows, strict=True):
        assert torch.equal(row, greedy(model, alone)[0, alone.shape[1] :])


def test_rows_that_end_early_are_filled_with_padding(family):
    model = tiny_model(family)
    rows = three_rows(family)
    ids, mask = pad_left(rows, model.config.pad_token_id)
    free = greedy(model, ids, attention_mask=mask)[:, ids.shape[1] :]
    eos = int(free[0, 3])
    ended = greedy(model, ids, attention_mask=mask, eos_token_id=eos)[:, ids.shape[1] :]
    first = free[0].tolist().index(eos)
    assert ended[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert (ended[0, first + 1 :] == model.config.pad_token_id).all()


def test_the_published_mask_and_positions_of_chatglm_6b_generate_the_same():
    """What the published tokenizer made for a padded batch."""
    model, rows = tiny_model(CHATGLM), three_rows(CHATGLM)
    ids, mask = pad_left(rows, PAD)
    length = ids.shape[1]
    masked = torch.ones(3, 1, length, length, dtype=torch.bool)
    for b, row in enumerate(rows):
        start, sop = length - row.shape[1], length - 1
        for query in range(start, length):
            masked[b, 0, query, start : max(sop, query + 1)] = False
    positions = torch.stack(unpack_positions(glm_positions(ids, mask, model.config)), dim=1)
    published = greedy(model, ids, attention_mask=masked, position_ids=positions)
    assert torch.equal(published, greedy(model, ids, attention_mask=mask))


# Beams and sampling


def score_of(model, ids: torch.Tensor, start: int) -> float:
    with torch.no_grad():
        scores = model(ids, use_cache=False).logits.float().log_softmax(-1)
    return scores[0, start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()


def test_beams_find_an_answer_at_least_as_likely_as_the_greedy_one(model, ids):
    beams = greedy(model, ids, num_beams=5, max_new_tokens=6)
    single = greedy(model, ids, max_new_tokens=6)
    start = ids.shape[1]
    assert score_of(model, beams, start) >= score_of(model, single, start) - 1e-3


def test_beams_tell_the_true_score_of_their_answer(model, ids):
    """The reordered cache belongs to the beam that won."""
    outputs = greedy(
        model, ids, num_beams=4, max_new_tokens=6, return_dict_in_generate=True, output_scores=True,
        length_penalty=0.0,
    )  # fmt: skip
    score = score_of(model, outputs.sequences, ids.shape[1])
    assert outputs.sequences_scores.item() == pytest.approx(score, abs=5e-3)


def test_beams_on_a_static_cache_are_the_same(model, ids):
    beams = [greedy(model, ids, num_beams=3, cache_implementation=kind) for kind in ("static", "dynamic")]
    assert torch.equal(*beams)


def test_several_samples_of_one_prompt_start_with_it_and_differ(model, ids):
    torch.manual_seed(0)
    sampled = model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=5.0, num_return_sequences=3)
    assert torch.equal(sampled[:, : ids.shape[1]], ids.expand(3, -1))
    assert len({tuple(row) for row in sampled.tolist()}) == 3


def test_the_same_seed_gives_the_same_sample(model, ids):
    def sample() -> torch.Tensor:
        torch.manual_seed(7)
        return model.generate(ids, max_new_tokens=NEW, do_sample=True, temperature=3.0)

    assert torch.equal(sample(), sample())


# What generate returns and takes besides


def test_scores_hidden_states_and_attentions_come_along_when_asked_for(model, ids, expected):
    outputs = greedy(
        model, ids, max_new_tokens=3, return_dict_in_generate=True, output_logits=True,
        output_hidden_states=True, output_attentions=True,
    )  # fmt: skip
    assert torch.equal(outputs.sequences, expected[:, : ids.shape[1] + 3])
    assert len(outputs.attentions) == len(outputs.hidden_states) == 3
    with torch.no_grad():
        logits = model(expected).logits[0, ids.shape[1] - 1 :]
    for step, scores in enumerate(outputs.logits):
        assert_close(scores[0], logits[step])


def test_a_cache_of_an_earlier_answer_goes_on_with_all_ids(model, ids, expected):
    """The way of transformers: the whole sequence and the cache of all but its last token."""
    first = greedy(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    second = greedy(model, first.sequences, max_new_tokens=NEW - 5, past_key_values=first.past_key_values)
    assert torch.equal(second, expected)


def test_a_cache_goes_on_with_all_ids_and_new_ones(model, family, ids):
    first = greedy(model, ids, max_new_tokens=5, return_dict_in_generate=True)
    longer = torch.cat((first.sequences, torch.tensor([[20, 30, 40]])), dim=1)
    continued = greedy(model, longer, past_key_values=first.past_key_values)
    assert torch.equal(continued, greedy(model, longer))


def test_a_prompt_of_one_token_is_enough_for_chatglm2():
    model, ids = tiny_model(CHATGLM2), torch.tensor([[17]])
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def test_a_prompt_of_the_special_tokens_alone_is_enough_for_chatglm_6b():
    model, ids = tiny_model(CHATGLM), torch.tensor([[GMASK, SOP]])
    assert torch.equal(greedy(model, ids), greedy(model, ids, use_cache=False))


def test_the_end_token_of_the_config_ends_an_answer(family, ids):
    model = tiny_model(family)
    free = greedy(model, ids)[0, ids.shape[1] :].tolist()
    model.generation_config.eos_token_id = free[4]
    ended = greedy(model, ids)[0, ids.shape[1] :].tolist()
    assert ended == free[: free.index(free[4]) + 1]


def test_the_token_ids_of_the_config_reach_generation():
    assert tiny_model(CHATGLM).generation_config.eos_token_id == EOP
    assert tiny_model(CHATGLM).generation_config.pad_token_id == PAD
    assert tiny_model(CHATGLM2).generation_config.eos_token_id == 2
    assert tiny_model(CHATGLM2).generation_config.pad_token_id == 0


def test_generating_does_not_edit_the_processors_of_the_caller(model, ids):
    processors = LogitsProcessorList()
    greedy(model, ids, max_new_tokens=2, logits_processor=processors)
    assert not processors


class AtLength(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        stop = input_ids.shape[1] >= self.length
        return torch.full((len(input_ids),), stop, dtype=torch.bool)


def test_stopping_criteria_are_obeyed(model, ids, expected):
    criteria = StoppingCriteriaList([AtLength(ids.shape[1] + 3)])
    assert torch.equal(greedy(model, ids, stopping_criteria=criteria), expected[:, : ids.shape[1] + 3])


# stream_generate


def test_stream_generate_yields_every_token_and_ends_like_generate(model, ids, expected):
    steps = list(model.stream_generate(ids, max_new_tokens=NEW, do_sample=False))
    assert [step.shape[1] for step in steps] == list(range(ids.shape[1] + 1, ids.shape[1] + NEW + 1))
    assert torch.equal(steps[-1], expected)


def test_stream_generate_samples_as_generate_does(model, ids):
    torch.manual_seed(3)
    sampled = model.generate(ids, max_new_tokens=NEW, do_sample=True, top_p=0.8, temperature=2.0)
    torch.manual_seed(3)
    steps = list(model.stream_generate(ids, max_new_tokens=NEW, do_sample=True, top_p=0.8, temperature=2.0))
    assert torch.equal(steps[-1], sampled)


def test_a_closed_stream_computes_nothing_more(family, ids):
    model, calls = tiny_model(family), []
    model.transformer.register_forward_pre_hook(lambda *args: calls.append(1))
    stream = model.stream_generate(ids, max_new_tokens=NEW, do_sample=False)
    next(stream)
    stream.close()
    assert len(calls) == 1
    assert list(stream) == []


# What would answer wrongly is refused


@pytest.mark.parametrize(
    "arguments",
    [{"prefill_chunk_size": 4}, {"generation_config": GenerationConfig(prefill_chunk_size=4)}],
    ids=["argument", "generation config"],
)
def test_chatglm_6b_refuses_to_read_a_prompt_in_pieces(arguments):
    with pytest.raises(ValueError, match="reads its prompt in both directions"):
        tiny_model(CHATGLM).generate(prompt(CHATGLM), **arguments)


def test_chatglm2_reads_a_prompt_in_pieces():
    model, ids = tiny_model(CHATGLM2), prompt(CHATGLM2)
    assert torch.equal(greedy(model, ids, prefill_chunk_size=4), greedy(model, ids))


def test_chatglm_6b_refuses_continuous_batching():
    with pytest.raises(ValueError, match="reads its prompt in both directions"):
        tiny_model(CHATGLM).generate_batch([prompt(CHATGLM)[0].tolist()])


@pytest.mark.filterwarnings("ignore")
def test_continuous_batching_of_chatglm2_equals_generate():
    model = tiny_model(CHATGLM2)
    rows = [row[0].tolist() for row in three_rows(CHATGLM2)]
    expected = [greedy(model, torch.tensor([row]))[0, len(row) :].tolist() for row in rows]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=2, pad_token_id=0)
    # Left to itself the cache takes most of the free memory of the machine.
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=64)
    outputs = copy.deepcopy(model).generate_batch(
        rows, generation_config=config, continuous_batching_config=small
    )
    assert sorted(output.generated_tokens for output in outputs.values()) == sorted(expected)


@pytest.mark.parametrize("row", [[5, 6, 7], [5, GMASK, 7], [5, 6, SOP]], ids=["neither", "no sop", "no mask"])
def test_chatglm_6b_refuses_a_prompt_without_its_special_tokens(row):
    with pytest.raises(ValueError, match="Row 0 of input_ids has no"):
        tiny_model(CHATGLM).generate(torch.tensor([row]), max_new_tokens=2)


# Scores that are no numbers


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_damaged_weights_stop_generation_and_name_the_step(family, ids, broken):
    model = tiny_model(family)
    greedy(model, ids, max_new_tokens=1)
    with torch.no_grad():
        model.get_output_embeddings().weight[7] = broken
    with pytest.raises(ValueError, match=r"new token 1\b"):
        greedy(model, ids)


def test_the_step_at_which_scores_break_is_counted(model, ids):
    damaged = copy.deepcopy(model)
    forward, calls = damaged.forward, []

    def forward_that_breaks(*args, **kwargs):
        outputs = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            outputs.logits = outputs.logits * float("nan")
        return outputs

    damaged.forward = forward_that_breaks
    with pytest.raises(ValueError, match=r"new token 3\b.*bfloat16"):
        greedy(damaged, ids)


def test_minus_infinity_from_a_users_processor_is_no_damage(model, ids, expected):
    first = int(expected[0, ids.shape[1]])
    answer = greedy(model, ids, suppress_tokens=[first])
    assert first not in answer[0, ids.shape[1] :].tolist()


def test_the_published_processor_replaces_broken_rows_only():
    scores = torch.tensor([[0.0, 1.0, 2.0, 0.0, 0.0, 0.0], [0.0, float("nan"), 2.0, 0.0, 0.0, 0.0]])
    result = InvalidScoreLogitsProcessor()(torch.zeros(2, 1, dtype=torch.long), scores)
    assert torch.equal(result[0], scores[0])
    assert result[1].argmax() == 5
    assert result[1].isfinite().all()
