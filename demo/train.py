"""Train a demo model from nothing: `python -m demo.train --model demo --output FOLDER`.

Makes the vocabulary, encodes conversations exactly as `chat` does, trains with AdamW on the answers
only, and writes a folder that `AutoModel.from_pretrained` loads: weights in float16, config, tokenizer,
the loss curve as picture and numbers, and the model card with the held-out accuracy. The same seed
gives the same data and start; sums inside torch may still differ in the last digits between machines
and numbers of threads.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.tokenization_chatglm import CHATGLM, CHATGLM2, ChatGLMTokenizer
from demo.book import Book, Mix
from demo.evaluate import evaluate_folder
from demo.held_out import Item, held_out_questions
from demo.text import Turn
from demo.vocabulary import ROWS, train_vocabulary

CODE_FILES = [path.name for path in Path(__file__).parents[1].glob("*.py")]
IGNORED = -100  # target of a position that is not trained
CHUNK = 2048  # conversations that are sorted by length together
MAX_TOKENS = 320  # of one conversation
SAMPLE_QUESTIONS = [
    "你是谁？",
    "What is 27 plus 45?",
    "法国的首都是哪里？",
    "How do you say 苹果 in English?",
]
ALPHA = 56**0.5  # how much ChatGLM-6B's blocks weigh their input against what they add


@dataclass(frozen=True)
class Stage:
    """A part of the training: what is practised, how long, and how fast."""

    steps: int
    learning_rate: float
    mix: Mix
    warmup: int = 100


# Shares of:       sums  questions tables translation unknown follow_up core
PRACTISE_MIX = Mix(0.58, 0.19,     0.04,  0.08,       0.06,   0.05,     0.00, lost_words=0.2)  # fmt: skip
POLISH_MIX   = Mix(0.40, 0.25,     0.06,  0.08,       0.05,   0.08,     0.08, (0.75, 0.13, 0.07, 0.05))  # fmt: skip
DRILL_MIX    = Mix(0.70, 0.12,     0.03,  0.05,       0.03,   0.04,     0.03, (0.94, 0.03, 0.02, 0.01))  # fmt: skip

LEARN = Stage(steps=2300, learning_rate=3e-3, mix=Mix())
# Sums come right last: they get most of the second stage.
PRACTISE = Stage(steps=1000, learning_rate=1.5e-3, mix=PRACTISE_MIX)
# Everything once more, in short conversations: they hold more answers in the same time.
POLISH = Stage(steps=900, learning_rate=1.2e-3, mix=POLISH_MIX)
# ChatGLM-6B trains one answer a conversation, ChatGLM2-6B all of them, so the first needs more practice.
DRILL = Stage(steps=480, learning_rate=1.2e-3, mix=DRILL_MIX, warmup=50)


@dataclass(frozen=True)
class Recipe:
    """Sizes of a model and how it is trained."""

    family: str
    hidden_size: int
    inner_size: int
    num_layers: int
    num_heads: int
    stages: tuple[Stage, ...] = (LEARN, PRACTISE, POLISH)
    tokens_per_step: int = 2048
    weight_decay: float = 0.05

    @property
    def steps(self) -> int:
        """Of all stages."""
        return sum(stage.steps for stage in self.stages)

    def config(self, tokenizer: ChatGLMTokenizer) -> ChatGLMConfig:
        """The config.json of the model: the published keys with small sizes."""
        shared = {
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "dtype": "float16",
        }
        if self.family == CHATGLM2:
            return ChatGLMConfig(
                **shared,
                padded_vocab_size=ROWS,
                ffn_hidden_size=self.inner_size,
                kv_channels=self.hidden_size // self.num_heads,
                multi_query_attention=True,
                multi_query_group_num=2,
                seq_length=2048,
            )
        return ChatGLMConfig.chatglm_6b(
            **shared,
            vocab_size=ROWS,
            inner_hidden_size=self.inner_size,
            max_sequence_length=2048,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            mask_token_id=tokenizer.mask_token_id,
            gmask_token_id=tokenizer.gmask_token_id,
        )


RECIPES = {
    "demo": Recipe(CHATGLM2, hidden_size=192, inner_size=512, num_layers=4, num_heads=4),
    "demo-v1": Recipe(
        CHATGLM,
        hidden_size=192,
        inner_size=768,
        num_layers=4,
        num_heads=4,
        stages=(LEARN, PRACTISE, POLISH, DRILL),
    ),
}


# ---- conversations as ids and targets


Row = tuple[list[int], list[int], list[float]]


class Encoder:
    """Turns conversations into rows of ids, targets and weights.

    `targets[i]` is what follows `ids[i]`, or IGNORED. An answer of n tokens weighs sqrt(n), each of its
    tokens 1 / sqrt(n): the three digits of a sum would be lost beside long answers otherwise.
    """

    def __init__(self, tokenizer: ChatGLMTokenizer) -> None:
        self.tokenizer = tokenizer
        self._answers: dict[str, list[int]] = {}

    def answer(self, text: str) -> list[int]:
        if text not in self._answers:
            self._answers[text] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return self._answers[text]

    def _add_round(self, row: Row, prompt: list[int], answer: str) -> None:
        ids, targets, weights = row
        reply = [*self.answer(answer), self.tokenizer.eos_token_id]
        ids += prompt + reply[:-1]  # the end token stands in no cache, so a next round follows without it
        targets += [IGNORED] * (len(prompt) - 1) + reply
        weights += [0.0] * (len(prompt) - 1) + [len(reply) ** -0.5] * len(reply)

    def whole_prompt(self, rounds: list[Turn]) -> Row:
        """The published layout: the prompt with its history, the last answer, the end token."""
        query, answer = rounds[-1]
        row: Row = ([], [], [])
        self._add_round(row, self.tokenizer.encode_chat(query, rounds[:-1]), answer)
        return row

    def on_the_cache(self, rounds: list[Turn]) -> Row:
        """What ChatGLM2 sees when `stream_chat` goes on with its cache: every answer can be trained."""
        row: Row = ([], [], [])
        for number, (query, answer) in enumerate(rounds):
            self._add_round(row, self.tokenizer.encode_chat_continuation(query, rounds[:number]), answer)
        return row

    def encode(self, rounds: list[Turn], rng: random.Random) -> Row:
        """Choose a layout the family knows."""
        if self.tokenizer.family == CHATGLM2 and rng.random() < 0.6:
            return self.on_the_cache(rounds)
        return self.whole_prompt(rounds)


Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def pad(rows: list[Row], pad_token_id: int) -> Batch:
    """Right-padded ids, targets and weights, [B, T]; what comes after an answer cannot reach it."""
    length = max(len(ids) for ids, _, _ in rows)
    columns = zip(*rows, strict=True)
    ids, targets, weights = (
        torch.tensor([values + [fill] * (length - len(values)) for values in column])
        for column, fill in zip(columns, (pad_token_id, IGNORED, 0.0), strict=True)
    )
    return ids, targets, weights


def batches(book: Book, encoder: Encoder, tokens: int, rng: random.Random) -> Iterator[Batch]:
    """Endless batches of about `tokens` tokens, rows of one batch being about equally long."""
    while True:
        rows = [encoder.encode(book.conversation(rng), rng) for _ in range(CHUNK)]
        rows = sorted((row for row in rows if len(row[0]) <= MAX_TOKENS), key=lambda row: len(row[0]))
        groups: list[list[Row]] = [[]]
        for row in rows:
            if len(row[0]) * (len(groups[-1]) + 1) > tokens:
                groups.append([])
            groups[-1].append(row)
        rng.shuffle(groups)
        for group in groups:
            yield pad(group, encoder.tokenizer.pad_token_id)


def held_out_batches(items: list[Item], encoder: Encoder) -> list[Batch]:
    rows = [encoder.whole_prompt([*item.history, (item.query, item.answer)]) for item in items]
    rows.sort(key=lambda row: len(row[0]))
    return [pad(rows[i : i + 64], encoder.tokenizer.pad_token_id) for i in range(0, len(rows), 64)]


# ---- model


@torch.no_grad()
def initialise(model: ChatGLMForConditionalGeneration) -> None:
    """Draw the weights so that every layer starts with an output of about its input's size."""
    config = model.config
    depth = (2 * config.num_layers) ** -0.5
    if config.family == CHATGLM:
        depth *= ALPHA  # its blocks multiply the other side of the sum by this
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings():
            into_residual = name.endswith(("attention.dense", "dense_4h_to_h"))
            nn.init.normal_(module.weight, std=(depth if into_residual else 1.0) * module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(model.get_output_embeddings().weight, std=0.02)
    nn.init.normal_(model.get_input_embeddings().weight, std=0.02 if config.family == CHATGLM else 0.1)


def answer_loss(model: ChatGLMForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """Weighted mean of the cross entropy; logits are computed for trained positions only."""
    ids, targets, weights = batch
    hidden_states = model.transformer(input_ids=ids, use_cache=False).last_hidden_state
    trained = targets != IGNORED
    logits = model.get_output_embeddings()(hidden_states[trained])
    losses = F.cross_entropy(logits.float(), targets[trained], reduction="none")
    return (losses * weights[trained]).sum() / weights.sum()


def optimizer_for(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW; norms, biases and embeddings are not decayed."""
    embeddings = {id(model.get_input_embeddings().weight), id(model.get_output_embeddings().weight)}
    decayed = [p for p in model.parameters() if p.dim() == 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() != 2 or id(p) in embeddings]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98))


def learning_rate(step: int, stage: Stage) -> float:
    """Linear warm-up, then half a cosine down to almost nothing."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    progress = (step - stage.warmup) / max(1, stage.steps - stage.warmup)
    return stage.learning_rate * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass
class Curve:
    """Loss by step, of training (smoothed) and of the held-out questions."""

    train: list[tuple[int, float]]
    held_out: list[tuple[int, float]]

    def picture(self, path: Path, title: str) -> None:
        """Draw it; needs matplotlib."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3.5), dpi=80, layout="tight")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        axes.plot(*zip(*self.train, strict=True), label="training", linewidth=1)
        if self.held_out:
            axes.plot(*zip(*self.held_out, strict=True), label="held-out questions", marker=".")
        axes.set(xlabel="step", ylabel="loss per token of the answers", yscale="log", title=title)
        axes.legend()
        axes.grid(alpha=0.3)
        figure.savefig(path, metadata={"Software": None})


def train(
    model: ChatGLMForConditionalGeneration,
    encoder: Encoder,
    recipe: Recipe,
    number: int,
    seed: int,
    curve: Curve,
) -> None:
    """Train stage `number` in place with a progress bar, adding to the curve."""
    stage = recipe.stages[number]
    before = sum(earlier.steps for earlier in recipe.stages[:number])
    book = Book(stage.mix)
    held_out = held_out_batches(held_out_questions(book), encoder)
    optimizer = optimizer_for(model, recipe)
    stream = batches(book, encoder, recipe.tokens_per_step, random.Random(seed + number))
    smooth = None
    bar = tqdm(range(stage.steps), desc=f"stage {number + 1} of {len(recipe.stages)}", mininterval=1.0)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, stage)
        loss = answer_loss(model, next(stream))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        smooth = loss.item() if smooth is None else 0.97 * smooth + 0.03 * loss.item()
        bar.set_postfix(loss=f"{smooth:.3f}")
        if step % 20 == 0 or step == stage.steps - 1:
            curve.train.append((before + step, round(smooth, 4)))
        if (step + 1) % max(1, stage.steps // 8) == 0:
            curve.held_out.append((before + step + 1, round(held_out_loss(model, held_out), 4)))
            tqdm.write(f"step {before + step + 1}: loss {smooth:.4f}, held out {curve.held_out[-1][1]:.4f}")
            show_answers(model, encoder.tokenizer, before + step + 1)


@torch.no_grad()
def held_out_loss(model: ChatGLMForConditionalGeneration, held_out: list[Batch]) -> float:
    model.eval()
    totals = [batch[2].sum().item() for batch in held_out]
    losses = [answer_loss(model, batch).item() * total for batch, total in zip(held_out, totals, strict=True)]
    model.train()
    return sum(losses) / sum(totals)


def show_answers(model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, step: int) -> None:
    """Print what the model says now to a few questions."""
    model.eval()
    answers = model.batch_chat(tokenizer, SAMPLE_QUESTIONS, do_sample=False, max_length=160)
    model.train()
    for question, (answer, _) in zip(SAMPLE_QUESTIONS, answers, strict=True):
        tqdm.write(f"  step {step}  {question} -> {answer!r}")


def make_tokenizer(family: str, output: Path) -> ChatGLMTokenizer:
    """Train the vocabulary of `family` and return its tokenizer."""
    (output / "config.json").unlink(missing_ok=True)  # of an earlier model, with another vocabulary
    return ChatGLMTokenizer(str(train_vocabulary(family, output)))


def make_model(recipe: Recipe, tokenizer: ChatGLMTokenizer, seed: int) -> ChatGLMForConditionalGeneration:
    """An untrained float32 model of the recipe's sizes."""
    torch.manual_seed(seed)
    model = ChatGLMForConditionalGeneration(recipe.config(tokenizer))
    initialise(model)
    return model.float().train()


def save(model: ChatGLMForConditionalGeneration, tokenizer: ChatGLMTokenizer, output: Path) -> None:
    """Write weights (float16), config and tokenizer; no code files, since the package brings the code."""
    model.half().eval()
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    for name in CODE_FILES:
        (output / name).unlink(missing_ok=True)
    for path in (output / "config.json", output / "tokenizer_config.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        content.pop("auto_map", None)
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def shortened(recipe: Recipe, steps: int) -> Recipe:
    """The recipe with `steps` steps in all, each stage keeping its share."""
    stages = tuple(
        replace(stage, steps=max(1, round(steps * stage.steps / recipe.steps))) for stage in recipe.stages
    )
    return replace(recipe, stages=stages)


def run(name: str, output: Path, seed: int, steps: int | None = None, resume: bool = False) -> None:
    """Make one demo model from nothing in the folder `output`, or go on after its last finished stage.

    Every stage starts from the float16 weights that the one before has saved, and with a fresh optimizer, so going
    on gives the same as running through.
    """
    recipe = RECIPES[name] if steps is None else shortened(RECIPES[name], steps)
    facts: dict[str, Any] = {"stages": 0, "minutes": 0.0, "train_loss": [], "held_out_loss": []}
    if resume:
        facts.update(json.loads((output / "training.json").read_text(encoding="utf-8")))
        tokenizer = ChatGLMTokenizer.from_pretrained(output)
        model = ChatGLMForConditionalGeneration.from_pretrained(output)
    else:
        output.mkdir(parents=True, exist_ok=True)
        print("training the vocabulary …")
        tokenizer = make_tokenizer(recipe.family, output)
        model = make_model(recipe, tokenizer, seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{name}: {parameters:,} parameters, {recipe.steps} steps of {recipe.tokens_per_step} tokens")
    curve = Curve(facts["train_loss"], facts["held_out_loss"])
    for number in range(facts["stages"], len(recipe.stages)):
        start = time.perf_counter()
        train(model.float().train(), Encoder(tokenizer), recipe, number, seed, curve)
        save(model, tokenizer, output)
        facts |= {
            "model": name,
            "parameters": parameters,
            "seed": seed,
            "stages": number + 1,
            "steps": [stage.steps for stage in recipe.stages[: number + 1]],
            "learning_rate": [stage.learning_rate for stage in recipe.stages[: number + 1]],
            "tokens_per_step": recipe.tokens_per_step,
            "minutes": round(facts["minutes"] + (time.perf_counter() - start) / 60, 1),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "train_loss": curve.train,
            "held_out_loss": curve.held_out,
        }
        (output / "training.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    curve.picture(output / "loss.png", f"{name}: {parameters / 1e6:.1f} M parameters")
    print(f"trained in {facts['minutes']} minutes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a demo model from nothing.")
    parser.add_argument("--model", choices=sorted(RECIPES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, help="training steps (default: the recipe's)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument(
        "--no-evaluation",
        action="store_true",
        help="leave out the held-out questions and the model card; python -m demo.evaluate does them later",
    )
    parser.add_argument(
        "--resume", action="store_true", help="go on after the last finished stage in the folder"
    )
    options = parser.parse_args()
    if options.resume and not (options.output / "training.json").is_file():
        parser.error(f"{options.output} has no training.json of an earlier stage; leave out --resume.")
    if options.steps is not None and options.steps < 1:
        parser.error(f"--steps is {options.steps}; it must be at least 1.")
    run(options.model, options.output, options.seed, options.steps, options.resume)
    if not options.no_evaluation:
        evaluate_folder(options.output)


if __name__ == "__main__":
    main()
