import stat

import pytest

from multitask_kd.atomic import replacing


def test_what_is_written_takes_the_place_of_the_old_file_and_a_failure_leaves_it(tmp_path):
    path = tmp_path / "file"
    for content in (b"old", b"new"):
        with replacing(path) as file:
            file.write(content)
            assert not path.exists() or path.read_bytes() == b"old"  # a reader meanwhile
        assert path.read_bytes() == content
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"new"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(
        plain.stat().st_mode
    )  # others may read it as they may any file
