"""The files that travel with the weights, as ``chatglm.hub.*``.

An installed package holds them beside this file. In a checkout, and in an editable install, they
lie in the root of the repository, which is then searched as well.
"""

from pathlib import Path

_here = Path(__file__).resolve()
if not _here.with_name("modeling_chatglm.py").is_file():
    __path__.append(str(_here.parents[2]))
