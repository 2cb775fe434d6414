"""Makes `pictures/` and `pictures/browser.json`: what headless Chromium draws of a dozen files on a white page.

python tests/data/browser.py        needs Chromium; the test that reads the file does not
"""

import io
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

FOLDER = Path(__file__).parent / "pictures"
SIDE, SHOWN = 16, 4


def pictures() -> dict[str, bytes]:
    """Small files of the kinds that are easily misread."""
    y, x = np.mgrid[0:4, 0:4].repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    rgb = np.stack([x * 80, y * 80, 200 - x * 40], -1).astype(np.uint8)
    alpha = ((x + y) * 42).astype(np.uint8)
    colour, grey = Image.fromarray(rgb), Image.fromarray((x * 60 + y * 15).astype(np.uint8))
    rgba, la = colour.copy(), Image.merge("LA", (grey, Image.fromarray(alpha)))
    rgba.putalpha(Image.fromarray(alpha))
    palette = colour.quantize(16)
    wide = Image.fromarray((x * 16000 + y * 4000).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    black = Image.new("LA", (SIDE, SIDE), (0, 0))  # a black drawing on nothing: black all over, read carelessly
    black.paste((0, 255), (0, 0, SIDE // 2, SIDE // 2))
    made = {
        "alpha.png": (rgba, {}),
        "grey-alpha.png": (la, {}),
        "black-on-nothing.png": (black, {}),
        "palette.png": (palette, {}),
        "palette-clear.png": (palette, {"transparency": 3}),
        "palette-alpha.png": (palette, {"transparency": bytes(range(0, 256, 16))}),
        "clear-colour.png": (colour, {"transparency": (0, 0, 200)}),
        "sixteen.png": (wide, {}),
        "one-bit.png": (grey.convert("1"), {}),
        "turned.jpg": (colour, {"exif": turned, "quality": 95, "subsampling": 0}),
        "cmyk.jpg": (colour.convert("CMYK"), {"quality": 95, "subsampling": 0}),
        "grey.jpg": (grey, {"quality": 95}),
        "clear.gif": (palette, {"transparency": 5}),
        "alpha.webp": (rgba, {"lossless": True, "exact": True}),
        "plain.bmp": (colour, {}),
    }
    files = {}
    for name, (image, options) in made.items():
        buffer = io.BytesIO()
        image.save(buffer, {"jpg": "JPEG"}.get(name[-3:], name.rpartition(".")[2].upper()), **options)
        files[name] = buffer.getvalue()
    return files


def main() -> None:
    """Write the files and what the browser draws of them."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("needs Chromium")
    FOLDER.mkdir(exist_ok=True)
    drawn = {}
    for name, content in pictures().items():
        (FOLDER / name).write_bytes(content)
        with tempfile.TemporaryDirectory() as place:
            page, shot = Path(place) / "page.html", Path(place) / "shot.png"
            page.write_text(
                "<body style='margin:0;background:white'>"
                f"<img src='{(FOLDER / name).as_uri()}' style='image-rendering:pixelated;display:block'>"
            )
            switches = "--headless --no-sandbox --disable-gpu --disable-background-networking --hide-scrollbars"
            call = [browser, *switches.split(), "--force-color-profile=srgb", f"--user-data-dir={place}/profile"]
            call += ["--window-size=400,300", f"--screenshot={shot}", page.as_uri()]
            subprocess.run(call, check=True, capture_output=True, timeout=120)
            with Image.open(shot) as image:
                pixels = np.asarray(image.convert("RGB"))
        step = SIDE // SHOWN
        drawn[name] = pixels[step // 2 : SIDE : step, step // 2 : SIDE : step].tolist()
    (FOLDER / "browser.json").write_text(json.dumps(drawn) + "\n")


if __name__ == "__main__":
    main()
