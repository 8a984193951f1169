"""A product of several files is up to date, replaced and removed with all of them."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest

from shared.command.errors import CheckError, ToolError
from shared.files.artifacts import build
from shared.files.provenance import read_provenance
from tests.shared.files.conftest import Found, Work


def with_weights(work: Work) -> Work:
    """Let products name the file that holds their weights, as large models do."""

    def make(draft: Path) -> Found:
        work.times += 1
        text = work.source.read_text()
        name = f"out.{hashlib.sha256(text.encode()).hexdigest()[:8]}.data"
        (draft.parent / name).write_text(text * 10)
        draft.write_text(name)
        return Found(len(text))

    work.make = make  # type: ignore[method-assign]
    work.plan = replace(work.plan, reopen=lambda path: [path.parent / path.read_text()])
    return work


def weights_beside(work: Work) -> list[str]:
    return sorted(path.name for path in work.plan.output.parent.glob("*.data"))


def test_a_products_size_and_provenance_are_of_all_its_files(work: Work) -> None:
    product, _ = with_weights(work).build()
    provenance = read_provenance(product.path)
    assert provenance is not None
    assert [Path(item.path).name for item in provenance.companions] == weights_beside(work)
    assert product.size_bytes == product.path.stat().st_size + 30
    again, _ = work.build()
    assert (again.up_to_date, again.size_bytes, work.times) == (True, product.size_bytes, 1)


@pytest.mark.parametrize("fault", ["changed", "gone"])
def test_weights_that_changed_or_are_gone_make_the_product_stale(work: Work, fault: str) -> None:
    product, _ = with_weights(work).build()
    (name,) = weights_beside(work)
    weights = product.path.with_name(name)
    times = weights.stat()
    weights.write_text("z" * 30)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    if fault == "gone":
        weights.unlink()
    with pytest.raises(ToolError, match="exists and is out of date"):
        work.build()
    work.build(refresh=True)
    assert (work.times, weights.read_text()) == (2, "abc" * 10)
    assert work.build()[0].up_to_date


def test_a_refresh_removes_the_weights_of_the_former_product_and_no_others(work: Work) -> None:
    with_weights(work).build()
    (former,) = weights_beside(work)
    work.plan.output.with_name("out.00000000.data").write_text("somebody's")
    work.source.write_text("xyz")
    work.build(refresh=True)
    assert former not in weights_beside(work)
    assert len(weights_beside(work)) == 2
    assert work.plan.output.with_name("out.00000000.data").read_text() == "somebody's"


def test_former_weights_that_are_not_what_was_written_stay(work: Work) -> None:
    with_weights(work).build()
    (former,) = weights_beside(work)
    work.plan.output.with_name(former).write_text("edited")
    work.source.write_text("xyz")
    work.build(refresh=True)
    assert work.plan.output.with_name(former).read_text() == "edited"


def test_a_refresh_with_the_same_weights_keeps_them(work: Work) -> None:
    product, _ = with_weights(work).build()
    work.build(arguments={"shout": False}, refresh=True)
    assert product.path.with_name(product.path.read_text()).read_text() == "abc" * 10


def test_weights_that_differ_the_second_time_are_not_kept_either(work: Work) -> None:
    with_weights(work)

    def fickle(draft: Path) -> Found:
        work.source.write_text("abc" * (work.times + 1))
        return work.make(draft)

    with pytest.raises(CheckError):
        build(replace(work.plan, inputs=[], reproducible=True), Found, fickle)
    assert len(weights_beside(work)) <= 1
