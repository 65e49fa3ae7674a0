"""Sums of numbers below one hundred, their phrasings, and answers that show the working."""

from __future__ import annotations

from demo.text import chosen

LARGEST = 99  # in sums

SUMS: dict[str, dict[str, list[str]]] = {
    "+": {
        "zh": ["{a}+{b}=?", "{a}+{b}等于多少？", "{a}加{b}等于多少？", "{a}加{b}是多少？", "计算{a}+{b}",
               "{a} + {b} = ?", "{a}加上{b}等于几？", "算一下{a}+{b}"],
        "en": ["{a}+{b}=?", "What is {a} plus {b}?", "{a} + {b} = ?", "{a}+{b}", "How much is {a} plus {b}?",
               "Calculate {a} + {b}", "What is {a}+{b}?", "Add {a} and {b}"],
    },
    "-": {
        "zh": ["{a}-{b}=?", "{a}-{b}等于多少？", "{a}减{b}等于多少？", "{a}减{b}是多少？", "计算{a}-{b}",
               "{a} - {b} = ?", "{a}减去{b}等于几？", "算一下{a}-{b}"],
        "en": ["{a}-{b}=?", "What is {a} minus {b}?", "{a} - {b} = ?", "{a}-{b}", "How much is {a} minus {b}?",
               "Calculate {a} - {b}", "What is {a}-{b}?", "Subtract {b} from {a}"],
    },
}  # fmt: skip


def sum_held_out(a: int, sign: str, b: int) -> bool:
    """Whether the problem is kept from training, in every phrasing and, for additions, in both orders."""
    if sign == "+":
        a, b = min(a, b), max(a, b)
    return chosen(0.05, a, sign, b)


def sum_answer(a: int, sign: str, b: int) -> str:
    """The answer with its working, the same in both languages, as one does sums in the head.

    `3+4=7`, `27+45=60+12=72`, `72-45=32-5=27`, `27-45=-(45-27)=-(25-7)=-18`. Each step is a fact that
    many problems share; the result in one go takes a model of this size much longer to learn.
    """
    problem = f"{a}{sign}{b}="
    if sign == "+":
        tens, ones = a // 10 * 10 + b // 10 * 10, a % 10 + b % 10
        return f"{problem}{tens}+{ones}={a + b}" if tens else f"{problem}{a + b}"
    if a < b:
        return problem + "".join(f"-({step})=" for step in _difference(b, a)[:-1]) + f"-{b - a}"
    return "=".join(_difference(a, b))


def _difference(a: int, b: int) -> list[str]:
    """The steps of a - b for a >= b: first the tens are taken away, then the ones."""
    steps = [f"{a}-{b}"]
    if b >= 10 and b % 10:
        steps.append(f"{a - b // 10 * 10}-{b % 10}")
    return [*steps, str(a - b)]


def sum_problems(held_out: bool) -> list[tuple[int, str, int]]:
    """All problems of one part with numbers from 0 to 99 and a result of at least 0."""
    numbers = range(LARGEST + 1)
    pairs = [(a, sign, b) for sign in "+-" for a in numbers for b in numbers if sign == "+" or a >= b]
    return [pair for pair in pairs if sum_held_out(*pair) == held_out]


def negative_problems(held_out: bool) -> list[tuple[int, str, int]]:
    """The subtractions of one part whose result is below 0."""
    pairs = [(a, "-", b) for b in range(LARGEST + 1) for a in range(b)]
    return [pair for pair in pairs if sum_held_out(*pair) == held_out]
