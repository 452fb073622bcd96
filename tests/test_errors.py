"""User errors are one line, also those of a process that reads data."""

import pytest
from torch.utils.data import DataLoader

from encoder.errors import DataError, run_main

SENTENCE = "b.png cannot be decoded: truncated; replace it"


class Broken:
    def __init__(self, kind: type[Exception]):
        self.kind = kind

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        raise self.kind(SENTENCE) from OSError("image file is truncated")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [DataError, FileNotFoundError])
def test_an_error_is_one_line(workers, kind, capfd):
    with pytest.raises(SystemExit) as stopped:
        run_main(lambda: list(DataLoader(Broken(kind), num_workers=workers)))
    assert stopped.value.code == 2 and capfd.readouterr().err == f"error: {SENTENCE}\n"
