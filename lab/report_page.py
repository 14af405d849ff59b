"""The parts of a report's page: the document, its style, tables, facts.

Text from data or a checkpoint is escaped here; only Html is taken as it is.
"""

import re
from collections.abc import Sequence
from html import escape

from lab import svg

LIGHT = """--ink:#1c2128;--muted:#57606a;--bg:#f8f8f6;--card:#fff;--line:#d3d8de;--accent:#0a58ca;
--heat:65;--good:#17693a;--bad:#a8320b;
--s0:#0a58ca;--s1:#b04a00;--s2:#17783a;--s3:#7a3fb5;--s4:#a3195b;--s5:#0b7285;--s6:#6b5900;--s7:#444c56"""
DARK = """--ink:#e6edf3;--muted:#a5afb9;--bg:#0d1117;--card:#161b22;--line:#3d444d;--accent:#79b8ff;
--heat:50;--good:#6fdc8c;--bad:#ff9b72;
--s0:#79b8ff;--s1:#ffab70;--s2:#6fdc8c;--s3:#d2a8ff;--s4:#ff9bce;--s5:#76e3ea;--s6:#e3c55b;--s7:#c0c8d0"""
CSS = f"""
:root{{color-scheme:light dark;{LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--bg);color:var(--ink);font:16px/1.55 system-ui,sans-serif;
overflow-wrap:anywhere}}
.wide{{max-width:62rem;margin:0 auto;padding:0 1rem}}
header{{padding:2.2rem 0 .6rem}}footer{{padding:1rem 0 2.5rem;color:var(--muted)}}
h1{{font-size:1.7rem;line-height:1.2;margin:0 0 .4rem}}
h2{{font-size:1.25rem;margin:0 0 .5rem}}h3{{font-size:1.05rem;margin:1.4rem 0 .4rem}}
p{{margin:.4rem 0 .8rem;max-width:44rem}}.note{{color:var(--muted)}}
a{{color:var(--accent);text-underline-offset:.2em}}
:focus-visible{{outline:3px solid var(--accent);outline-offset:2px}}
.skip{{position:absolute;left:-99rem}}.skip:focus{{position:static}}
.warning{{border-left:4px solid var(--bad);padding:.3rem .8rem;background:var(--card)}}
nav ul{{display:flex;flex-wrap:wrap;gap:.25rem 1.2rem;list-style:none;padding:0;
margin:.6rem 0 1rem}}
main>section{{background:var(--card);border:1px solid var(--line);border-radius:12px;
padding:1.1rem 1.2rem 1.3rem;margin:0 0 1.1rem}}
dl{{display:grid;grid-template-columns:minmax(7rem,13rem) 1fr;gap:.25rem 1rem;margin:.8rem 0}}
dt{{color:var(--muted)}}dd{{margin:0}}
.scroll{{overflow-x:auto;margin:.6rem 0 1.2rem}}
caption{{white-space:nowrap}}
table{{border-collapse:collapse;font-variant-numeric:tabular-nums;overflow-wrap:normal}}
caption{{text-align:left;color:var(--muted);padding:0 0 .4rem}}
th,td{{padding:.32rem .7rem;text-align:right;border-bottom:1px solid var(--line);
font-weight:400;white-space:nowrap}}
th{{text-align:left}}thead th{{font-weight:600;text-align:right;
white-space:normal;vertical-align:bottom}}
thead th:first-child,.second th:nth-child(2),.words td,.words thead th{{text-align:left}}
th[scope=rowgroup]{{vertical-align:top;font-weight:600}}
.heat{{background:color-mix(in srgb,var(--accent) calc(var(--v)*var(--heat)*1%),var(--card));
border:2px solid var(--card);border-radius:7px;min-width:5.4rem;text-align:center}}
thead th.cell{{text-align:center}}
.examples{{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;list-style:none}}
article{{border-top:1px solid var(--line);padding-top:.2rem;margin-top:1.3rem}}
.views{{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.2rem,14rem));gap:.8rem;
max-width:44rem;margin:.8rem 0}}
figure{{margin:0}}figure svg{{width:100%;height:auto;display:block;border-radius:8px;
background:#000}}
figcaption{{color:var(--muted);font-size:.9rem;padding-top:.25rem}}
.overlay .mark{{fill:#fff;stroke:#000;stroke-width:3px;paint-order:stroke;text-anchor:middle;
font-weight:700;font-family:system-ui,sans-serif}}
.patch{{stroke:#fff;stroke-opacity:.25;stroke-width:.6}}.patch.none{{fill:#000}}
.e0{{fill:#3b82f6}}.e1{{fill:#f97316}}.e2{{fill:#22c55e}}.e3{{fill:#c026d3}}
.e4{{fill:#ec4899}}.e5{{fill:#06b6d4}}.e6{{fill:#eab308}}.e7{{fill:#94a3b8}}
.good{{color:var(--good);font-weight:600}}.bad{{color:var(--bad);font-weight:600}}
code{{font:.92em ui-monospace,monospace;background:var(--bg);padding:.05em .3em;
border-radius:4px;white-space:pre-wrap}}
@media (max-width:34rem){{main>section{{padding:.9rem .8rem 1rem}}
dl{{grid-template-columns:1fr;gap:0}}.views{{grid-template-columns:1fr 1fr}}
dd{{margin-bottom:.5rem}}
caption span{{display:inline-block;position:sticky;left:0;white-space:normal;
max-width:calc(100vw - 4.5rem)}}th,td{{padding:.3rem .45rem}}.heat{{min-width:4.2rem}}}}
@media print{{:root{{{LIGHT};--bg:#fff}}body{{font-size:10pt;
-webkit-print-color-adjust:exact;print-color-adjust:exact}}
nav,.skip,.examples{{display:none}}.scroll{{overflow:visible}}.views{{max-width:27rem}}
main>section{{border:0;padding:0}}
article,tr,figure,.chart,.scroll{{break-inside:avoid}}h2,h3{{break-after:avoid}}th,td{{white-space:normal}}}}
"""


