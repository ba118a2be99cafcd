"""JSON and CSV: what is refused, with the place; what is refused costs nothing else."""

import pytest

from dit_accel.inputs.data import DEEPEST, parse, read_object
from dit_accel.inputs.table import read_table


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON: .* at column 2"),
        ("{\n1}", "at line 2, column 1"),
        ('{"a": 1, "a": 2}', "key 'a' is there twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[" * 100_000 + "]" * 100_000, f"nested more than {DEEPEST} deep"),
        ("[" * 70 + "]" * 70, f"nested more than {DEEPEST} deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than"),
        ("9" * 5000, "limit"),
    ],
)
def test_what_is_no_json(text, says):
    with pytest.raises(ValueError, match=says):
        parse(text)


def test_flat_json_of_many_brackets():
    assert parse("[" + "[1], " * 999 + "[1]]") == [[1]] * 1000
    assert parse(" null ") is None


def test_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"preset file .*a\.json holds \[1\], not an object"):
        read_object(tmp_path / "a.json", "preset file")


def rows(text):
    return [(n, str(row) if isinstance(row, ValueError) else row) for n, row in read_table(text)[1]]


def test_a_stray_quote_costs_its_own_row_only():
    text = 'prompt,seed\na cat,1\n"a dog,2\na fish,3\n"a "star",4\n\nlast,"5"\n'
    found = rows(text)
    assert [n for n, _ in found] == [2, 3, 4, 5, 7]
    assert [row["prompt"] for _, row in found if isinstance(row, dict)] == [
        "a cat",
        "a fish",
        "last",
    ]
    assert "quote" in found[1][1] and "no CSV" in found[3][1]


def test_cells_of_several_lines():
    assert rows('\ufeff\nprompt,seed\r\n"a cat\nin a hat",1\rdog\n'.removeprefix("\ufeff")) == [
        (3, {"prompt": "a cat\nin a hat", "seed": "1"}),
        (5, {"prompt": "dog"}),
    ]


def test_a_quote_that_is_never_closed_in_a_long_file():
    text = "prompt,seed\n" + '"a cat,1\n' + "a dog,2\n" * 5000
    assert sum(isinstance(row, dict) for _, row in read_table(text)[1]) == 5000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompt,prompt\na,b\n", "names 'prompt' twice"),
        ("prompt;seed\na;1\n", "separated by commas"),
        ('"prompt,seed\na,1\n', "the heading cannot be read"),
    ],
)
def test_bad_headings(text, says):
    with pytest.raises(ValueError, match=says):
        read_table(text)
