"""The page: a section for each block, alone in one file."""

import json
import os
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from softmoe_cli.compare.blocks import compare
from softmoe_cli.compare.groups import EQUAL_COST
from softmoe_cli.compare.question import Question
from tests.synthetic import row, study, write

SORTED = [
    ["<1%", "1%", "2%", "93% (41% to >99%)", ">99%"],
    ["-1.50 ± 0.10", "-0.80", "+1.20 (0.40 to 2.10)", "(it ends before)"],
    ["± 0.50", "± 9.00", "± 10.00"],
    ["below 0.9", "0.91 (0.8 to 1)", "1.2", "above 1.2", "cannot be told"],
    ["2025-12-01 10:00", "2026-02-01 09:00", "2026-02-01 10:00"],
    ["12", "950k [900k, 1.1M]", "1.23M [1M, 2M]"],
    ["392.4 GFLOP", "1.2 PFLOP"],
    ["23.4 ms", "1.5 s", "1 min 3 s", "23 min", "1 h", "1 h 5 min", "3.1 days"],
    ["2 experts", "16 experts", "soft, 2 experts", "soft, 16 experts"],
]
"""Cells of columns, as a click on the head sorts them."""


@pytest.mark.skipif(shutil.which("node") is None, reason="there is no node here")
def test_columns_are_sorted_by_what_their_cells_mean() -> None:
    from softmoe_cli.compare.page import TEMPLATE

    _, head, rest = TEMPLATE.read_text().partition("const SECONDS =")
    source = head + rest.partition("for (const table of")[0]
    told = f"""{source}
    const of = textContent => value({{textContent}}), columns = {json.dumps([column[::-1] for column in SORTED])};
    columns.forEach(column => column.sort((a, b) => order(of(a), of(b))));
    console.log(JSON.stringify(columns));"""
    answer = subprocess.run(["node", "-e", told], capture_output=True, text=True, check=True)
    assert json.loads(answer.stdout) == SORTED


def test_page_has_a_section_for_each_block(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    study(tmp_path)
    for hardware in ("AMD: one", "AMD: two"):
        write(tmp_path / hardware, row(seed=7, hardware=hardware, train__minutes=5))
        write(tmp_path / hardware, row(seed=len(hardware) + ord(hardware[-1]), hardware=hardware, train__minutes=5))
    comparison = compare([tmp_path], Question())
    sections = page(comparison, {"pareto.svg": b"", "curves.svg": b""}, tmp_path).split("<section>")[1:]
    assert [each.partition("</section>")[0].count("<table ") for each in sections] == [4, 3, 3]


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's own script")
def test_places_of_a_scale_differ() -> None:
    """However narrow it is."""
    from softmoe_cli.compare.page import TEMPLATE

    text = TEMPLATE.read_text()
    part = text[text.index("const shown =") : text.index("function frame(")]
    ranges = [[1, 1.0003], [0.99998, 0.99999], [0, 475_392], [-2e-5, 1e-5], [1.2e6, 1.21e6], [99.5, 99.99], [0.1, 0.1]]
    code = f"""{part}
      const scales = {ranges}.map(ends => scale(ends, 300, 0, false));
      console.log(JSON.stringify(scales.map(s => s.ticks.map(t => [t, shown(t, s.step)]))));"""
    for ticks in json.loads(subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout):
        assert len({name for _, name in ticks}) == len(ticks) >= 2
        assert [float(name) for _, name in ticks] == pytest.approx([place for place, _ in ticks], rel=1e-12)


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the page's own script")
@pytest.mark.parametrize(
    ("cost", "share", "places", "equal"),
    [(1.0, 0.01, 2, True), (1.004, 0.01, 2, True), (1.2, 0.01, 2, False), (1.2, 0.3, 2, True), (None, 0.01, 1, False)],
)
def test_points_of_equal_cost_stand_beside_each_other(
    cost: float | None, share: float, places: int, equal: bool
) -> None:
    """As in the figures, where they do not hide each other; a group alone stands in the middle, by its cost. The page's
    data say what counts as equal."""
    from softmoe_cli.compare.page import TEMPLATE

    text = TEMPLATE.read_text()
    part = text[text.index("const escaped =") : text.index("function at(")]
    group = {"colour": 0, "marker": "o", "n": 3, "y": [1, 0.9, 1.1], "front": True, "but": [], "chance": None}
    groups = [group | {"label": str(x), "x": [x, None, None]} for x in (1.0, cost) if x is not None]
    code = f"""const data = {{cost: "PFLOP", quality: "loss", equal_cost: {share}}}, place = {{clientWidth: 600}};
      {part}
      legend = tips = () => null;
      pareto(place, {json.dumps(groups)})();
      console.log(place.innerHTML);"""
    drawn = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True).stdout
    at = [float(piece.partition('"')[0]) for piece in drawn.split('<circle cx="')[1:]]
    assert len(set(at)) == places == len(at)
    assert places == 1 or abs(at[0] - at[1]) > 200
    assert ("PFLOP, the same for all" in drawn) == equal


