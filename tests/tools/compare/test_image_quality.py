"""PSNR and SSIM are the textbook's, on the luma and without a border against the truth, which is found by name."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shared.command.errors import ToolError
from shared.media.images import Pixels, to_image
from shared.metrics.output_error import MOST_DB
from tests.conftest import REALDATA
from tools.compare.image_quality import SSIM_WINDOW, as_image, bicubic_scores, find_truths, score, score_against_truth


def noise(height: int, width: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def save(path: Path, pixels: Pixels) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


def luma(pixels: Pixels) -> np.ndarray:  # type: ignore[type-arg]
    red, green, blue = pixels.astype(np.float64).transpose(2, 0, 1)
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def test_psnr_is_ten_logarithms_of_the_mean_square() -> None:
    one = np.zeros((8, 10, 3))
    for step, decibel in ((0.1, 20), (0.01, 40), (1, 0)):
        assert score(one, one + step, 1.0).psnr_db == pytest.approx(decibel)
        assert score(one * 255, (one + step) * 255, 255).psnr_db == pytest.approx(decibel)
    half = one.copy()
    half[:4] = 0.1
    assert score(one, half, 1.0).psnr_db == pytest.approx(20 + 10 * np.log10(2))


def test_equal_images_have_the_most_decibels_that_json_can_hold() -> None:
    same = score(noise(16, 16), noise(16, 16), 255)
    assert (same.psnr_db, same.ssim) == (MOST_DB, pytest.approx(1))


@pytest.mark.parametrize("shape", [(12, 14), (12, 14, 3), (12, 14, 1)])
def test_ssim_of_flat_images_is_the_formulas(shape: tuple[int, ...]) -> None:
    one, other, c1 = 0.3, 0.8, 0.01**2
    expected = (2 * one * other + c1) / (one**2 + other**2 + c1)
    assert score(np.full(shape, one), np.full(shape, other), 1.0).ssim == pytest.approx(expected, rel=1e-6)


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    for height, is_known in ((SSIM_WINDOW - 1, False), (SSIM_WINDOW, True)):
        flat = np.zeros((height, 99, 3))
        assert (score(flat, flat, 1.0).ssim is not None) is is_known


def test_images_that_do_not_compare_are_errors() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        score(np.zeros((8, 8, 3)), np.zeros((8, 9, 3)), 1.0)
    with pytest.raises(ValueError, match="NaN"):
        score(np.zeros((8, 8, 3)), np.full((8, 8, 3), np.nan), 1.0)


def test_both_layouts_are_the_same_image() -> None:
    image = to_image(noise(8, 10))
    np.testing.assert_array_equal(as_image(image), as_image(image.transpose(0, 2, 3, 1)))
    assert as_image(image[:, :1]).shape == (8, 10, 1)


def test_against_the_truth_it_is_the_luma_without_a_border_as_wide_as_the_scale(tmp_path: Path) -> None:
    truth, made = noise(36, 42, 1), noise(36, 42, 2)
    small = save(tmp_path / "small.png", noise(12, 14))
    found = score_against_truth([to_image(made)], [small], [save(tmp_path / "truth.png", truth)])
    difference = (luma(made) - luma(truth))[3:-3, 3:-3]
    expected = 10 * np.log10(255**2 / np.square(difference).mean())
    assert found.psnr_db == found.images[0].psnr_db == pytest.approx(expected)
    assert found.ssim is not None
    assert found.ssim < 0.2


def test_damage_in_the_border_does_not_count_one_pixel_further_in_does(tmp_path: Path) -> None:
    truth = noise(32, 40)
    files, truths = [save(tmp_path / "small.png", noise(16, 20))], [save(tmp_path / "truth.png", truth)]
    for inset, is_seen in ((1, False), (2, True)):
        for place in ((inset, 20), (31 - inset, 20), (16, inset), (16, 39 - inset)):
            made = truth.copy()
            made[place] ^= 128
            assert (score_against_truth([to_image(made)], files, truths).psnr_db < MOST_DB) is is_seen


def test_images_are_clipped_and_rounded_as_files_are(tmp_path: Path) -> None:
    truth = noise(32, 40)
    truth[::2] = 255
    truth[1::2, ::2] = 0
    made = to_image(truth)
    made = np.where(made == 1, np.float32(1.7), np.where(made == 0, np.float32(-0.3), made + np.float32(0.4 / 255)))
    files, truths = [save(tmp_path / "small.png", noise(16, 20))], [save(tmp_path / "truth.png", truth)]
    assert score_against_truth([made], files, truths).psnr_db == MOST_DB
    off = made + np.float32(0.2 / 255)
    assert score_against_truth([off], files, truths).psnr_db < MOST_DB


def test_the_score_is_the_mean_over_images(tmp_path: Path) -> None:
    truth = np.full((32, 32, 3), 100, np.uint8)
    files = [save(tmp_path / f"{number}.png", noise(16, 16)) for number in range(2)]
    truths = [save(tmp_path / "truth" / f"{number}.png", truth) for number in range(2)]
    made = [to_image(truth + np.uint8(step)) for step in (1, 100)]
    found = score_against_truth(made, files, truths)
    # A grey level is 219/255 of one in the luma.
    decibels = [20 * np.log10(255 / (step * 219 / 255)) for step in (1, 100)]
    assert [one.psnr_db for one in found.images] == pytest.approx(decibels, abs=1e-6)
    assert found.psnr_db == pytest.approx(np.mean(decibels), abs=1e-6)
    tiny = [save(tmp_path / "tiny.png", noise(4, 4)), save(tmp_path / "tiny_truth.png", noise(8, 8))]
    assert score_against_truth([to_image(noise(8, 8))], tiny[:1], tiny[1:]).ssim is None


def test_an_image_that_is_not_of_its_truths_size_is_an_error(tmp_path: Path) -> None:
    files, truths = [save(tmp_path / "small.png", noise(16, 20))], [save(tmp_path / "truth.png", noise(32, 41))]
    with pytest.raises(ValueError, match="an image is 40x32 pixels, its truth 41x32"):
        score_against_truth([to_image(noise(32, 40))], files, truths)


def test_bicubic_is_pillows_enlargement_scored_alike(tmp_path: Path) -> None:
    truth, small = noise(32, 40), noise(16, 20, 1)
    files, truths = [save(tmp_path / "small.png", small)], [save(tmp_path / "truth.png", truth)]
    enlarged = np.asarray(Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC))
    assert bicubic_scores(files, truths) == score_against_truth([to_image(enlarged)], files, truths)


def test_a_luma_model_that_enlarges_by_bicubic_gains_nothing_on_bicubic(tmp_path: Path) -> None:
    truth, small = noise(32, 40), noise(16, 20, 1)
    files, truths = [save(tmp_path / "small.png", small)], [save(tmp_path / "truth.png", truth)]
    enlarged = np.asarray(Image.fromarray(small).resize((40, 32), Image.Resampling.BICUBIC).convert("L"))
    found = score_against_truth([(enlarged / np.float32(255))[None, None]], files, truths)
    assert bicubic_scores(files, truths, channels=1).psnr_db == pytest.approx(found.psnr_db)
    assert bicubic_scores(files, truths).psnr_db - found.psnr_db == pytest.approx(20 * np.log10(255 / 219), abs=0.1), "16 to 235"


def test_a_truth_is_of_the_same_name_or_of_the_longest_that_the_name_begins_with(tmp_path: Path) -> None:
    for name in ("baby.png", "baby_2.jpg", "sub/bird.webp", "b.png"):
        save(tmp_path / "truth" / name, noise(8, 8))
    files = [tmp_path / "small" / name for name in ("baby_2_lr.png", "baby_3.png", "bird.png", "b-1.png")]
    found = find_truths(files, tmp_path / "truth")
    assert [path.relative_to(tmp_path / "truth").as_posix() for path in found] == [
        "baby_2.jpg",
        "baby.png",
        "sub/bird.webp",
        "b.png",
    ]


def test_a_truth_whose_name_goes_on_in_letters_or_digits_is_anothers(tmp_path: Path) -> None:
    save(tmp_path / "img1.png", noise(8, 8))
    with pytest.raises(ToolError, match=r"images have no truth; got img10\.png"):
        find_truths([Path("img1_lr.png"), Path("img10.png")], tmp_path)


def test_an_image_is_not_its_own_truth(tmp_path: Path) -> None:
    small, truth = save(tmp_path / "a_lr.png", noise(8, 8)), save(tmp_path / "a.png", noise(16, 16))
    assert find_truths([small], tmp_path) == [truth]
    with pytest.raises(ToolError, match=r"images have no truth; got a\.png"):
        find_truths([small, truth], tmp_path)


def test_images_without_truth_are_an_error_that_names_some(tmp_path: Path) -> None:
    save(tmp_path / "a.png", noise(8, 8))
    with pytest.raises(
        ToolError, match=r"images have no truth; got b0\.png, b1\.png, b2\.png, b3\.png, b4\.png; expected an image"
    ):
        find_truths([Path("a_lr.png"), *(Path(f"b{number}.png") for number in range(9))], tmp_path)
    with pytest.raises(ToolError, match="no such image folder"):
        find_truths([Path("a.png")], tmp_path / "absent")


def test_of_truths_of_one_name_the_folder_decides(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        save(tmp_path / "truth" / folder / "1.png", noise(8, 8))
    files = [tmp_path / "small" / folder / "1.png" for folder in ("one", "other")]
    assert find_truths(files, tmp_path / "truth") == [tmp_path / "truth" / folder / "1.png" for folder in ("one", "other")]


@pytest.mark.realdata
def test_bicubic_on_set5_is_what_papers_tell() -> None:
    """33.66 dB at twice the size; with Matlab's own resampling and luma, hence the tolerance."""
    files = sorted((REALDATA / "images").glob("set5_*_x2lr.png"))
    assert bicubic_scores(files, find_truths(files, REALDATA / "images")).psnr_db == pytest.approx(33.66, abs=0.05)


@pytest.mark.realdata
def test_ssim_of_bicubic_on_set5_is_what_papers_tell() -> None:
    """0.9299 at twice the size."""
    files = sorted((REALDATA / "images").glob("set5_*_x2lr.png"))
    assert bicubic_scores(files, find_truths(files, REALDATA / "images")).ssim == pytest.approx(0.9299, abs=0.002)
