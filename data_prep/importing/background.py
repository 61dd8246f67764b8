"""Puts transparent images on a background that is chosen, or drawn for each of them."""

import argparse
import hashlib
import io

from PIL import Image, ImageColor

from dico_t2i.data.decode import decode_whole, is_transparent

RANDOM = "random"

Colour = tuple[int, int, int]


def add_background_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--background",
        type=background,
        metavar="COLOUR",
        help="put transparent images on this colour, such as white or #808080, or on a random one (default: keep the"
        " transparency, which is read as white)",
    )


def background(text: str) -> str:
    """A colour that Pillow knows, or "random"."""
    if text != RANDOM:
        try:
            ImageColor.getcolor(text, "RGB")
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither a colour nor {RANDOM}") from None
    return text


def on_background(data: bytes, name: str, key: str) -> tuple[bytes, Colour] | None:
    """The image on its background, as a PNG, and the colour; None if it is not transparent. Raises SampleError.

    name: a colour, or "random", which the key then decides.
    """
    if not is_transparent(data):
        return None
    colour = _drawn(key) if name == RANDOM else ImageColor.getrgb(name)[:3]
    buffer = io.BytesIO()
    Image.fromarray(decode_whole(data, colour)).save(buffer, "PNG")
    return buffer.getvalue(), colour


def _drawn(key: str) -> Colour:
    red, green, blue = hashlib.sha256(f"background {key}".encode()).digest()[:3]
    return red, green, blue
