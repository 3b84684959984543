"""SVG to pixels."""

import resvg_py


def rasterise(svg: str, size: int) -> bytes:
    """Draw an SVG on a white square, in black where it names no colour, and return a PNG."""
    options = {"width": size, "height": size, "background": "white", "skip_system_fonts": True}
    return bytes(resvg_py.svg_to_bytes(svg_string=svg, **options))
