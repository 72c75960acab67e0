"""Passages on disk: Arrow files, mapped into memory, of which only what is read is loaded.

A `Passages` stands wherever a list of passages does. Changing the files is left out: they are written once.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import index as whole
from pathlib import Path

import pyarrow as pa

from searchr1_lite.types import Passage

SCHEMA = pa.schema(
    [("id", pa.large_utf8()), ("title", pa.large_utf8()), ("text", pa.large_utf8()), ("quoted", pa.bool_())]
)
AT_ONCE = 1024  # passages read together when all are gone through


def write_passages(passages: list[Passage], file: Path) -> None:
    """One Arrow IPC file with the columns id, title, text and quoted."""
    columns = [[getattr(passage, name) for passage in passages] for name in SCHEMA.names]
    with pa.OSFile(str(file), "wb") as out, pa.ipc.new_file(out, SCHEMA) as writer:
        writer.write(pa.record_batch(columns, schema=SCHEMA))


class Passages(Sequence[Passage]):
    """The passages of Arrow files, one file after the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.tables = [pa.ipc.open_file(pa.memory_map(str(file))).read_all() for file in files]
        self.ends = list(accumulate(table.num_rows for table in self.tables))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, position: int | slice) -> Passage | list[Passage]:
        """The passage at a position, or a list of those in a slice."""
        if isinstance(position, slice):
            return [self[i] for i in range(*position.indices(len(self)))]
        i = whole(position)
        i += len(self) * (i < 0)
        if not 0 <= i < len(self):
            raise IndexError(f"passage {position} of {len(self)}")
        at = bisect_right(self.ends, i)
        table = self.tables[at]
        row = i - self.ends[at] + table.num_rows
        return Passage(*(column[row].as_py() for column in table.columns))

    def __iter__(self) -> Iterator[Passage]:
        for table in self.tables:
            for batch in table.to_batches(max_chunksize=AT_ONCE):
                yield from map(Passage, *(column.to_pylist() for column in batch.columns))
