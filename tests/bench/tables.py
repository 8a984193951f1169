"""Tables of the measured figures: committed result files in, marked sections of Markdown files out.

A section is marked in README.md or models/BENCHMARKS.md, and `fill` writes what `render` makes of the result files into it:

    <!-- bench: demo -->
    <!-- end -->
"""

import json
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import nox.registry

import noxfile  # noqa: F401 - registers the sessions
from shared.command.resources import cpu_count, size_text
from shared.files.code_version import ROOT
from shared.networks.card import load_card
from shared.runtime.benchmark import SLOWER

FOLDER = Path(__file__).parent
README, BENCHMARKS = ROOT / "README.md", ROOT / "models" / "BENCHMARKS.md"
PACKAGES = ("torch", "litert-torch", "ai-edge-quantizer", "ai-edge-litert", "onnxruntime")
MARKED = re.compile(r"(<!-- bench: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOT_MEASURED = "not measured"
KIB = 1024
ATTACKS = {
    "none": "as they are",
    "jpeg-80": "JPEG 80",
    "jpeg-50": "JPEG 50",
    "resize-0.75": "to 75% and back",
    "resize-0.5": "to 50% and back",
    "brightness-1.25": "25% brighter",
    "contrast-0.75": "25% less contrast",
    "blur-1": "blur, 1 pixel",
    "noise-0.04": "noise, 4%",
    "crop-0.9": "10% of each side cropped",
}
ONNX_ROWS = {  # session -> title in onnx_recipes.json, recipe
    "videoseal_onnx_int8": ("VideoSeal's detector", "int8-static"),
    "chunkyseal_onnx_int8": ("ChunkySeal's detector", "int8-static"),
    "superres_int8": ("minisr", "int8-static"),
    "superres_fp16": ("minisr", "fp16"),
}


def read_results(name: str) -> Any:
    """Return the content of a committed result file."""
    return json.loads((FOLDER / f"{name}.json").read_text())


def write_results(name: str, results: Any) -> None:
    """Write a result file, and fill the documents anew."""
    (FOLDER / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
    for document in (README, BENCHMARKS):
        document.write_text(fill(document.read_text()))


def machine() -> dict[str, Any]:
    """Return what figures depend on besides the code."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    return {"cpus": cpu_count(), "python": platform.python_version(), **versions}


def fill(text: str) -> str:
    """Return a document with every marked section rendered."""
    return MARKED.sub(lambda found: f"{found[1]}{render(found[2])}\n{found[3]}", text)


def render(section: str) -> str:
    """Return the Markdown of a section."""
    return SECTIONS[section]()


def table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def speed_text(speedup: float) -> str:
    """Return how fast a product is against its float32 model, with the threshold of the tools."""
    if speedup * SLOWER < 1:
        return f"**slower**, {speedup:.2f} times as fast"
    return f"{speedup:.2f} times as fast" if speedup > SLOWER else f"as fast ({speedup:.2f})"


def _sessions() -> str:
    """Every recipe with its product, as README.md shows them."""
    rows = []
    for name, session in nox.registry.get().items():
        if "recipe" in session.tags:
            size, measured = _headline(name)
            rows.append([f"`{name}`", str(session.func.__doc__).rstrip("."), size, measured])
    return table(["session", "product", "size", "measured against the original"], rows)


def _headline(session: str) -> tuple[str, str]:
    """Return the size of a recipe's product, and its speed and outputs."""
    if session == "demo":
        reference, product = read_results("demo")["models"][:2]
        size = f"{reference['size_mib']:.2f} MiB -> {product['size_mib']:.2f} MiB"
        return size, f"{speed_text(product['speedup'])}; {product['bit_accuracy']['none']:.1%} of the bits read right"
    if session == "face_landmarker_int8":
        found = read_results("face_landmarker")
        size = f"{size_text(found['size_before_bytes'])} -> {size_text(found['size_after_bytes'])}"
        moved = f"landmarks move by {found['landmark_error_percent']:.2f}% of the face's width"
        return size, f"{found['slowdown']:.2f} times the latency; {moved}"
    if session in ONNX_ROWS:
        return _onnx_headline(*ONNX_ROWS[session])
    for row in read_results("guide")["products"]:
        if row["recipe"] == session:
            size = f"{row['float_mib']} MiB -> {row['product_mib']} MiB"
            return size, f"{speed_text(row['speedup'])}; {row['bit_agreement']:.1%} of the bits alike"
    for row in read_results("embedders")["products"]:
        if row["recipe"] == session:
            size = f"{row['float_mib']} MiB -> {row['product_mib']} MiB"
            return size, f"{speed_text(row['speedup'])}; {row['psnr_db']:.1f} dB to the photos that float32 marks"
    return NOT_MEASURED, NOT_MEASURED


def _onnx_headline(title: str, recipe: str) -> tuple[str, str]:
    for model in read_results("onnx_recipes"):
        if model["title"] == title:
            rows = {row["recipe"]: row for row in model["rows"]}
            reference, product = rows["float32"], rows[recipe]
            size = f"{size_text(reference['size_bytes'])} -> {size_text(product['size_bytes'])}"
            return size, f"{speed_text(product['speedup'])}; {_outputs_text(product['error'])}"
    return NOT_MEASURED, NOT_MEASURED


def _outputs_text(error: dict[str, Any]) -> str:
    return f"cosine {error['cosine']:.5f}" if error["psnr_db"] is None else f"{error['psnr_db']:.1f} dB"


def _transcript() -> str:
    """A command that ran on the demo's float32 model, with its output."""
    shown = read_results("demo")["transcript"]
    return "\n".join(["```console", f"$ {shown['command']}", *shown["output"], "```"])


def _products() -> str:
    """Recipes of the published detectors."""
    results = read_results("guide")
    headers = ["recipe", "float32", "product", "smaller by", "float32 run", "product run", "speed-up", "cosine", "bits alike"]
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['float_mib']} MiB",
            f"{row['product_mib']} MiB",
            f"{1 - row['product_mib'] / row['float_mib']:.1%}",
            f"{row['float_ms']:.0f} ms",
            f"{row['product_ms']:.0f} ms",
            f"{row['speedup']:.1f}",
            f"{row['cosine']:.5f}",
            f"{row['bit_agreement']:.3f}",
        ]
        for row in results["products"]
    ]
    return f"{table(headers, rows)}\n\n{_machine_text(results['machine'])}"


