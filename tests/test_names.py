"""Names and paths of many files in one buffer."""

import os
import pickle
from pathlib import Path

import pytest

from pml_tacl.utils.names import Names, Paths

NAMES = ["a.jpg", "b/ü c.jpg", "", os.fsdecode(b"no text \xff.jpg"), "\ud800", "z/日.png"]


def test_names_are_those_that_were_given():
    names = Names(name for name in NAMES)
    assert names == NAMES
    assert list(names) == NAMES
    assert [names[i] for i in range(len(names))] == NAMES
    assert names[-1] == NAMES[-1]
    assert names[1:4] == NAMES[1:4]
    assert names[::-2] == NAMES[::-2]
    assert names.index("z/日.png") == 5
    assert "a.jpg" in names
    assert "b.jpg" not in names
    assert names != NAMES[:-1]
    assert names != [*NAMES[:-1], "other"]
    assert names != "a.jpg"
    assert pickle.loads(pickle.dumps(names)) == names
    assert repr(names).startswith("Names(['a.jpg', 'b/ü c.jpg', '', ...")
    with pytest.raises(IndexError):
        names[6]
    with pytest.raises(TypeError, match="unhashable"):
        hash(names)


def test_there_may_be_none():
    assert Names([]) == []
    assert list(Names([])) == []
    assert Names([])[:] == []


def test_more_than_one_chunk_is_read_in_order():
    names = [f"{i:05}.jpg" for i in range(40_000)]
    assert list(Names(names)) == names


def test_paths_lie_below_their_root():
    paths = Paths(Path("photos"), Names(NAMES[:2]))
    expected = [Path("photos/a.jpg"), Path("photos/b/ü c.jpg")]
    assert paths == expected
    assert list(paths) == expected
    assert paths[-1] == expected[-1]
    assert paths[:1] == expected[:1]
    assert len(paths) == 2
    assert Path("photos/a.jpg") in paths


def test_a_name_takes_its_bytes_and_eight_more():
    names = Names(f"{i:09}.jpg" for i in range(1000))
    assert len(pickle.dumps(names)) < 1000 * (13 + 8) + 500
