"""How fast a model is on this machine: loading, reading a prompt, decoding, and the memory it needs.

Answers of a fixed length are generated in rounds, each loop taking its turn in every round, with a probe of the
memory bandwidth between the rounds. What was measured is a `Report`; `figures` computes from it what people read.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import GenerationMixin

from chatglm import __version__
from chatglm.checkpoint import Sizes, read_checkpoint
from chatglm.find import find_checkpoint
from chatglm.hub.chat_chatglm import CHAT_DEFAULTS
from chatglm.hub.configuration_chatglm import ChatGLMConfig
from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
from chatglm.hub.quantization_kernels import WORTH_IT, choose_path
from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer
from chatglm.loading import load
from chatglm.tools.chart import draw_bars
from chatglm.tools.machine import machine, peak_memory, read_probe

GREEDY, SAMPLED = "greedy", "sampled"
PLAIN = "plain "  # in front of them: with the loop of transformers
PROMPT_TOKENS, NEW_TOKENS = 512, 128  # by default, in a context of 2048 or more
FEWEST_PROMPT, FEWEST_NEW = 4, 2
WARM_UP = 8  # tokens of the prompt and of the answer with which a loop is tried first
TEXT = """\
人工智能是研究怎样让机器完成通常需要人的智慧才能完成的工作的学科。今天的语言模型从大量的文字中学习，一个词一个词地写出回答。
A language model reads a text and says which word is likely to come next; everything it writes is made that way.
它读懂问题的速度取决于处理器能算多快，而写出回答的速度取决于内存能读多快，因为每写一个词都要把所有的权重读一遍。
"""


@dataclass(frozen=True)
class Turn:
    """Seconds of one answer: until its first token was there, and from there to its last."""

    first: float
    rest: float


@dataclass(frozen=True)
class Figure:
    """What one line of the report says: a value a round, and if compared what the plain loop had in that round."""

    name: str
    unit: str
    values: tuple[float, ...]
    plain: tuple[float, ...] = ()

    @property
    def times_as_fast(self) -> tuple[float, ...]:
        """Round by round; more is better, also where the unit is seconds."""
        ratios = [mine / its for mine, its in zip(self.values, self.plain, strict=False)]
        return tuple(1 / ratio if self.unit == "s" else ratio for ratio in ratios)

    def as_dict(self) -> dict[str, Any]:
        result = {"name": self.name, "unit": self.unit, **spread(self.values), "values": list(self.values)}
        if self.plain:
            result["plain"] = {**spread(self.plain), "values": list(self.plain)}
            result["times_as_fast"] = {**spread(self.times_as_fast), "values": list(self.times_as_fast)}
        return result


@dataclass(frozen=True)
class Report:
    """What `bench` measured. Times are in seconds, sizes in bytes."""

    about: dict[str, Any]  # model, machine, versions, device, dtype, packing
    prompt_tokens: int
    new_tokens: int
    sampling: dict[str, float]  # the settings of the family's chat
    load_time: float
    bytes_per_token: int  # weights and scales that decoding a token reads
    memory: dict[str, int]  # the most that was needed, by place
    bandwidth: list[float]  # bytes per second, before and after every round
    turns: dict[str, list[Turn]]  # by loop, one a round
    same_tokens: bool | None = None  # whether both loops gave the same greedy answer; None: not compared

    @property
    def rounds(self) -> int:
        return len(self.bandwidth) - 1

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file: the figures, and the seconds of every turn."""
        lengths = {"prompt_tokens": self.prompt_tokens, "new_tokens": self.new_tokens, "rounds": self.rounds}
        measured = {
            "bytes_per_token": self.bytes_per_token,
            "same_tokens": self.same_tokens,
            "figures": [figure.as_dict() for figure in figures(self)],
            "turns": {loop: [vars(turn) for turn in turns] for loop, turns in self.turns.items()},
        }
        return self.about | lengths | {"sampling": self.sampling} | measured