class Html(str):
    """Markup that is put into a page as it is. Anything else is escaped."""


def markup(value: object) -> str:
    return value if isinstance(value, Html) else escape(str(value))


def tag(name: str, *inside: object, **attributes: object) -> Html:
    """tag("td", "a < b", class_="x") -> <td class="x">a &lt; b</td>; aria_label is aria-label."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(str(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Html(f"<{name}{written}>{''.join(markup(part) for part in inside)}</{name}>")


def join(*parts: object) -> Html:
    return Html("\n".join(markup(part) for part in parts))


def percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f} %"


def heat(share: float, shown: str | None = None) -> Html:
    """A cell with a share from 0 to 1 as text and as tint."""
    tint = f"--v:{min(max(share, 0.0), 1.0):.3f}"
    return tag("td", percent(share) if shown is None else shown, class_="heat", style=tint)


def table(
    caption: str, head: Sequence[str], rows: Sequence[Sequence[object]], style: str | None = None
) -> Html:
    """A table in a box of its own that scrolls. The first cell of a row is its header.

    A cell may be a <td> or <th> that was made with `tag`; the rest is put into one.
    """
    top = [tag("th", name, scope="col", class_="cell" if i else None)
           for i, name in enumerate(head)]  # fmt: skip
    lines = []
    for row in rows:
        cells = []
        for i, cell in enumerate(row):
            is_cell = isinstance(cell, Html) and re.match("<t[dh][ >]", cell)
            header = {"scope": "row"} if i == 0 else {}
            cells.append(cell if is_cell else tag("td" if i else "th", cell, **header))
        lines.append(tag("tr", *cells))
    inside = tag("table", tag("caption", tag("span", caption)), tag("thead", tag("tr", *top)),
                 tag("tbody", *lines), class_=style)  # fmt: skip
    label = re.split(r"[.:;]", caption)[0]
    return tag("div", inside, class_="scroll", tabindex=0, role="region", aria_label=label)


def facts(pairs: Sequence[tuple[str, object]]) -> Html:
    return tag("dl", *(tag(name, one) for pair in pairs
                       for name, one in zip(("dt", "dd"), pair, strict=True)))  # fmt: skip


def note(words: object) -> Html:
    return tag("p", words, class_="note")


def section(name: str, title: str, *parts: object) -> tuple[str, str, Html]:
    """An identifier, the title for the list of contents, and the markup."""
    head = tag("h2", title, id=f"{name}-title")
    inside = tag("section", head, *parts, id=name, aria_labelledby=f"{name}-title")
    return name, title, inside


def document(title: str, head: Html, sections: Sequence[tuple[str, str, Html]], end: str) -> str:
    """The whole page; its style is in it, and it fetches nothing."""
    links = [tag("li", tag("a", words, href=f"#{name}")) for name, words, _ in sections]
    body = join(
        tag("a", "Skip to the content", href="#main", class_="skip"),
        tag("div", tag("header", tag("h1", title), head),
            tag("nav", tag("ul", *links), aria_label="Contents"),
            tag("main", *(part for _, _, part in sections), id="main"),
            tag("footer", end), class_="wide"),
    )  # fmt: skip
    return page(title, body)


def page(title: str, body: Html, style: str = "") -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{CSS}{svg.CSS}{style}</style></head>\n"
        f"<body>{body}</body></html>\n"
    )
