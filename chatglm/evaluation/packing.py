"""What int8 and int4 weights cost a model: perplexity, agreement and error of each layer, on any text.

The precisions are loaded one after the other, so that the memory holds one of them. Text is read in windows, each as
the beginning of an answer: [gMASK] sop text. That is how both families continue a text with nothing before it.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm import tqdm

from chatglm.checkpoint import read_checkpoint
from chatglm.evaluation.run import model_fingerprint
from chatglm.find import find_checkpoint
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization import check_packing
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.loading import load
from chatglm.tools.slim import Corpus, find_corpus

WINDOW = 512  # tokens of text that are read at once
BYTES_A_TOKEN = 64  # read at most; texts have 3 to 5
GROUP_SIZES = (128, 64, 32)


@dataclass
class Cost:
    """What was measured of one precision. Shares are 0 to 1; the unpacked model has agreement 1 and no errors."""

    name: str
    megabytes: float  # of the weights, tied ones once
    perplexity: float
    agreement: float = 1.0  # share of the tokens for which the likeliest one is that of the unpacked model
    layer_errors: list[float] = field(
        default_factory=list
    )  # of each block's output, |difference| / |unpacked|


@dataclass(frozen=True)
class Costs:
    """All precisions of a model, the unpacked one first."""

    about: dict[str, Any]
    costs: list[Cost]

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "about": self.about,
            "costs": [asdict(cost) | {"lost": self.lost(cost)} for cost in self.costs],
        }

    def lost(self, cost: Cost) -> float:
        """By which share the perplexity is higher than that of the unpacked model."""
        return cost.perplexity / self.costs[0].perplexity - 1

    def as_markdown(self) -> str:
        """Two tables for people: the precisions, and the error behind each layer."""
        about = self.about
        head = f"# {about['name']}, what packing costs on {about['tokens']:,} tokens of text"
        lines = [
            head,
            "",
            "| weights | MB | perplexity | lost | same likeliest token |",
            "|---|--:|--:|--:|--:|",
        ]
        for cost in self.costs:
            lost = f"{self.lost(cost):+.2%}" if cost.layer_errors else ""
            cells = [
                cost.name,
                f"{cost.megabytes:,.1f}",
                f"{cost.perplexity:.4f}",
                lost,
                f"{cost.agreement:.2%}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
        packed = self.costs[1:]
        lines += ["", f"| error behind layer | {' | '.join(cost.name for cost in packed)} |"]
        lines.append("|--:|" + "--:|" * len(packed))
        for layer in range(about["layers"]):
            errors = " | ".join(f"{cost.layer_errors[layer]:.2%}" for cost in packed)
            lines.append(f"| {layer} | {errors} |")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """quantization.json and quantization.md."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.as_dict(), indent=2, ensure_ascii=False)
        (folder / "quantization.json").write_text(text + "\n", encoding="utf-8")
        (folder / "quantization.md").write_text(self.as_markdown(), encoding="utf-8")


@dataclass(frozen=True)
class Reading:
    """How a model read the text: for every token its log-probability, and the id that was likeliest."""

    log_probabilities: torch.Tensor  # [tokens]
    likeliest: torch.Tensor  # [tokens]
    layers: list[torch.Tensor]  # of each block, what it gave for the first window [tokens, D]


def packing_costs(
    name: str | Path,
    texts: str | Path | Sequence[str | Path],
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    tokens: int = 8192,
    progress: bool = True,
) -> Costs:
    """Compares the model `name` in int8 and int4, also in groups, with what it is unpacked.

    Args:
        name, revision, device, dtype: as for `chatglm.load`; the checkpoint must not be packed.
        texts: UTF-8 files, or folders that hold some; the first `tokens` tokens of them are read.
        progress: show a bar, where somebody sees it.

    Raises OSError or ValueError with one sentence, before anything is loaded.
    """
    checkpoint = read_checkpoint(find_checkpoint(name, revision))
    config = ChatGLMConfig.from_dict(dict(checkpoint.config))
    if config.quantization_bit:
        raise ValueError(
            f"{name} is packed to {config.quantization_bit} bits already, so there is nothing to compare it with; "
            "give the checkpoint that is not packed."
        )
    corpus = find_corpus(texts)
    ids = text_ids(ChatGLMTokenizer.from_pretrained(checkpoint.folder), corpus, tokens)
    windows = split(ids, min(WINDOW, config.max_position_embeddings - 2))
    precisions = list(packings(config))
    hidden = None if progress else True  # None: shown on a terminal
    bar = tqdm(desc="windows", total=len(windows) * (1 + len(precisions)), disable=hidden)
    with bar:
        model, tokenizer = load(checkpoint.folder, device, dtype)
        unpacked = read(model, tokenizer, windows, bar)
        device, dtype = str(model.device), str(model.dtype).removeprefix("torch.")
        costs = [Cost(dtype, megabytes(model), perplexity(unpacked.log_probabilities))]
        for label, packing in precisions:
            del model  # before the next one is loaded
            gc.collect()
            model, tokenizer = load(checkpoint.folder, device, dtype, **packing)
            packed = read(model, tokenizer, windows, bar)
            costs.append(compared(label, megabytes(model), packed, unpacked))
    about = {
        "name": str(name),
        "model": model_fingerprint(checkpoint),
        "family": config.family,
        "layers": config.num_layers,
        "device": device,
        "dtype": dtype,
        "tokens": sum(map(len, windows)),
        "window": len(windows[0]),
    }
    return Costs(about, costs)


