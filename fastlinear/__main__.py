"""The command line: `python -m fastlinear info | bench | tune | inspect | check`, also installed as `fastlinear`."""

import sys

from fastlinear.cli.commands import main

if __name__ == "__main__":
    sys.exit(main())
