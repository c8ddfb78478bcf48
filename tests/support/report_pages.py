"""Reads a report as strictly as a page can be read: balanced tags, quoted attributes, nothing from outside."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

VOID = {"meta", "img", "br"}
FETCHED = ("src", "href", "srcset", "poster", "data", "action", "xlink:href")  # attributes that a browser would follow
ACTIVE = {"script", "link", "iframe", "object", "embed", "base", "form", "input", "button", "video", "audio"}


class Page(HTMLParser):
    """``tables`` are (heading above, rows of cells as text); ``titles`` what is shown when something is pointed at."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html = html
        self.open: list[str] = []
        self.tables: list[tuple[str, list[list[str]]]] = []
        self.titles: list[str] = []
        self.headings: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        if self.open:
            raise AssertionError(f"left open: {self.open}")
        for svg in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
            ElementTree.fromstring(svg)  # well-formed XML

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._check(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append((self.headings[-1] if self.headings else "", []))
        elif tag == "tr":
            self.tables[-1][1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][1][-1].append("")
        elif tag in ("h2", "h3"):
            self.headings.append("")
        elif tag == "title":
            self.titles.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._check(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            raise AssertionError(f"</{tag}> at {self.getpos()} closes nothing")

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "title" in self.open:
            self.titles[-1] += data
        if "h2" in self.open or "h3" in self.open:
            self.headings[-1] += data
        if self.tables and ("td" in self.open or "th" in self.open):
            self.tables[-1][1][-1][-1] += data

    def table(self, heading: str, number: int = 0) -> list[list[str]]:
        """The rows of a table under a heading, its head first."""
        return [rows for above, rows in self.tables if above == heading][number]

    def _check(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if tag in ACTIVE or len(names) != len(set(names)) or any(name.startswith("on") for name in names):
            raise AssertionError(f"<{tag}> with {attrs} at {self.getpos()}")
        for name, value in attrs:
            if name in FETCHED and not (value or "").startswith(("data:image/", "#")):  # "#": a part of this page
                raise AssertionError(f"<{tag} {name}={value!r}> reaches outside")
            if name == "style" and "url" in (value or ""):
                raise AssertionError(f"<{tag} style={value!r}> reaches outside")
            if name == "title":
                self.titles.append(value or "")