def packings(config: ChatGLMConfig) -> Iterator[tuple[str, dict[str, int]]]:
    """Name and arguments for `load` of every packing that the shapes of the model allow."""
    yield "int8", {"quantize": 8}
    yield "int4", {"quantize": 4}
    inner = config.inner_hidden_size if config.family == "chatglm" else config.ffn_hidden_size
    columns = (config.hidden_size, config.num_attention_heads * config.head_dim, inner)
    for size in GROUP_SIZES:
        try:
            for width in columns:
                check_packing(4, size, width)
        except ValueError:
            continue
        yield f"int4, groups of {size}", {"quantize": 4, "group_size": size}


def text_ids(tokenizer: ChatGLMTokenizer, corpus: Corpus, most: int) -> list[int]:
    """The first `most` ids of the files, each encoded by itself as plain text."""
    ids: list[int] = []
    for file in corpus.files:
        if len(ids) >= most:
            break
        with file.open(encoding="utf-8-sig") as stream:
            ids += tokenizer._encode_plain(stream.read((most - len(ids)) * BYTES_A_TOKEN))
    if len(ids) < 2:
        raise ValueError(
            f"The texts have {len(ids)} tokens, which is too little to measure; give longer ones."
        )
    return ids[:most]


def split(ids: list[int], window: int) -> list[list[int]]:
    """The ids in pieces of `window`."""
    return [ids[start : start + window] for start in range(0, len(ids), window)]


def read(
    model: ChatGLMForConditionalGeneration,
    tokenizer: ChatGLMTokenizer,
    windows: Iterable[list[int]],
    bar: tqdm,
) -> Reading:
    """Reads all windows, each for itself."""
    start = [tokenizer.gmask_token_id, tokenizer.sop_token_id]
    told, likeliest, layers = [], [], []
    for window in windows:
        ids = torch.tensor([start + window], device=model.device)
        # Every token of the window is predicted at the one before it.
        predicting = torch.zeros_like(ids, dtype=torch.bool)
        predicting[:, len(start) - 1 : -1] = True
        with nullcontext(layers) if layers else block_outputs(model) as layers:
            scores = log_probabilities(model, ids, predicting)
        targets = ids[0, len(start) :]
        told.append(scores.gather(1, targets[:, None])[:, 0].cpu())
        likeliest.append(scores.argmax(-1).cpu())
        bar.update()
    return Reading(torch.cat(told), torch.cat(likeliest), layers)


@torch.no_grad()
def log_probabilities(
    model: ChatGLMForConditionalGeneration, input_ids: torch.Tensor, predicting: torch.Tensor
) -> torch.Tensor:
    """Of the token after each position that `predicting` [B, T] marks, over the vocabulary: [marked, V], float32."""
    hidden_states = model.transformer(input_ids=input_ids, use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden_states[predicting])
    return F.log_softmax(logits.float(), dim=-1)


@contextmanager
def block_outputs(model: ChatGLMForConditionalGeneration) -> Iterator[list[torch.Tensor]]:
    """A list that fills with what each block of the model gives for a batch of one, [T, D]."""
    outputs: list[torch.Tensor] = []

    def keep(block: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, Any]) -> None:
        outputs.append(output[0][0].detach().float().cpu())

    hooks = [block.register_forward_hook(keep) for block in model.transformer.blocks]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def compared(name: str, size: float, packed: Reading, unpacked: Reading) -> Cost:
    """The cost of a precision from how both models read the same text."""
    agreement = (packed.likeliest == unpacked.likeliest).double().mean().item()
    pairs = zip(packed.layers, unpacked.layers, strict=True)
    errors = [((ours - theirs).norm() / theirs.norm()).item() for ours, theirs in pairs]
    return Cost(name, size, perplexity(packed.log_probabilities), agreement, errors)


def perplexity(log_probabilities: torch.Tensor) -> float:
    """e to the mean of the negative log-probabilities."""
    return (-log_probabilities.double().mean()).exp().item()


def megabytes(model: ChatGLMForConditionalGeneration) -> float:
    """Of the weights, tied ones once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values()) / 1e6
