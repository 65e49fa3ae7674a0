"""The next token of every row, each by its own settings and with its own random numbers."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from chatglm.engine.guide import JsonGuide
from chatglm.engine.request import Request

LIKELIEST = 1024  # tokens among which top-p is looked for before the vocabulary is sorted


@dataclass(frozen=True)
class Chosen:
    """A token, and what was asked for of the log-probabilities: its own, and the best [(id, log-probability)]."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


class Chooser:
    """The settings of one request, and what has been chosen so far.

    Which token comes does not depend on the requests beside it: random numbers come from a generator of its own.
    """

    def __init__(self, request: Request, guide: JsonGuide | None = None) -> None:
        self.request, self.guide = request, guide
        self.random = random.Random(request.seed)
        self.counts: dict[int, int] = {}

    def adjust(self, scores: torch.Tensor) -> None:
        """Change scores [V] in place as the request asks."""
        request = self.request
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=scores.device)
            scores[ids] += torch.tensor(list(request.logit_bias.values()), device=scores.device)
        if self.counts and (request.presence_penalty or request.frequency_penalty):
            ids = torch.tensor(list(self.counts), device=scores.device)
            times = torch.tensor(list(self.counts.values()), dtype=scores.dtype, device=scores.device)
            scores[ids] -= request.presence_penalty + request.frequency_penalty * times
        if self.guide is not None:
            scores.masked_fill_(~self.guide.allowed(len(scores)).to(scores.device), -torch.inf)

    def took(self, token: int) -> None:
        """Remember a token of the answer."""
        self.counts[token] = self.counts.get(token, 0) + 1
        if self.guide is not None:
            self.guide.took(token)


def choose(scores: torch.Tensor, choosers: list[Chooser], known: int) -> list[Chosen | ValueError]:
    """The next tokens from scores [n, V] in float32; an error for a row from which nothing can be chosen.

    Rows of the vocabulary from `known` on only fill it up. `scores` are changed.
    """
    scores[:, known:] = -torch.inf
    finite = torch.isfinite(scores.amax(dim=-1)).tolist()  # the highest is NaN if any is
    pairs = list(zip(scores, choosers, strict=True))
    logprobs = [
        row.log_softmax(dim=-1) if each.request.top_logprobs is not None else None for row, each in pairs
    ]
    for row, chooser in pairs:
        chooser.adjust(row)
    tokens = _next_tokens(scores, choosers, finite)
    chosen: list[Chosen | ValueError] = []
    for token, chooser, whole, row in zip(tokens, choosers, finite, logprobs, strict=True):
        try:
            chosen.append(_taken(token, chooser, whole, row))
        except ValueError as error:
            chosen.append(error)
    return chosen


def _taken(token: int, chooser: Chooser, finite: bool, logprobs: torch.Tensor | None) -> Chosen:
    if not finite:
        raise ValueError(
            f"The scores of new token {sum(chooser.counts.values()) + 1} are NaN or infinite: the weights are damaged, "
            "or float16 overflowed; check the files, or load the model in bfloat16 or float32."
        )
    chooser.took(token)
    if logprobs is None:
        return Chosen(token)
    values, ids = logprobs.topk(chooser.request.top_logprobs)
    best = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Chosen(token, float(logprobs[token]), best)


def _next_tokens(scores: torch.Tensor, choosers: list[Chooser], finite: list[bool]) -> list[int]:
    """Token ids: the likeliest where the temperature is 0, drawn elsewhere."""
    tokens = scores.argmax(dim=-1)
    drawn = [i for i, each in enumerate(choosers) if each.request.temperature > 0 and finite[i]]
    whole = [i for i in drawn if not choosers[i].request.top_k and choosers[i].request.top_p == 1]
    for rows, draw in ((whole, _draw_from_all), ([i for i in drawn if i not in whole], _draw_from_likeliest)):
        if rows:
            at = torch.tensor(rows, device=scores.device)
            requests = [choosers[i].request for i in rows]
            chance = _tensor([choosers[i].random.random() for i in rows], scores)
            tokens[at] = draw(_tempered(scores[at], requests), requests, chance)
    return tokens.tolist()


def _tempered(scores: torch.Tensor, requests: list[Request]) -> torch.Tensor:
    # The highest score is taken off before: a temperature close to 0 must not make scores infinite.
    temperature = _tensor([request.temperature for request in requests], scores).clamp(min=1e-5)
    return (scores - scores.amax(dim=-1, keepdim=True)) / temperature[:, None]


def _draw_from_all(scores: torch.Tensor, requests: list[Request], chance: torch.Tensor) -> torch.Tensor:
    """Token ids [n] from scores [n, V], one for each number in `chance` [n] from 0 to 1."""
    return _at(scores.softmax(dim=-1).cumsum(dim=-1), chance)


def _draw_from_likeliest(scores: torch.Tensor, requests: list[Request], chance: torch.Tensor) -> torch.Tensor:
    """The same among the top_k likeliest tokens (0: all), and of these the fewest that have top_p together.

    The vocabulary is sorted only where neither is found among its LIKELIEST tokens.
    """
    size = scores.shape[-1]
    kept = [min(request.top_k or size, size) for request in requests]
    number = min(size, max(k if k < size else LIKELIEST for k in kept))
    ids, probabilities, sums = _likeliest(scores, number, kept)
    top_p = _tensor([request.top_p for request in requests], scores)
    found = (sums[:, -1] >= top_p) | (_tensor(kept, scores) <= number)
    if not bool(found.all()):
        ids, probabilities, sums = _likeliest(scores, size, kept)
    # A token stays while those before it have less than top_p: the first one always does.
    stays = sums - probabilities < top_p[:, None]
    place = _at((probabilities * stays).cumsum(dim=-1), chance)
    return ids.gather(1, place[:, None]).squeeze(1)


def _likeliest(
    scores: torch.Tensor, number: int, kept: list[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, probabilities and their sums [n, number], the likeliest first, among the `kept` likeliest of each row."""
    best, ids = scores.topk(number, dim=-1)
    limit = _tensor(kept, scores)[:, None]
    best = best.masked_fill(torch.arange(number, device=scores.device) >= limit, -torch.inf)
    total = torch.where(
        limit < scores.shape[-1],
        best.logsumexp(dim=-1, keepdim=True),
        scores.logsumexp(dim=-1, keepdim=True),
    )
    probabilities = (best - total).exp()
    return ids, probabilities, probabilities.cumsum(dim=-1)


def _at(sums: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """The first places [n] at which the sums [n, k] exceed that share `chance` [n] of the last one."""
    total = sums[:, -1:]
    # Just below the whole, whatever the rounding, so that there is such a place.
    share = torch.minimum(chance[:, None] * total, total * (1 - 1e-6))
    return torch.searchsorted(sums, share, right=True).squeeze(1).clamp(max=sums.shape[-1] - 1)


def _tensor(values: list, like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, device=like.device, dtype=torch.float32)
