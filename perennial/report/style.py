"""Colours, line styles and the style sheet of the report page, for light and dark."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LineStyle:
    """How one run is drawn everywhere: colour by CSS variable, dash and marker so that colour is never needed alone."""

    colour: str
    dash: tuple[float, ...]
    """On and off lengths in line widths; empty for a solid line."""
    marker: str
    """Matplotlib marker."""


# Eight hues whose neighbours also differ in lightness, so that they stay apart for readers who do not see red and green
# as different (checked with the Machado et al. 2009 matrices: least distance of the first six 0.06 in Oklab).
LIGHT = ("#2a6fdb", "#d0570b", "#12665a", "#b03a8e", "#4d3a00", "#4b2fa8", "#1b93b2", "#8a1c2b")
DARK = ("#5c9dff", "#ff9550", "#2aa58c", "#f7a9dc", "#f4e08a", "#8a6cf0", "#b5ecff", "#d0564e")
CORPORA_LIGHT = ("#6d7f99", "#b98a2f", "#7f9c6f", "#a3708f", "#5f9aa0", "#b0715f")
CORPORA_DARK = ("#8ea3c2", "#d8b25f", "#9cc088", "#cb97b6", "#7fc0c7", "#d8957f")
SURFACE_LIGHT, SURFACE_DARK = "#ffffff", "#181b21"
INK_LIGHT, INK_DARK = "#1b1e24", "#e9ebef"
MUTED_LIGHT, MUTED_DARK = "#5a6270", "#a3abba"
_DASHES: tuple[tuple[float, ...], ...] = ((), (4.5, 1.8), (1.2, 1.4), (6.0, 1.6, 1.2, 1.6))
_MARKERS = "osD^vPXp"


def line_style(index: int) -> LineStyle:
    """The style of the run at this position; 32 runs differ before one repeats."""
    dash = _DASHES[(index + index // len(LIGHT)) % len(_DASHES)]
    return LineStyle(f"--run-{index % len(LIGHT) + 1}", dash, _MARKERS[index % len(_MARKERS)])


def corpus_colour(index: int) -> str:
    """The CSS colour of the corpus at this position; quieter than the runs', so that the two are not mixed up."""
    return f"var(--corpus-{index % len(CORPORA_LIGHT) + 1})"


def _variables(
    palette: tuple[str, ...], corpora: tuple[str, ...], surface: str, ink: str, muted: str, rest: str
) -> str:
    runs = "".join(f"--run-{i}:{colour};" for i, colour in enumerate(palette, 1))
    runs += "".join(f"--corpus-{i}:{colour};" for i, colour in enumerate(corpora, 1))
    return f"{runs}--surface:{surface};--ink:{ink};--muted:{muted};{rest}"


_LIGHT = _variables(
    LIGHT,
    CORPORA_LIGHT,
    SURFACE_LIGHT,
    INK_LIGHT,
    MUTED_LIGHT,
    "--page:#f6f5f1;--line:#e2e0d9;--grid:#e9e7e1;--good:#0b6b4f;--bad:#a8341b;--soft:#f0eee8;--best:#e6f1ea;"
    "--link:#1d57b0;--branch:#b4b1a8;color-scheme:light;",
)
_DARK = _variables(
    DARK,
    CORPORA_DARK,
    SURFACE_DARK,
    INK_DARK,
    MUTED_DARK,
    "--page:#101217;--line:#2c313b;--grid:#272c35;--good:#5ed3a6;--bad:#ff9a7d;--soft:#20242c;--best:#1c3a31;"
    "--link:#8ab8ff;--branch:#525a68;color-scheme:dark;",
)

# The reader's system decides; the two radio buttons at the top of the page override it without any script.
THEMES = (
    f":root{{{_LIGHT}}}"
    f"@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}"
    f":root:has(#theme-light:checked){{{_LIGHT}}}"
    f":root:has(#theme-dark:checked){{{_DARK}}}"
    f"@media print{{:root{{{_LIGHT}}}}}"
)