def bench(
    name: str | Path,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    rounds: int = 3,
    compare: bool = False,
    progress: bool = True,
) -> Report:
    """Loads the model `name` and measures it; takes the time of 2 answers a round, or 4 to compare.

    Args:
        name, revision, device, dtype, quantize, group_size: as for `chatglm.load`.
        prompt_tokens: length of the prompt; None: 512, or a quarter of a shorter context.
        new_tokens: length of every answer, whether or not the model would have ended it; None: 128, or a
            sixteenth of a shorter context.
        rounds: how many values every figure has.
        compare: let the loop of transformers' `generate` run the same model, turn about.
        progress: show a bar, where somebody sees it.

    Raises OSError or ValueError with one sentence, before anything is loaded, for a model that cannot be had
    and for lengths that do not fit it.
    """
    checkpoint = read_checkpoint(find_checkpoint(name, revision))
    context = ChatGLMConfig.from_dict(dict(checkpoint.config)).max_position_embeddings
    prompt_tokens, new_tokens = lengths(context, prompt_tokens, new_tokens)
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; measure 1 at least.")
    start = time.perf_counter()
    model, tokenizer = load(checkpoint.folder, device, dtype, quantize, group_size=group_size)
    synchronize(model.device)
    load_time = time.perf_counter() - start

    ids = prompt_ids(tokenizer, prompt_tokens)
    loops = (GREEDY, PLAIN + GREEDY, SAMPLED, PLAIN + SAMPLED) if compare else (GREEDY, SAMPLED)
    total = new_tokens * (1 + rounds * len(loops)) + WARM_UP * (len(loops) - 1)
    with tqdm(desc="tokens", total=total, disable=None if progress else True) as bar:
        answers = Answers(model, tokenizer, bar)
        memory = warm_up(answers, loops, ids, new_tokens)
        bandwidth, taken, same_tokens = take_turns(answers, loops, ids, new_tokens, rounds)
    return Report(
        about=describe(str(name), checkpoint.sizes, model),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        sampling=sampling_settings(model),
        load_time=load_time,
        bytes_per_token=bytes_per_token(model),
        memory=memory,
        bandwidth=bandwidth,
        turns=taken,
        same_tokens=same_tokens if compare else None,
    )


def warm_up(answers: Answers, loops: Sequence[str], ids: list[int], new_tokens: int) -> dict[str, int]:
    """Tries every loop once; returns the memory that loading and one whole answer took at most."""
    answers.turn(loops[0], ids, new_tokens)
    memory = peak_memory(str(answers.model.device))
    for loop in loops[1:]:
        answers.turn(loop, ids[-WARM_UP:], WARM_UP)
    return memory


def take_turns(
    answers: Answers, loops: Sequence[str], ids: list[int], new_tokens: int, rounds: int
) -> tuple[list[float], dict[str, list[Turn]], bool]:
    """The bandwidth around the rounds, the turns of every loop, and whether equal loops gave equal tokens."""
    probe = read_probe(str(answers.model.device))
    probe()  # the first pass pays for pages and frequency
    bandwidth, same_tokens = [probe()], True
    turns: dict[str, list[Turn]] = {loop: [] for loop in loops}
    for number in range(rounds):
        tokens = {}
        # Forwards and backwards, so that none always comes right after the probe, which empties the caches.
        for loop in loops if number % 2 == 0 else loops[::-1]:
            turn, tokens[loop] = answers.turn(loop, ids, new_tokens)
            turns[loop].append(turn)
        bandwidth.append(probe())
        same_tokens &= tokens[GREEDY] == tokens.get(PLAIN + GREEDY, tokens[GREEDY])
    return bandwidth, turns, same_tokens


