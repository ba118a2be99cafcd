"""One reader of prompt files, whatever wrote them; the same prompts for every command."""

import os
import subprocess
import sys

import pytest

from dit_accel.batch.reading import gather
from dit_accel.inputs.prompts import read_prompts
from dit_accel.inputs.text import decode, read

LINES = "# colours\na red cat\n\n  a blue\u2028cat \r\na red cat\rfünf Hüte\n\ufeffa dog"
PROMPTS = ["a red cat", "a blue cat", "fünf Hüte", "a dog"]


@pytest.fixture(params=["utf-8", "utf-8-sig", "utf-16"])
def file(tmp_path, request):
    path = tmp_path / "prompts.txt"
    path.write_bytes(LINES.encode(request.param))
    return path


def test_the_same_prompts_for_batch_and_for_the_others(file):
    assert read_prompts(file) == PROMPTS
    assert [job.prompt for _, job in gather(file).jobs] == PROMPTS


def test_a_locale_without_letters_changes_nothing(file):
    code = f"from dit_accel.inputs.prompts import read_prompts as r; print(ascii(r({str(file)!r})))"
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = {**os.environ, **plain}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout.decode().strip() == ascii(PROMPTS), done.stderr


def test_a_line_that_is_no_text_is_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"a cat\n\xff\xfe is no text\n")
    with pytest.raises(ValueError, match=r"p\.txt, line 2: this line is not UTF-8"):
        read_prompts(tmp_path / "p.txt")
    assert [str(p) for p in gather(tmp_path / "p.txt").problems] == [
        "line 2: this line is not UTF-8 text"
    ]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("none.txt", "there is no prompt file"),
        (".", "is a folder"),
        ("x" * 300, "cannot be read: File name too long"),
        ("/dev/zero", "is a device"),
        ("empty.txt", "holds no prompt"),
    ],
)
def test_what_cannot_be_read(tmp_path, name, says):
    (tmp_path / "empty.txt").write_text("# nothing\n")
    with pytest.raises(ValueError, match=says):
        read_prompts(tmp_path / name)


def test_what_is_no_text(tmp_path):
    with pytest.raises(ValueError, match="not UTF-8 text"):
        decode("café".encode("latin-1"))
    (tmp_path / "x").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"file .*/x: this is not UTF-8"):
        read(tmp_path / "x")
