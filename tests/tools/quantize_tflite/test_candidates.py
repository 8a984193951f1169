"""A candidate's damage is measured by formulas anyone can check, on the real interpreter."""

import hashlib
import math
from pathlib import Path

import numpy as np
import pytest

from shared.calibration.dataset import CalibrationSet
from shared.command.errors import ToolError
from shared.formats.tflite import read_ops
from shared.metrics.output_error import Damage, measure_damage
from tools.quantize_tflite.candidates import Job, Subject, measure_candidate
from tools.quantize_tflite.recipes import assign, resolve_recipe


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> CalibrationSet:
    path = tmp_path_factory.mktemp("samples") / "samples.npz"
    np.savez(path, images=np.random.default_rng(0).random((4, 3, 64, 64), np.float32))
    return CalibrationSet(path)


@pytest.fixture(scope="module")
def subject(float_model: Path, samples: CalibrationSet) -> Subject:
    return Subject(float_model, sha256(float_model), samples)


def test_damage_follows_its_formulas() -> None:
    reference = [np.array([3.0, 4.0]), np.array([0.0, 1.0])]
    candidate = [np.array([3.0, 4.5]), np.array([0.1, 1.0])]
    damage = measure_damage(reference, candidate)
    # Norms of the float values 5 and 1: root mean square sqrt(13); norms of the differences 0.5 and 0.1.
    assert damage.relative_error == pytest.approx(0.5 / math.sqrt(13))
    assert damage.snr_db == pytest.approx(10 * math.log10(26 / 0.26))
    assert damage.cosine == pytest.approx(1 / math.sqrt(1.01))  # the second sample's; the first's is 27 / (5 sqrt(29.25))


def test_the_worst_sample_decides_the_relative_error() -> None:
    reference = [np.array([1.0, 0.0])] * 4
    candidate = [np.array([1.0, 0.0])] * 3 + [np.array([1.0, 0.5])]
    assert measure_damage(reference, candidate).relative_error == pytest.approx(0.5)
    assert measure_damage(reference, candidate).snr_db == pytest.approx(10 * math.log10(4 / 0.25))


def test_a_single_small_sample_is_not_measured_by_itself() -> None:
    reference, candidate = [np.array([10.0]), np.array([0.001])], [np.array([10.0]), np.array([0.002])]
    assert measure_damage(reference, candidate).relative_error == pytest.approx(0.001 / math.sqrt(50), rel=1e-3)


def test_identical_outputs_have_no_error_and_no_signal_to_noise_ratio() -> None:
    values = [np.arange(1, 7, dtype=np.float32).reshape(1, 2, 3)]
    damage = measure_damage(values, [v.copy() for v in values])
    assert (damage.relative_error, damage.snr_db) == (0.0, None)
    assert damage.cosine == pytest.approx(1)


def test_an_output_turned_around_has_cosine_minus_one() -> None:
    damage = measure_damage([np.array([1.0, 2.0])], [np.array([-1.0, -2.0])])
    assert damage.cosine == pytest.approx(-1)
    assert damage.relative_error == pytest.approx(2)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["reference", "candidate"])
def test_what_is_no_number_has_no_damage_in_numbers(value: float, side: str) -> None:
    good, bad = [np.ones(3), np.ones(3)], [np.ones(3), np.array([1.0, value, 1.0])]
    pair = (bad, good) if side == "reference" else (good, bad)
    assert measure_damage(*pair) == Damage(None, None, None)


def test_a_reference_of_zeros_has_no_relative_error() -> None:
    zeros = [np.zeros(3)]
    assert measure_damage(zeros, [np.array([0.0, 0.1, 0.0])]) == Damage(None, None, 0.0)
    assert measure_damage(zeros, zeros) == Damage(0.0, None, None)


def test_a_candidate_of_zeros_lost_everything() -> None:
    damage = measure_damage([np.array([3.0, 4.0])], [np.zeros(2)])
    assert damage.relative_error == pytest.approx(1)
    assert damage.snr_db == pytest.approx(0)
    assert damage.cosine == 0


def test_integers_are_compared_as_numbers() -> None:
    damage = measure_damage([np.array([0, 200], np.uint8)], [np.array([200, 0], np.uint8)])
    assert damage.relative_error == pytest.approx(math.sqrt(2))
    assert damage.cosine == pytest.approx(0)


def test_a_model_left_in_float_is_undamaged(subject: Subject) -> None:
    outcome = measure_candidate(Job(subject, []))
    assert outcome.size_bytes == subject.path.stat().st_size
    assert [(damage.relative_error, damage.snr_db) for damage in outcome.outputs] == [(0.0, None)]
    assert (outcome.tensor, outcome.slowdown) == (None, None)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only"])
