"""The model card of an exported folder: what is known of the model, and nothing more."""

from __future__ import annotations

from chatglm import __version__
from chatglm.checkpoint import readable, sizes_of
from chatglm.weights.parts import Parts
from chatglm.weights.write import total_bytes

ARCHITECTURES = {
    "chatglm": ("ChatGLM-6B", "ChatGLM-6B and ChatGLM-6B-Slim"),
    "chatglm2": ("ChatGLM2-6B", "ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B"),
}
TOKENS = (1000, 2000, 8000, 32000)  # lengths of a conversation in the memory table
CACHE_BYTES = 2  # of a number in the cache, with half-precision weights

CARD = """\
---
language: [zh, en]
library_name: transformers
pipeline_tag: text-generation
tags: [chatglm]
{license}
---

# {name}

A model of the {architecture} architecture, which is that of {kin}.
It has {parameters:,} parameters in {layers} layers, a vocabulary of {rows:,} rows and a context of {context:,} tokens.
{packing}

How this folder came about:

{history}

Written with chatglm {version}. Loading it takes transformers 5, torch and sentencepiece:

```python
from transformers import AutoModel, AutoTokenizer

name = "{name}"  # this repository, or the folder of a copy
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModel.from_pretrained(name, trust_remote_code=True).eval()
response, history = model.chat(tokenizer, "你好", history=[])
```

`trust_remote_code=True` runs the Python files of this folder. The package chatglm is not needed; where it is imported,
its own code runs instead.

## Memory

The weights take {weights} on the disk and as much in memory. A conversation comes on top, with 16-bit numbers:

| tokens | cache | together |
|--:|--:|--:|
{memory}

## Licence

{licence_text}
"""
OWN_LICENCE = (
    "The weights keep the licence under which they were published; MODEL_LICENSE says which that is, and where\n"
    "to read it. The code is licensed under Apache-2.0 (LICENSE)."
)


def model_card(parts: Parts, name: str, license: str) -> str:
    """The README.md of a repository `name`; `license` is the Hub's name for the licence of the weights."""
    config, size = parts.config, total_bytes(parts.state)
    sizes = sizes_of(config.to_dict())
    architecture, kin = ARCHITECTURES[config.family]
    other, context = license == "other", config.max_position_embeddings
    return CARD.format(
        name=name,
        architecture=architecture,
        kin=kin,
        parameters=sizes.parameters,
        layers=sizes.num_layers,
        rows=sizes.vocab_size,
        context=context,
        packing=_packing(parts),
        history="\n".join(f"- {step}" for step in parts.history),
        version=__version__,
        weights=readable(size),
        memory="\n".join(
            _memory_row(tokens, size, sizes.cache_values_per_token)
            for tokens in (*(n for n in TOKENS if n < context), context)
        ),
        license="license: other\nlicense_name: see-model-license\nlicense_link: MODEL_LICENSE"
        if other
        else f"license: {license}",
        licence_text=OWN_LICENCE if other else f"Weights: {license}. Code: Apache-2.0 (LICENSE).",
    )


def _packing(parts: Parts) -> str:
    bits = parts.config.quantization_bit
    if not bits:
        return f"The weights are in {str(parts.config.dtype).removeprefix('torch.')}."
    what = (
        "with embedding and output layer"
        if parts.config.quantization_embeddings
        else "embedding and output layer not"
    )
    return f"The linear layers are packed to {bits} bits, {what}."


def _memory_row(tokens: int, weights: int, cache_values: int) -> str:
    cache = tokens * cache_values * CACHE_BYTES
    return f"| {tokens:,} | {readable(cache)} | {readable(weights + cache)} |"
