"""How this project says no: one sentence with what was seen, where, and what to do."""

import sys
from collections.abc import Callable

# Of a path that the user gave: a file that is not there, a folder for a file, a file for a folder, one that may not be read.
PATH_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


class DataError(ValueError):
    """Input that cannot be used. Its message is one sentence: what was seen, where (file, line or key), what to do."""


def run_main(main: Callable[[], int | None]) -> None:
    """Runs a script's `main`: user errors print as one `error: ...` line (exit 2), Ctrl-C as one line (exit 130)."""
    try:
        code = main()
    except (DataError, *PATH_ERRORS) as error:
        print(f"error: {_sentence(error)}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command again goes on from what was saved", file=sys.stderr, flush=True)
        sys.exit(130)
    sys.exit(code or 0)


def _sentence(error: Exception) -> str:
    """What was said where it was raised: out of a process that reads data it comes wrapped in that one's traceback."""
    text = str(error).strip()
    return text.splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
