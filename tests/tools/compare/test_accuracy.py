"""Bit accuracy, margins, p-values and false positives are counted as they are defined."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.formats.tensors import TensorSpec
from shared.media.attacks import Attack
from shared.runtime.processes import ChildError
from shared.runtime.samples import image_sample
from shared.watermark.message import Labelled
from tools.compare.accuracy import Accuracy, Condition, labelled_inputs, largest_drop, read_accuracy, roc_auc

MESSAGE = np.array([1, 0, 1, 1], bool)
IMAGES = [Labelled(Path("a.png"), MESSAGE, Path("o.png")), Labelled(Path("b.png"), ~MESSAGE), Labelled(Path("c.png"), None)]
RIGHT = np.where(MESSAGE, 2.0, -2.0).astype(np.float32)


def output(confidence: float, logits: np.ndarray) -> np.ndarray:
    return np.concatenate([[confidence], logits]).astype(np.float32)[np.newaxis]


def test_what_is_right_is_right() -> None:
    accuracy = read_accuracy(IMAGES, [None], [output(3, RIGHT), output(1, -RIGHT), output(-2, RIGHT)])
    assert accuracy.clean == Condition("none", 1.0, 1.0, 0.0, 1.0, pytest.approx(2**-4))  # type: ignore[arg-type]
    assert [reading.bit_accuracy for reading in accuracy.readings] == [1, 1, None]
    assert [reading.margin for reading in accuracy.readings] == [2, 2, None]
    assert accuracy.worst("p_value") == pytest.approx(2**-4)
    assert accuracy.readings[0].original == Path("o.png")
    assert accuracy.logits == [RIGHT.tolist(), (-RIGHT).tolist()]


def test_every_wrong_answer_is_counted() -> None:
    one_wrong = RIGHT * [1, 1, 1, -0.5]
    answers = [output(3, RIGHT), output(1, -RIGHT), output(-2, RIGHT)]
    answers += [output(-1, one_wrong), output(1, -RIGHT), output(2, RIGHT)]
    accuracy = read_accuracy(IMAGES, [None, Attack("jpeg", 50)], answers)
    assert accuracy.under("jpeg-50") == Condition(
        "jpeg-50",
        7 / 8,
        0.5,
        1.0,
        0.0,
        pytest.approx(2**-4),  # type: ignore[arg-type]
    )
    clean = read_accuracy(IMAGES, [None], [output(3, one_wrong), output(1, -RIGHT), output(-2, RIGHT)])
    assert (clean.worst("margin"), clean.worst("bit_accuracy"), clean.worst("p_value")) == (-1, 0.75, pytest.approx(5 / 16))


def test_without_unmarked_images_there_are_no_false_positives_to_count() -> None:
    accuracy = read_accuracy(IMAGES[:1], [None], [output(3, RIGHT)])
    assert (accuracy.clean.false_positives, accuracy.clean.auc) == (None, None)


@pytest.mark.parametrize(("answer", "reason"), [(output(np.nan, RIGHT), "NaN"), (output(1, RIGHT[:3]), "no message of 4 bits")])
def test_answers_that_are_none_are_errors(answer: np.ndarray, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_accuracy(IMAGES[:1], [None], [answer])


def accuracy(*values: float) -> Accuracy:
    """Return what was read of 4 messages of 25 bits under attacks a, b, c."""
    conditions = [Condition(name, value, 1, None, None) for name, value in zip("abc", values, strict=False)]
    return Accuracy(conditions, [], [[0.0] * 25] * 4)


def test_the_largest_drop_is_that_of_any_attack() -> None:
    assert largest_drop(accuracy(1, 0.9, 0.8), accuracy(1, 0.75, 0.7)) == pytest.approx(0.15)
    assert largest_drop(accuracy(0.7, 0.7, 0.7), accuracy(0.8, 0.9, 1)) == pytest.approx(-0.1)


def test_where_the_reference_tosses_coins_nothing_can_be_lost() -> None:
    assert [accuracy(share).is_chance(accuracy(share).clean) for share in (0.5, 0.6, 0.7)] == [True, True, False]
    assert largest_drop(accuracy(1, 0.55), accuracy(0.99, 0.4)) == pytest.approx(0.01)
    assert largest_drop(accuracy(0.5), accuracy(0.4)) is None
    assert largest_drop(accuracy(0.6), accuracy(0.3)) == pytest.approx(0.3)  # more than luck


def test_one_image_that_is_read_is_more_than_chance() -> None:
    pooled = accuracy(0.55)
    read = replace(pooled, conditions=[replace(pooled.clean, best_p_value=1e-6)])
    assert (pooled.is_chance(pooled.clean), read.is_chance(read.clean)) == (True, False)


def test_samples_come_attack_by_attack_and_random_attacks_differ_from_image_to_image(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a.png", "b.png")]
    for file in files:
        Image.new("RGB", (16, 16), (128, 128, 128)).save(file)
    samples = labelled_inputs([Labelled(file, MESSAGE) for file in files], [None, Attack("noise", 0.1)])
    spec = [TensorSpec("image", (1, 3, 8, 8), "float32")]
    clean, same, noisy, other = (sample(spec)["image"] for sample in samples)
    assert clean.shape == (1, 3, 8, 8)
    np.testing.assert_array_equal(clean, same)
    assert noisy.std() > 0.01
    assert (noisy != other).any()
    np.testing.assert_array_equal(samples[2](spec)["image"], noisy)
    assert samples[0]([TensorSpec("image", (1, 8, 8, 3), "float32")])["image"].shape == (1, 8, 8, 3)


def test_a_model_that_takes_no_image_is_an_error() -> None:
    with pytest.raises(ChildError, match=r"it takes x float32 \(1, 7\), not one image"):
        image_sample([TensorSpec("x", (1, 7), "float32")], np.zeros((8, 8, 3), np.uint8))


def test_auc_counts_how_often_a_positive_scores_higher() -> None:
    assert roc_auc(np.array([1.0, 2.0]), np.array([0.0, -1.0])) == 1
    assert roc_auc(np.array([0.0]), np.array([1.0])) == 0
    assert roc_auc(np.array([1.0, 3.0]), np.array([2.0, 1.0])) == 0.625
    for wrong in (np.array([]), np.array([np.nan])):
        with pytest.raises(ValueError, match=r"no positives|NaN"):
            roc_auc(np.array([1.0]), wrong)
