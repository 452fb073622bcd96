"""Pickles of plain data, read without trusting them: RefCOCO's files are pickles, and a pickle can run what it names."""

import io
import pickle
from pathlib import Path
from typing import Any

from encoder.errors import DataError


class _NoClasses(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def read_plain_pickle(path: Path) -> Any:
    """A pickle of lists, tuples, dicts, strings, numbers, booleans and None, of Python 2 or 3; all else is refused.

    Raises DataError for a file that is missing, cut off, not a pickle, or that names a class or function.
    """
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} is not there; a refs(...).p of the RefCOCO family was expected") from None
    try:
        return _NoClasses(io.BytesIO(data), encoding="latin1").load()
    except pickle.UnpicklingError as error:
        if "it names" in str(error):
            raise DataError(f"{path}: {error}, and only lists, dicts, strings and numbers are read; do not trust it") from None
        raise DataError(f"{path}: not a whole pickle ({error}); download it again") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise DataError(f"{path}: not a whole pickle ({type(error).__name__}: {error}); download it again") from None
