"""Recipes that press a model from checkpoint to verified product, and one session per tool.

nox -s demo                                         # everything on a small trained detector, in two minutes
nox -s chunkyseal_int8                              # rehearsal with seeded weights, or your checkpoint if it is found
nox -s chunkyseal_int8 -- --checkpoint FILE         # from your checkpoint
nox -s chunkyseal_int8 -- --download                # from the published one
nox -s face_landmarker_int8 -- --bundle FILE        # a MediaPipe bundle
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
TOOLS = {
    "extract_weights": "Take one component's weights out of a full training checkpoint.",
    "convert_detector": "Convert a watermark detector to TFLite, checked against torch.",
    "quantize_tflite": "Quantize a TFLite model or a MediaPipe bundle, and say what became of every layer.",
    "verify": "Check that a TFLite model loads, runs, repeats itself and stays in range.",
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
    parser = argparse.ArgumentParser(prog=f"nox -s {session.name} --")
    parser.add_argument("--checkpoint", type=Path, help="full or detector-only checkpoint, .pth or .safetensors")
    parser.add_argument("--download", action="store_true", help="fetch the published checkpoint if none is found")
    options = parser.parse_args(session.posargs)
    install(session, "recipe")

    # A detector-only file; left out when there is no checkpoint anywhere.
    weights = MODELS / f"{model}_detector.safetensors"
    given = [options.checkpoint.absolute()] if options.checkpoint else []
    wanted = ["--download"] if options.download else ["--allow-missing"]
    tool(session, "extract_weights", *given, "--model", model, "-o", weights, *wanted, "--refresh")
    rehearsal = not weights.exists()

    # The float32 model, checked against torch.
    card = nox.project.load_toml(MODELS / f"{model}.toml")
    stem = f"{card['output_prefix']}{'_rehearsal' if rehearsal else ''}_{card['image_size']}"
    float_model = MODELS / f"{stem}.tflite"
    source = ["--rehearsal"] if rehearsal else ["--checkpoint", weights]
    tool(session, "convert_detector", "--model", model, *source, "-o", float_model, "--refresh")

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
    if rehearsal:
        session.warn(f"REHEARSAL: {product} holds seeded, untrained weights. Give a checkpoint for a model that reads messages.")


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
    session.run("pytest", *session.posargs)


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
def bench_demo(session: nox.Session) -> None:
    """Run the demo and keep its figures; rewrites tests/demo.json and the README's section."""
    demo(session)
    session.run("python", "-m", "tests.demo")


@nox.session(default=False)
def bench_face_landmarker(session: nox.Session) -> None:
    """Run the face landmarker's recipe and keep its figures; rewrites tests/face_landmarker.json and the README's table."""
    face_landmarker_int8(session)
    install(session, "tests")
    session.run("python", "-m", "tests.face_landmarker")


@nox.session(default=False)
def bench(session: nox.Session) -> None:
    """Measure the guide's way and ours side by side; rewrites tests/bench.json and the README's table."""
    install(session, "tests")
    session.run("python", "-m", "tests.bench", *session.posargs)


if __name__ == "__main__":
    nox.main()
