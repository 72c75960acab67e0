"""retrieval/passages.py: what a list of passages does, from files."""

from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from searchr1_lite.retrieval.index import Passages, write_passages
from searchr1_lite.types import Passage

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
passage = st.builds(Passage, text, text, text, st.booleans())


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(passage, min_size=1, max_size=5), max_size=4), st.data())
def test_it_is_the_list_that_was_written(tmp_path_factory, shards: list[list[Passage]], data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("passages")
    files = [folder / f"{i}.arrow" for i in range(len(shards))]
    for file, shard in zip(files, shards, strict=True):
        write_passages(shard, file)
    stored, wanted = Passages(files), [p for shard in shards for p in shard]
    assert len(stored) == len(wanted) and list(stored) == wanted == [stored[i] for i in range(len(wanted))]
    cut = data.draw(st.slices(len(wanted)))
    assert stored[cut] == wanted[cut]
    for i in (len(wanted), -len(wanted) - 1):
        with pytest.raises(IndexError):
            stored[i]
    if wanted:
        assert stored[-1] == wanted[-1] and stored.index(wanted[0]) == 0


def test_only_what_is_read_is_in_memory(tmp_path: Path) -> None:
    files = [tmp_path / f"{i}.arrow" for i in range(3)]
    for number, file in enumerate(files):
        write_passages([Passage(f"{number}-{i}", "t", "x" * 1000) for i in range(20_000)], file)
    before = pa.total_allocated_bytes()
    stored = Passages(files)
    assert (stored[0].id, stored[20_000].id, stored[59_999].id) == ("0-0", "1-0", "2-19999")
    assert sum(len(p.text) for p in stored) == 60_000_000
    assert pa.total_allocated_bytes() - before < 1_000_000
