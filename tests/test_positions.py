"""Positions and context of ChatGLM-6B rows, on examples drawn by hand."""

from __future__ import annotations

import pytest
import torch
from helpers import CHATGLM, GMASK, MASK, PAD, SOP, tiny_config

from chatglm.hub.positions_chatglm import (
    glm_positions,
    is_context,
    pack_positions,
    two_dimensional_mask,
    unpack_positions,
)

CONFIG = tiny_config(CHATGLM)


def rows(*ids: list[int]) -> torch.Tensor:
    return torch.tensor(list(ids))


def drawn(input_ids: torch.Tensor, mask: torch.Tensor | None = None, **overrides) -> list[list[list[int]]]:
    """[row][0 position, 1 block][token] of the ids."""
    packed = glm_positions(input_ids, mask, tiny_config(CHATGLM, **overrides))
    return torch.stack(unpack_positions(packed), dim=1).tolist()


def test_the_context_counts_up_and_the_answer_keeps_the_position_of_its_mask_token():
    assert drawn(rows([7, 8, GMASK, SOP, 9, 9])) == [[[0, 1, 2, 2, 2, 2], [0, 0, 0, 1, 2, 3]]]


def test_the_answer_stands_where_the_mask_token_is_also_in_the_middle():
    assert drawn(rows([7, MASK, 8, 9, SOP, 9])) == [[[0, 1, 2, 3, 1, 1], [0, 0, 0, 0, 1, 2]]]


def test_gmask_is_filled_when_a_row_has_both_mask_tokens():
    assert drawn(rows([MASK, 8, GMASK, SOP, 9])) == [[[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]]


def test_the_first_of_several_mask_tokens_is_filled():
    assert drawn(rows([7, GMASK, GMASK, SOP])) == [[[0, 1, 2, 1], [0, 0, 0, 1]]]


def test_a_mask_token_in_the_answer_moves_nothing():
    assert drawn(rows([7, MASK, 8, SOP, GMASK, 9])) == [[[0, 1, 2, 1, 1, 1], [0, 0, 0, 1, 2, 3]]]


def test_a_mask_token_in_the_answer_is_filled_where_there_is_no_other_one():
    assert drawn(rows([7, 8, SOP, MASK, 9])) == [[[0, 1, 3, 3, 3], [0, 0, 1, 2, 3]]]


def test_every_row_of_a_batch_has_its_own_mask_token():
    both = rows([7, MASK, 8, SOP], [7, 8, GMASK, SOP])
    assert drawn(both) == drawn(both[:1]) + drawn(both[1:])


def test_padding_on_the_left_is_not_counted():
    ids, mask = rows([PAD, PAD, 7, 8, GMASK, SOP, 9]), rows([0, 0, 1, 1, 1, 1, 1])
    positions, blocks = drawn(ids, mask)[0]
    assert positions[2:] == [0, 1, 2, 2, 2]
    assert blocks[2:] == [0, 0, 0, 1, 2]


def test_padding_on_the_right_changes_no_token_before_it():
    ids, mask = rows([7, 8, GMASK, SOP, 9, PAD]), rows([1, 1, 1, 1, 1, 0])
    for padded, alone in zip(drawn(ids, mask)[0], drawn(ids[:, :5])[0], strict=True):
        assert padded[:5] == alone


def test_without_the_second_dimension_an_answer_to_gmask_counts_on():
    assert drawn(rows([7, GMASK, SOP, 9]), position_encoding_2d=False) == [[[0, 1, 2, 3], [0, 0, 0, 0]]]


def test_without_the_second_dimension_an_answer_to_mask_stays_at_its_place():
    assert drawn(rows([7, MASK, 8, SOP, 9]), position_encoding_2d=False)[0][0] == [0, 1, 2, 1, 1]


def test_adding_one_to_a_packed_position_is_the_next_token_of_the_answer():
    ids = rows([7, 8, GMASK, SOP, 9, 9])
    packed = glm_positions(ids, None, CONFIG)
    assert torch.equal(glm_positions(ids[:, :4], None, CONFIG)[:, -1] + 1, packed[:, 4])


def test_packing_and_unpacking_positions_are_inverse():
    positions = torch.tensor([[[0, 1, 2047, 32767], [0, 0, 1, 65535]]])
    assert torch.equal(torch.stack(unpack_positions(pack_positions(positions)), dim=1), positions)


@pytest.mark.parametrize(
    ("ids", "context"),
    [
        ([7, GMASK, SOP, 9], [True, True, False, False]),
        ([SOP, 9], [False, False]),
        ([7, SOP, 8, SOP], [True, False, False, False]),
        ([7, 8, 9], [False, False, False]),
    ],
    ids=["a prompt", "nothing before sop", "two sops", "no sop"],
)
def test_the_context_is_what_stands_before_the_first_sop(ids, context):
    assert is_context(rows(ids), CONFIG).tolist() == [context]


def published_mask(ids: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """The 4-D mask of the published tokenizer, True = masked, written down from its description."""
    length = ids.shape[1]
    masked = torch.ones(len(ids), 1, length, length, dtype=torch.bool)
    for b in range(len(ids)):
        context = ids[b].tolist().index(SOP)
        for query in range(length):
            for key in range(length):
                visible = keep[b, query] and keep[b, key] and (key <= query or key < context)
                masked[b, 0, query, key] = not visible
    return masked


def test_the_published_mask_is_understood_as_the_padding_it_was_made_from():
    ids = rows([PAD, PAD, 7, GMASK, SOP], [7, 8, 9, GMASK, SOP])
    keep = rows([0, 0, 1, 1, 1], [1, 1, 1, 1, 1])
    assert torch.equal(two_dimensional_mask(published_mask(ids, keep), ids, CONFIG), keep)


def test_a_mask_that_hides_other_tokens_is_refused_in_generation():
    ids = rows([7, 8, 9, GMASK, SOP])
    mask = published_mask(ids, torch.ones_like(ids))
    mask[0, 0, 2, 0] = True
    with pytest.raises(ValueError, match="hides other positions"):
        two_dimensional_mask(mask, ids, CONFIG)
