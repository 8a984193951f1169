"""A report holds its provenance inside itself: it is up to date, out of date, edited, or not ours, with no file next to it."""

import base64
import json
import re
from collections.abc import Callable
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from shared.command.errors import ToolError
from shared.files import reports
from shared.files.artifacts import build
from shared.files.atomic import write_json
from shared.files.plan import Plan, Product
from shared.files.provenance import as_json, provenance_path, read_provenance, record, require_checksums
from shared.files.reports import split_report
from tests.shared.files.conftest import Found

PICTURE = base64.b64encode(np.random.default_rng(0).bytes(2**20)).decode()
CONTENTS = {
    "report.json": '{"ok": true, "share": 0.1, "name": "<b>\\u00e9\\ud83d\\ude00"}\n',
    "report.html": f'<!doctype html>\n<html><body>\n<h1>é</h1><img src="data:image/png;base64,{PICTURE}">\n</body>\n</html>\n',
    "report.txt": '{"rows": [1]}',
    "fragment.html": "\n<p>no body</p>",
}


class Report:
    """A tool that writes one report, and counts how often it did."""

    def __init__(self, folder: Path, name: str) -> None:
        self.content, self.times = CONTENTS[name], 0
        self.source = folder / "model.tflite"
        self.source.write_text("abc")
        self.plan = Plan(folder / name, "verify", {"seed": 0}, [self.source], ["numpy"], is_report=True)

    @property
    def path(self) -> Path:
        return self.plan.output

    def build(self, **changes: object) -> Product:
        def make(draft: Path) -> Found:
            self.times += 1
            draft.write_text(self.content, encoding="utf-8")
            return Found(self.times)

        product, _ = build(replace(self.plan, **changes), Found, make)  # type: ignore[arg-type]
        return product


@pytest.fixture(params=CONTENTS)
def report(request: pytest.FixtureRequest, tmp_path: Path) -> Report:
    return Report(tmp_path, request.param)


@pytest.fixture(params=["report.json", "report.html"])
def usual(request: pytest.FixtureRequest, tmp_path: Path) -> Report:
    return Report(tmp_path, request.param)


def test_a_report_is_one_file_and_up_to_date_the_second_time(report: Report) -> None:
    first, second = report.build(), report.build()
    assert (first.up_to_date, second.up_to_date, report.times) == (False, True, 1)
    assert sorted(path.name for path in report.path.parent.iterdir()) == sorted([report.path.name, "model.tflite"])
    assert (second.sha256, second.size_bytes) == (first.sha256, report.path.stat().st_size)
    provenance = read_provenance(report.path)
    assert provenance is not None
    assert (provenance.tool, provenance.arguments, provenance.found) == ("verify", {"seed": 0}, {"letters": 1, "ok": True})
    assert [item.sha256 for item in provenance.inputs] == [record(report.source).sha256]
    assert provenance.output.sha256 == first.sha256 == record(report.path).sha256


def test_a_json_report_keeps_its_content_and_has_one_key_more(tmp_path: Path) -> None:
    report = Report(tmp_path, "report.json")
    report.build()
    content = json.loads(report.path.read_text())
    assert content.pop("provenance")["tool"] == "verify"
    assert content == json.loads(report.content)


def test_a_page_keeps_its_content_and_has_one_element_more(tmp_path: Path) -> None:
    report = Report(tmp_path, "report.html")
    report.build(arguments={"hostile": "</script></body><b>"})
    page = report.path.read_text()
    element = re.compile(r'<script type="application/json" id="edgepress-provenance">(.*?)</script>\n', re.DOTALL)
    assert element.sub("", page) == report.content
    found = element.search(page)
    assert found is not None
    assert json.loads(found[1])["arguments"] == {"hostile": "</script></body><b>"}
    assert page.index("<h1>") < found.start() < page.index("</body>")
    tags: list[str] = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: tags.append(tag)  # type: ignore[method-assign]
    parser.feed(page)
    assert tags == ["html", "body", "h1", "img", "script"], "what stands in the arguments is no markup"


@pytest.mark.parametrize(
    "changes", [{"arguments": {"seed": 1}}, {"tool": "compare"}, {"packages": ["numpy", "typer"]}, {"inputs": []}]
)
def test_other_arguments_tools_versions_or_inputs_make_a_report_stale(usual: Report, changes: dict[str, object]) -> None:
    usual.build()
    with pytest.raises(ToolError, match="the output exists and is out of date"):
        usual.build(**changes)
    assert not usual.build(**changes, refresh=True).up_to_date
    assert usual.build(**changes).up_to_date
    assert usual.times == 2


def test_a_changed_input_makes_a_report_stale(usual: Report) -> None:
    usual.build()
    usual.source.write_text("xyz")
    with pytest.raises(ToolError, match="out of date"):
        usual.build()
    usual.build(refresh=True)
    assert usual.times == 2


