"""Recipes from checkpoint to verified product, and one session per tool.

nox -s demo                                         # everything on a small trained detector, in two minutes
nox -s chunkyseal_int8                              # rehearsal with seeded weights, or your checkpoint if it is found
nox -s chunkyseal_int8 -- --checkpoint FILE         # from your checkpoint
nox -s chunkyseal_int8 -- --download                # from the published one
nox -s face_landmarker_int8 -- --bundle FILE        # a MediaPipe bundle
nox -s superres_int8 -- --model FILE --images DIR   # a super-resolution network
nox -s verify -- model.tflite                       # one tool

Products land in models/out/<recipe>/. Sessions that need the same packages share one environment, .nox/<set of packages>.
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):  # before any import that older Pythons lack
    sys.exit("edgepress runs on Python 3.11 to 3.13; nox runs here on " + sys.version.split()[0])

import argparse
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "none"  # `environment` makes them: one for each set of packages

MODELS, OUT = Path("models"), Path("models/out")
MINISR, MINISEAL = MODELS / "minisr", MODELS / "miniseal"
MINISR_GATES = (
    "--gate=min_psnr_gain=0.5",
    "--gate=max_psnr_drop=0.3",
)  # dB: above bicubic enlargement, and below the float32 model
WORKERS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal")  # a worker may hold gigabytes
TOOLS = {
    "extract_weights": "Take one component's weights out of a full training checkpoint.",
    "convert_detector": "Convert a watermark detector to TFLite or ONNX, checked against torch.",
    "convert_embedder": "Convert a watermark embedder to TFLite or ONNX, checked against torch.",
    "quantize_tflite": "Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.",
    "quantize_onnx": "Quantize an ONNX model, and say what became of every layer, its speed and its outputs.",
    "prepare_calibration": "Choose calibration samples from images, videos, a CSV or made-up pictures.",
    "mark": "Mark photos with a message, each at its own size.",
    "read": "Read the message of images and videos with a detector.",
    "verify": "Check that a TFLite or ONNX model loads, runs, repeats itself and stays in range.",
    "compare": "Compare quantized models with their reference: size, speed, outputs.",
}
CHORES = {  # session -> packages, module, arguments, what it does
    "typecheck": ("typecheck", "mypy", (), "Check types."),
    "faults": (
        "tests",
        "pytest",
        (*WORKERS, "tests/faults", "--rounds", "50", "-rP"),
        "All kinds of faults at full length, two hours.",
    ),
    "fuzz": ("fuzz", "tests.support.fuzz", (), "Try the readers of files of unknown origin on files changed at random."),
    "train_miniseal": ("train", "models.miniseal.retrain", (), "Train miniseal from scratch, half an hour, and check the result."),
    "train_minisr": ("train", "models.minisr.retrain", (), "Train minisr from scratch in a quarter of an hour, and check it."),
    "bench": (
        "tests",
        "tests.bench",
        (),
        "Measure what models/BENCHMARKS.md shows: `-- guide`, demo, face_landmarker, onnx_recipes.",
    ),
}
Run = Callable[..., bool | None]


def environment(session: nox.Session, packages: str) -> Run:
    """Return what runs a module in the environment of a set of packages, made first where it is missing or out of date."""
    folder = Path(".nox") / packages
    python = folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    mark = folder / "installed"
    wanted = hashlib.sha256(b"".join(Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))).hexdigest()
    if not mark.exists() or mark.read_text() != wanted:
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(folder))  # pip finds a CPU build of torch where there is one
        install = ("-m", "pip", "install", "--constraint", "constraints.txt", "--editable", f".[{packages}]")
        session.run(str(python), *install, silent=not session.interactive)
        mark.write_text(wanted)
    return lambda module, *arguments: session.run(str(python), "-m", module, *map(str, arguments))


def detector_options(session: nox.Session) -> argparse.ArgumentParser:
    """Return the options that all recipes of detectors have."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--checkpoint", type=Path, help="full or detector-only checkpoint, .pth or .safetensors")
    parser.add_argument("--download", action="store_true", help="fetch the published checkpoint if none is found")
    return parser


def float_detector(session: nox.Session, run: Run, model: str, options: argparse.Namespace, suffix: str) -> Path:
    """Extract weights and convert them, checked against torch; without a checkpoint, a rehearsal with seeded weights."""
    folder, card = OUT / session.name, nox.project.load_toml(MODELS / f"{model}.toml")
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / f"{model}_detector.safetensors"
    given = [options.checkpoint.absolute()] if options.checkpoint else []
    missing = "--download" if options.download else "--allow-missing"
    run("tools.extract_weights", *given, "--model", model, "-o", weights, missing, "--refresh")
    is_rehearsal = not weights.exists()
    if is_rehearsal:
        session.warn("REHEARSAL: seeded, untrained weights. Give a checkpoint for a model that reads messages.")
    float_model = folder / f"{card['output_prefix']}{'_rehearsal' * is_rehearsal}_{card['image_size']}.{suffix}"
    source = ["--rehearsal"] if is_rehearsal else ["--checkpoint", weights]
    run("tools.convert_detector", "--model", model, *source, "-o", float_model, "--refresh")
    return float_model


