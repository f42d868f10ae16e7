"""Tables of results: as HTML each section folds, and nothing in it is taken for markup."""

from __future__ import annotations

import re

from mdsens._util.tables import html

ROWS = [("status", "CONVERGED"), ("Is it a minimum?", ""), ("force", "1e-13"), ("a < b", "x & y")]


def test_each_section_of_a_table_folds():
    page = html("Certificate", ROWS)
    assert page.count("<details open>") == page.count("</details>") == 2
    assert re.findall(r"<summary><\w>(.*?)</\w></summary>", page) == [
        "Certificate",
        "Is it a minimum?",
    ]
    # rows before the first heading stand in a table of their own
    tables = re.findall(r"<table>(.*?)</table>", page)
    assert [table.count("<tr>") for table in tables] == [1, 2]
    assert "a &lt; b" in page and "x &amp; y" in page


def test_a_heading_without_rows_has_no_table():
    assert "<table>" not in html("Empty", [("Nothing here", "")])
