"""Pairs and prompts -> messages, which TRL turns into token ids by the chat template of the tokenizer: that of `chat`.

Words of people and model are plain text there, so that data cannot write control tokens. Rows are never cut: half an
answer is another one than what was judged.
"""

from __future__ import annotations

from chatglm.hub.tokenization_chatglm import BLANK, ChatGLMTokenizer
from chatglm.preferences.rows import Pair, PreferenceData, Prompt

Messages = list[dict[str, str]]


def prompt_messages(row: Prompt) -> Messages:
    """What was said before, and what is asked."""
    messages = []
    for query, response in row.history:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": response}]
    return [*messages, {"role": "user", "content": row.query}]


def answer_messages(answer: str) -> Messages:
    return [{"role": "assistant", "content": answer}]


def lay_out_pairs(
    tokenizer: ChatGLMTokenizer, data: PreferenceData, longest: int
) -> list[dict[str, Messages]]:
    """`prompt`, `chosen` and `rejected` of every pair of at most `longest` tokens; the others are counted."""
    return [
        {
            "prompt": prompt_messages(row),
            "chosen": answer_messages(row.chosen),
            "rejected": answer_messages(row.rejected),
        }
        for row in data.rows
        if _fits(tokenizer, data, row, longest)
    ]


def lay_out_prompts(
    tokenizer: ChatGLMTokenizer, data: PreferenceData, longest: int
) -> list[dict[str, Messages]]:
    """The `prompt` of every row of at most `longest` tokens; the others are counted."""
    found = []
    for row in data.rows:
        if len(tokenizer.encode_chat(row.query, row.history)) > longest:
            data.problems.leave_out(row.place, f"the prompt is longer than max_length {longest}")
        else:
            found.append({"prompt": prompt_messages(row)})
    return found


def _fits(tokenizer: ChatGLMTokenizer, data: PreferenceData, row: Pair, longest: int) -> bool:
    """Whether a pair can be learned from; notes or counts what is odd with it."""
    blank = tokenizer.convert_tokens_to_ids(BLANK)  # stands in front of most Chinese texts
    answers = [
        tokenizer.encode(answer, add_special_tokens=False, split_special_tokens=True)
        for answer in (row.chosen, row.rejected)
    ]
    if not all(answers):
        data.problems.leave_out(row.place, "an answer has no token")
        return False
    prompt = tokenizer.encode_chat(row.query, row.history)
    if len(prompt) + max(map(len, answers)) + 1 > longest:  # and the end of the answer
        data.problems.leave_out(row.place, f"prompt and answer are longer than max_length {longest}")
        return False
    if any(len(ids) - (ids[0] == blank) == 1 for ids in answers):
        data.problems.note(row.place, "an answer is one token")
    return True
