"""The report as a page: whole in one file, drawn by a browser, and small for a large model."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from models import OFF, mlp
from reports import answer, entry

import fastlinear
from fastlinear.model.reporting import Report
from fastlinear.plan.roofline import Roofline, Spot

CHROMIUM = shutil.which("chromium")
NEEDS_CHROMIUM = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: make chromium installs Debian's")
SPOT = Spot(0.7, 6e10, 12.5, Roofline("fp32", 1, 1e11, 5e10, 2e10, 1e10))


def large(layers: int = 300) -> Report:
    """Of a model of so many layers, each with plans for three batch sizes, and one that was skipped."""
    plans = [
        answer(m, "fp32/avx512/6x64", "tuned", 1.0 + m / 50, spread=0.04, table=(("fp32/avx512/6x64 t1", 0.1),))
        for m in (1, 8, 32)
    ]
    rows = [entry(f"encoder.layer.{i}.attention.self.query", *plans, roofline=(SPOT,) * 3) for i in range(layers - 1)]
    return Report([*rows, entry("</script><b>odd</b>", decision="skipped", reason="excluded by 'x'")])


def drawn(path: Path, tmp_path: Path, *flags: str) -> str:
    """What a browser makes of the page."""
    quiet = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking")
    command = [str(CHROMIUM), *quiet, f"--user-data-dir={tmp_path}/profile", *flags, "--dump-dom", path.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_a_page_of_300_layers_is_small_and_needs_nothing(tmp_path: Path) -> None:
    """Under 500 KB, without an address of anything, and names never end the script that holds them."""
    large().to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert len(text.encode()) < 500_000
    assert set(re.findall(r"https?://[^\s\"'<>]+", text)) == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert text.count("</script>") == 2 and "\\u003c/script>" in text
    data = json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', text)[1])
    assert len(data["layers"]) == 300 and data["layers"][-1][0] == "</script><b>odd</b>"


@NEEDS_CHROMIUM
def test_a_browser_draws_it(tmp_path: Path) -> None:
    """Summary, a row for each plan with a head to sort by, the plot with its roof and dots, bars and environment."""
    large(7).to_html(tmp_path / "report.html")
    page = drawn(tmp_path / "report.html", tmp_path)
    body = re.search(r'<tbody id="body">(.*?)</tbody>', page)[1]
    assert body.count("<tr>") == 6 * 3 + 1 and "&lt;/script&gt;&lt;b&gt;odd&lt;/b&gt;" in body
    assert "excluded by 'x'" in body and "1.64x ±4%" in body
    heads = re.findall(r'<th scope="col"><button type="button">([^<]*)</button></th>', page)
    assert {"layer", "runs on", "speed-up", "roofline", "why"} <= {*heads}
    assert page.count("<circle") == 6 * 3 and page.count('class="roof"') == 1
    assert page.count('class="bar"') == 6 * 3 and "19 of 19 rows" in page
    assert torch.__version__ in page


@NEEDS_CHROMIUM
def test_it_sorts_and_filters(tmp_path: Path) -> None:
    """Buttons sort either way, with aria-sort; words and the two lists leave the rows that have them."""
    large(5).to_html(tmp_path / "report.html")
    steps = """
      const press = head => [...document.querySelectorAll("thead button")].find(b => b.textContent === head).click();
      const rows = () => [...at("body").children].map(row => row.textContent);
      const enter = (id, value) => { at(id).value = value; at(id).dispatchEvent(new Event("input")); };
      const seen = {};
      press("M"); seen.up = rows(); press("M"); seen.down = rows();
      seen.sort = [...document.querySelectorAll("th[aria-sort=descending]")].map(th => th.textContent);
      enter("text", "LAYER.2. avx512"); seen.filtered = rows(); enter("text", "");
      enter("decision", "skipped"); seen.skipped = rows(); enter("decision", "");
      enter("rows", "8"); seen.eight = rows();
      document.body.append(make("pre", JSON.stringify(seen), { id: "seen" }));
    """
    path = tmp_path / "report.html"
    path.write_text(path.read_text().replace("</body>", f"<script>{{ {steps} }}</script></body>"))
    found = re.search(r'<pre id="seen">(.*?)</pre>', drawn(path, tmp_path))[1]
    seen = json.loads(found.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert len(seen["up"]) == 13 and seen["sort"] == ["M"]
    assert "odd" in seen["up"][-1] and "odd" in seen["down"][-1]  # what has no M is last either way
    assert seen["up"][:12] != seen["down"][:12] and sorted(seen["up"]) == sorted(seen["down"])
    assert len(seen["filtered"]) == 3 and all("layer.2." in row for row in seen["filtered"])
    assert len(seen["skipped"]) == 1 and len(seen["eight"]) == 4


def test_notebooks_show_a_table() -> None:
    """_repr_html_ has a row for each layer, with names and reasons escaped."""
    text = large(3)._repr_html_()
    assert text.count("<tr>") == 1 + 2 * 3 + 1 and "&lt;b&gt;odd" in text and "<b>" not in text
    untuned = fastlinear.report(OFF(mlp(8, 8)))._repr_html_()
    assert "untuned" in untuned and "64 weights" in untuned
