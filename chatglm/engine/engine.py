"""Runs many requests on one model: they join and leave a batch at any step, in a thread of its own.

    submit ─> waiting ─> reading its prompt, a chunk between two steps ─> answering, a token with every step

Every conversation has a row of the buffers in rows.py. A row keeps what it held until another request takes it, so
the next turn of a conversation, or another prompt that begins alike, computes only what is new (ChatGLM2; a prompt of
ChatGLM-6B is read in both directions, and always as a whole).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from chatglm.engine.answer import Answer, GeneratedAnswer
from chatglm.engine.guide import JsonGuide, JsonGuides, grammar_of
from chatglm.engine.request import EngineClosed, QueueFull, Request, check_request
from chatglm.engine.rows import Rows
from chatglm.engine.sampling import Chooser, choose
from chatglm.hub.chat_chatglm import CHAT_DEFAULTS
from chatglm.hub.generation_chatglm import GrowingCache, read_prompt
from chatglm.hub.positions_chatglm import check_prompt

if TYPE_CHECKING:
    from chatglm.hub.modeling_chatglm import ChatGLMForConditionalGeneration
    from chatglm.hub.tokenization_chatglm import ChatGLMTokenizer

CHUNK = 256  # tokens of a prompt that are read between two steps of the others


@dataclass
class Statistics:
    """Counters since the start, and how many requests there are now."""

    running: int = 0
    waiting: int = 0
    prompt_tokens: int = 0  # of all prompts that were begun
    cached_tokens: int = 0  # of these, what was not computed again
    generated_tokens: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0


@dataclass(frozen=True)
class Facts:
    """What an engine tells of its model."""

    context: int  # tokens of prompt and answer together
    bytes: int  # of the weights as they lie in memory
    most_cache_bytes: int  # of the cache when every conversation has filled the context
    dtype: str
    device: str


@dataclass(eq=False)
class Row:
    """A row of the buffers: the tokens that it holds, and the request that it works for."""

    tokens: list[int] = field(default_factory=list)
    job: Job | None = None
    used: float = 0.0

    @property
    def answers(self) -> bool:
        """Whether it takes part in the next step."""
        return self.job is not None and self.job.token is not None


@dataclass(eq=False)
class Job:
    """A request at work in its row."""

    answer: GeneratedAnswer
    chooser: Chooser
    most: int  # tokens of the answer
    token: int | None = None  # the one chosen last, which is not in the row yet
    position: int = 0  # of that token
    cache: GrowingCache | None = None  # the row, while the prompt is read


@dataclass
class Embedding:
    """Prompts whose mean hidden states are computed one by one between the steps."""

    prompts: deque[list[int]]
    future: Future
    done: list[list[float]] = field(default_factory=list)


class Engine:
    """Answers requests from any number of threads with one model, up to `max_batch` of them in one batch.

    Args:
        model: ChatGLMForConditionalGeneration; nobody else may change it meanwhile.
        tokenizer: the one that belongs to it.
        max_batch: requests that are answered at the same time, and rows of the cache.
        max_queue: requests that may wait; further ones are refused with QueueFull.
        context: most tokens of prompt and answer together; None: as `chat` has it, 2048 for ChatGLM-6B and 8192 for
            ChatGLM2-6B, or what the model was made for if that is less.

    The cache takes at most `facts.most_cache_bytes`, which are used as prompts and answers need them.
    """

    def __init__(
        self,
        model: ChatGLMForConditionalGeneration,
        tokenizer: ChatGLMTokenizer,
        max_batch: int = 8,
        max_queue: int = 64,
        context: int | None = None,
    ) -> None:
        longest = model.config.max_position_embeddings
        published = CHAT_DEFAULTS[model.config.family]["max_length"]
        self.context = min(published, longest) if context is None else context
        if not 2 <= self.context <= longest:
            raise ValueError(f"context is {context}, but this model was made for 2 to {longest} tokens.")
        if max_batch < 1 or max_queue < 0:
            raise ValueError(f"max_batch is {max_batch} and max_queue {max_queue}; give 1 and 0 at least.")
        self.model, self.tokenizer, self.config, self.max_queue = model, tokenizer, model.config, max_queue
        self._rows = [Row() for _ in range(max_batch)]
        self._buffers = Rows(model, max_batch, self.context)
        self._step = model.one_token_step()
        self._known = len(tokenizer)
        ends = model.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, (list, tuple)) else [ends])
        self._guides: JsonGuides | None = None
        self._waiting: deque[GeneratedAnswer] = deque()
        self._embeddings: deque[Embedding] = deque()
        self._statistics, self._seconds = Statistics(), 1.0  # of an answer, a running mean
        self._closing, self._stopped = False, False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="chatglm-engine", daemon=True)
        self._thread.start()

    @property
    def facts(self) -> Facts:
        """What the model is like, and how much memory it takes."""
        model = self.model
        return Facts(
            context=self.context,
            bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
            most_cache_bytes=self._buffers.most_bytes,
            dtype=str(model.dtype).removeprefix("torch."),
            device=str(model.device),
        )

    @property
    def places(self) -> int:
        """Requests that there can be at the same time, running and waiting."""
        return len(self._rows) + self.max_queue

    @property
    def closed(self) -> bool:
        """Whether it takes no more requests."""
        return self._closing

    def submit(self, request: Request) -> Answer:
        """Queue a request; its answer can be read at once, and grows.

        Raises ValueError for what cannot be answered, QueueFull, and EngineClosed.
        """
        return self.submit_all([request])[0]

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Queue all of these requests or, with the errors of `submit`, none."""
        answers = [self._new_answer(request) for request in requests]
        with self._changed:
            if self._closing:
                raise EngineClosed
            free = sum(row.job is None for row in self._rows)
            if len(self._waiting) + len(answers) > self.max_queue + free:
                turns = 1 + len(self._waiting) // len(self._rows)
                retry_after = min(60, max(1, round(turns * self._seconds)))
                raise QueueFull(len(answers), len(self._waiting), retry_after)
            self._waiting += answers
            self._changed.notify_all()
        return list(answers)

    def embed(self, prompts: Sequence[Sequence[int]]) -> Future:
        """Mean of the last hidden states over the tokens of each prompt: a future of [[float] * hidden_size]."""
        for prompt in prompts:
            self._check(Request(prompt))
        work = Embedding(deque(list(prompt) for prompt in prompts), Future())
        with self._changed:
            if self._closing:
                raise EngineClosed
            if len(self._embeddings) >= max(1, self.max_queue):
                raise QueueFull(1, len(self._embeddings), 1)
            self._embeddings.append(work)
            self._changed.notify_all()
        return work.future

    def statistics(self) -> Statistics:
        """How much was done, and what there is to do."""
        with self._changed:
            running = sum(row.job is not None for row in self._rows)
            return replace(self._statistics, running=running, waiting=len(self._waiting))

    def close(self, patience: float = 0.0) -> None:
        """Take no more requests, let those there are end within `patience` seconds, and cancel what is left."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(patience)
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join()

    def _new_answer(self, request: Request) -> GeneratedAnswer:
        self._check(request)
        answer = GeneratedAnswer(request, self.tokenizer, self._wake)
        answer.guide = self._guide(request)
        return answer

    def _guide(self, request: Request) -> JsonGuide | None:
        """What keeps the answer to its schema; made in the thread of whoever asks, as it takes its time."""
        if request.schema is None:
            return None
        grammar_of(request.schema)
        if self._guides is None:
            self._guides = JsonGuides(self.tokenizer, sorted(self._ends))
        return self._guides.new(request.schema)

    def _check(self, request: Request) -> None:
        check_request(request, self.context, self.model.config.vocab_size)
        if not self.model.reads_forward:
            check_prompt(torch.tensor([request.prompt]), self.model.config)

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- everything below runs in the engine's thread

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with torch.no_grad():
                    self._end_cancelled()
                    self._begin_waiting()
                    self._embed_next()
                    self._read_prompts()
                    self._answer_next()
        finally:  # whatever it was that ended it, nobody waits for ever
            with self._changed:
                self._closing = True
            for answer in self._unfinished():
                self._finish(answer, "cancelled")
            for work in self._embeddings:
                if not work.future.cancel():  # it was being computed
                    work.future.set_exception(EngineClosed())

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do; False when it is time to end."""
        with self._changed:
            while not self._stopped:
                if self._waiting or self._embeddings or any(row.job for row in self._rows):
                    return True
                if self._closing:
                    return False
                self._changed.wait()
            return False

    def _end_cancelled(self) -> None:
        with self._changed:
            given_up = [answer for answer in self._waiting if answer.cancelled]
            for answer in given_up:
                self._waiting.remove(answer)
        for answer in given_up:
            self._finish(answer, "cancelled")
        for row in self._rows:
            if row.job is not None and row.job.answer.cancelled:
                self._leave(row, "cancelled")

    def _begin_waiting(self) -> None:
        """Give free rows to the requests that have waited longest."""
        while True:
            with self._changed:
                if not self._waiting or all(row.job for row in self._rows):
                    return
                answer = self._waiting.popleft()
            try:
                self._begin(answer)
            except Exception as error:  # of whatever kind: the engine goes on with the next request
                self._finish(answer, "error", error)

    def _begin(self, answer: GeneratedAnswer) -> None:
        request = answer.request
        row, kept = self._row_for(request.prompt)
        job = Job(
            answer, Chooser(request, answer.guide), request.max_tokens or self.context - len(request.prompt)
        )
        row.tokens = list(request.prompt[:kept])
        answer.cached_tokens = kept
        with self._changed:
            row.job = job
            self._statistics.prompt_tokens += len(request.prompt)
            self._statistics.cached_tokens += kept

    def _row_for(self, prompt: Sequence[int]) -> tuple[Row, int]:
        """A free row, and how many tokens of the prompt it holds."""
        free = [row for row in self._rows if row.job is None]
        oldest = min(free, key=lambda row: (bool(row.tokens), row.used))
        if not self.model.reads_forward:
            return oldest, 0
        lengths = {id(row): common_length(row.tokens, prompt) for row in self._rows}
        best = max(self._rows, key=lambda row: lengths[id(row)])
        kept = lengths[id(best)]
        # Its own conversation goes on in it; another one that begins alike must not lose what it has.
        if best.job is None and (best is oldest or 2 * kept >= len(best.tokens)):
            return best, kept
        if kept:
            self._buffers.copy(self._rows.index(best), self._rows.index(oldest), kept)
        return oldest, kept

    def _read_prompts(self) -> None:
        """Read CHUNK tokens of prompts that have not been read to their end, the oldest first."""
        left = CHUNK
        reading = [row for row in self._rows if row.job is not None and row.job.token is None]
        for row in sorted(reading, key=lambda row: row.job.answer.submitted):
            if left <= 0:
                return
            prompt, done = row.job.answer.request.prompt, len(row.tokens)
            end = min(len(prompt), done + left) if self.model.reads_forward else len(prompt)
            left -= end - done
            try:
                self._read_part(row, list(prompt[done:end]))
            except Exception as error:
                self._leave(row, "error", error)

    def _read_part(self, row: Row, part: list[int]) -> None:
        scores, job = self._read(row, part), row.job
        if len(row.tokens) == len(job.answer.request.prompt):
            job.position = int(self.model.next_position(job.cache, None, None))
            self._take([row], scores)

    def _read(self, row: Row, tokens: list[int]) -> torch.Tensor:
        """Scores [1, V] after further tokens of a row."""
        index, length = self._rows.index(row), len(row.tokens)
        self._make_room(length + len(tokens))
        cache = self._buffers.cache(index, length)
        if row.job.cache is not None:  # what the model wrote on it: positions, a P-Tuning prefix
            cache.__dict__.update({k: v for k, v in row.job.cache.__dict__.items() if k.startswith("glm_")})
        row.job.cache = cache
        ids = torch.tensor([tokens], device=self.model.device)
        scores = read_prompt(self.model, ids, None, None, cache)
        row.tokens += tokens
        return scores

    def _make_room(self, length: int) -> None:
        self._buffers.make_room(max(length, *(len(row.tokens) for row in self._rows)))

    def _answer_next(self) -> None:
        """One token more for every row that answers."""
        answering = [row for row in self._rows if row.answers]
        if not answering:
            return
        try:
            if self._step is None:  # what only `forward` computes is computed row by row
                scores = torch.cat([self._read(row, [row.job.token]) for row in answering])
            else:
                self._close_gaps(len(answering))
                answering = self._rows[: len(answering)]
                scores = self._step_scores(answering)
            self._take(answering, scores)
        except Exception as error:
            for row in self._rows:
                if row.answers:
                    self._leave(row, "error", error)

    def _close_gaps(self, answering: int) -> None:
        """Bring the rows that answer to the front, where the step computes them."""
        for target in range(answering):
            if self._rows[target].answers:
                continue
            source = max(i for i, row in enumerate(self._rows) if row.answers)
            lengths = [len(self._rows[i].tokens) for i in (source, target)]
            self._buffers.swap(source, target, max(lengths))
            self._rows[source], self._rows[target] = self._rows[target], self._rows[source]

    def _step_scores(self, answering: list[Row]) -> torch.Tensor:
        """Scores [n, V] after the last tokens of the first n rows."""
        device = self.model.device
        lengths = [len(row.tokens) for row in answering]
        longest = max(lengths) + 1
        self._make_room(longest)
        cache, visible = self._buffers.step(lengths, longest)
        tokens = torch.tensor([[row.job.token] for row in answering], device=device)
        positions = torch.tensor([[row.job.position] for row in answering], device=device)
        with torch.inference_mode():  # small operations take a seventh less in it
            scores = self._step(tokens, self._step.tables(positions), visible, cache)
        scores = scores.clone()  # that one may not be changed
        for row in answering:
            row.tokens.append(row.job.token)
            row.job.position += 1
        return scores

    def _take(self, rows: list[Row], scores: torch.Tensor) -> None:
        """Choose the next token of each row from scores [n, V], and hand it out."""
        chosen = choose(scores, [row.job.chooser for row in rows], self._known)
        for row, token in zip(list(rows), chosen, strict=True):
            job = row.job
            if isinstance(token, ValueError):
                self._leave(row, "error", token)
                continue
            job.token = token.id
            self._statistics.generated_tokens += 1
            if token.id in self._ends:
                job.answer.completion_tokens += 1
                self._leave(row, "stop")
            elif job.answer.put(token):
                self._leave(row, "stop")
            elif job.answer.completion_tokens >= job.most:
                self._leave(row, "length")

    def _leave(self, row: Row, reason: str, error: Exception | None = None) -> None:
        job, row.used = row.job, time.monotonic()
        with self._changed:
            row.job = None
        if not self.model.reads_forward or error is not None:
            row.tokens = []
        self._finish(job.answer, reason, error)

    def _finish(self, answer: Answer, reason: str, error: Exception | None = None) -> None:
        counted = {"cancelled": "cancelled", "error": "failed"}.get(reason, "finished")
        with self._changed:
            setattr(self._statistics, counted, getattr(self._statistics, counted) + 1)
        answer.end(reason, error)
        if counted == "finished":
            began = answer.started or answer.ended
            self._seconds += 0.1 * (answer.ended - began - self._seconds)

    def _unfinished(self) -> list[Answer]:
        with self._changed:
            answers = [row.job.answer for row in self._rows if row.job] + list(self._waiting)
            self._waiting.clear()
            for row in self._rows:
                row.job, row.tokens = None, []
        return answers

    def _embed_next(self) -> None:
        """The next prompt of the embeddings that have waited longest."""
        if not self._embeddings:
            return
        work = self._embeddings[0]
        if not work.future.running() and not work.future.set_running_or_notify_cancel():
            self._embeddings.popleft()
            return
        try:
            if work.prompts:
                work.done.append(self._mean_state(work.prompts.popleft()))
        except Exception as error:
            self._embeddings.popleft()
            work.future.set_exception(error)
            return
        if not work.prompts:
            self._embeddings.popleft()
            work.future.set_result(work.done)

    def _mean_state(self, prompt: list[int]) -> list[float]:
        ids = torch.tensor([prompt], device=self.model.device)
        states = self.model.transformer(ids, use_cache=False).last_hidden_state[0]  # [T, hidden]
        return states.float().mean(dim=0).tolist()


def common_length(known: Sequence[int], prompt: Sequence[int]) -> int:
    """How many tokens both begin with; at least one of the prompt is left, from which the answer goes on."""
    most = min(len(known), len(prompt) - 1)
    return next((i for i in range(most) if known[i] != prompt[i]), most)
