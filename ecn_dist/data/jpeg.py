"""Picture files in, JPEG bytes out."""

from io import BytesIO

from PIL import Image, ImageOps, UnidentifiedImageError

JPEG_QUALITY = 95
EXIF_ORIENTATION = 0x0112
READ_ERRORS = (OSError, UnidentifiedImageError, SyntaxError, ValueError, Image.DecompressionBombError)


class UnreadablePicture(Exception):
    """The bytes are no whole picture; the text says why."""


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, upright. `UnreadablePicture` where the bytes are damaged or no picture."""
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            return ImageOps.exif_transpose(image).convert("RGB")
    except READ_ERRORS as error:
        raise UnreadablePicture(str(error)) from error


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
    image = decode(data)
    with Image.open(BytesIO(data)) as header:
        plain = header.format == "JPEG" and header.mode in ("RGB", "L")
        plain = plain and header.getexif().get(EXIF_ORIENTATION, 1) == 1
    if max_size is not None and (image.height > max_size[0] or image.width > max_size[1]):
        scale = min(max_size[0] / image.height, max_size[1] / image.width)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image, plain = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=3.0), False
    return (data, image) if plain else (encode(image), image)
