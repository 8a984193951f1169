"""Recipes that press a model from checkpoint to verified product, and one session per tool.

nox -s demo                                         # everything on a small trained detector, in two minutes
nox -s chunkyseal_int8                              # rehearsal with seeded weights, or your checkpoint if it is found
nox -s chunkyseal_int8 -- --checkpoint FILE         # from your checkpoint
nox -s chunkyseal_int8 -- --download                # from the published one
nox -s face_landmarker_int8 -- --bundle FILE        # a MediaPipe bundle
nox -s superres_int8 -- --model FILE --images DIR   # a super-resolution network
nox -s verify -- model.tflite                       # one tool
"""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):  # before any import that older Pythons lack
    sys.exit("edgepress runs on Python 3.11 to 3.13; nox runs here on " + sys.version.split()[0])

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nox

nox.needs_version = ">=2025.10.14"
nox.options.default_venv_backend = "virtualenv"  # pip finds a CPU build of torch where an index offers one
nox.options.reuse_venv = "yes"  # the environments are large; constraints.txt pins what is in them

MODELS = Path("models")
MINISR_LIMITS = ("--min-psnr-gain=0.5", "--max-psnr-drop=0.3")  # dB: above bicubic enlargement, and below the float32 model
FACE_LANDMARKER = (
    "https://storage.googleapis.com/mediapipe-models/face_landmarker/face_landmarker/float16/latest/face_landmarker.task"
)
# Relative errors of the inner models' answers. The detector's are so tight because a box that only just counts decides where the
# landmarks model looks. Identity: the landmarks; Identity_1: whether it is a face, as a logit; Identity_2: a score that the face
# landmarker does not use.
FACE_LANDMARKER_LIMITS = (
    "face_detector.tflite=0.0001",
    "face_landmarks_detector.tflite:Identity=0.006",
    "face_landmarks_detector.tflite:Identity_1=0.1",
    "face_landmarks_detector.tflite:Identity_2=5",
    "face_blendshapes.tflite=0.05",
)
FAULTS = tuple(
    f"tests/faults/test_{name}.py" for name in ("bad_inputs", "interruptions", "full_disk", "bit_flips", "interrupted_downloads")
)
WORKERS = ("--numprocesses", "logical", "--maxprocesses", "4", "--dist", "worksteal")  # a worker may hold gigabytes
TOOLS = {
    "extract_weights": "Take one component's weights out of a full training checkpoint.",
    "convert_detector": "Convert a watermark detector to TFLite or ONNX, checked against torch.",
    "quantize_tflite": "Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.",
    "quantize_onnx": "Quantize an ONNX model, and say what became of every layer, its speed and its answers.",
    "prepare_calibration": "Choose calibration samples from images, videos, a CSV or made-up pictures.",
    "verify": "Check that a TFLite or ONNX model loads, runs, repeats itself and stays in range.",
    "compare": "Compare quantized models with their reference: size, speed, answers.",
}


def install(session: nox.Session, dependencies: str) -> None:
    """Install this project with one of its dependency sets, at the versions of constraints.txt."""
    session.install("--constraint", "constraints.txt", "--editable", f".[{dependencies}]")


def tool(session: nox.Session, name: str, *arguments: str | Path) -> None:
    """Run one tool in the session's environment."""
    session.run("python", "-m", f"tools.{name}", *arguments)