def _embedders() -> str:
    """Recipes of the published embedders."""
    results = read_results("embedders")
    headers = [
        "recipe",
        "float32",
        "product",
        "float32 run",
        "product run",
        "speed-up",
        "cosine",
        "photos alike",
        "convert",
        "peak",
    ]
    rows = [
        [
            f"`{row['recipe']}`",
            f"{row['float_mib']} MiB",
            f"{row['product_mib']} MiB",
            f"{row['float_ms']:.0f} ms",
            f"{row['product_ms']:.0f} ms",
            f"{row['speedup']:.1f}",
            f"{row['cosine']:.5f}",
            f"{row['psnr_db']:.1f} dB",
            f"{row['convert_seconds']:.0f} s",
            f"{row['convert_gib']:.1f} GiB",
        ]
        for row in results["products"]
    ]
    return f"{table(headers, rows)}\n\n{_machine_text(results['machine'])}"


def _guide() -> str:
    """The published guide's method and ours."""
    headers = [
        "network",
        "method",
        "convert",
        "peak memory",
        "quantize",
        "peak memory",
        "float32",
        "INT8",
        "float32 run",
        "INT8 run",
    ]
    rows = []
    for method in read_results("guide")["methods"]:
        convert, quantize = method["convert"], method["quantize"]
        rows.append(
            [
                load_card(method["network"]).title,
                method["method"],
                f"{convert['seconds']:.0f} s",
                f"{convert['peak_anonymous_gib']:.1f} GiB",
                "**fails**" if quantize["error"] else f"{quantize['seconds']:.0f} s",
                f"{quantize['peak_anonymous_gib']:.1f} GiB",
                f"{method['float_mib']} MiB",
                "none" if method["int8_mib"] is None else f"{method['int8_mib']} MiB",
                f"{method['float_ms']:.0f} ms",
                "none" if method["int8_ms"] is None else f"{method['int8_ms']:.0f} ms",
            ]
        )
    return table(headers, rows)


