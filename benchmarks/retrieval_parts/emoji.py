"""Emoji as several openly licensed sets draw them, from npm packages that are fetched once."""

import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from pml_tacl.utils.errors import MissingPackageError

# Side of a drawing as it is kept: half as much again as the sharpest use, an object on 96 pixels.
SIDE = 128
# Package, version, folder and ending of its drawings, licence of the drawings.
SETS = {
    "Noto": ("emoji-datasource-google", "16.0.0", "img/google/64", "png", "Apache-2.0"),
    "Twemoji": ("emoji-datasource-twitter", "16.0.0", "img/twitter/64", "png", "CC-BY 4.0"),
    "OpenMoji": ("openmoji", "17.0.0", "color/svg", "svg", "CC-BY-SA 4.0"),
    "Fluent": ("@lobehub/fluent-emoji-3d", "1.1.0", "assets", "webp", "MIT"),
}
_LIST = "emoji.json"  # of Noto's package: every emoji, variants of skin inside each


def fetch(package: str, version: str, cache: Path) -> Path:
    """The package's archive, from the cache or through npm.

    Raises:
        OSError: if npm is missing or gives no such package.
    """
    target = cache / f"{package.replace('@', '').replace('/', '-')}-{version}.tgz"
    if target.is_file():
        return target
    if shutil.which("npm") is None:
        raise OSError(f"{package}@{version} is fetched with npm: install it, or put {target}")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["npm", "pack", f"{package}@{version}", "--pack-destination", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        found = list(Path(folder).glob("*.tgz"))
        if done.returncode or len(found) != 1:
            last = (done.stderr.strip() or "no archive").splitlines()[-1]
            raise OSError(f"npm pack {package}@{version} failed: {last}")
        found[0].replace(target)
    return target


def code_of(name: str) -> str:
    """One spelling for the code points of a file or list: no variation selector, no zeros."""
    parts = [part.lstrip("0") for part in name.lower().split("-")]
    return "-".join(part for part in parts if part != "fe0f")


def drawings(cache: Path, fetcher: Callable[[str, str, Path], Path] = fetch) -> dict[str, list]:
    """Every emoji that all sets draw, each set in its own way.

    Skin tones are left out, and of drawings that one set uses for several emoji all but the
    first, as its list orders them.

    Args:
        cache: folder of the archives.
        fetcher: (package, version, cache) -> archive.

    Returns:
        By code points, in their order: the sets' drawings, RGBA, cropped to what is drawn.
    """
    archives = {name: fetcher(*entry[:2], cache) for name, entry in SETS.items()}
    wanted = _emoji_codes(archives["Noto"])
    found: dict[str, dict[str, Image.Image]] = {}
    for name, (_, _, folder, ending, _) in SETS.items():
        files = _read(archives[name], folder, ending)
        seen: set[bytes] = set()
        for code in wanted:
            if code in files:
                image = _open(files[code], ending)
                pixels = np.asarray(image)
                key = (pixels * (pixels[..., 3:] > 0)).tobytes()
                if key not in seen and pixels[..., 3].any():
                    found.setdefault(code, {})[name] = image.crop(image.getchannel("A").getbbox())
                seen.add(key)
    return {c: [found[c][s] for s in SETS] for c in sorted(found) if len(found[c]) == len(SETS)}


def _emoji_codes(archive: Path) -> list[str]:
    with tarfile.open(archive) as file:
        listed = json.loads(file.extractfile(f"package/{_LIST}").read())  # type: ignore[union-attr]
    kept = [e for e in listed if e.get("category") != "Component"]
    return [code_of(e["unified"]) for e in sorted(kept, key=lambda e: e["sort_order"])]


def _read(archive: Path, folder: str, ending: str) -> dict[str, bytes]:
    start, files = f"package/{folder}/", {}
    with tarfile.open(archive) as file:
        for member in file:
            name = member.name
            if name.startswith(start) and name.endswith(f".{ending}"):
                data = file.extractfile(member)
                if data is not None:
                    files[code_of(name[len(start) : -len(ending) - 1])] = data.read()
    return files


def _open(data: bytes, ending: str) -> Image.Image:
    if ending == "svg":
        try:
            import resvg_py  # of all sets only one is not in pixels
        except ImportError as error:
            raise MissingPackageError(
                "OpenMoji's drawings are SVG: pip install resvg-py"
            ) from error
        data = bytes(resvg_py.svg_to_bytes(svg_string=data.decode(), width=SIDE, height=SIDE))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    if max(image.size) > SIDE:
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return image
