"""An input is checked against the checksum that lies next to it."""

from dataclasses import replace
from pathlib import Path

import pytest

from shared.command.errors import ToolError
from shared.files.artifacts import build
from shared.files.checksums import write_checksum
from shared.files.provenance import provenance_path, read_provenance, require_checksums
from tests.shared.files.conftest import Found, Work


@pytest.mark.parametrize("noted", ["provenance", "sha256", "sums"])
def test_an_input_that_is_not_what_its_checksum_says_is_refused(work: Work, noted: str) -> None:
    product, _ = work.build()
    path = product.path
    if noted != "provenance":
        provenance_path(path).unlink()
    if noted == "sha256":
        write_checksum(path, product.sha256)
    if noted == "sums":
        path.with_name("SHA256SUMS").write_text(f"{'0' * 64}  other.txt\n{product.sha256} *./{path.name}\n")
    further = replace(work.plan, output=path.with_name("further.txt"), inputs=[path])
    build(further, Found, work.make)
    by = {"provenance": f"{path.name}.json", "sha256": f"{path.name}.sha256", "sums": "SHA256SUMS"}[noted]
    provenance = read_provenance(further.output)
    assert provenance is not None
    assert [item.verified_by for item in provenance.inputs] == [by]
    path.write_text("ABD")
    with pytest.raises(ToolError, match=rf"not the one that its checksum is of.*as {by} says; .*remove {by}"):
        build(replace(further, output=path.with_name("again.txt")), Found, work.make)
    with pytest.raises(ToolError, match="not the one that its checksum is of"):
        require_checksums([path])


def test_an_input_without_a_checksum_is_on_record_as_such(work: Work) -> None:
    work.build()
    provenance = read_provenance(work.plan.output)
    assert provenance is not None
    assert [item.verified_by for item in provenance.inputs] == [""]


def test_a_file_of_a_hash_that_holds_none_is_an_error(work: Work) -> None:
    work.source.with_name("source.txt.sha256").write_text("not a hash")
    with pytest.raises(ToolError, match="no sha256"):
        work.build()


def test_an_input_that_changes_meanwhile_leaves_nothing(work: Work) -> None:
    def slow(draft: Path) -> Found:
        found = work.make(draft)
        work.source.write_text("xyz")
        return found

    with pytest.raises(ToolError, match="changed while it was worked on; nothing was kept"):
        build(work.plan, Found, slow)
    assert not work.plan.output.exists()