def detector_tflite(
    session: nox.Session, model: str, precision: str, others: Sequence[str] = (), messages: Sequence[str] = ()
) -> None:
    """Extract, convert, quantize, verify and compare one detector; `others` are recipes of alternatives to its `precision`."""
    options = detector_options(session).parse_args(session.posargs)
    run = environment(session, "recipe")
    float_model = float_detector(session, run, model, options, "tflite")
    folder = float_model.parent
    product, *alternatives = (folder / f"{float_model.stem}_{recipe}.tflite" for recipe in (precision, *others))
    for recipe, path in zip((precision, *others), (product, *alternatives), strict=True):
        run("tools.quantize_tflite", float_model, "-o", path, "--recipe", recipe, "--refresh")
        run("tools.verify", path, "-o", folder / f"verify_{recipe}.json", "--refresh")
    reports = ("-o", folder / "compare.json", "--html", folder / "report.html", f"--gates={model}:{precision}", "--refresh")
    run("tools.compare", float_model, product, *(f"--alternative={path}" for path in alternatives), *messages, *reports)


def detector_onnx(session: nox.Session, model: str, samples: int) -> None:
    """Extract, convert, calibrate, quantize, verify and compare one detector for ONNX Runtime, with `samples` images at most."""
    parser = detector_options(session)
    parser.add_argument("--images", type=Path, default=MINISEAL / "samples", help="images like those the detector will see")
    options = parser.parse_args(session.posargs)
    run = environment(session, "recipe-onnx")
    float_model = float_detector(session, run, model, options, "onnx")
    folder = float_model.parent
    product, calibration = folder / f"{float_model.stem}_int8.onnx", folder / "calibration"
    limits = ("--max-samples", samples, "--min-samples", min(samples, 8), "--holdout", 2)
    run("tools.prepare_calibration", options.images, "-o", calibration, "--model", float_model, *limits, "--refresh")
    run("tools.quantize_onnx", float_model, "-o", product, "--recipe", "int8-static", "--calibration", calibration, "--refresh")
    run("tools.verify", product, "-o", folder / "verify_int8.json", "--refresh")
    reports = ("-o", folder / "compare.json", "--html", folder / "report.html", f"--gates={model}:onnx_int8", "--refresh")
    run("tools.compare", float_model, product, *reports)


