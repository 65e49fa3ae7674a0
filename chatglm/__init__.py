"""ChatGLM-6B, ChatGLM2-6B and their kin on today's transformers.

Importing the package registers its classes with the Auto classes of transformers:
``AutoModel.from_pretrained`` and ``AutoTokenizer.from_pretrained`` of any published folder then run
the code of this package, never the code that lies in the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from chatglm.auto import register
    from chatglm.devices import load_model_on_gpus
    from chatglm.loading import load

__all__ = ["__version__", "load", "load_model_on_gpus", "register"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from chatglm.loading import load

        return load
    if name == "load_model_on_gpus":
        from chatglm.devices import load_model_on_gpus

        return load_model_on_gpus
    if name == "register":
        from chatglm.auto import register

        return register
    raise AttributeError(f"module 'chatglm' has no attribute {name!r}")


def _is_command(argv: list[str], orig_argv: list[str]) -> bool:
    """Whether this process is the `chatglm` command, started by its name or by `python -m chatglm`.

    While Python imports the package for -m, argv[0] is "-m"; orig_argv names the module just before
    the arguments, as ["-m", "chatglm"] or ["-mchatglm"].
    """
    if argv[:1] == ["-m"]:
        return orig_argv[-len(argv)].removeprefix("-m") == "chatglm"
    return bool(argv) and Path(argv[0]).stem == "chatglm"


# Registering imports torch and transformers, which takes seconds. The `chatglm` command must answer
# --help and `info` at once: it is the one program that registers only when it loads a model.
if not _is_command(sys.argv, sys.orig_argv):
    from chatglm.auto import register

    register()
