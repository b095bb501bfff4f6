"""`python -m spt_compiler`: the same as the command `spt`."""

from __future__ import annotations

import sys

from spt_compiler.cli import main

if __name__ == "__main__":
    sys.exit(main())
