"""The alarm: a model whose answers are far from the original's is of no use, whatever its size and speed."""

from collections.abc import Sequence

from shared.metrics.gates import GateResult
from shared.metrics.output_error import OutputError

LEAST_COSINE = 0.95  # of an output over all samples together
LEAST_MADE_UP_COSINE = 0.75  # the same where inputs are made up: photos of something that the model knows nothing of
LEAST_PSNR_DB = 25.0  # of an output that is an image, in its place


def alarms(errors: Sequence[OutputError], model: str = "", *, is_made_up: bool = False) -> list[GateResult]:
    """Return a broken gate for each output that is far from the original's.

    Args:
        errors: Of the outputs.
        model: The model's name, where there are several.
        is_made_up: Whether inputs are made up. An output of one value a sample, such as whether a face is there, says nothing then.
    """
    found = []
    for error in errors:
        is_image = error.psnr_db is not None
        least = LEAST_PSNR_DB if is_image else LEAST_MADE_UP_COSINE if is_made_up else LEAST_COSINE
        value = error.psnr_db if is_image else error.cosine
        if value is not None and value < least and not (is_made_up and error.values == 1):
            name = f"{'min_psnr' if is_image else 'min_cosine'}:{error.output}"
            found.append(GateResult(name, value, least, ok=False, model=model))
    return found


def describe_alarms(errors: Sequence[OutputError], worst_layers: Sequence[str], *, is_made_up: bool) -> str:
    """Say which outputs are far from the original's and what to try; empty where none is.

    Args:
        errors: Of the outputs.
        worst_layers: Names of the layers that do most to the outputs, where that was measured.
        is_made_up: Whether inputs are made up.
    """
    broken = alarms(errors, is_made_up=is_made_up)
    if not broken:
        return ""
    tries = [] if not is_made_up else ["--calibration with real inputs: made-up ones may be unlike any that the model knows"]
    tries += [
        f"--exclude for {', '.join(worst_layers)}, which do most" if worst_layers else "--sensitivity to find the layers that do it"
    ]
    tries += ["--max-error or --min-cosine to let a search choose", "another recipe"]
    return f"LARGE ERROR: {'; '.join(map(str, broken))}; try {'; '.join(tries)}; --allow-large-error writes it all the same"
