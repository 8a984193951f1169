"""verify passes sound models, and every one of its checks can fail."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from shared.command.errors import ToolError
from shared.formats.onnx_file import read_model
from shared.formats.onnx_graph import write_metadata
from shared.runtime.model import Model
from shared.runtime.processes import ChildError
from tests.conftest import REALDATA, ROOT, Run
from tests.support.small_onnx import save, save_picture_model, save_vector_model, seeded, with_external_weights
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
    content = json.loads(report.read_text())
    assert (content["ok"], content["provenance"]["tool"]) == (True, "verify")
    assert [path.name for path in tmp_path.iterdir()] == ["verify.json"]
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


def values(findings: Findings) -> dict[str, str]:
    return {check.name: check.value for check in findings.checks}


def test_an_onnx_model_with_free_axes_passes_and_shows_them(tmp_path: Path) -> None:
    for path, inputs, outputs in (
        (
            save_picture_model(tmp_path / "picture.onnx", shape=("n", 3, "h", "w")),
            "image float32 (-1, 3, -1, -1)",
            "made float32 (-1, 3, -1, -1)",
        ),
        (save_vector_model(tmp_path / "vector.onnx"), "vector float32 (-1, 8)", "out float32 (-1, 4)"),
    ):
        found = verify(path, threads=2).findings
        assert found.ok, failed(found)
        assert (values(found)["inputs"], values(found)["outputs"]) == (inputs, outputs)
        assert "onnxruntime kernels" in values(found)["loads"]
        assert "threads" in values(found)
        assert found.peak_rss_bytes > 0
        assert not any("bits" in name for name in values(found))


def test_the_shipped_super_resolution_passes() -> None:
    assert verify(ROOT / "models" / "minisr" / "minisr_x2.onnx").ok


def test_an_axis_without_length_fails(float_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    init = Model.__init__

    def open_shape(self: Model, *arguments: object) -> None:
        init(self, *arguments)  # type: ignore[arg-type]
        self.inputs = [replace(spec, shape=(0, 3, 64, 64)) for spec in self.inputs]

    monkeypatch.setattr(Model, "__init__", open_shape)
    assert failed(verify(float_model).findings) == ["inputs"]


def write_onnx_detector(path: Path, nbits: int, *, bits: int | None = None, positive: bool = False) -> Path:
    """Write a network of one matrix product: (1, 3, 4, 4) -> (1, 1 + bits), whose metadata tells `nbits`."""
    weights = {"m": seeded(48, 1 + (bits or nbits)), "b": np.full(1, 1e3 if positive else 0, np.float32)}
    nodes = [
        onnx.helper.make_node("Flatten", ["image"], ["flat"]),
        onnx.helper.make_node("MatMul", ["flat", "m"], ["product"]),
        onnx.helper.make_node("Add", ["product", "b"], ["logits"]),
    ]
    save(path, nodes, {"image": (1, 3, 4, 4)}, {"logits": (1, 1 + (bits or nbits))}, weights)
    model = read_model(path)
    write_metadata(model, {"nbits": nbits})
    onnx.save_model(model, str(path))
    return path


def test_an_onnx_detector_tells_the_length_of_its_message(tmp_path: Path) -> None:
    found = verify(write_onnx_detector(tmp_path / "a.onnx", 40)).findings
    assert found.ok, failed(found)
    assert values(found)["detector output"] == "(1, 41)"
    assert len(values(found)["first 32 bits"]) == 32
    assert values(found)["bits that are one"].endswith(" of 40")
    assert failed(verify(write_onnx_detector(tmp_path / "b.onnx", 40, bits=48)).findings) == ["detector output"]
    assert failed(verify(write_onnx_detector(tmp_path / "c.onnx", 40, positive=True)).findings) == ["bits that are one"]
    assert failed(verify(tmp_path / "a.onnx", bits=32).findings) == ["detector output"]


@pytest.mark.parametrize(
    ("kind", "check"), [("Log", "finite"), ("Mul", "range"), ("Sub", "reacts to its input"), ("RandomUniformLike", "repeats")]
)
def test_the_checks_trip_on_onnx_models_too(tmp_path: Path, kind: str, check: str) -> None:
    given = {"Log": ["low"], "Mul": ["image", "large"], "Sub": ["image", "image"], "RandomUniformLike": ["image"]}[kind]
    nodes = [
        onnx.helper.make_node("Mul", ["image", "minus"], ["low"]),
        onnx.helper.make_node(kind, given, ["made"]),
    ]
    weights = {"minus": np.array(-1, np.float32), "large": np.array(1e6, np.float32)}
    path = save(tmp_path / "a.onnx", nodes, {"image": (1, 3, 8, 8)}, {"made": (1, 3, 8, 8)}, weights)
    assert check in failed(verify(path, threads=1).findings)


def test_a_changed_file_of_weights_makes_the_report_out_of_date(tmp_path: Path) -> None:
    model = with_external_weights(save_picture_model(tmp_path / "a.onnx"))
    first, second = (verify(model, output=tmp_path / "v.json") for _ in range(2))
    assert (first.ok, second.report is not None and second.report.up_to_date) == (True, True)
    content = bytearray((tmp_path / "weights.data").read_bytes())
    content[5] ^= 1
    (tmp_path / "weights.data").write_bytes(content)
    with pytest.raises(ToolError, match="out of date"):
        verify(model, output=tmp_path / "v.json")


def test_exit_codes_for_onnx_models(tmp_path: Path, run_tool: Run) -> None:
    model = save_picture_model(tmp_path / "a.onnx")
    fine = run_tool("verify", model, "--json")
    assert (fine.returncode, fine.stderr, json.loads(fine.stdout)["ok"]) == (0, "", True)
    broken = read_model(model)
    broken.graph.node[0].op_type = "Unheard"
    onnx.save_model(broken, str(tmp_path / "b.onnx"))
    done = run_tool("verify", tmp_path / "b.onnx")
    assert (done.returncode, "FAILED: loads" in done.stdout, done.stderr) == (1, True, "")
    (tmp_path / "c.onnx").write_text("no model")
    for name in ("c.onnx", "absent.onnx"):
        done = run_tool("verify", tmp_path / name)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)


def test_real_inputs_are_taken_from_a_file(tmp_path: Path) -> None:
    """A model that looks up rows by numbers fails on numbers that are made up; real ones come as an .npz."""
    nodes = [
        onnx.helper.make_node("Add", ["rows", "first"], ["places"]),
        onnx.helper.make_node("Gather", ["table", "places"], ["y"], name="look up"),
    ]
    weights = {"table": seeded(8, 4), "first": np.array(-1000)}
    path = save(tmp_path / "m.onnx", nodes, {}, {"y": (1, 3, 4)}, weights)
    model = onnx.load(str(path))
    model.graph.input.append(onnx.helper.make_tensor_value_info("rows", onnx.TensorProto.INT64, (1, 3)))
    onnx.save_model(model, str(path))
    (row,) = [check for check in verify(path).findings.checks if not check.ok]
    assert row.name == "runs"
    assert row.value.startswith("it does not run on made-up inputs: Gather 'look up': indices element out of data bounds")
    assert row.value.endswith("give real inputs with --inputs FILE.npz")
    np.savez(tmp_path / "rows.npz", rows=np.arange(1000, 1006).reshape(2, 1, 3))
    (runs,) = [check for check in verify(path, inputs=tmp_path / "rows.npz").findings.checks if check.name == "runs"]
    assert runs.ok
