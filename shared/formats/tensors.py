"""Names, shapes and dtypes of a model's inputs and outputs, and the inputs that are images."""

from dataclasses import dataclass

from shared.media.images import ImageForm, image_form, image_layout


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one input or output; an axis of -1 may have any length."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def describe(specs: list[TensorSpec]) -> str:
    """Return names, dtypes and shapes in one line."""
    return "; ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs) or "none"


def image_spec(specs: list[TensorSpec]) -> tuple[str, str, int] | None:
    """Return name, layout and size of a model's input, or None where it does not take just one square RGB float32 image."""
    if len(specs) != 1 or specs[0].dtype != "float32" or (layout := image_layout(specs[0].shape)) is None:
        return None
    return specs[0].name, *layout


def image_input(specs: list[TensorSpec]) -> tuple[str, ImageForm] | None:
    """Return name and form of a model's input, or None where it does not take just one float32 image, RGB or luma, of any size."""
    if len(specs) != 1 or specs[0].dtype != "float32" or (form := image_form(specs[0].shape)) is None:
        return None
    return specs[0].name, form