SHEET = (
    THEMES
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:400 16px/1.55 var(--sans);
--sans:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
--serif:"Iowan Old Style","Palatino Linotype",Palatino,"Liberation Serif",Georgia,serif;
--mono:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.wrap{max-width:1190px;margin:0 auto;padding:0 28px 72px}
a{color:var(--link);text-underline-offset:2px}
:focus-visible{outline:2px solid var(--link);outline-offset:2px;border-radius:3px}
header.top{display:flex;justify-content:space-between;align-items:center;gap:16px;padding:22px 0 0;font-size:13px;
color:var(--muted)}
.brand{font-weight:650;letter-spacing:.02em;color:var(--ink)}
.themes{display:flex;border:1px solid var(--line);border-radius:999px;overflow:hidden;background:var(--surface);
margin:0;padding:0}
.themes legend{position:absolute;left:-999em}
.themes label{padding:3px 12px;cursor:pointer}
.themes input{position:absolute;opacity:0;pointer-events:none}
.themes label:has(:checked){background:var(--ink);color:var(--surface)}
.themes label:has(:focus-visible){outline:2px solid var(--link);outline-offset:-2px}
h1{font:600 clamp(28px,4.6vw,42px)/1.15 var(--serif);letter-spacing:-.012em;margin:34px 0 6px;overflow-wrap:anywhere;
text-wrap:balance}
.facts{color:var(--muted);font-size:14px;margin:0 0 22px;overflow-wrap:anywhere}
.lead{font:400 clamp(18px,2.1vw,21px)/1.5 var(--serif);max-width:46em;margin:0;text-wrap:pretty;overflow-wrap:anywhere}
nav{margin:30px 0 0;padding:12px 0;border-top:1px solid var(--line);border-bottom:1px solid var(--line);font-size:14px}
nav ul{display:flex;flex-wrap:wrap;gap:4px 20px;list-style:none;margin:0;padding:0}
nav a{color:var(--muted);text-decoration:none}
nav a:hover{color:var(--ink);text-decoration:underline}
section{margin:52px 0 0}
section>h2{font:600 25px/1.25 var(--serif);letter-spacing:-.006em;margin:0 0 6px;scroll-margin-top:16px}
h3{font:600 15px/1.4 var(--sans);margin:28px 0 8px;overflow-wrap:anywhere}
section>p{max-width:44em;margin:0 0 16px;color:var(--muted);overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(215px,1fr));gap:14px;margin:28px 0 0;padding:0}
.tile{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:15px 18px 14px;min-width:0}
.tile dt{font-size:13px;color:var(--muted)}
.tile dd{margin:0}
.tile .figure{font:600 33px/1.2 var(--serif);font-variant-numeric:lining-nums;letter-spacing:-.01em;margin:3px 0 2px}
.tile .figure small{font:400 14px var(--sans);color:var(--muted);letter-spacing:0}
.tile .against{font-size:13px;line-height:1.45;color:var(--muted);overflow-wrap:anywhere}
.scroll{overflow-x:auto;background:var(--surface);border:1px solid var(--line);border-radius:10px;margin:14px 0 0;
-webkit-overflow-scrolling:touch}
table{border-collapse:separate;border-spacing:0;width:100%;font-size:14px;line-height:1.4;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:11px 16px 3px;font-size:13px;color:var(--muted);caption-side:top}
th,td{padding:8px 11px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line);vertical-align:middle}
tbody th,tbody td{height:40px}
.dense th,.dense td{height:0;padding-top:5px;padding-bottom:5px}
thead th{font-weight:500;font-size:13px;color:var(--muted);vertical-align:bottom}
thead .group{text-align:center;border-bottom:0;padding-bottom:0;font-weight:600;color:var(--ink)}
thead tr+tr th{padding-top:3px}
th[scope=row],th.first,td.text,th.text{text-align:left}
th[scope=row]{font-weight:600;position:sticky;left:0;background:var(--surface);z-index:1}
th.first{position:sticky;left:0;background:var(--surface);z-index:2}
tbody tr:last-child>*{border-bottom:0}
.edge{border-left:1px solid var(--line)}
tr.parent td,tr.parent th{color:var(--muted)}
.folded{display:inline-block;max-width:13em;white-space:normal}
td.wide{white-space:normal;min-width:11em}
.run{display:inline-flex;vertical-align:middle;align-items:center;gap:9px;max-width:24em}
.run .name{overflow-wrap:break-word;white-space:normal;min-width:0}
th .run.long{min-width:14em}
.run svg{flex:none}
.run .tag{margin-left:4px;display:inline-block}
.tag{font-weight:400;font-size:12px;color:var(--muted);border:1px solid var(--line);border-radius:999px;padding:0 8px;
white-space:nowrap}
.best{font-weight:700;background:var(--best);border-radius:5px;padding:2px 6px;margin:-2px -6px}
.good{color:var(--good)}
.bad{color:var(--bad)}
.none{color:var(--muted)}
sup a{text-decoration:none;font-size:11px;padding:0 1px;font-weight:400}
sup{line-height:0;font-size:.72em}
ol.notes{margin:12px 0 0;padding:0 0 0 1.5em;font-size:13px;line-height:1.5;color:var(--muted);columns:2 26em;
column-gap:36px}
ol.notes li{break-inside:avoid;margin:0 0 5px;padding-left:3px;overflow-wrap:anywhere}
ol.notes b{color:var(--ink);font-weight:600}
ol.notes li:target{color:var(--ink);background:var(--best)}
.careful{background:var(--soft);border-left:3px solid var(--bad);border-radius:0 8px 8px 0;padding:11px 18px;
margin:18px 0 0;font-size:14px}
.careful p{margin:0;font-weight:600}
.careful ul{margin:4px 0 0;padding-left:1.2em}
.careful li{overflow-wrap:anywhere}
.keys li{white-space:nowrap}
.legend{display:flex;flex-wrap:wrap;gap:6px 20px;list-style:none;margin:14px 0 0;padding:0;font-size:14px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:14px;margin:14px 0 0}
figure{margin:0;background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:14px 14px 8px;
min-width:0}
figure>figcaption{font-size:14px;font-weight:600;margin:0 0 4px;padding:0 2px;overflow-wrap:anywhere}
figure>figcaption small{display:block;font-weight:400;font-size:13px;color:var(--muted)}
figure>svg{display:block;width:100%;height:auto;overflow:visible}
.bar{display:flex;height:13px;border-radius:4px;overflow:hidden;background:var(--soft);min-width:150px;gap:2px}
.mix .bar{min-width:min(420px,44vw);height:18px}
.bar i{display:block;height:100%}
.key{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px;vertical-align:-1px}
.hatch{background-image:repeating-linear-gradient(135deg,transparent 0 3px,var(--surface) 3px 5px)}
.tree,.tree ul{list-style:none;margin:0;padding:0}
.tree{margin-top:16px}
.tree ul{margin-left:13px}
.tree li{position:relative;padding:0 0 0 28px;display:flow-root}
.tree>li{padding-left:0}
.tree ul>li::before{content:"";position:absolute;left:0;top:0;width:21px;height:31px;border:solid var(--branch);
border-width:0 0 1.5px 1.5px;border-bottom-left-radius:9px}
.tree ul>li:not(:last-child)::after{content:"";position:absolute;left:0;top:0;bottom:0;
border-left:1.5px solid var(--branch)}
.node{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:10px 16px;margin:0 0 10px;
font-size:14px;overflow-wrap:anywhere}
.node .head{display:flex;flex-wrap:wrap;gap:3px 12px;align-items:center}
.node .run .name{font-weight:600}
.node .meta{color:var(--muted);font-size:13px}
code,pre,.mono{font-family:var(--mono);font-size:13px}
pre{background:var(--surface);border:1px solid var(--line);border-radius:10px;padding:13px 16px;overflow-x:auto;
margin:8px 0;line-height:1.5}
.hash{font-family:var(--mono);font-size:12px;white-space:normal;overflow-wrap:anywhere;text-align:left}
details{background:var(--surface);border:1px solid var(--line);border-radius:10px;margin:8px 0 0}
details>summary{cursor:pointer;padding:10px 16px;font-size:14px;font-weight:600;overflow-wrap:anywhere}
details>summary small{font-weight:400;color:var(--muted);font-size:13px}
details[open]>summary{border-bottom:1px solid var(--line)}
details>*:not(summary){margin:0 16px 12px}
details pre{border:0;padding:10px 0;max-height:420px;overflow:auto}
footer{margin:56px 0 0;padding:14px 0 0;border-top:1px solid var(--line);font-size:13px;color:var(--muted)}
@media (max-width:760px){
.wrap{padding:0 16px 48px}
.charts{grid-template-columns:minmax(0,1fr)}
section{margin-top:42px}
.tiles{grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:10px}
.tile{padding:12px 14px}
.tile .figure{font-size:27px}
th,td{padding:7px 10px}
.run{max-width:11em;gap:6px}
th .run.long{min-width:10em}
.tree ul{margin-left:7px}
.tree li{padding-left:18px}
.tree ul>li::before{width:13px}
figure{padding:12px 8px 6px}
figure>svg text{font-size:13px!important}
nav ul{gap:4px 16px}
}
@media (prefers-reduced-motion:reduce){html{scroll-behavior:auto}}
@media print{.themes,nav{display:none}.scroll,figure,.node,details,.tile{break-inside:avoid}.wrap{max-width:none}
.scroll{overflow:visible}body{font-size:12px}}
"""
)
