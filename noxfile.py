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
MINISR_GATES = ("--gate=min_psnr_gain=0.5", "--gate=max_psnr_drop=0.3")  # dB: above bicubic, and below the float32 model
PHOTOS, MOST_LOST = MINISEAL / "samples" / "unmarked", 0.005  # share of the bits that INT8 may lose under any attack
FEW = {"chunkyseal": ("--samples", 4, "--attacks", "jpeg-80,jpeg-50,resize-0.75,crop-0.9")}  # seconds for each image
WORKERS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal")  # a worker may hold gigabytes
TOOLS = {
    "extract_weights": "Take one component's weights out of a full training checkpoint.",
    "convert_detector": "Convert a watermark detector to TFLite or ONNX, checked against torch.",
    "convert_embedder": "Convert a watermark embedder to TFLite or ONNX, checked against torch.",
    "quantize_tflite": "Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.",
    "quantize_onnx": "Quantize an ONNX model, and say what became of every layer, its speed and its outputs.",
    "prepare_calibration": "Choose calibration samples from images, videos, a CSV or made-up pictures.",
    "mark": "Mark photos and videos with a message, at their own size.",
    "read": "Read the message of images and videos with a detector.",
    "verify": "Check that a TFLite or ONNX model loads, runs, repeats itself and stays in range.",
    "compare": "Compare quantized models with their reference: size, speed, outputs.",
}
FAULTS = (*WORKERS, "tests/faults", "--rounds", "50", "-rP")
CHORES = {  # session -> packages, module, arguments, what it does
    "typecheck": ("typecheck", "mypy", (), "Check types."),
    "faults": ("tests", "pytest", FAULTS, "All kinds of faults at full length, two hours."),
    "fuzz": ("fuzz", "tests.support.fuzz", (), "Try the readers of files of unknown origin on files changed at random."),
    "train_miniseal": ("train", "models.miniseal.retrain", (), "Train miniseal from scratch, half an hour, and check the result."),
    "train_minisr": ("train", "models.minisr.retrain", (), "Train minisr from scratch in a quarter of an hour, and check it."),
    "bench": ("tests", "tests.bench", (), "Measure a table of models/BENCHMARKS.md, which names the commands."),
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


def watermark_options(session: nox.Session, component: str) -> argparse.Namespace:
    """Return the options of a recipe of detectors or embedders, and which of the two it is about."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--checkpoint", type=Path, help="full, detector-only or embedder-only checkpoint, .pth or .safetensors")
    parser.add_argument("--download", action="store_true", help="fetch the published checkpoint if none is found")
    parser.add_argument("--images", type=Path, help="photos like those to be marked and read")
    return parser.parse_args(session.posargs, argparse.Namespace(component=component))


def weights_of(session: nox.Session, run: Run, model: str, component: str, options: argparse.Namespace) -> Path | None:
    """Extract a component's weights; None where there is no checkpoint, or it lacks a component that the recipe can do without."""
    (folder := OUT / session.name).mkdir(parents=True, exist_ok=True)
    is_needed = options.checkpoint is not None and component == options.component
    weights, missing = folder / f"{model}_{component}.safetensors", [] if is_needed else ["--allow-missing"]
    given = [
        *([options.checkpoint.absolute()] if options.checkpoint else []),
        *(["--download"] if options.download and not options.checkpoint else missing),
    ]
    run("tools.extract_weights", *given, "--model", model, f"--component={component}", "-o", weights, "--refresh")
    return weights if weights.exists() else None


def floats(session: nox.Session, model: str, component: str, weights: Path | None, suffix: str) -> tuple[Path, list[object]]:
    """Return the float32 model's path and a converter's options; without weights for a rehearsal, with seeded ones."""
    card = nox.project.load_toml(MODELS / f"{model}.toml")
    if weights is None:
        session.warn("REHEARSAL: seeded, untrained weights. Give a checkpoint for a model that reads messages.")
    prefix = card["output_prefix"].replace("_detector_", f"_{component}_")
    path = OUT / session.name / f"{prefix}{'_rehearsal' * (weights is None)}_{card['image_size']}.{suffix}"
    return path, ["--model", model, *(["--checkpoint", weights] if weights else ["--rehearsal"]), "--refresh"]


def marked_photos(session: nox.Session, run: Run, model: str, options: argparse.Namespace) -> Sequence[object]:
    """Mark photos with the checkpoint's embedder; return compare's options for true bit accuracy, none without an embedder."""
    embedder, marked = weights_of(session, run, model, "embedder", options), OUT / session.name / "marked"
    if embedder is None:
        session.warn("no embedder: bits alike on unmarked photos stand for bit accuracy, which needs a full checkpoint")
        return ()
    few = FEW.get(model, ())
    run("tools.mark", options.images or PHOTOS, "-o", marked, "--embedder", embedder, "--card", model, *few[:2], "--refresh")
    return "--messages", marked / "messages.json", *few, f"--gate=max_loss_where_read={MOST_LOST}"


def reports(session: nox.Session, name: str = "compare", page: str = "report") -> Sequence[object]:
    """Return compare's options for its JSON file and its page."""
    return "-o", OUT / session.name / f"{name}.json", "--html", OUT / session.name / f"{page}.html", "--refresh"


def detector(  # noqa: PLR0917 - by name
    session: nox.Session,
    model: str,
    precision: str,
    others: Sequence[str] = (),
    messages: Sequence[object] = (),
    calibrated_on: int = 0,
) -> None:
    """Extract, convert, quantize, verify and compare one detector; calibrated on at most so many samples for ONNX Runtime."""
    options, folder, suffix = watermark_options(session, "detector"), OUT / session.name, "onnx" if calibrated_on else "tflite"
    run = environment(session, "recipe-onnx" if calibrated_on else "recipe")
    weights = weights_of(session, run, model, "detector", options)
    source, arguments = floats(session, model, "detector", weights, suffix)
    run("tools.convert_detector", *arguments, "-o", source)
    recipes: dict[str, Sequence[object]] = dict.fromkeys((precision, *others), ())
    if calibrated_on:
        calibration, images = folder / "calibration", options.images or MINISEAL / "samples"
        limits = ("--max-samples", calibrated_on, "--min-samples", min(calibrated_on, 8), "--holdout", 2)
        run("tools.prepare_calibration", images, "-o", calibration, "--model", source, *limits, "--refresh")
        recipes[precision] = ("--calibration", calibration)
    products = [folder / f"{source.stem}_{recipe}.{suffix}" for recipe in recipes]
    for (recipe, samples), path in zip(recipes.items(), products, strict=True):
        name = "int8-static" if samples else recipe
        run(f"tools.quantize_{suffix}", source, "-o", path, "--recipe", name, *samples, "--refresh")
        run("tools.verify", path, "-o", folder / f"verify_{recipe}.json", "--refresh")
    product, *alternatives = products
    messages = messages or (marked_photos(session, run, model, options) if weights else ())
    gates = f"--gates={model}:{'onnx_' * bool(calibrated_on)}{precision}"
    run("tools.compare", source, product, *(f"--alternative={path}" for path in alternatives), *messages, gates, *reports(session))


def embedder(session: nox.Session, model: str) -> None:
    """Extract, convert, quantize, verify and compare one embedder; with a full checkpoint its detector reads what it marks."""
    options, run = watermark_options(session, "embedder"), environment(session, "recipe")
    weights = weights_of(session, run, model, "embedder", options)
    source, arguments = floats(session, model, "embedder", weights, "tflite")
    product, images = source.with_name(f"{source.stem}_int8.tflite"), ("--images", options.images or PHOTOS)
    run("tools.convert_embedder", *arguments, "--quantize", "int8", "-o", product)
    run("tools.verify", product, "-o", product.with_name("verify_int8.json"), "--refresh")
    run("tools.compare", source, product, *images, f"--gates={model}:embedder_int8", *reports(session))
    reader = weights_of(session, run, model, "detector", options) if weights else None
    if reader is not None:
        ends = (f"--embedder={source}", f"--embedder={product}", f"--gate=max_marking_drop={MOST_LOST}")
        run("tools.compare", reader, "--model", model, *ends, *images, *FEW.get(model, ()), *reports(session, "ends", "ends"))


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
    run("tools.compare", model, product, *images, *pixels, *gates, *reports(session))


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
WATERMARK = {  # session -> card, recipe, samples to calibrate with for ONNX Runtime, product
    "chunkyseal_int8": ("chunkyseal", "int8", 0, "ChunkySeal's detector as verified INT8 TFLite: the main job."),
    "chunkyseal_fp16": ("chunkyseal", "fp16", 0, "ChunkySeal's detector as verified TFLite with float16 weights."),
    "videoseal_int8": ("videoseal", "int8", 0, "VideoSeal 1.0's detector as verified INT8 TFLite."),
    "videoseal_fp16": ("videoseal", "fp16", 0, "VideoSeal 1.0's detector as verified TFLite with float16 weights."),
    "videoseal_0_int8": ("videoseal_0.0", "int8", 0, "VideoSeal 0.0's detector as verified INT8 TFLite."),
    "pixelseal_int8": ("pixelseal", "int8", 0, "PixelSeal's detector as verified INT8 TFLite."),
    "videoseal_onnx_int8": ("videoseal", "int8", 24, "VideoSeal 1.0's detector as verified INT8 ONNX."),
    "chunkyseal_onnx_int8": ("chunkyseal", "int8", 4, "ChunkySeal's detector as verified INT8 ONNX."),
}
SUPERRES = {  # session -> recipe, precision in names, least PSNR to the float32 model's images in dB, product
    "superres_int8": (
        "int8-static",
        "int8",
        40,
        "A super-resolution network as verified INT8 ONNX, where need be partly in float.",
    ),
    "superres_fp16": ("fp16", "fp16", 60, "A super-resolution network as verified float16 ONNX, float32 in and out."),
}
EMBEDDERS = {  # session -> card, product
    "videoseal_embedder_int8": ("videoseal", "VideoSeal 1.0's embedder as verified INT8 TFLite."),
    "chunkyseal_embedder_int8": ("chunkyseal", "ChunkySeal's embedder as verified INT8 TFLite."),
}
DEMO = "A small trained detector as verified INT8 TFLite: every step in two minutes, with true bit accuracy and pictures."
FACE = "MediaPipe's face landmarker with INT8 weights, each layer as far as a search finds it harmless, checked in MediaPipe."


def define(name: str, summary: str, tag: str, chain: Callable[[nox.Session], None]) -> None:
    """Make a session of a chain of tools."""

    def session_function(session: nox.Session) -> None:
        chain(session)

    session_function.__doc__ = summary
    globals()[name] = nox.session(name=name, default=False, tags=[tag])(session_function)


define("demo", DEMO, "recipe", partial(detector, model="miniseal", precision="int8", others=OTHERS, messages=MESSAGES))
for _name, (_card, _recipe, _samples, _product) in WATERMARK.items():
    define(_name, _product, "recipe", partial(detector, model=_card, precision=_recipe, calibrated_on=_samples))
for _name, (_card, _product) in EMBEDDERS.items():
    define(_name, _product, "recipe", partial(embedder, model=_card))
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