def press_detector(
    session: nox.Session,
    model: str,
    precision: str,
    *,
    alternatives: Sequence[str] = (),
    messages: Path | None = None,
    report: Path | None = None,
) -> None:
    """Extract, convert, quantize, verify and compare one detector; steps that are up to date say so and are skipped.

    Args:
        session: Where to run.
        model: Name of the model card.
        precision: What is shipped, inside the gates that the card has for it.
        alternatives: Further precisions, measured beside it.
        messages: Images whose messages are known.
        report: The HTML page; default: named after the product.
    """
    options = detector_options(session).parse_args(session.posargs)
    install(session, "recipe")
    float_model, rehearsal = float_detector(session, model, options, "tflite")
    stem, card = float_model.stem, nox.project.load_toml(MODELS / f"{model}.toml")

    # The product and what else could be shipped, each proven to run.
    pressed = {recipe: MODELS / f"{stem}_{recipe}.tflite" for recipe in (precision, *alternatives)}
    for recipe, path in pressed.items():
        tool(session, "quantize_tflite", float_model, "-o", path, "--recipe", recipe, "--refresh")
        tool(session, "verify", path, "-o", path.with_name(f"{path.stem}_verify.json"), "--refresh")

    # The proof that it still works.
    product = pressed.pop(precision)
    others = [f"--alternative={path}" for path in pressed.values()]
    labelled = [f"--messages={messages}"] if messages else []
    found, page = product.with_name(f"{product.stem}_compare.json"), report or product.with_name(f"{product.stem}_report.html")
    limits = [*gates(card["gates"][precision]), "--refresh"]
    tool(session, "compare", float_model, product, *others, *labelled, "-o", found, "--html", page, *limits)
    warn_of_rehearsal(session, product, rehearsal=rehearsal)


def press_detector_onnx(session: nox.Session, model: str, samples: int) -> None:
    """Extract, convert, calibrate, quantize, verify and compare one detector for ONNX Runtime.

    Args:
        session: Where to run.
        model: Name of the model card; its gates are those of `onnx_int8`.
        samples: Images to calibrate with, at most.
    """
    parser = detector_options(session)
    parser.add_argument("--images", type=Path, help="images like those the detector will see; default: miniseal's samples")
    options = parser.parse_args(session.posargs)
    install(session, "recipe-onnx")
    float_model, rehearsal = float_detector(session, model, options, "onnx")
    product = float_model.with_name(f"{float_model.stem}_int8.onnx")
    images = options.images or MODELS / "miniseal" / "samples"
    calibration = MODELS / f"{float_model.stem}_calibration"
    wanted: list[str | Path] = [
        "--model",
        float_model,
        "--max-samples",
        str(samples),
        "--min-samples",
        str(min(samples, 8)),
        "--holdout",
        "2",
    ]
    tool(session, "prepare_calibration", images, "-o", calibration, *wanted, "--refresh")
    tool(session, "quantize_onnx", float_model, "-o", product, "--mode", "static", "--calibration", calibration, "--refresh")
    tool(session, "verify", product, "-o", product.with_name(f"{product.stem}_onnx_verify.json"), "--refresh")
    found, page = (product.with_name(f"{product.stem}_onnx_{name}") for name in ("compare.json", "report.html"))
    limits = gates(nox.project.load_toml(MODELS / f"{model}.toml")["gates"]["onnx_int8"])
    tool(session, "compare", float_model, product, "-o", found, "--html", page, *limits, "--refresh")
    warn_of_rehearsal(session, product, rehearsal=rehearsal)


def detector_options(session: nox.Session) -> argparse.ArgumentParser:
    """Return the options that all recipes of detectors have."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--checkpoint", type=Path, help="full or detector-only checkpoint, .pth or .safetensors")
    parser.add_argument("--download", action="store_true", help="fetch the published checkpoint if none is found")
    return parser


def float_detector(session: nox.Session, model: str, options: argparse.Namespace, suffix: str) -> tuple[Path, bool]:
    """Make the float32 model, checked against torch; return it, and whether it is a rehearsal's."""
    # A detector-only file; left out when there is no checkpoint anywhere.
    weights = MODELS / f"{model}_detector.safetensors"
    given = [options.checkpoint.absolute()] if options.checkpoint else []
    wanted = ["--download"] if options.download else ["--allow-missing"]
    tool(session, "extract_weights", *given, "--model", model, "-o", weights, *wanted, "--refresh")
    rehearsal = not weights.exists()
    card = nox.project.load_toml(MODELS / f"{model}.toml")
    float_model = MODELS / f"{card['output_prefix']}{'_rehearsal' if rehearsal else ''}_{card['image_size']}.{suffix}"
    source = ["--rehearsal"] if rehearsal else ["--checkpoint", weights]
    tool(session, "convert_detector", "--model", model, *source, "-o", float_model, "--refresh")
    return float_model, rehearsal


