"""The page of the reading list: no row says "works" without files and tests that exist."""

import ast

import pytest
from papers import PAGE, PAPERS, ROOT, STATES, page


def test_the_page_is_what_the_table_says():
    assert PAGE.read_text(encoding="utf-8") == page(), "run python tests/papers.py"


def test_each_paper_has_one_row():
    names = [paper.name for paper in PAPERS]
    assert len(names) == len(set(names)) == 57


@pytest.mark.parametrize("paper", PAPERS, ids=lambda paper: paper.name)
def test_a_row_names_what_exists(paper):
    assert paper.state in STATES
    built = paper.state == "works"
    assert bool(paper.file) == bool(paper.tests) == built
    assert not paper.file or (ROOT / paper.file).is_file()
    for test in paper.tests:
        path, name = test.split("::")
        tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
