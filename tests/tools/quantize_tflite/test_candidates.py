"""A candidate is quantized and run in the real interpreter, and measured alike wherever it runs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shared.calibration.dataset import CalibrationSet
from shared.calibration.samples import HeldSamples
from shared.command.errors import ToolError
from shared.files.checksums import sha256_of
from shared.formats.tflite import read_tflite
from shared.quantize.ledger import Outcome, measure_safely
from tools.quantize_tflite.candidates import Subject, TfliteJob
from tools.quantize_tflite.recipes import assign, resolve_recipe


def subject_of(model: Path, samples: Path) -> Subject:
    """Return a model that is calibrated and measured on the same samples."""
    dataset = CalibrationSet(samples)
    return Subject(model, sha256_of(model), ("output_0",), held=HeldSamples(dataset, 4), calibration=dataset)


@pytest.fixture(scope="module")
def subject(float_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images=np.random.default_rng(0).random((4, 3, 64, 64), np.float32))
    return subject_of(float_model, path)


def measured(subject: Subject, recipe: str) -> Outcome:
    return TfliteJob(subject, resolve_recipe(recipe)[1]).measure()


def error_of(outcome: Outcome) -> float:
    """Return the relative error of the only output."""
    [error] = outcome.errors
    assert error.relative_error is not None
    return error.relative_error


def test_a_model_left_in_float_has_no_error(subject: Subject) -> None:
    outcome = TfliteJob(subject, []).measure()
    assert outcome.size_bytes == subject.path.stat().st_size
    assert [(error.output, error.relative_error, error.snr_db) for error in outcome.errors] == [("output_0", 0.0, None)]
    assert (outcome.tensor, outcome.slowdown) == (None, None)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only"])
def test_int8_is_smaller_and_a_little_off(subject: Subject, recipe: str) -> None:
    outcome = measured(subject, recipe)
    assert 0.2 < outcome.size_bytes / subject.path.stat().st_size < 0.45
    [error] = outcome.errors
    assert error.relative_error is not None and error.snr_db is not None and error.cosine is not None
    assert 0 < error.relative_error < 0.05
    assert error.snr_db > 25
    assert 0.99 < error.cosine < 1


def test_fewer_bits_give_larger_errors(subject: Subject) -> None:
    errors = [error_of(measured(subject, recipe)) for recipe in ("fp16", "int8-weight-only", "weight_only_wi4_afp32")]
    assert 0 < errors[0] < errors[1] < errors[2]


def test_the_same_candidate_is_measured_the_same(subject: Subject) -> None:
    assert measured(subject, "int8") == measured(subject, "int8")


def test_correcting_biases_makes_the_error_smaller(subject: Subject) -> None:
    with_, without = (measured(one, "weight_only_wi4_afp32") for one in (subject, replace(subject, corrects_bias=False)))
    assert with_.size_bytes == without.size_bytes
    assert error_of(with_) < 0.9 * error_of(without)
    assert measured(replace(subject, calibration=None), "weight_only_wi4_afp32") == without


def test_without_samples_seeded_pictures_are_run(subject: Subject) -> None:
    seeded = replace(subject, held=HeldSamples(None, 1), calibration=None)
    assert 0 < error_of(measured(seeded, "int8")) < 0.05


@pytest.mark.parametrize("op_type", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"])
def test_the_output_of_a_layer_can_be_compared_too(subject: Subject, op_type: str) -> None:
    op = next(op for op in read_tflite(subject.path).ops if op.op_type == op_type)
    outcome = TfliteJob(subject, assign({op.name: "int8"}), tensor=op.output).measure()
    assert outcome.tensor is not None
    assert 0 < (outcome.tensor.relative_error or 0) < 0.05
    assert 0 < error_of(outcome) < 0.05


def test_the_output_of_a_layer_before_the_quantized_one_is_the_same(subject: Subject) -> None:
    first, *_, last = [op for op in read_tflite(subject.path).ops if op.op_type == "FULLY_CONNECTED"]
    outcome = TfliteJob(subject, assign({last.name: "int8"}), tensor=first.output).measure()
    assert outcome.tensor is not None
    assert outcome.tensor.relative_error == 0.0


def test_latency_is_compared_on_demand(subject: Subject) -> None:
    slowdown = TfliteJob(subject, resolve_recipe("int8")[1], is_timed=True).measure().slowdown
    assert slowdown is not None
    assert 0.05 < slowdown < 20


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("another model", r"model\.tflite: another model is in its place"),
        ("no model", r"gone\.tflite: the model is not here.*the same paths"),
        ("no samples", r"gone\.npz: no such calibration set"),
    ],
)
def test_a_worker_that_lacks_the_files_raises_and_refuses_no_candidate(
    subject: Subject, tmp_path: Path, fault: str, says: str
) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(subject.path.read_bytes() + (b"\0" if fault == "another model" else b""))
    changes = {
        "another model": {"path": path},
        "no model": {"path": tmp_path / "gone.tflite"},
        "no samples": {"path": path, "held": HeldSamples(CalibrationSet(tmp_path / "gone.npz"), 4)},
    }
    with pytest.raises(ToolError, match=says):
        measure_safely(TfliteJob(replace(subject, **changes[fault]), []))  # type: ignore[arg-type]


def test_rules_that_the_quantizer_rejects_are_an_error_and_refuse_the_candidate(subject: Subject) -> None:
    job = TfliteJob(subject, [{**resolve_recipe("int8")[1][0], "algorithm_key": "alchemy"}])
    with pytest.raises(ToolError, match="rejects the recipe"):
        job.measure()
    assert measure_safely(job) == Outcome(0, [])


def test_samples_named_as_the_signature_names_its_input_fit(float_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(0).random((2, 3, 64, 64), np.float32))
    assert error_of(TfliteJob(subject_of(float_model, tmp_path / "a.npz"), []).measure()) == 0.0


def test_a_tensor_that_is_not_there_is_an_error(subject: Subject) -> None:
    with pytest.raises(ToolError, match="no tensor of this name; got no such tensor"):
        TfliteJob(subject, [], tensor="no such tensor").measure()