def test_page_draws_seconds_of_one_machine_only(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    def axes() -> list[str]:
        text = page(compare([study_folder], Question()), {"pareto.svg": b"", "curves.svg": b""}, tmp_path)
        data = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
        assert data["equal_cost"] == EQUAL_COST
        return list(data["axes"][0])

    study_folder = study(tmp_path / "runs")
    assert axes() == ["train_pflop", "device_s", "images"]
    write(study_folder, row(seed=5, hardware="NVIDIA H100"))
    assert axes() == ["train_pflop", "images"]


class Reader(HTMLParser):
    """Checks that what opens closes, and gathers attributes, data and words."""

    VOID = ("meta", "img", "br", "!doctype")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words: dict[str, list[str]] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.setdefault(self.open[-1] if self.open else "", []).append(data)


@pytest.mark.parametrize("which", ["compared", "nasty"])
def test_page_stands_alone(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    comparison = request.getfixturevalue(which)
    text = page(comparison, {"pareto.svg": b"<svg/>", "curves.svg": b"<svg/>"}, tmp_path)
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert "http:" not in text and "https:" not in text and "@import" not in text and "url(" not in text
    links = [value or "" for name, value in reader.attributes if name == "href"]
    assert all((tmp_path / unquote(link)).is_dir() for link in links) and len(links) == sum(
        len(group.runs) for group in comparison.groups
    )
    assert all((value or "").startswith("data:") for name, value in reader.attributes if name == "src")
    data, _ = reader.words["script"]
    told = json.loads(data)
    labels = {each["label"] for each in told["blocks"][0]}
    assert labels == {group.label for group in comparison.groups}
    assert "routing_utilisation" in next(each for each in told["blocks"][0] if each["label"] != "dense")["names"]
    assert "b" not in reader.words, "no tag that a run's name brought along"
    assert any("utilisation" in word for word in reader.words["button"])
    assert labels <= set(reader.words["th"])


def test_the_page_tells_what_was_run(tmp_path: Path) -> None:
    from softmoe_cli.compare.page import page

    runs = study(tmp_path / "out puts" / "a&b")
    folder = runs / "sweep-1"
    folder.mkdir()
    jobs = [{"run": run.name, "folder": f"../{run.name}"} for run in sorted(runs.iterdir()) if "sweep" not in run.name]
    (folder / "jobs.json").write_text(json.dumps({"command": "train", "typed": ["seed=0,1,2", "a=<b>"], "jobs": jobs}))
    (runs / "sweep-2").mkdir()
    (runs / "sweep-2" / "jobs.json").write_text("{")
    for run in runs.glob("*/result.json"):
        os.utime(run, (1_700_000_000, 1_700_000_000))
    text = page(compare([runs], Question()), {"pareto.svg": b"", "curves.svg": b""}, tmp_path / "elsewhere")
    reader = Reader()
    reader.feed(text)
    facts = reader.words["dd"][2:]  # after the routing table's words
    assert facts[0] == "softmoe train -m seed=0,1,2 'a=<b>'" and "2023-11-14 (UTC" in facts[1]
    assert "AMD EPYC, 1 threads, torch 2.15.0+cu132 (9 runs)" in facts
    assert "softmoe 0.1.0, commit 7d27ecc (9 runs)" in facts
    assert "digits: 1,295 training images, 359 test images (9 runs)" in facts
    assert "200 updates of 32 images (9 runs)" in facts
    links = [value or "" for name, value in reader.attributes if name == "href"]
    assert len(links) == 9 and all(link.startswith("../out%20puts/a%26b/vit_nano2_") for link in links)
    assert any("soft is better than dense" in word for word in reader.words["p"]), "the headline"
    assert {"utilisation", "load_max"} <= set(reader.words["dt"]), "the routing table's words"
    heads = [value for name, value in reader.attributes if name == "data-head"]
    assert "verdict" in heads, "which a card names on a narrow screen"