def warn_of_rehearsal(session: nox.Session, product: Path, *, rehearsal: bool) -> None:
    """Say loudly what a product without a checkpoint is."""
    if rehearsal:
        session.warn(f"REHEARSAL: {product} holds seeded, untrained weights. Give a checkpoint for a model that reads messages.")


def press_superres(session: nox.Session, mode: str, precision: str, min_psnr: float) -> None:
    """Calibrate, quantize, verify and compare a network that makes images of images.

    Args:
        session: Where to run.
        mode: Of quantize_onnx.
        precision: What the product is called after.
        min_psnr: Least PSNR to the float32 model's images in dB, unless the user says another.
    """
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--model", type=Path, help="a super-resolution network, .onnx; default: minisr")
    parser.add_argument("--images", type=Path, help="images like those it will get")
    parser.add_argument("--input-range", choices=("0..1", "-1..1", "0..255"), help="range of its images; default: 0..1")
    parser.add_argument("--min-psnr", type=float, default=min_psnr, help="least PSNR to the float32 model's images, dB")
    options = parser.parse_args(session.posargs)
    if (options.model is None) != (options.images is None):
        session.error("give --model and --images, or neither")
    install(session, "superres")
    samples = MODELS / "minisr" / "samples"
    model = options.model or MODELS / "minisr" / "minisr_x2.onnx"
    product = MODELS / f"{model.stem}_{precision}.onnx"
    calibration = MODELS / f"{model.stem}_calibration"
    cut: list[str | Path] = ["--model", model, *([] if options.model else ["--tile-size", "64"]), "--holdout", "8", "--refresh"]
    tool(session, "prepare_calibration", options.images or samples / "calibration", "-o", calibration, *cut)
    given: list[str | Path] = ["--calibration", calibration] if mode == "static" else []
    limit = f"--min-psnr={options.min_psnr}"
    ranged = [f"--input-range={options.input_range}"] if options.input_range else []
    tool(session, "quantize_onnx", model, "-o", product, "--mode", mode, *given, *ranged, limit, "--refresh")
    tool(session, "verify", product, "-o", product.with_name(f"{product.stem}_verify.json"), "--refresh")
    found, page = (product.with_name(f"{product.stem}_{name}") for name in ("compare.json", "report.html"))
    images: list[str | Path] = (
        ["--images", calibration] if options.model else ["--images", samples / "small", "--truth", samples / "large"]
    )
    limits = [limit, *ranged, *([] if options.model else MINISR_LIMITS)]
    tool(session, "compare", model, product, *images, "-o", found, "--html", page, *limits, "--refresh")


def gates(limits: dict[str, Any]) -> list[str]:
    """Return a card's gates as options of compare."""
    options = []
    for name, limit in limits.items():
        values = [f"{attack}={share}" for attack, share in limit.items()] if isinstance(limit, dict) else [limit]
        options += [f"--{name.replace('_', '-')}={value}" for value in values]
    return options


@nox.session(default=False, tags=["recipe"])
def demo(session: nox.Session) -> None:
    """A small trained detector as verified INT8 TFLite: the whole way in two minutes, with true bit accuracy and pictures."""
    others = ("fp16", "int8-weight-only", "int4")
    messages = MODELS / "miniseal" / "samples" / "messages.json"
    press_detector(session, "miniseal", "int8", alternatives=others, messages=messages, report=MODELS / "report.html")


@nox.session(default=False, tags=["recipe"])
def chunkyseal_int8(session: nox.Session) -> None:
    """ChunkySeal's detector as verified INT8 TFLite: the main job."""
    press_detector(session, "chunkyseal", "int8")


@nox.session(default=False, tags=["recipe"])
def chunkyseal_fp16(session: nox.Session) -> None:
    """ChunkySeal's detector as verified TFLite with float16 weights."""
    press_detector(session, "chunkyseal", "fp16")


