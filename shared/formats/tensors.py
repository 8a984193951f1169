"""Names, shapes and dtypes of a model's inputs and outputs, and the inputs that are images."""

from collections.abc import Iterable
from dataclasses import dataclass

from shared.media.images import CHANNELS, ImageForm, image_form, image_layout

IMAGE_DTYPES = ("float32", "float16", "uint8")
INFINITE_FROM = 1e30  # magnitude from which a value stands for infinity: masks hold the lowest float32 in place of -inf


MESSAGE_INPUT = "message"  # an embedder's, as our converters name it


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a model.

    Args:
        name: Its name; SIGNATURE/NAME in a model with several signatures.
        shape: Lengths of its axes; -1 for any length.
        dtype: Numpy's name of its type.
        signature: The signature that it belongs to, where there are several.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    signature: str = ""

    @property
    def own_name(self) -> str:
        """Its name within its signature."""
        return self.name.removeprefix(f"{self.signature}/") if self.signature else self.name


def describe(specs: list[TensorSpec]) -> str:
    """Return names, dtypes and shapes in one line."""
    return "; ".join(f"{spec.name} {spec.dtype} {spec.shape}" for spec in specs) or "none"


def by_signature(specs: Iterable[TensorSpec]) -> list[list[TensorSpec]]:
    """Return the specs of each signature; all of them together where there are no signatures to tell apart."""
    groups: dict[str, list[TensorSpec]] = {}
    for spec in specs:
        groups.setdefault(spec.signature, []).append(spec)
    return list(groups.values()) or [[]]


def but_message(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Return inputs without the message of an embedder: bits as floats, called `message`."""
    return [spec for spec in specs if spec.own_name != MESSAGE_INPUT]


def image_spec(specs: list[TensorSpec]) -> tuple[str, str, int] | None:
    """Return name, layout and size of a model's input, or None where it does not take just one square RGB float32 image."""
    if len(specs) != 1 or specs[0].dtype != "float32" or (layout := image_layout(specs[0].shape)) is None:
        return None
    return specs[0].name, *layout


def image_input(specs: list[TensorSpec]) -> tuple[str, ImageForm] | None:
    """Return name and form of a model's input, or None where it does not take just one image, RGB or luma, of any size.

    An image is of float32, of float16, or of uint8, whose range is 0 to 255. An embedder's message may come with it.
    """
    specs = but_message(specs)
    if len(specs) != 1 or specs[0].dtype not in IMAGE_DTYPES or (form := image_form(specs[0].shape)) is None:
        return None
    return specs[0].name, form


def makes_image(inputs: list[TensorSpec], output: TensorSpec) -> bool:
    """Return whether a model makes an image of its one image: of RGB, or of as many channels as that has.

    A mask is none, and what an embedder makes may be a watermark.
    """
    own = [spec for spec in inputs if spec.signature == output.signature]
    given = image_input(own) if but_message(own) == own else None
    if given is None or len(output.shape) != 4:
        return False
    shape, place = list(output.shape), 1 if given[1].layout == "nchw" else 3
    shape[place] = given[1].channels if shape[place] == -1 else shape[place]  # exporters leave it open
    made = image_form(tuple(shape))
    return made is not None and made.channels in (CHANNELS, given[1].channels)
