"""A real browser opens the report of every family: nothing is wrong in its console, nothing is asked of the network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from time_limits import PATIENCE_S
from transom.export.report import report as report_module
from transom.export.report.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
FLAGS += ["--window-size=400,2000"]  # a phone's width
BUNDLES = ["bert_bundle", "vit_bundle", "gpt_bundle", "dates_bundle", "clip_bundle"]
BUNDLES += ["random_seq2seq_bundle", "random_fixed_bundle", "random_captioner_bundle", "captions_bundle"]

# Told to the console by a script that the test adds: how far the page is wider than the window, images that failed.
PROBE = """<script>addEventListener("load", () => {
  const page = document.documentElement, broken = [...document.images].filter(image => !image.naturalWidth).length;
  console.info(`probe wider=${page.scrollWidth - page.clientWidth} broken=${broken}`);
});</script>"""


@pytest.mark.skipif(BROWSER is None, reason=f"no browser is installed: {', '.join(BROWSERS)}")
@pytest.mark.parametrize("name", BUNDLES)
def test_a_browser_finds_nothing_wrong(
    name: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report_module, "RUNS", 2)
    out = tmp_path / "report.html"
    write_report(request.getfixturevalue(name), [], out)
    out.write_text(out.read_text(encoding="utf-8").replace("</head>", f"{PROBE}</head>"), encoding="utf-8")
    assert BROWSER is not None
    found = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--screenshot={tmp_path / 'page.png'}",
            out.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    console = re.findall(r'CONSOLE:?\(?\d*\)?\] "(.*?)", source', found.stderr)
    assert console == ["probe wider=0 broken=0"], found.stderr[-2000:]
