"""One of the processes of test_tensor_parallel.py: computes its share of every model, and writes what came out."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers.distributed import DistributedConfig

from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

GREEDY = {"do_sample": False, "max_new_tokens": 6}
QUERIES = ["你好", "晚上睡不着"]


def said(model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer) -> dict[str, Any]:
    """Everything that must be the same on one process and on several."""
    batch = tokenizer(QUERIES, return_tensors="pt", padding=True)
    return {
        "generate": model.generate(**batch, **GREEDY).tolist(),
        "int8_cache": model.generate(**batch, **GREEDY, int8_cache=True).tolist(),
        "static": model.generate(**batch, **GREEDY, cache_implementation="static").tolist(),
        "chat": model.chat(tokenizer, "你好", [("1+1=?", "2")], **GREEDY),
        "stream": list(model.stream_chat(tokenizer, "你好", **GREEDY)),
        "batch": model.batch_chat(tokenizer, QUERIES, **GREEDY),
    }


@torch.no_grad()
def last_logits(model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer) -> torch.Tensor:
    """[2, V], after each of QUERIES."""
    return model(**tokenizer(QUERIES, return_tensors="pt", padding=True), return_last_logit=True).logits[
        :, -1
    ]


def share_of(parameter: torch.Tensor) -> int:
    """How many numbers of it this process holds."""
    return (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()


def main(folders: list[Path]) -> None:
    """Loads every folder in shares, and writes what the model says; then all processes save it together."""
    torch.set_num_threads(1)
    for folder in folders:
        model = ChatGLMForConditionalGeneration.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_plan="auto")
        )
        tokenizer, process = ChatGLMTokenizer.from_pretrained(folder), torch.distributed.get_rank()
        found = {
            "said": said(model, tokenizer),
            "logits": last_logits(model, tokenizer),
            "share": sum(share_of(parameter) for parameter in model.parameters()),
        }
        torch.save(found, folder / f"process{process}.pt")
        model.save_pretrained(folder / "saved", is_main_process=process == 0)
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort a process now and then while it ends, when all is written


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
