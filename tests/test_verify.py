"""verify passes sound models, and every one of its checks can fail."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.child import ChildError
from shared.errors import ToolError
from shared.runtime import Model, ModelSource
from tests.conftest import REALDATA, Run
from tools import verify as module
from tools.verify import Findings, verify

Outputs = dict[str, np.ndarray]  # type: ignore[type-arg]


def failed(findings: Findings) -> list[str]:
    return [check.name for check in findings.checks if not check.ok]


def test_a_sound_detector_passes_and_shows_its_bits(float_model: Path) -> None:
    found = verify(float_model).findings
    assert found.ok
    values = {check.name: check.value for check in found.checks}
    assert values["inputs"] == "image float32 (1, 3, 64, 64)"
    assert values["outputs"] == "output_0 float32 (1, 33)"
    assert set(values["first 32 bits"]) == {"0", "1"}
    assert len(values["first 32 bits"]) == 32
    assert values["bits that are one"] == f"{values['first 32 bits'].count('1')} of 32"


def test_without_our_metadata_bits_are_read_on_request(float_model: Path, tmp_path: Path) -> None:
    import zipfile

    content = float_model.read_bytes()
    with zipfile.ZipFile(float_model) as archive:
        start = min(entry.header_offset for entry in archive.infolist())
    plain = tmp_path / "plain.tflite"
    plain.write_bytes(content[:start])
    assert not any("bits" in check.name for check in verify(plain).findings.checks)
    assert any("bits" in check.name for check in verify(plain, bits=32).findings.checks)
    assert failed(verify(plain, bits=40).findings) == ["detector output"]


@pytest.fixture
def spoiled(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Outputs, int], Outputs]], None]:
    """Return a function that lets every run's outputs go through another one, which gets the number of the run too."""

    def install(spoil: Callable[[Outputs, int], Outputs]) -> None:
        run, calls = Model.run, iter(range(1000))

        def spoiled_run(self: Model, inputs: Outputs) -> tuple[Outputs, float]:
            outputs, run_ms = run(self, inputs)
            return spoil({name: output.copy() for name, output in outputs.items()}, next(calls)), run_ms

        monkeypatch.setattr(Model, "run", spoiled_run)

    return install


def nan(outputs: Outputs, _: int) -> Outputs:
    outputs["output_0"][0, 5] = np.nan
    return outputs


def huge(outputs: Outputs, _: int) -> Outputs:
    outputs["output_0"][0, 5] = 1e6
    return outputs


def constant(outputs: Outputs, _: int) -> Outputs:
    return {"output_0": np.linspace(-1, 1, 33, dtype=np.float32)[None]}


def drifting(outputs: Outputs, number: int) -> Outputs:
    return {"output_0": outputs["output_0"] + np.float32(1e-3 * number)}


def thread_dependent(outputs: Outputs, number: int) -> Outputs:
    return {"output_0": outputs["output_0"] + np.float32(0.1 * (number == module.REPEATS + 1))}


def all_ones(outputs: Outputs, number: int) -> Outputs:
    return {"output_0": np.abs(outputs["output_0"]) + np.float32(1)}


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (nan, "finite"),
        (huge, "range"),
        (constant, "reacts to its input"),
        (drifting, "repeats"),
        (thread_dependent, "threads"),
        (all_ones, "bits that are one"),
    ],
)
def test_each_check_trips(float_model: Path, spoiled: Callable[..., None], spoil: Callable[..., Outputs], check: str) -> None:
    spoiled(spoil)
    found = verify(float_model, threads=2).findings
    assert check in failed(found)
    assert not found.ok


def test_a_model_that_crashes_the_runtime_is_a_failed_row(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> object:
        raise ChildError("its process crashed with SIGSEGV")

    monkeypatch.setattr(Model, "run", crash)
    found = verify(float_model).findings
    assert failed(found) == ["runs"]
    assert found.checks[-1].value == "its process crashed with SIGSEGV"


def test_a_model_with_open_shapes_fails(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Model.__init__

    def open_shape(self: Model, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.outputs = [replace(spec, shape=(0, 33)) for spec in self.outputs]

    monkeypatch.setattr(Model, "__init__", open_shape)
    assert "outputs" in failed(verify(float_model).findings)


def test_the_report_is_json_and_up_to_date_the_second_time(float_model: Path, tmp_path: Path) -> None:
    report = tmp_path / "verify.json"
    first = verify(float_model, output=report)
    assert json.loads(report.read_text())["ok"] is True
    second = verify(float_model, output=report)
    assert second.report is not None
    assert second.report.up_to_date
    assert second.findings == first.findings
    with pytest.raises(ToolError, match="out of date"):
        verify(float_model, output=report, seed=5)


def test_exit_codes_of_the_command(float_model: Path, tmp_path: Path, run_tool: Run) -> None:
    fine = run_tool("verify", float_model, "--json")
    assert (fine.returncode, fine.stderr) == (0, "")
    assert json.loads(fine.stdout)["ok"] is True
    damaged = tmp_path / "damaged.tflite"
    damaged.write_bytes(float_model.read_bytes()[:5000])
    broken = run_tool("verify", damaged)
    assert (broken.returncode, "FAILED" in broken.stdout, broken.stderr) == (1, True, "")
    absent = run_tool("verify", tmp_path / "absent.tflite")
    assert (absent.returncode, absent.stdout, absent.stderr.count("\n")) == (2, "", 1)


@pytest.mark.realdata
def test_other_peoples_models_pass_or_fail_as_they_should() -> None:
    assert verify(REALDATA / "tflite" / "mobilenet_v1_0.25_224_float_metadata.tflite").ok
    assert verify(REALDATA / "tflite" / "mlperf_tiny_resnet_int8.tflite").ok
    assert failed(verify(REALDATA / "corrupt" / "mangled_a.tflite").findings) == ["loads"]
    custom = verify(REALDATA / "mediapipe" / "face_landmark_with_attention.tflite").findings
    assert "custom op" in custom.checks[-1].value


def test_a_source_knows_nothing_of_bits_it_was_not_told(tmp_path: Path) -> None:
    (tmp_path / "m.tflite").write_bytes(bytes(100))
    assert ModelSource(tmp_path / "m.tflite").nbits() is None


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("number", range(module.REPEATS + 2))
def test_nan_and_infinity_in_any_run_fail(float_model: Path, spoiled: Callable[..., None], number: int, value: float) -> None:
    def spoil(outputs: Outputs, run: int) -> Outputs:
        if run == number:
            outputs["output_0"][0, 7] = value
        return outputs

    spoiled(spoil)
    expected = "threads" if number == module.REPEATS + 1 else "finite"
    assert expected in failed(verify(float_model, threads=2).findings)


def test_a_model_without_outputs_fails_and_is_not_run(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Model.__init__

    def no_outputs(self: Model, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.outputs = []

    monkeypatch.setattr(Model, "__init__", no_outputs)
    found = verify(float_model).findings
    assert failed(found) == ["outputs"]
    assert found.checks[-1].name == "outputs"
