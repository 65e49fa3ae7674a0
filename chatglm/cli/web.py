"""`chatglm web [MODEL]`: the same server as `chatglm serve`, and its chat page in the browser."""

from __future__ import annotations

import argparse
import threading
import webbrowser

from chatglm.cli.serve import add_server_options, serve_model


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_server_options(parser)
    parser.add_argument(
        "--no-browser", action="store_true", help="do not open the page, only tell its address"
    )


def run(arguments: argparse.Namespace) -> None:
    serve_model(arguments, listening=lambda url: None if arguments.no_browser else open_page(url))


def open_page(url: str) -> None:
    """Opens the page without waiting: some browsers return only when they are closed."""
    threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()
