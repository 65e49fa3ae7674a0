"""`chatglm serve [MODEL]`: OpenAI's API, the published one and a chat page; the work is in chatglm/server."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from chatglm.checkpoint import Checkpoint, read_checkpoint, readable
from chatglm.cli.options import add_adapter_option, add_loading_options, named_model, whole_number
from chatglm.find import MODEL_HELP, find_checkpoint

if TYPE_CHECKING:
    from chatglm.engine.cluster import Scale
    from chatglm.server.model import Model
    from chatglm.server.settings import Settings

KEY_VARIABLE = "CHATGLM_API_KEY"
# Parameters below which sharing the work among threads costs more than it saves: `demo` answered 8 chats at once with
# 810 tokens a second on one thread of a Zen 3, and with 523 on two.
SMALL = 50_000_000
EPILOG = """
Examples:
  chatglm serve
  chatglm serve THUDM/chatglm2-6b --quantize 4
  chatglm serve --host 0.0.0.0 --api-key-file keys.txt
  chatglm serve --adapter my-lora
  chatglm serve THUDM/chatglm-6b --ray --replicas 4
  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
      -d '{"model": "demo", "messages": [{"role": "user", "content": "hello"}]}'

docs/serving.md tells every route and field.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    add_server_options(parser)


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Which model is served, where, to whom, and how much at a time."""
    add = parser.add_argument
    add("model", nargs="?", help=MODEL_HELP)
    add_loading_options(parser)
    add_adapter_option(parser)
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine alone)")
    add("--port", type=port, default=8000, help="port to listen at; 0: any that is free (default: 8000)")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="refuse requests without it; may be repeated",
    )
    add("--api-key-file", type=Path, metavar="FILE", help=f"keys, one a line; {KEY_VARIABLE} is read too")
    add("--no-key", action="store_true", help="let every machine that reaches --host in, without a key")
    add(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this site in; may be repeated",
    )
    add("--model-alias", action="append", default=[], metavar="NAME", help="another name for the model")
    add("--max-batch", type=whole_number, metavar="N", help="answers computed at the same time (default: 8)")
    add(
        "--max-queue",
        type=whole_number,
        metavar="N",
        help="requests that may wait; more get 429 (default: 64)",
    )
    lengths = "2048 for ChatGLM-6B, 8192 for ChatGLM2-6B"
    add(
        "--max-context",
        type=whole_number,
        metavar="N",
        help=f"tokens of prompt and answer (default: {lengths})",
    )
    add(
        "--max-tokens",
        type=whole_number,
        metavar="N",
        help="tokens of one answer (default: what there is room for)",
    )
    add(
        "--patience",
        type=seconds,
        default=30.0,
        metavar="SECONDS",
        help="for answers when it ends (default: 30)",
    )
    add("--log-prompts", action="store_true", help="write what people ask into the log")
    add_copies_options(parser)


def add_copies_options(parser: argparse.ArgumentParser) -> None:
    """How many copies of the model answer, and on which machines."""
    add = parser.add_argument
    add(
        "--ray",
        action="store_true",
        help="run copies of the model with Ray Serve, here or on a cluster (docs/scaling.md)",
    )
    add(
        "--replicas",
        type=replicas,
        metavar="N",
        help="with --ray: how many copies, or how few and how many, such as 1-4 (default: 1)",
    )
    add(
        "--ray-address",
        metavar="ADDRESS",
        help="with --ray: the cluster to run them on (default: this machine alone)",
    )


def run(arguments: argparse.Namespace) -> None:
    serve_model(arguments, listening=lambda url: None)


def serve_model(arguments: argparse.Namespace, listening: Callable[[str], None]) -> None:
    """Serves the model of the command line; `listening` is called with the address when it can be opened."""
    # Before torch is imported and anything large is loaded: most mistakes are told at once.
    settings = settings_from(arguments)
    arguments.model = named_model(arguments)
    checkpoint = read_checkpoint(find_checkpoint(arguments.model, arguments.revision))
    from chatglm.server.run import serve

    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s")
    logging.getLogger("chatglm.server").setLevel(logging.INFO)

    def tell(url: str) -> None:
        print(f"Listening at {url} (the page), {url}/v1 (the API) and {url}/docs (its fields).")
        print(f"Loading {arguments.model} ...", flush=True)
        listening(url)

    scale = scale_from(arguments, checkpoint)
    serve(
        lambda: _load(arguments, checkpoint, settings, scale), settings, arguments.host, arguments.port, tell
    )


def _load(
    arguments: argparse.Namespace, checkpoint: Checkpoint, settings: Settings, scale: Scale | None
) -> Model:
    """Loads the model of the command line, and tells what it is and needs."""
    import torch
    import transformers

    from chatglm.loading import LARGE
    from chatglm.server.model import load_model

    if checkpoint.sizes.parameters < LARGE:
        transformers.utils.logging.disable_progress_bar()
    if scale is None and checkpoint.sizes.parameters < SMALL:
        torch.set_num_threads(1)
    options = {name: getattr(arguments, name) for name in ("device", "dtype", "quantize", "adapter")}
    try:
        model = load_model(arguments.model, settings, arguments.revision, scale, **options)
    except torch.OutOfMemoryError:
        raise MemoryError(
            "The memory of the device is used up; try --quantize 4, a smaller --max-batch or --max-context, or "
            "--device cpu, and see what chatglm info tells."
        ) from None
    cache = readable(model.engine.facts.most_cache_bytes)
    copies = f" in {_count(scale)}" if scale else ""
    print(
        f"{model.id} is ready{copies}: {model.parameters:,} parameters, {model.dtype} on {model.device}; "
        f"{settings.max_batch} conversations of {model.engine.context} tokens take {cache} more at most.",
        flush=True,
    )
    return model


def _count(scale: Scale) -> str:
    """As in "2 replicas"."""
    number = f"{scale.least}" if scale.least == scale.most else f"{scale.least} to {scale.most}"
    return f"{number} replica{'s' if scale.most > 1 else ''} with Ray Serve"


def scale_from(arguments: argparse.Namespace, checkpoint: Checkpoint) -> Scale | None:
    """The copies that the options ask for; ValueError or OSError with a sentence where they cannot be."""
    if not arguments.ray:
        if arguments.replicas or arguments.ray_address:
            raise ValueError("--replicas and --ray-address belong to --ray; give that too.")
        return None
    from chatglm.engine.cluster import Scale, import_ray

    import_ray(local=arguments.ray_address is None)
    least, most = arguments.replicas or (1, 1)
    threads = 1 if checkpoint.sizes.parameters < SMALL else None
    return Scale(least, most, arguments.ray_address, threads)


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings that the options ask for; ValueError or OSError with a sentence where they cannot be."""
    try:
        from chatglm.server.guard import is_loopback
        from chatglm.server.settings import Settings
    except ImportError as error:
        message = (
            f"The server needs {error.name}, which is not installed; install chatglm with its extra 'server'."
        )
        raise OSError(message) from None

    keys = api_keys(arguments.api_key, arguments.api_key_file)
    local = is_loopback(arguments.host)
    if not local and not keys and not arguments.no_key:
        raise ValueError(
            f"--host {arguments.host} lets other machines in; give --api-key or --api-key-file, or --no-key if "
            "everybody may."
        )
    numbers = {
        name: getattr(arguments, name) for name in ("max_batch", "max_queue", "max_context", "max_tokens")
    }
    return Settings(
        api_keys=keys,
        cors_origins=tuple(map(origin, arguments.cors)),
        # With a key another site's page gains nothing by pointing its own name here.
        allowed_hosts=("localhost", "127.0.0.1", "::1", arguments.host) if local and not keys else (),
        model_aliases=tuple(arguments.model_alias),
        patience=arguments.patience,
        log_prompts=arguments.log_prompts,
        **{name: number for name, number in numbers.items() if number is not None},
    )