@nox.session(default=False, tags=["recipe"])
def videoseal_int8(session: nox.Session) -> None:
    """VideoSeal 1.0's detector as verified INT8 TFLite."""
    press_detector(session, "videoseal", "int8")


@nox.session(default=False, tags=["recipe"])
def videoseal_fp16(session: nox.Session) -> None:
    """VideoSeal 1.0's detector as verified TFLite with float16 weights."""
    press_detector(session, "videoseal", "fp16")


@nox.session(default=False, tags=["recipe"])
def pixelseal_int8(session: nox.Session) -> None:
    """PixelSeal's detector as verified INT8 TFLite."""
    press_detector(session, "pixelseal", "int8")


@nox.session(default=False, tags=["recipe"])
def face_landmarker_int8(session: nox.Session) -> None:
    """MediaPipe's face landmarker with INT8 weights, layer by layer as far as a search finds it harmless, checked in MediaPipe."""
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --", epilog=f"The official bundle: {FACE_LANDMARKER}")
    parser.add_argument("--bundle", type=Path, default=MODELS / "face_landmarker.task", help="the face landmarker, .task")
    parser.add_argument("--photos", type=Path, help="folder of photos with faces; default: the one that scikit-image carries")
    options = parser.parse_args(session.posargs)
    if not options.bundle.is_file():
        session.error(f"no bundle at {options.bundle}; download {FACE_LANDMARKER} there, or name yours with -- --bundle FILE")
    install(session, "face-landmarker")
    photos = [options.photos] if options.photos else []
    samples, product = MODELS / "face_landmarker_samples", MODELS / "face_landmarker_int8.task"
    session.run("python", "-m", "models.face_landmarker.make_samples", options.bundle, *photos, "-o", samples, "--overwrite")
    limits = [f"--max-drop={limit}" for limit in FACE_LANDMARKER_LIMITS]
    page = product.with_suffix(".html")
    tool(
        session,
        "quantize_tflite",
        options.bundle,
        "-o",
        product,
        "--calibration",
        samples,
        *limits,
        "--short-names",
        "--html",
        page,
        "--refresh",
    )
    checked = product.with_name(f"{product.stem}_check.json")
    session.run("python", "-m", "models.face_landmarker.check", options.bundle, product, *photos, "-o", checked, "--refresh")


@nox.session(default=False, tags=["recipe"])
def videoseal_onnx_int8(session: nox.Session) -> None:
    """VideoSeal 1.0's detector as verified INT8 ONNX."""
    press_detector_onnx(session, "videoseal", samples=24)


@nox.session(default=False, tags=["recipe"])
def chunkyseal_onnx_int8(session: nox.Session) -> None:
    """ChunkySeal's detector as verified INT8 ONNX."""
    press_detector_onnx(session, "chunkyseal", samples=4)


@nox.session(default=False, tags=["recipe"])
def superres_int8(session: nox.Session) -> None:
    """A super-resolution network as verified INT8 ONNX, with layers left in float where the images would suffer."""
    press_superres(session, "static", "int8", min_psnr=40)


@nox.session(default=False, tags=["recipe"])
def superres_fp16(session: nox.Session) -> None:
    """A super-resolution network as verified float16 ONNX, float32 in and out."""
    press_superres(session, "fp16", "fp16", min_psnr=60)


def tool_session(name: str, summary: str) -> Callable[[nox.Session], None]:
    """Make the session of one tool: `nox -s NAME -- ARGUMENTS`."""

    def session_function(session: nox.Session) -> None:
        install(session, name.replace("_", "-"))
        tool(session, name, *session.posargs)

    session_function.__doc__ = summary
    return nox.session(name=name, default=False, tags=["tool"])(session_function)


for _name, _summary in TOOLS.items():
    globals()[_name] = tool_session(_name, _summary)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style and formatting."""
    install(session, "lint")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")


@nox.session(default=False)
def typecheck(session: nox.Session) -> None:
    """Check types."""
    install(session, "typecheck")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """Run the tests; those on other people's files skip where the files are absent."""
    install(session, "tests")
    session.run("pytest", *WORKERS, *session.posargs)