def _demo() -> str:
    """Products of the demo, with bit accuracy under attacks."""
    results = read_results("demo")
    models = results["models"]
    steps = f"Its steps took {results['seconds']:.0f} s together and at most {results['peak_rss_gib']:.1f} GiB of memory"
    crops = f"{results['images']} crops of {results['photos']} photos that were held out of training"
    rows = {
        "size": [f"{model['size_mib']:.2f} MiB" for model in models],
        "one run": [f"{model['median_ms']:.1f} ms" for model in models],
        "cosine to float32, worst": ["1", *(f"{model['cosine']:.5f}" for model in models[1:])],
        "marked against unmarked, AUC": [f"{model['auc']:.3f}" for model in models],
    }
    for attack, title in ATTACKS.items():
        rows[f"bits read right, {title}"] = [f"{model['bit_accuracy'][attack]:.1%}" for model in models]
    lines = [
        f"{steps}; `{results['recommended']}` is the smallest product inside the gates.",
        f"On {crops}, marked at {results['lowest_psnr_db']:.1f} dB or better, and their originals:",
    ]
    paragraphs = [
        "\n".join(lines),
        table(["", *(f"`{model['name']}`" for model in models)], ([title, *cells] for title, cells in rows.items())),
        _machine_text(results["machine"]),
    ]
    return "\n\n".join(paragraphs)


def _face_landmarker() -> str:
    """MediaPipe's face landmarker: its inner models, and what MediaPipe makes of the bundle."""
    results = read_results("face_landmarker")
    rows = []
    for model in results["models"]:
        used = ", ".join(f"{count} {precision}" for precision, count in model["precisions"].items())
        sizes = [f"{model[key] / KIB:.0f} KiB" for key in ("size_before_bytes", "size_after_bytes")]
        rows.append([f"`{model['name']}`", *sizes, f"{model['speedup']:.2f}", used])
    reduction = 1 - results["size_after_bytes"] / results["size_before_bytes"]
    sizes_text = f"{results['size_before_bytes']:,} to {results['size_after_bytes']:,} bytes, {reduction:.1%} smaller"
    faces = f"{results['faces_before']} face before and {results['faces_after']} after"
    moved = f"landmarks move by {results['landmark_error_percent']:.2f}% of the face's width"
    rest = f"blendshape scores by {results['blendshape_error']:.3f}, {results['slowdown']:.2f} times the latency"
    return (
        f"{table(['inner model', 'before', 'after', 'speed-up', 'precisions found'], rows)}\n\n"
        f"The bundle: {sizes_text}; searched and written in {results['seconds']} s on two cores.\n"
        f"In MediaPipe on `{results['photo']}`, the worst of {results['photos']} photos: {faces}, {moved}, {rest}."
    )


def _onnx_recipes() -> str:
    """Every recipe of quantize_onnx on several models."""
    rows = [row for model in read_results("onnx_recipes") for row in _onnx_rows(model)]
    return table(["model", "recipe", "size", "one run", "speed against float32", "outputs against float32"], rows)


def _onnx_rows(model: dict[str, Any]) -> Iterator[list[str]]:
    for number, row in enumerate(model["rows"]):
        run = f"{row['median_ms']:.1f} ms" if row["median_ms"] < 1000 else f"{row['median_ms'] / 1000:.1f} s"
        if number == 0:
            original = f"; before the repairs {model['original_ms']:.1f} ms" if model["original_ms"] else ""
            yield [model["title"], "float32", size_text(row["size_bytes"]), run + original, "", ""]
        else:
            speed, outputs = speed_text(row["speedup"]), _outputs_text(row["error"])
            yield ["", f"`{row['recipe']}`", size_text(row["size_bytes"]), run, speed, outputs]


def _machine_text(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.items() if name not in ("cpus", "python"))
    return f"Measured with {found['cpus']} CPUs, Python {found['python']}, {versions}."


SECTIONS: dict[str, Callable[[], str]] = {  # name of the marker -> its Markdown
    "sessions": _sessions,
    "transcript": _transcript,
    "products": _products,
    "embedders": _embedders,
    "guide": _guide,
    "demo": _demo,
    "face_landmarker": _face_landmarker,
    "onnx_recipes": _onnx_recipes,
}