def api_keys(given: Sequence[str], file: Path | None) -> tuple[str, ...]:
    """All keys: of the options, the environment, and the lines of the file that are neither empty nor comments."""
    keys = list(given)
    if KEY_VARIABLE in os.environ:
        keys.append(os.environ[KEY_VARIABLE])
    if file is not None:
        keys += keys_in(file)
    if not all(map(fits_header, keys)):
        raise ValueError(
            "An API key is empty or has blanks or letters beyond ASCII, which no header can carry."
        )
    return tuple(keys)


def keys_in(file: Path) -> list[str]:
    """The keys of a file; OSError or ValueError, naming the line but never the key, for none or a bad one."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise OSError(
            f"--api-key-file {file} cannot be read ({reason}); give a text file with a key on each line."
        ) from None
    keys = {number: line for number, line in enumerate(lines, 1) if line and not line.startswith("#")}
    if not keys:
        raise ValueError(f"{file} has no API key; write one on a line of its own.")
    for number, key in keys.items():
        if not fits_header(key):
            raise ValueError(
                f"The API key in {file}, line {number}, has blanks or letters beyond ASCII, which no header can carry."
            )
    return list(keys.values())


def fits_header(key: str) -> bool:
    return bool(key) and all("!" <= letter <= "~" for letter in key)


def origin(text: str) -> str:
    """Scheme and host of a site whose pages may read answers; `*` is every site."""
    scheme, _, rest = text.partition("://")
    if text != "*" and (not scheme or not rest or "/" in rest):
        raise ValueError(f"--cors is {text!r}; give scheme and host alone, such as https://chat.example.org.")
    return text


def port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 0 to 65535")
    return int(text)


def replicas(text: str) -> tuple[int, int]:
    """A number of copies, or the bounds of it."""
    least, _, most = text.partition("-")
    most = most or least
    if not (least.isdecimal() and most.isdecimal() and 1 <= int(least) <= int(most)):
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number above 0 nor two, such as 1-4")
    return int(least), int(most)


def seconds(text: str) -> float:
    if not 0 <= float(text) <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 86400")
    return float(text)
