"""A folder is one process's at a time; a dead one's lock counts for nothing."""

import subprocess
import sys

import pytest

from dit_accel.evaluate.journal import Journal
from dit_accel.media import owner as owners
from dit_accel.media.lock import LOCK, held


def test_one_at_a_time(tmp_path):
    with held(tmp_path / "a" / "b") as folder:
        assert (folder / LOCK).read_text() == owners.me()
        told = f"in use by process {owners.pid_of(owners.me())} on"
        with pytest.raises(ValueError, match=told), held(folder):
            pass
        (folder / "result").write_text("x")
    assert [path.name for path in folder.iterdir()] == ["result"]


def test_a_folder_in_which_nothing_was_written_goes_again(tmp_path):
    with pytest.raises(RuntimeError), held(tmp_path / "new"):
        raise RuntimeError
    assert not (tmp_path / "new").exists()


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
    code = "from dit_accel.media.owner import me; print(me())"
    dead = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
    (tmp_path / LOCK).write_text(dead.strip())
    with held(tmp_path):
        assert (tmp_path / LOCK).read_text() == owners.me()


@pytest.mark.parametrize("holder", ["another-host/boot/pid:1:2", "", "what is this"])
def test_what_cannot_be_looked_up_is_left_alone(tmp_path, holder):
    (tmp_path / LOCK).write_text(holder)
    with pytest.raises(ValueError, match=r"in use by process .* remove .*lock"), held(tmp_path):
        pass
    assert (tmp_path / LOCK).read_text() == holder


@pytest.mark.parametrize("text", ["my notes", "[1]\n", '{"a": 1}\n', "[" * 9999 + "\n", "\xff\n"])
def test_a_journal_of_somebody_else_is_untouched(tmp_path, text):
    path = tmp_path / "cells.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="is no journal of dit-accel"):
        Journal(path, {})
    assert path.read_bytes() == text.encode("latin-1")


def test_a_journal_that_was_cut_off_goes_on(tmp_path):
    path = tmp_path / "cells.jsonl"
    Journal(path, {"a": 1}).add("x", {"b": "\u2028"})
    path.write_bytes(path.read_bytes() + b'{"key": "y", "b')
    assert Journal(path, {"a": 1}).lines == {"x": {"key": "x", "b": "\u2028"}}
