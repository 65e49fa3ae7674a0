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
    from chatglm.loading import load

__all__ = ["__version__", "load", "register"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name == "load":
        from chatglm.loading import load

        return load
    if name == "register":
        from chatglm.auto import register

        return register
    raise AttributeError(f"module 'chatglm' has no attribute {name!r}")


# Registering imports torch and transformers, which takes seconds. The `chatglm` command must answer
# --help and `info` at once: it is the one program that registers only when it loads a model.
if Path(sys.argv[0] if sys.argv else "").stem != "chatglm":
    from chatglm.auto import register

    register()