def lengths(context: int, prompt_tokens: int | None, new_tokens: int | None) -> tuple[int, int]:
    """Tokens of the prompt and of the answer; ValueError where a model with this `context` has no room for them."""
    prompt = min(PROMPT_TOKENS, context // 4) if prompt_tokens is None else prompt_tokens
    new = min(NEW_TOKENS, context // 16) if new_tokens is None else new_tokens
    if prompt < FEWEST_PROMPT or new < FEWEST_NEW:
        raise ValueError(
            f"A prompt of {prompt} and an answer of {new} tokens cannot be measured; take {FEWEST_PROMPT} and "
            f"{FEWEST_NEW} at least."
        )
    if prompt + new > context:
        raise ValueError(
            f"A prompt of {prompt} and an answer of {new} tokens make {prompt + new}, but the model has a context "
            f"of {context}; ask for fewer."
        )
    return prompt, new


def prompt_ids(tokenizer: ChatGLMTokenizer, length: int) -> list[int]:
    """`length` ids of a chat prompt: text of the middle is left out, the special tokens of both ends stay.

    ChatGLM-6B's prompt so ends with [gMASK] <sop>, ChatGLM2's begins with [gMASK] sop.
    """
    text = TEXT
    while len(ids := tokenizer.encode_chat(text)) < length:
        text += text
    return ids[: length - 2] + ids[-2:]


class Stopwatch:
    """What `generate` streams to: notes when each token was there."""

    def __init__(self, clock: Callable[[], float], bar: tqdm) -> None:
        self.clock, self.bar = clock, bar
        self.tokens: list[int] = []
        self.times: list[float] = []
        self.prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, then one token at a time, on the CPU."""
        if self.prompt_is_next:
            self.prompt_is_next = False
            return
        self.times.append(self.clock())
        self.tokens += value.flatten().tolist()
        self.bar.update()

    def end(self) -> None:
        """Nothing is left to be streamed."""


class Answers:
    """Lets a model answer as its chat does, by one loop or another, and takes the time."""

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        bar: tqdm,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.model, self.tokenizer, self.bar, self.clock = model, tokenizer, bar, clock

    def turn(self, loop: str, ids: list[int], new_tokens: int) -> tuple[Turn, list[int]]:
        """One answer of exactly `new_tokens` tokens to the prompt `ids`: its times and its tokens."""
        model = self.model
        inputs = model._batch(self.tokenizer, [ids])
        arguments = model._generation_arguments(
            self.tokenizer, len(ids), do_sample=loop.endswith(SAMPLED), max_new_tokens=new_tokens,
            eos_token_id=None,
        )  # fmt: skip
        watch = Stopwatch(self.clock, self.bar)
        with the_loop_of_transformers(model, loop.startswith(PLAIN)):
            synchronize(model.device)
            start = self.clock()
            model.generate(**inputs, **arguments, streamer=watch)
        return Turn(watch.times[0] - start, watch.times[-1] - watch.times[0]), watch.tokens


class PlainModel(ChatGLMForConditionalGeneration):
    """The same model, decoding by the loop of transformers."""

    _sample = GenerationMixin._sample


@contextmanager
def the_loop_of_transformers(model: ChatGLMForConditionalGeneration, wanted: bool = True) -> Iterator[None]:
    """Within, `model.generate` runs the loop of transformers, if that is wanted."""
    own = type(model)
    if wanted:
        model.__class__ = PlainModel
    try:
        yield
    finally:
        model.__class__ = own


def synchronize(device: torch.device) -> None:
    """Waits until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def bytes_per_token(model: ChatGLMForConditionalGeneration) -> int:
    """Weights and scales that decoding one token reads, as they are stored in a file.

    All but the embedding, of which it takes one row, unless that is the output layer too (ChatGLM-6B), and but
    the P-Tuning prefix, which is encoded once.
    """
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    once = {id(parameter) for parameter in model.get_input_embeddings().parameters()} - head
    if model.config.pre_seq_len:
        once |= {id(parameter) for parameter in model.transformer.prefix_encoder.parameters()}
    return sum(parameter.nbytes for parameter in model.parameters() if id(parameter) not in once)


def sampling_settings(model: ChatGLMForConditionalGeneration) -> dict[str, float]:
    """Those of the family's chat."""
    defaults = CHAT_DEFAULTS[model.config.family]
    return {"temperature": defaults["temperature"], "top_p": defaults["top_p"]}


def describe(name: str, sizes: Sizes, model: ChatGLMForConditionalGeneration) -> dict[str, Any]:
    """What the figures depend on, besides the lengths."""
    device = model.device
    accelerator = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "model": name,
        "family": model.config.family,
        "parameters": sizes.parameters,
        "layers": sizes.num_layers,
        "date": date.today().isoformat(),
        "machine": machine() | ({"GPU": accelerator} if accelerator else {}),
        "versions": {
            "chatglm": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "Python": platform.python_version(),
        },
        "device": str(device),
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "packing": packing(model),
    }


def packing(model: ChatGLMForConditionalGeneration) -> str:
    """How the weights are stored, and by what they are multiplied."""
    config = model.config
    bits, group_size = config.quantization_bit, config.quantization_group_size
    if not bits:
        return "none"
    scales = f"groups of {group_size}" if group_size else "a scale a row"
    embeddings = ", embeddings too" if config.quantization_embeddings else ""
    largest = max(p.numel() for p in model.parameters() if p.dtype == torch.int8) * 8 // bits
    kernels = choose_path(model.device.type) if largest >= WORTH_IT else "plain"
    return f"int{bits}, {scales}{embeddings}, {kernels} kernels"


def spread(values: Sequence[float]) -> dict[str, float]:
    """The median of the values and their range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def figures(report: Report) -> list[Figure]:
    """What the report says, line by line."""
    decoded, settings = report.new_tokens - 1, report.sampling  # the first token belongs to the prompt

    def each(loop: str, value: Callable[[Turn], float]) -> tuple[float, ...]:
        return tuple(value(turn) for turn in report.turns.get(loop, ()))

    def figure(name: str, unit: str, loop: str, value: Callable[[Turn], float]) -> Figure:
        return Figure(name, unit, each(loop, value), each(PLAIN + loop, value))

    seconds_per_token = each(GREEDY, lambda turn: turn.rest / decoded)
    around = zip(seconds_per_token, report.bandwidth[:-1], report.bandwidth[1:], strict=True)
    shares = tuple(
        100 * report.bytes_per_token / seconds / ((before + after) / 2) for seconds, before, after in around
    )
    drawn = f"temperature {settings['temperature']:g}, top-p {settings['top_p']:g}"
    return [
        Figure("load time", "s", (report.load_time,)),
        figure("prefill", "tokens/s", GREEDY, lambda turn: report.prompt_tokens / turn.first),
        figure("time to first token", "s", GREEDY, lambda turn: turn.first),
        figure("decode, likeliest token", "tokens/s", GREEDY, lambda turn: decoded / turn.rest),
        figure(f"decode, {drawn}", "tokens/s", SAMPLED, lambda turn: decoded / turn.rest),
        Figure("read by a decoded token", "GB", (report.bytes_per_token / 1e9,)),
        Figure("memory bandwidth", "GB/s", tuple(each / 1e9 for each in report.bandwidth)),
        Figure("share of it in decoding", "%", shares),
        *(Figure(f"peak memory, {place}", "GB", (size / 1e9,)) for place, size in report.memory.items()),
    ]


def draw(report: Report, path: Path) -> None:
    """Writes a bar chart of prefill and decoding to a .png or .svg file."""
    prefill, greedy, sampled = (figure for figure in figures(report) if figure.unit == "tokens/s")
    limit = statistics.median(report.bandwidth) / report.bytes_per_token
    decoding = [
        *bars(greedy, "likeliest token"),
        *bars(sampled, "sampled"),
        ("bandwidth allows", limit, False),
    ]
    about = report.about
    packed = "" if about["packing"] == "none" else f", {about['packing']}"
    where = about["machine"].get("GPU") or about["machine"]["processor"]
    draw_bars(
        path,
        f"{Path(about['model']).name}, {about['dtype']}{packed}, {where}",
        [
            (f"prefill of {report.prompt_tokens} tokens, tokens/s", bars(prefill, "prompt")),
            (f"decoding of {report.new_tokens} tokens, tokens/s", decoding),
        ],
    )


def bars(figure: Figure, name: str) -> list[tuple[str, float, bool]]:
    """The bar of a figure, and that of the plain loop if there is one."""
    plain = [(f"{name}, plain loop", statistics.median(figure.plain), False)] if figure.plain else []
    return [(name, statistics.median(figure.values), True), *plain]
