"""Write a video again with its frames changed, its sound kept as it is.

Source: FFmpeg by way of PyAV.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from shared.command.errors import ToolError, first_line
from shared.command.limits import limit
from shared.command.watchdog import reading
from shared.media.images import Pixels
from shared.media.video import AGAIN, no_video, require_container, require_whole

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer, OutputContainer

Change = Callable[[Iterator[Pixels]], Iterator[Pixels]]
ENCODER = "libx264"
FORMATS = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}  # ending of a name -> of FFmpeg's containers
FINE = Fraction(1, 90_000)  # seconds; unit of the times of frames
RGB, UNSPECIFIED, BT601, LIMITED = 0, 2, 5, 1  # FFmpeg's numbers of colour spaces, and of the range 16 to 235
EXACT = 0x40000 | 0x4000 | 0x2000 | 4  # of FFmpeg's scaler: rounds to nearest, full chroma, bicubic; else half a level too dark


def require_kind(kind: str) -> None:
    """Raise ToolError unless a name's ending is that of a video that can be written."""
    if kind not in FORMATS:
        raise ToolError(
            "no ending of a video", got=kind or "none", expected=", ".join(FORMATS), remedy="choose another name with -o"
        )


def frame_count(path: Path) -> int:
    """Return the number of frames that a video's container announces; 0 where it says nothing.

    Raises:
        ToolError: The file is missing or no video.
    """
    with _opened(path) as source:
        return round(_announced(source))


def _announced(read: "InputContainer") -> float:
    """Return how many frames a container announces, by its count or else its length."""
    video = read.streams.video[0]
    whole = read.duration / 1e6 if read.duration else 0.0  # that of the longest stream
    own = float(video.duration * video.time_base) if video.duration and video.time_base else _tagged_seconds(video.metadata)
    return float(video.frames or (own or (0.0 if read.streams.audio else whole)) * (video.average_rate or 0))


def _tagged_seconds(tags: Mapping[str, str]) -> float:
    """Return the length of a Matroska stream by its tag, 00:00:01.500000000; 0 where it has none."""
    parts = tags.get("DURATION", "").split(":")
    try:
        hours, minutes, seconds = map(float, parts)
    except ValueError:
        return 0.0
    return 3600 * hours + 60 * minutes + seconds


def transcode(source: Path, target: Path, kind: str, change: Change, *, crf: int) -> int:
    """Write a video whose frames went through `change`: H.264, 8 bits, the times of the frames and the sound as they were.

    Frames that the file turns by a note in its header are turned upright. Odd sizes and all others keep full size.

    Args:
        source: The video.
        target: File to write.
        kind: Ending of the name that the file will have, one of `FORMATS`.
        change: Takes all frames, uint8 (H, W, 3) RGB, one by one; yields as many, of the same size, in the same order.
        crf: Constant rate factor of the encoder, 0 (lossless) to 51.

    Returns:
        Number of frames.

    Raises:
        ToolError: The file is missing, no video, damaged, or has no frame.
    """
    import av

    require_kind(kind)
    try:
        with _opened(source) as read, av.open(str(target), "w", format=FORMATS[kind]) as written:
            count, announced = _copy(read, written, change, crf, source), _announced(read)
    except av.FFmpegError as error:
        remedy = f"choose a name in .mkv, which takes any sound, or {AGAIN}"
        raise ToolError("the video can't be written again", where=source, got=first_line(error), remedy=remedy) from None
    if not count:
        raise no_video(source)
    require_whole(source, count, announced)
    return count


@contextlib.contextmanager
def _opened(path: Path) -> "Iterator[InputContainer]":
    import av

    require_container(path)
    with reading(path):
        try:
            container = av.open(str(path.absolute()), options={"protocol_whitelist": "file"})
        except av.FFmpegError as error:
            raise no_video(path, first_line(error)) from None
    with container:
        if not container.streams.video:
            raise no_video(path, "no picture")
        context = container.streams.video[0].codec_context
        if context.width * context.height > limit("megapixels") * 1e6:
            remedy = "raise the limit with --limit megapixels=VALUE"
            raise ToolError("the frames have too many pixels", where=path, remedy=remedy)
        yield container


