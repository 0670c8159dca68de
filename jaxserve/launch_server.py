"""`python -m jaxserve.launch_server --model-path ...`: the quickstart's spelling of `jaxserve launch`."""

import sys
from collections.abc import Sequence

from jaxserve.cli import main as run_command


def main(argv: Sequence[str] | None = None) -> int:
    return run_command(["launch", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
