"""`python -m tests.bench NAME ARGUMENTS`: measure what models/BENCHMARKS.md shows."""

import runpy
import sys

NAMES = ("guide", "demo", "embedders", "face_landmarker", "onnx_recipes")

if __name__ == "__main__":
    name, *rest = sys.argv[1:] or ["guide"]
    if name not in NAMES:
        sys.exit(f"no such benchmark: {name}; one of {', '.join(NAMES)}")
    sys.argv = [name, *rest]
    runpy.run_module(f"tests.bench.{name}", run_name="__main__")
