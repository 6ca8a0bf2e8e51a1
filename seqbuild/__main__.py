"""Run the command line with `python -m seqbuild`."""

from __future__ import annotations

import sys

from seqbuild.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
