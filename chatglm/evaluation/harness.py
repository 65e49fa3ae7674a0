"""Our models in the lm-evaluation-harness, as it is: `python -m chatglm.evaluation.harness run --model chatglm ...`.

The harness offers other libraries to register a class for their models; this is ours. It encodes prompts as `chat` and
the finetuning do, which the harness cannot know: the blank to fill stands behind a prompt of ChatGLM-6B, answers are
encoded by themselves, and the token that ends an answer has no text.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from chatglm.loading import load


@register_model("chatglm")
class ChatGLMHarness(HFLM):
    """`--model_args pretrained=...,dtype=...,quantize=8,group_size=...,revision=...` go to `chatglm.load`.

    Other arguments are those of the harness's own class `hf`. With `--apply_chat_template` a prompt is what `chat`
    makes of it, without it the bare text.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str | None = None,
        quantize: int | None = None,
        group_size: int | None = None,
        revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        model, tokenizer = load(pretrained, device, dtype, quantize, revision, group_size)
        super().__init__(pretrained=model, tokenizer=tokenizer, device=str(model.device), **kwargs)

    def tok_encode(
        self,
        string: str,
        add_special_tokens: bool | None = None,
        left_truncate_len: int | None = None,
        **kwargs: Any,
    ) -> list[int]:
        """The ids of a prompt; one that is too long loses its beginning, but no special token."""
        before, text, after = self.tokenizer._split_rendered_chat(string)
        if before or after:  # the chat template was applied already
            convert = self.tokenizer.convert_tokens_to_ids
            before, after = convert(before), convert(after)
        else:
            before, after = self.tokenizer.get_prefix_tokens(), self._mask
        ids = self.tokenizer._encode_plain(text)
        if left_truncate_len:
            room = max(0, left_truncate_len - len(before) - len(after))
            ids = ids[max(0, len(ids) - room) :]
        return before + ids + after

    @property
    def _mask(self) -> list[int]:
        """What stands between a prompt and its answer in ChatGLM-6B."""
        tokenizer = self.tokenizer
        return [] if tokenizer.get_prefix_tokens() else [tokenizer.gmask_token_id, tokenizer.sop_token_id]

    def tok_batch_encode(
        self,
        strings: list[str],
        padding_side: str = "left",
        left_truncate_len: int | None = None,
        truncation: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts as a batch, and its mask, both [B, T]."""
        rows = [self.tok_encode(string, left_truncate_len=left_truncate_len) for string in strings]
        batch = self.tokenizer.pad(
            {"input_ids": rows}, padding=True, padding_side=padding_side, return_tensors="pt"
        )
        return batch["input_ids"], batch["attention_mask"]

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """A prompt and an answer to it. The blank in front of an answer is one that the tokenizer adds anyway."""
        room = self.max_length - len(answer := self.tokenizer._encode_plain(continuation.removeprefix(" ")))
        return self.tok_encode(context, left_truncate_len=room), answer

    def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
        """The text of tokens; of the token that ends answers its name, where the harness asks for it alone.

        By its text, which is empty, the harness would stop each answer at its first token.
        """
        if tokens == self.eot_token_id:
            return self.tokenizer.convert_ids_to_tokens(tokens)
        return self.tokenizer.decode(tokens, skip_special_tokens=skip_special_tokens)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
        """Perplexity of whole texts, which the harness begins with one token: these models begin with two."""
        raise NotImplementedError(
            "Tasks of perplexity begin a text in a way that ChatGLM does not know; chatglm evaluate --quantization "
            "tells the perplexity of a text."
        )


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
