"""What the three commands share: an expected error is one sentence and exit code 1."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fedpruner_common.errors import FedPrunerError


@contextmanager
def exit_on_error() -> Iterator[None]:
    """Print a FedPrunerError without a traceback and exit with code 1; bugs keep theirs."""
    try:
        yield
    except FedPrunerError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
