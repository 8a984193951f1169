"""Photos with faces: the user's, or the one that scikit-image carries."""

from pathlib import Path

import numpy as np

from shared.media.images import Pixels, image_files, read_pixels


def read_photos(path: Path | None) -> list[tuple[str, Pixels]]:
    """Return name and uint8 (H, W, 3) RGB of a photo, or of all in a folder.

    Without a path: `astronaut`, Eileen Collins by NASA, public domain, 512 x 512.

    Raises:
        ToolError: No image there, or an unreadable one.
    """
    if path is None:
        from skimage import data

        return [("astronaut", np.ascontiguousarray(data.astronaut()))]
    files = [path] if path.is_file() else image_files(path)
    return [(file.name, read_pixels(file)) for file in files]
