"""Write training conversations, to look at: `python -m demo.generate --number 5`."""

from __future__ import annotations

import argparse
import json
import random

from demo.book import Book
from demo.held_out import held_out_questions


def main() -> None:
    parser = argparse.ArgumentParser(description="Write training conversations as JSON lines, to look at.")
    parser.add_argument(
        "--number", type=int, default=20, help="conversations to write (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    parser.add_argument("--held-out", action="store_true", help="write the held-out questions instead")
    options = parser.parse_args()
    book = Book()
    if options.held_out:
        for item in held_out_questions(book):
            print(json.dumps(vars(item), ensure_ascii=False))
        return
    rng = random.Random(options.seed)
    for _ in range(options.number):
        print(json.dumps(book.conversation(rng), ensure_ascii=False))


if __name__ == "__main__":
    main()