def _copy(read: "InputContainer", written: "OutputContainer", change: Change, crf: int, source: Path) -> int:
    """Decode, change and encode the frames, and hand packets of sound on; return the number of frames."""
    video, count = read.streams.video[0], 0
    video.thread_type = "AUTO"
    rate = video.average_rate or video.base_rate or Fraction(25)
    encoder: Any = written.add_stream(ENCODER, rate=rate, options={"crf": str(crf), "preset": "medium"})
    sounds = _sounds(read, written, source)
    waiting: list[Any] = []  # frames that were read and not yet written
    early: list[Any] = []  # sound before the first frame, whose size the container's header needs

    def frames() -> Iterator[Pixels]:
        with reading(source) as goes_on:
            for packet in read.demux([video, *read.streams.audio]):
                goes_on()
                if packet.stream_index != video.index:
                    if packet.dts is not None:
                        packet.stream = sounds[packet.stream_index]
                        (written.mux if count else early.append)(packet)
                    continue
                for frame in cast("list[VideoFrame]", packet.decode()):
                    waiting.append(frame)
                    pixels = frame.reformat(format="rgb24", interpolation=EXACT).to_ndarray()
                    yield np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90))

    for pixels in change(frames()):
        if not count:
            _describe(encoder, pixels, waiting[0], video.sample_aspect_ratio)
        written.mux(encoder.encode(_encodable(pixels, waiting.pop(0), encoder, count, rate)))
        count += 1
        while early:
            written.mux(early.pop(0))
    if count:
        written.mux(encoder.encode(None))
    return count


def _sounds(read: "InputContainer", written: "OutputContainer", source: Path) -> dict[int, Any]:
    """Return a stream of sound to write for each one that is read, by its index."""
    try:
        return {stream.index: written.add_stream_from_template(stream) for stream in read.streams.audio}
    except ValueError as error:  # of PyAV, for sound that the container does not take
        remedy = "choose a name in .mkv, which takes any sound"
        raise ToolError("the sound can't be kept", where=source, got=first_line(error), remedy=remedy) from None


def _describe(encoder: Any, pixels: Pixels, read: Any, aspect: Fraction | None) -> None:
    """Set up an encoder for frames of that size, with colours and shape of pixels of a frame that was read."""
    encoder.height, encoder.width = pixels.shape[:2]
    encoder.pix_fmt = "yuv420p" if pixels.shape[0] % 2 == pixels.shape[1] % 2 == 0 else "yuv444p"
    encoder.codec_context.time_base = FINE
    context = encoder.codec_context
    is_rgb = read.colorspace == RGB  # of a source without luma and chroma: the result has them
    context.colorspace = UNSPECIFIED if is_rgb else read.colorspace
    context.color_range = LIMITED if is_rgb else read.color_range or LIMITED
    context.color_primaries, context.color_trc = read.color_primaries, read.color_trc
    if aspect:
        context.sample_aspect_ratio = 1 / aspect if read.rotation % 180 else aspect


def _encodable(pixels: Pixels, read: Any, encoder: Any, number: int, rate: Fraction) -> Any:
    """Return pixels as a frame to encode, shown when the frame that was read is; else by its number."""
    from av import VideoFrame

    context = encoder.codec_context
    space = BT601 if context.colorspace == UNSPECIFIED else context.colorspace  # the scaler's own choice when it decodes
    frame = VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
        format=encoder.pix_fmt, interpolation=EXACT, dst_colorspace=space, dst_color_range=context.color_range
    )
    seconds = number / rate if read.pts is None else read.pts * read.time_base  # AVI has no times of its own
    frame.pts, frame.time_base = round(seconds / FINE), FINE
    return frame
