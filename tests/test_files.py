"""Files that survive an interruption: whole or not at all, and a torn end is cut."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from atp_jax import files
from atp_jax.errors import UserError

RECORDS = [{"a": 1.5, "b": "\u00fc\u2028"}, {"a": None, "b": [1, 2]}]


def test_lines_come_back_as_they_were_appended(tmp_path):
    path = tmp_path / "lines"
    assert files.read_lines(path) == [] and files.size(path) == 0
    files.append(path, RECORDS[:1])
    length = files.size(path)
    files.append(path, RECORDS[1:])
    assert files.read_lines(path) == RECORDS
    files.cut(path, length)
    assert files.read_lines(path) == RECORDS[:1]
    files.cut(path, length + 100)  # nothing to take back
    assert files.size(path) == length


@given(st.integers(0, 200))
def test_a_torn_last_line_is_cut_wherever_it_was_torn(tmp_path_factory, kept):
    path = tmp_path_factory.mktemp("torn") / "lines"
    files.append(path, RECORDS)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    files.mend(path)
    assert path.read_bytes() == whole[:kept][: whole[:kept].rfind(b"\n") + 1]
    assert files.read_lines(path) == RECORDS[: whole[:kept].count(b"\n")]


@pytest.mark.parametrize("write", [files.write_json, files.write_lines])
def test_what_cannot_be_written_leaves_what_was_there(tmp_path, write):
    path = tmp_path / "file"
    write(path, RECORDS)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        write(path, [{"a": float("nan")}])
    assert path.read_bytes() == before


def test_json_that_is_torn_or_missing(tmp_path):
    assert files.read_json(tmp_path / "none") is None
    (tmp_path / "torn").write_text(json.dumps(RECORDS)[:-3])
    with pytest.raises(UserError, match="torn"):
        files.read_json(tmp_path / "torn")
    with pytest.raises(UserError, match="torn"):
        files.read_lines(tmp_path / "torn")
