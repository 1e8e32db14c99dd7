"""Picture files in, JPEG bytes out."""

from io import BytesIO

from PIL import Image, ImageOps

JPEG_QUALITY = 95
EXIF_ORIENTATION = 0x0112


class UnreadablePicture(Exception):
    """The bytes are no whole picture; the text says why."""


def decode(data: bytes) -> Image.Image:
    """The whole picture as RGB, upright. `UnreadablePicture` where the bytes are damaged or no picture."""
    return _load(data)[0]


def _load(data: bytes) -> tuple[Image.Image, bool]:
    """The picture, and whether the bytes are a JPEG that any decoder shows just so."""
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
            upright = image.getexif().get(EXIF_ORIENTATION, 1) == 1
            plain = image.format == "JPEG" and image.mode in ("RGB", "L") and upright
            return (image if upright else ImageOps.exif_transpose(image)).convert("RGB"), plain
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