def test_int8_is_smaller_and_a_little_off(subject: Subject, recipe: str) -> None:
    outcome = measure_candidate(Job(subject, resolve_recipe(recipe)[1]))
    assert 0.2 < outcome.size_bytes / subject.path.stat().st_size < 0.45
    (damage,) = outcome.outputs
    assert damage.relative_error is not None and damage.snr_db is not None and damage.cosine is not None
    assert 0 < damage.relative_error < 0.05
    assert damage.snr_db > 25
    assert 0.99 < damage.cosine < 1


def test_fewer_bits_do_more_damage(subject: Subject) -> None:
    errors = [
        measure_candidate(Job(subject, resolve_recipe(recipe)[1])).outputs[0].relative_error
        for recipe in ("fp16", "int8-weight-only", "weight_only_wi4_afp32")
    ]
    assert all(errors)
    assert errors == sorted(errors, key=lambda error: error or 0.0)
    assert len(set(errors)) == 3


def test_the_same_candidate_is_measured_the_same(subject: Subject) -> None:
    job = Job(subject, resolve_recipe("int8")[1])
    assert measure_candidate(job) == measure_candidate(job)


def test_correcting_biases_moves_the_answers_less(subject: Subject) -> None:
    rules = resolve_recipe("weight_only_wi4_afp32")[1]
    plain = Subject(subject.path, subject.sha256, subject.samples, corrects_bias=False)
    with_, without = (measure_candidate(Job(one, rules)) for one in (subject, plain))
    assert with_.size_bytes == without.size_bytes
    assert (with_.outputs[0].relative_error or 1) < 0.9 * (without.outputs[0].relative_error or 0)


def test_without_samples_made_up_pictures_are_run(float_model: Path) -> None:
    outcome = measure_candidate(Job(Subject(float_model, sha256(float_model)), resolve_recipe("int8")[1]))
    assert 0 < (outcome.outputs[0].relative_error or 0) < 0.05


@pytest.mark.parametrize("op_type", ["CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"])
def test_a_layers_own_output_can_be_compared_too(subject: Subject, op_type: str) -> None:
    op = next(op for op in read_ops(subject.path) if op.op_type == op_type)
    outcome = measure_candidate(Job(subject, assign({op.scope: "int8"}), tensor=op.name))
    assert outcome.tensor is not None
    assert 0 < (outcome.tensor.relative_error or 0) < 0.05
    assert len(outcome.outputs) == 1
    assert 0 < (outcome.outputs[0].relative_error or 0) < 0.05


def test_a_layer_before_the_quantized_one_is_unmoved(subject: Subject) -> None:
    first, *_, last = [op for op in read_ops(subject.path) if op.op_type == "FULLY_CONNECTED"]
    outcome = measure_candidate(Job(subject, assign({last.scope: "int8"}), tensor=first.name))
    assert outcome.tensor is not None
    assert outcome.tensor.relative_error == 0.0


def test_latency_is_compared_on_demand(subject: Subject) -> None:
    slowdown = measure_candidate(Job(subject, resolve_recipe("int8")[1], is_timed=True)).slowdown
    assert slowdown is not None
    assert 0.05 < slowdown < 20


def test_another_model_in_its_place_is_an_error(subject: Subject, tmp_path: Path) -> None:
    other = tmp_path / "model.tflite"
    other.write_bytes(subject.path.read_bytes() + b"\0")
    with pytest.raises(ToolError, match=r"model\.tflite: another model is in its place"):
        measure_candidate(Job(Subject(other, subject.sha256, subject.samples), []))


def test_a_missing_model_is_an_error_that_names_the_remedy(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"gone\.tflite: the model is not here.*the same paths"):
        measure_candidate(Job(Subject(tmp_path / "gone.tflite", subject.sha256, subject.samples), []))


def test_missing_samples_are_an_error(subject: Subject, tmp_path: Path) -> None:
    with pytest.raises(ToolError, match=r"gone\.npz"):
        measure_candidate(Job(Subject(subject.path, subject.sha256, CalibrationSet(tmp_path / "gone.npz")), []))


def test_rules_that_the_quantizer_rejects_are_an_error(subject: Subject) -> None:
    rule = {**resolve_recipe("int8")[1][0], "algorithm_key": "alchemy"}
    with pytest.raises(ToolError, match="rejects the recipe"):
        measure_candidate(Job(subject, [rule]))


def test_samples_named_as_the_signature_names_its_input_fit(float_model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", image=np.random.default_rng(0).random((2, 3, 64, 64), np.float32))
    outcome = measure_candidate(Job(Subject(float_model, sha256(float_model), CalibrationSet(tmp_path / "a.npz")), []))
    assert outcome.outputs[0].relative_error == 0.0


def test_a_tensor_that_is_not_there_is_an_error(subject: Subject) -> None:
    with pytest.raises(ToolError, match="no such tensor"):
        measure_candidate(Job(subject, [], tensor="no such tensor"))
