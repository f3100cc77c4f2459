"""Charts: what is drawn, that it is the same every time, and that it can be read in every way."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from perennial.report import style
from perennial.report.charts import MAX_POINTS, Frame, Line, line_chart, power_of_ten, smooth, thin

FRAME = Frame("key", "A title", "tokens", "nats/token", "tokens")


def line(label: str = "run", size: int = 50, index: int = 0) -> Line:
    x = np.arange(1.0, size + 1)
    return Line(label, x * 1000, 5 + 3 / x, index, markers=True)


def test_thin_keeps_ends_and_peaks() -> None:
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[54_321], y[12_345] = 50.0, -50.0
    small_x, small_y = thin(x, y)
    assert len(small_x) <= MAX_POINTS
    assert (small_x[0], small_x[-1]) == (0, 99_999)
    assert small_y.max() == 50
    assert small_y.min() == -50
    assert (np.diff(small_x) > 0).all()
    assert len(thin(x[:10], y[:10])[0]) == 10


def test_smooth_is_unbiased_and_halves() -> None:
    x = np.arange(0.0, 100.0)
    assert smooth(x, np.full(100, 3.0), 5.0) == pytest.approx(3.0)
    step = smooth(x, (x >= 50).astype(float), 5.0)
    assert step[49] == 0
    assert step[-1] == pytest.approx(1.0, abs=0.01)
    one = smooth(np.array([0.0, 5.0]), np.array([0.0, 1.0]), 5.0)
    assert one[1] == pytest.approx(1 / 1.5), "the older of the two weighs half"
    assert len(smooth(np.array([]), np.array([]), 1.0)) == 0


def test_the_same_chart_is_the_same_bytes() -> None:
    assert line_chart([line()], FRAME) == line_chart([line()], FRAME)


def test_a_chart_is_one_element_with_words_for_those_who_cannot_see_it() -> None:
    svg = line_chart([line("a <b> & 'c'", index=0), line("other", index=1)], FRAME)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.get("role") == "img"
    title, description = root.find("title"), root.find("desc")
    assert title is not None
    assert title.text == "A title"
    assert description is not None
    assert description.text is not None
    assert "a <b> & 'c': from 8 to 5.06" in description.text
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"


def test_colours_and_fonts_are_the_pages() -> None:
    svg = line_chart([line(index=i) for i in range(9)], FRAME)
    for i in range(1, 9):
        assert f"var(--run-{i})" in svg
    for text in ("#fe00", "#fd00", "DejaVu", "xmlns", "http", "<metadata", "<script", "<?xml", "1970", "Matplotlib"):
        assert text not in svg
    assert "<text" in svg, "words stay words"


def test_ids_do_not_meet_those_of_another_chart() -> None:
    def ids(key: str) -> set[str]:
        svg = line_chart([line()], Frame(key, "t", "x", "y", "tokens"))
        return {str(e.get("id")) for e in ElementTree.fromstring(svg).iter() if e.get("id")}

    assert ids("one")
    assert not ids("one") & ids("two")


def test_ticks_keep_all_their_digits() -> None:
    rates = Line("run", np.arange(1.0, 20.0), np.linspace(0, 1e-3, 19), 0)
    svg = line_chart([rates], Frame("rates", "t", "x", "y", "tokens", from_zero=True))
    assert "0.00025" in svg


def test_a_logarithmic_axis_shows_what_was_measured_at_zero() -> None:
    spent = Line("run", np.array([0.0, 1e15, 1e17]), np.array([9.0, 5.0, 4.0]), 0, markers=True)
    svg = line_chart([spent], Frame("flops", "t", "FLOPs", "y", "flops", log_x=True))
    assert "10\u00b9\u2076" in svg
    assert "from 9 to 4" in svg


def test_nothing_to_draw() -> None:
    nan = np.array([np.nan])
    assert line_chart([], FRAME) == ""
    assert line_chart([Line("x", nan, nan, 0)], FRAME) == ""
    assert (
        line_chart([Line("x", np.array([0.0]), np.array([1.0]), 0)], Frame("k", "t", "x", "y", "flops", log_x=True))
        != ""
    )


def test_a_readers_own_settings_change_nothing() -> None:
    import matplotlib

    plain = line_chart([line()], FRAME)
    with matplotlib.rc_context({"lines.linewidth": 9, "font.size": 30}):
        assert line_chart([line()], FRAME) == plain
        assert matplotlib.rcParams["font.size"] == 30, "and are left as they were"


def test_power_of_ten() -> None:
    assert power_of_ten(0) == "0"
    assert power_of_ten(1e13) == "10\u00b9\u00b3"
    assert power_of_ten(2.5e-4) == "2.5\u00d710\u207b\u2074"


# Colours


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("palette", "surface", "ink", "muted"),
    [
        (style.LIGHT, style.SURFACE_LIGHT, style.INK_LIGHT, style.MUTED_LIGHT),
        (style.DARK, style.SURFACE_DARK, style.INK_DARK, style.MUTED_DARK),
    ],
)
def test_contrast(palette: tuple[str, ...], surface: str, ink: str, muted: str) -> None:
    """WCAG 2.2: 3 for lines, 4.5 for text."""
    assert min(contrast(colour, surface) for colour in palette) >= 3
    assert contrast(ink, surface) >= 7
    assert contrast(muted, surface) >= 4.5


def test_32_runs_are_told_apart() -> None:
    styles = {(style.line_style(i).colour, style.line_style(i).dash) for i in range(32)}
    assert len(styles) == 32
    assert len({style.line_style(i).dash for i in range(4)}) == 4, "neighbours differ in more than colour"
