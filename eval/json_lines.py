"""JSON lines: annotations of benchmarks, and what an evaluation writes."""

import json
from pathlib import Path

from encoder.errors import DataError


def json_lines(path: Path, advice: str = "download it again") -> list[tuple[dict, str]]:
    """(object, 'file, line n') per line. DataError, ending with `advice`, for a file that cannot be read or a line that is no
    object."""
    try:
        with open(path, encoding="utf-8") as file:
            lines = list(file)
    except FileNotFoundError:
        raise DataError(f"{path} is not there; {advice}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read ({error}); {advice}") from None
    rows = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{where}: not JSON ({error.msg}); {advice}") from None
        if not isinstance(row, dict):
            raise DataError(f"{where}: a JSON object was expected, this is {type(row).__name__}; {advice}")
        rows.append((row, where))
    return rows
