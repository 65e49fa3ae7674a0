"""`python -m chatglm` is the `chatglm` command."""

import sys

from chatglm.cli import main

sys.exit(main())
