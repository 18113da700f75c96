"""Lines in the order in which a person reads them."""

import math

from llama_adapter.experts.reading_order import Line, rows_of, skew_of


def at(text, x, y, width=None, height=10):
    right = x + (width if width is not None else 6 * len(text))
    return Line(
        text=text, confidence=1.0, quad=((x, y), (right, y), (right, y + height), (x, y + height))
    )


def turned(line, angle):
    c, s = math.cos(angle), math.sin(angle)
    return Line(
        text=line.text,
        confidence=1.0,
        quad=tuple((x * c - y * s, x * s + y * c) for x, y in line.quad),
    )


def read(lines):
    return [[lines[i].text for i in row] for row in rows_of(lines)]


RECEIPT = [
    at("CORNER SHOP", 60, 0),
    at("9.00", 200, 21),
    at("TEA", 0, 20),
    at("12.50", 200, 42),
    at("COFFEE BEANS", 0, 40),
    at("TOTAL", 0, 60),
    at("21.50", 200, 59),
]


def test_rows_of_a_receipt_stay_together():
    assert read(RECEIPT) == [
        ["CORNER SHOP"],
        ["TEA", "9.00"],
        ["COFFEE BEANS", "12.50"],
        ["TOTAL", "21.50"],
    ]


def test_a_page_askew_reads_the_same():
    for angle in (-0.12, 0.12):
        # a wide line tells the angle best; short ones follow it
        lines = [turned(line, angle) for line in [*RECEIPT, at("thank you for your visit", 0, 80)]]
        assert abs(skew_of(lines) - angle) < 0.01
        assert read(lines)[1:3] == [["TEA", "9.00"], ["COFFEE BEANS", "12.50"]]


def test_columns_are_read_one_after_the_other():
    left = [at(f"left column line {i}", 0, 40 + 20 * i, width=180) for i in range(4)]
    right = [at(f"right column line {i}", 220, 41 + 20 * i, width=180) for i in range(4)]
    head, foot = at("A heading across both of them", 0, 0, width=400), at("page 1", 185, 140)
    rows = read([foot, *right, head, *left])
    assert [row[0] for row in rows] == [
        head.text, *(p.text for p in left), *(p.text for p in right), foot.text
    ]  # fmt: skip


def test_a_table_is_read_row_by_row():
    names = ("name", "mean", "max")
    cells = [at(f"{n}{row}", 100 * i, 20 * row) for row in range(5) for i, n in enumerate(names)]
    assert read(cells) == [[f"{n}{row}" for n in names] for row in range(5)]


def test_nothing_and_one_line():
    assert rows_of([]) == []
    assert read([at("alone", 0, 0)]) == [["alone"]]