@nox.session(default=False)
def faults(session: nox.Session) -> None:
    """Strangers' files, kills, full disks, bit flips and broken downloads at full length, two hours; CI runs fewer rounds."""
    install(session, "tests")
    session.run("pytest", *WORKERS, *FAULTS, "--rounds", "50", "-rP", *session.posargs)


@nox.session(default=False)
def fuzz(session: nox.Session) -> None:
    """Try the readers of strangers' files on files changed at random: each format for a minute, or as you say."""
    install(session, "fuzz")
    session.run("python", "-m", "tests.support.fuzz", *(session.posargs or ["--all"]))


@nox.session(default=False)
def train_miniseal(session: nox.Session) -> None:
    """Train miniseal from scratch, half an hour on two cores, and check what came out; an interrupted run goes on."""
    install(session, "train-miniseal")
    folder = MODELS / "miniseal_retrained"  # beside the shipped one, which it does not touch
    checkpoint, samples, float_model = folder / "checkpoint.safetensors", folder / "samples", folder / "float32.tflite"
    folder.mkdir(exist_ok=True)
    if session.posargs or not checkpoint.exists():
        session.run("python", "-m", "models.miniseal.train", "-o", checkpoint, *session.posargs)
    session.run("python", "-m", "models.miniseal.make_samples", checkpoint, "-o", samples, "--overwrite")
    tool(session, "convert_detector", "--model", "miniseal", "--checkpoint", checkpoint, "-o", float_model, "--refresh")
    limits = gates(nox.project.load_toml(MODELS / "miniseal.toml")["gates"]["fp32"])
    labelled: list[str | Path] = ["--model", "miniseal", "--messages", samples / "messages.json"]
    tool(session, "compare", checkpoint, float_model, *labelled, "-o", folder / "compare.json", "--refresh", *limits)


@nox.session(default=False)
def train_minisr(session: nox.Session) -> None:
    """Train minisr from scratch, a quarter of an hour on two cores, and check what came out."""
    install(session, "train-minisr")
    folder = MODELS / "minisr_retrained"  # beside the shipped one, which it does not touch
    model, samples = folder / "minisr_x2.onnx", folder / "samples"
    if session.posargs or not model.exists():
        session.run("python", "-m", "models.minisr.train", "-o", model, *session.posargs)
    session.run("python", "-m", "models.minisr.make_samples", "-o", samples, "--overwrite")
    images: list[str | Path] = ["--images", samples / "small", "--truth", samples / "large"]
    shipped = MODELS / "minisr" / "minisr_x2.onnx"
    tool(session, "compare", shipped, model, *images, "-o", folder / "compare.json", "--refresh", *MINISR_LIMITS)


@nox.session(default=False)
def bench_demo(session: nox.Session) -> None:
    """Run the demo and keep its figures; rewrites tests/bench/demo.json and the README's section."""
    demo(session)
    session.run("python", "-m", "tests.bench.demo")


@nox.session(default=False)
def bench_face_landmarker(session: nox.Session) -> None:
    """Run the face landmarker's recipe and keep its figures; rewrites tests/bench/face_landmarker.json and the README's table."""
    face_landmarker_int8(session)
    install(session, "tests")
    session.run("python", "-m", "tests.bench.face_landmarker")


@nox.session(default=False)
def bench_onnx(session: nox.Session) -> None:
    """Measure each mode of quantize_onnx on several models; rewrites tests/bench/onnx_modes.json and the README's table."""
    install(session, "tests")
    session.run("python", "-m", "tests.bench.onnx_modes", *session.posargs)


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure the guide's way and ours side by side; rewrites tests/bench/guide.json and the README's table."""
    install(session, "tests")
    session.run("python", "-m", "tests.bench.guide", *session.posargs)


if __name__ == "__main__":
    nox.main()