def superres(session: nox.Session, recipe: str, precision: str, min_psnr: float) -> None:
    """Calibrate, quantize, verify and compare a network that makes images of images; `min_psnr` in dB to the float32 model's."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--model", type=Path, help="a super-resolution network, .onnx; default: minisr")
    parser.add_argument("--images", type=Path, help="images like those it will get")
    parser.add_argument("--input-range", choices=("0..1", "-1..1", "0..255"), help="range of its images; default: 0..1")
    parser.add_argument("--min-psnr", type=float, default=min_psnr, help="least PSNR to the float32 model's images, dB")
    options = parser.parse_args(session.posargs)
    if (options.model is None) != (options.images is None):
        session.error("give --model and --images, or neither")
    run, folder, samples = environment(session, "superres"), OUT / session.name, MINISR / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    model, is_default = options.model or MINISR / "minisr_x2.onnx", options.model is None
    product, calibration = folder / f"{model.stem}_{precision}.onnx", folder / "calibration"
    tiles = ("--tile-size", 64) if is_default else ()
    source = options.images or samples / "calibration"
    run("tools.prepare_calibration", source, "-o", calibration, "--model", model, *tiles, "--holdout", 8, "--refresh")
    pixels = [f"--input-range={options.input_range}"] if options.input_range else []
    real = ["--calibration", calibration] if recipe == "int8-static" else ["--holdout", calibration]
    limit = f"--min-psnr={options.min_psnr}"
    run("tools.quantize_onnx", model, "-o", product, "--recipe", recipe, *real, *pixels, limit, "--refresh")
    run("tools.verify", product, "-o", folder / f"verify_{precision}.json", "--refresh")
    images = ("--images", samples / "small", "--ground-truth", samples / "large") if is_default else ("--images", calibration)
    gates = [f"--gate=min_psnr={options.min_psnr}", *(MINISR_GATES if is_default else ())]
    reports = ("-o", folder / "compare.json", "--html", folder / "report.html", "--refresh")
    run("tools.compare", model, product, *images, *pixels, *gates, *reports)


def face_landmarker(session: nox.Session) -> None:
    """Sample, quantize within limits of each output, and check in MediaPipe itself."""
    known = nox.project.load_toml(MODELS / "face_landmarker" / "recipe.toml")
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --", epilog=f"The official bundle: {known['url']}")
    parser.add_argument("--bundle", type=Path, default=MODELS / "face_landmarker.task", help="the face landmarker, .task")
    parser.add_argument("--photos", type=Path, help="folder of photos with faces; default: the one that scikit-image carries")
    options = parser.parse_args(session.posargs)
    if not options.bundle.is_file():
        session.error(f"no bundle at {options.bundle}; download {known['url']} there, or name yours with -- --bundle FILE")
    run, folder = environment(session, "face-landmarker"), OUT / session.name
    folder.mkdir(parents=True, exist_ok=True)
    photos = [options.photos] if options.photos else []
    samples, product = folder / "samples", folder / "face_landmarker_int8.task"
    run("models.face_landmarker.make_samples", options.bundle, *photos, "-o", samples, "--overwrite")
    limits = (*(f"--max-error={limit}" for limit in known["max_error"]), "--short-names", "--html", folder / "report.html")
    run("tools.quantize_tflite", options.bundle, "-o", product, "--calibration", samples, *limits, "--refresh")
    run("models.face_landmarker.check", options.bundle, product, *photos, "-o", folder / "check.json", "--refresh")


def one_module(session: nox.Session, packages: str, module: str, arguments: Sequence[str] = ()) -> None:
    """Run one module in an environment that holds what it needs, with the arguments after `--`."""
    environment(session, packages)(module, *arguments, *session.posargs)


OTHERS = ("fp16", "int8-weight-only", "int4")
MESSAGES = ("--messages", str(MINISEAL / "samples" / "messages.json"))
TFLITE = {  # session -> card, recipe, product
    "chunkyseal_int8": ("chunkyseal", "int8", "ChunkySeal's detector as verified INT8 TFLite: the main job."),
    "chunkyseal_fp16": ("chunkyseal", "fp16", "ChunkySeal's detector as verified TFLite with float16 weights."),
    "videoseal_int8": ("videoseal", "int8", "VideoSeal 1.0's detector as verified INT8 TFLite."),
    "videoseal_fp16": ("videoseal", "fp16", "VideoSeal 1.0's detector as verified TFLite with float16 weights."),
    "videoseal_0_int8": ("videoseal_0.0", "int8", "VideoSeal 0.0's detector as verified INT8 TFLite."),
    "pixelseal_int8": ("pixelseal", "int8", "PixelSeal's detector as verified INT8 TFLite."),
}
ONNX = {  # session -> card, images to calibrate with, product
    "videoseal_onnx_int8": ("videoseal", 24, "VideoSeal 1.0's detector as verified INT8 ONNX."),
    "chunkyseal_onnx_int8": ("chunkyseal", 4, "ChunkySeal's detector as verified INT8 ONNX."),
}
SUPERRES = {  # session -> recipe, precision in names, least PSNR to the float32 model's images in dB, product
    "superres_int8": (
        "int8-static",
        "int8",
        40,
        "A super-resolution network as verified INT8 ONNX, some layers in float if need be.",
    ),
    "superres_fp16": ("fp16", "fp16", 60, "A super-resolution network as verified float16 ONNX, float32 in and out."),
}
DEMO = "A small trained detector as verified INT8 TFLite: every step in two minutes, with true bit accuracy and pictures."
FACE = "MediaPipe's face landmarker with INT8 weights, each layer as far as a search finds it harmless, checked in MediaPipe."


def define(name: str, summary: str, tag: str, chain: Callable[[nox.Session], None]) -> None:
    """Make a session of a chain of tools."""

    def session_function(session: nox.Session) -> None:
        chain(session)

    session_function.__doc__ = summary
    globals()[name] = nox.session(name=name, default=False, tags=[tag])(session_function)


define("demo", DEMO, "recipe", partial(detector_tflite, model="miniseal", precision="int8", others=OTHERS, messages=MESSAGES))
for _name, (_card, _recipe, _product) in TFLITE.items():
    define(_name, _product, "recipe", partial(detector_tflite, model=_card, precision=_recipe))
for _name, (_card, _samples, _product) in ONNX.items():
    define(_name, _product, "recipe", partial(detector_onnx, model=_card, samples=_samples))
for _name, (_recipe, _precision, _least, _product) in SUPERRES.items():
    define(_name, _product, "recipe", partial(superres, recipe=_recipe, precision=_precision, min_psnr=_least))
define("face_landmarker_int8", FACE, "recipe", face_landmarker)
for _name, _summary in TOOLS.items():
    define(_name, _summary, "tool", partial(one_module, packages=_name.replace("_", "-"), module=f"tools.{_name}"))
for _name, (_packages, _module, _arguments, _summary) in CHORES.items():
    define(_name, _summary, "chore", partial(one_module, packages=_packages, module=_module, arguments=_arguments))


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, formatting and layout."""
    run = environment(session, "lint")
    run("ruff", "check", *session.posargs)
    run("ruff", "format", "--check")
    run("pytest", "-q", "tests/test_layout.py", "--noconftest")


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; those on other people's files skip where the files are absent."""
    environment(session, "tests")("pytest", *WORKERS, *session.posargs)
