"""Picture files in, JPEG bytes out. Every picture file that this program reads is opened here, or by `reader.decode`.

A file may come from anybody: only the formats that pack takes are opened (Pillow knows some that are programs, such as
PostScript), and none that would take gigabytes of memory.
"""

import os
from io import BytesIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 95
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "PPM")
MAX_PIXELS = 1 << 26
MAX_BYTES = 1 << 28  # of a file; more than any of MAX_PIXELS takes
MIN_SIDE = 2  # what is smaller has no part to crop
WIDE_GREY = ("I;16", "I;16L", "I;16B", "I;16N")  # Pillow's modes of 16-bit grey
FORMATS_OF_WIDE_GREY = ("PNG", "PPM")  # whose 16-bit grey is also opened as mode I, by some versions of Pillow
UNKNOWN_RANGE = ("I", "F")
EXIF_ORIENTATION = 0x0112


class UnreadablePicture(Exception):
    """The bytes are no whole picture, none with a way to 8 bits, or too small or large a one; the text says why."""


def check_size(height: int, width: int) -> None:
    """`UnreadablePicture` where nothing can be cropped of such a picture, or it is no picture of a person."""
    if min(height, width) < MIN_SIDE or height * width > MAX_PIXELS:
        raise UnreadablePicture(
            f"it has {height} x {width} pixels; from {MIN_SIDE} x {MIN_SIDE} to {MAX_PIXELS} in all are taken"
        )


def read_file(path: str | os.PathLike[str]) -> bytes:
    """The bytes of a picture file. `UnreadablePicture` where they are too many to be one, `OSError` as of any file."""
    with open(path, "rb") as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_BYTES:
            raise UnreadablePicture(f"it has {size:,} bytes; at most {MAX_BYTES:,} are taken")
        return file.read()


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, upright. `UnreadablePicture` where the bytes are damaged or no picture."""
    return _load(data)[0]


def to_rgb(image: Image.Image) -> Image.Image:
    """An opened picture as upright RGB of 8 bits a channel: every picture comes into the program here.

    16-bit grey, as infrared cameras give, is divided by 257 and rounded, so that 0..65535 becomes 0..255 evenly.
    `UnreadablePicture` for Pillow's modes I and F, of which nobody can tell which value is white.
    """
    image.load()
    upright = image if _is_upright(image) else ImageOps.exif_transpose(image)
    if image.mode in WIDE_GREY or (image.mode == "I" and image.format in FORMATS_OF_WIDE_GREY):
        grey_hw = (np.asarray(upright).astype(np.uint32) + 128) // 257
        upright = Image.fromarray(grey_hw.astype(np.uint8))
    elif image.mode in UNKNOWN_RANGE:
        raise UnreadablePicture(
            f"it is of Pillow's mode {image.mode}, whose range of values is unknown; convert it to 8 or 16 bits"
        )
    return upright.convert("RGB")


def _is_upright(image: Image.Image) -> bool:
    return image.getexif().get(EXIF_ORIENTATION, 1) == 1


def is_turned(data: bytes) -> bool:
    """Whether the picture is stored on its side or mirrored, or so damaged that its EXIF data cannot be read."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            return not _is_upright(image)
    except Exception:  # PIL's readers of damaged files raise almost anything
        return True


def _load(data: bytes) -> tuple[Image.Image, bool]:
    """The picture, and whether the bytes are a JPEG that any decoder shows just so."""
    try:
        with Image.open(BytesIO(data), formats=FORMATS) as image:
            check_size(image.height, image.width)  # before a pixel is read
            image.load()
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and _is_upright(image)
            return to_rgb(image), plain
    except UnreadablePicture:
        raise
    except UnidentifiedImageError as error:  # whose own text names an object in memory
        raise UnreadablePicture(f"its bytes are of none of the formats {', '.join(FORMATS)}") from error
    except Exception as error:  # PIL's readers of damaged files raise almost anything
        raise UnreadablePicture(str(error) or type(error).__name__) from error


def encode(image: Image.Image) -> bytes:
    """JPEG bytes, the same for the same picture."""
    buffer = BytesIO()
    image.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()


def as_stored(data: bytes, max_size: tuple[int, int] | None = None) -> tuple[bytes, Image.Image]:
    """A picture file's bytes as a shard holds them, and the picture (RGB).

    A JPEG stays as it is, byte for byte. It is encoded anew where it is another format, larger than `max_size` (height,
    width; it is then reduced to fit, keeping its shape), turned by an EXIF orientation, or neither RGB nor grey: not
    every decoder minds these.
    """
    image, plain = _load(data)
    if max_size is not None and (image.height > max_size[0] or image.width > max_size[1]):
        scale = min(max_size[0] / image.height, max_size[1] / image.width)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image, plain = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0), False
    return (data, image) if plain else (encode(image), image)
