"""The runner that all benchmarks share: questions in batches, answers into the journal, scores out of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from chatglm.checkpoint import Checkpoint, read_checkpoint
from chatglm.evaluation.bbh import BBH
from chatglm.evaluation.ceval import CEval
from chatglm.evaluation.gsm8k import GSM8K
from chatglm.evaluation.journal import Answer, Journal
from chatglm.evaluation.mmlu import MMLU
from chatglm.evaluation.own import Own
from chatglm.evaluation.question import Benchmark, Question
from chatglm.evaluation.reader import Reader, letter_ids
from chatglm.evaluation.results import Results, Score
from chatglm.find import find_checkpoint
from chatglm.loading import load

BENCHMARKS = {benchmark.name: benchmark for benchmark in (CEval, MMLU, GSM8K, BBH)}
SAMPLE = 1 << 20  # bytes


def evaluate(
    name: str | Path,
    task: str | Path,
    data: str | Path | None = None,
    output: str | Path | None = None,
    revision: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
    quantize: int | None = None,
    group_size: int | None = None,
    batch_size: int = 8,
    new_tokens: int = 512,
    limit: int | None = None,
    progress: bool = True,
) -> Results:
    """Asks the model `name` all questions of a task and returns its scores.

    Args:
        name, revision, device, dtype, quantize, group_size: as for `chatglm.load`.
        task: "ceval", "mmlu", "gsm8k", "bbh", or a .jsonl file of own questions.
        data: the folder of the task's data; None: from the Hub, through the package datasets.
        output: the folder for answers.jsonl, results.json and results.md; None: evaluation-TASK-MODEL here. A run
            that was cut off goes on with the answers that it has there.
        batch_size: questions at a time.
        new_tokens: of an answer, at most.
        limit: only so many questions of each subject.
        progress: show a bar, where somebody sees it.

    Raises OSError or ValueError with one sentence: for data and options before the model is loaded.
    """
    if batch_size < 1 or (limit is not None and limit < 1):
        raise ValueError(f"batch_size is {batch_size} and limit {limit}; give 1 at least.")
    checkpoint = read_checkpoint(find_checkpoint(name, revision))
    benchmark = find_benchmark(task)
    if isinstance(benchmark, Own) and data is not None:
        raise ValueError(f"The questions are those of {task}; leave out --data {data}.")
    questions = benchmark.questions(None if data is None else Path(data).expanduser())
    folder = Path(output or f"evaluation-{benchmark.name}-{checkpoint.folder.name}").expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(checkpoint.folder, device, dtype, quantize, group_size=group_size)
    reader = Reader(model, tokenizer, new_tokens, benchmark.longest_prompt)
    settings = {
        "task": benchmark.name,
        "data": fingerprint(questions),
        "model": model_fingerprint(checkpoint),
        "dtype": str(model.dtype).removeprefix("torch."),
        "packing": packing_of(model.config),
        "new_tokens": new_tokens,
    }
    questions = first_of_each_subject(questions, limit)
    journal = Journal(folder / "answers.jsonl", settings)
    ask(reader, benchmark, questions, journal, batch_size, progress)
    about = settings | {"name": str(name), "family": model.config.family, "device": str(model.device)}
    results = Results(about, scores(questions, journal), benchmark.published)
    results.write(folder)
    return results


def find_benchmark(task: str | Path) -> Benchmark:
    """The benchmark of that name, or the questions of that file; OSError for neither."""
    if str(task) in BENCHMARKS:
        return BENCHMARKS[str(task)]()
    file = Path(task).expanduser()
    if not file.is_file():
        raise OSError(
            f"There is no task {str(task)!r}; give {', '.join(BENCHMARKS)}, or a .jsonl file of questions."
        )
    return Own(file)


def ask(
    reader: Reader,
    benchmark: Benchmark,
    questions: Sequence[Question],
    journal: Journal,
    batch_size: int = 8,
    progress: bool = True,
) -> None:
    """Asks what the journal has no answer for, and writes the answers of each batch into it."""
    for letters in {question.letters for question in questions if question.letters}:
        letter_ids(reader.tokenizer, letters)  # before hours go by
    left = [question for question in questions if question.place not in journal.answers]
    done = len(questions) - len(left)
    hidden = None if progress else True  # None: shown on a terminal
    with tqdm(desc=benchmark.name, total=len(questions), initial=done, unit="q", disable=hidden) as bar:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            journal.append(list(answers(reader, benchmark, batch)))
            bar.update(len(batch))


def answers(reader: Reader, benchmark: Benchmark, batch: Sequence[Question]) -> Iterator[Answer]:
    """What the model says to each question, what of it is its answer, and whether that is right."""
    written = reader.write(batch)
    choosing = [i for i, question in enumerate(batch) if question.letters]
    texts = [f"{batch[i].text}{written[i][0]}\n{batch[i].extraction}" for i in choosing]
    chosen = reader.choose(texts, [batch[i].letters for i in choosing]) if choosing else []
    choices = dict(zip(choosing, chosen, strict=True))
    for i, (question, (text, cut)) in enumerate(zip(batch, written, strict=True)):
        answer, cut_again = choices.get(i) or (benchmark.answer_in(text), 0)
        yield {
            "place": question.place,
            "text": text,
            "answer": answer,
            "right": benchmark.is_right(question, answer),
            "cut": cut + cut_again,
        }


def scores(questions: Sequence[Question], journal: Journal) -> list[Score]:
    """One for each subject, in the order of the questions."""
    found: dict[str, Score] = {}
    for question in questions:
        answer = journal.answers[question.place]
        score = found.get(question.subject) or Score(question.subject, question.group)
        found[question.subject] = replace(
            score,
            right=score.right + answer["right"],
            asked=score.asked + 1,
            cut=score.cut + bool(answer["cut"]),
        )
    return list(found.values())


def first_of_each_subject(questions: Sequence[Question], limit: int | None) -> list[Question]:
    """At most `limit` questions of each subject."""
    kept: dict[str, int] = {}
    chosen = []
    for question in questions:
        kept[question.subject] = kept.get(question.subject, 0) + 1
        if limit is None or kept[question.subject] <= limit:
            chosen.append(question)
    return chosen


def fingerprint(questions: Sequence[Question]) -> str:
    """The same for the same questions, wherever they lie."""
    text = json.dumps([asdict(question) for question in questions])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def model_fingerprint(checkpoint: Checkpoint) -> str:
    """The same for the same config and weights, of which each file's size and three samples are read."""
    digest = hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for file in checkpoint.weights:
        digest.update(f"{file.path.name} {file.size}".encode())
        with file.path.open("rb") as stream:
            for start in (0, file.size // 2, max(0, file.size - SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(SAMPLE))
    return digest.hexdigest()[:16]


def packing_of(config: Any) -> str:
    """How the weights are packed: "none", "int8", "int4, groups of 32"."""
    if not config.quantization_bit:
        return "none"
    groups = f", groups of {config.quantization_group_size}" if config.quantization_group_size else ""
    embeddings = ", embeddings too" if config.quantization_embeddings else ""
    return f"int{config.quantization_bit}{groups}{embeddings}"