def test_a_report_that_was_edited_is_not_replaced_without_overwrite(report: Report) -> None:
    report.build()
    text = report.path.read_text()
    edited = (
        text.replace("é", "mine", 1).replace("\\u00e9", "mine", 1).replace("[\n  1\n ]", "[\n  2\n ]").replace("no body", "mine")
    )
    assert edited != text
    report.path.write_text(edited)
    for refresh in (False, True):
        with pytest.raises(ToolError, match=r"the output exists; use --overwrite"):
            report.build(refresh=refresh)
    assert (report.path.read_text(), report.times) == (edited, 1)
    with pytest.raises(ToolError, match=rf"not the one that its checksum is of.*as {report.path.name} says"):
        require_checksums([report.path])
    assert not report.build(overwrite=True).up_to_date
    assert report.build().up_to_date


def test_a_json_report_that_was_only_indented_is_still_up_to_date(tmp_path: Path) -> None:
    report = Report(tmp_path, "report.json")
    report.build()
    report.path.write_text(json.dumps(json.loads(report.path.read_text()), indent=4))
    assert report.build().up_to_date


FILES: dict[str, Callable[[str], str]] = {
    "no provenance": lambda _: '{"ok": true}',
    "no page of ours": lambda _: "<html><body></body></html>",
    "provenance that is text": lambda _: '{"provenance": "from a friend"}',
    "provenance of another form": lambda _: '{"provenance": {"tool": "another"}}',
    "a list": lambda _: "[1, 2]",
    "a list that begins as an object": lambda _: "{[",
    "no JSON": lambda _: '{"ok": tru',
    "deep JSON": lambda _: '{"a":' * 100_000,
    "an element that holds no JSON": lambda text: text.replace('edgepress-provenance">{', 'edgepress-provenance">{{'),
    "an element that is cut off": lambda text: text.partition("</script>")[0],
    "empty": lambda _: "",
    "text": lambda _: "notes",
}


@pytest.mark.parametrize("kind", FILES)
@pytest.mark.parametrize("name", ["report.json", "report.html"])
def test_a_file_that_is_not_ours_is_never_replaced_without_overwrite(tmp_path: Path, name: str, kind: str) -> None:
    page = Report(tmp_path, "report.html")
    page.build()
    text = FILES[kind](page.path.read_text())
    page.path.unlink()
    report = Report(tmp_path, name)
    report.path.write_text(text)
    assert read_provenance(report.path) is None
    for refresh in (False, True):
        with pytest.raises(ToolError, match="the output exists; use --overwrite"):
            report.build(refresh=refresh)
    assert (report.path.read_text(), report.times) == (text, 0)
    report.build(overwrite=True)
    assert report.build().up_to_date


def test_bytes_that_are_no_text_are_no_report_and_no_traceback(tmp_path: Path) -> None:
    for start in (b"{", b"<", b"\xff", b"\0"):
        (tmp_path / "report.json").write_bytes(start + bytes(range(256)))
        assert split_report(tmp_path / "report.json") is None


def test_a_very_large_file_is_not_read_as_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = Report(tmp_path, "report.json")
    report.build()
    size = report.path.stat().st_size
    for most, is_read in ((size, True), (size - 1, False)):
        monkeypatch.setattr(reports, "MOST_BYTES", most)
        assert (split_report(report.path) is not None) is is_read


def test_nan_in_a_report_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    report = Report(tmp_path, "report.json")
    report.content = '{"share": NaN}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        report.build()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tflite"]


def test_a_report_whose_provenance_lay_next_to_it_is_refreshed_and_the_provenance_file_goes(usual: Report) -> None:
    """So were reports written before they held their own."""
    usual.build()
    old = read_provenance(usual.path)
    assert old is not None
    usual.path.write_text(usual.content, encoding="utf-8")
    side = provenance_path(usual.path)
    write_json(side, as_json(asdict(replace(old, output=record(usual.path)))))
    with pytest.raises(ToolError, match="out of date"):
        usual.build(arguments={"seed": 1})
    usual.build(arguments={"seed": 1}, refresh=True)
    assert not side.exists()
    assert usual.build(arguments={"seed": 1}).up_to_date


def test_a_file_of_somebody_elses_next_to_a_report_stays(usual: Report) -> None:
    side = provenance_path(usual.path)
    side.write_text('{"mine": 1}')
    usual.build()
    assert side.read_text() == '{"mine": 1}'
    assert usual.build().up_to_date


def test_a_product_that_only_has_a_key_of_that_name_keeps_its_provenance_file(tmp_path: Path) -> None:
    """Such as a manifest."""
    plan = Plan(tmp_path / "manifest.json", "prepare_calibration", {})

    def make(draft: Path) -> Found:
        draft.write_text('{"samples": [], "provenance": {"camera": "mine"}}')
        return Found(1)

    build(plan, Found, make)
    assert build(plan, Found, make)[0].up_to_date
    assert record(plan.output).sha256 == build(plan, Found, make)[0].sha256
