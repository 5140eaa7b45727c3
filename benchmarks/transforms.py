"""Compare the speed of `SiameseTransform`, with decoding, to the same views without points.

The views without points use plain torchvision: a random resized crop for each view, a flip, the
geometric transform on the second view, photometric transforms and normalisation. Both take turns
on one thread over the same JPEG files in memory. The result is the ratio of their medians.

    python benchmarks/transforms.py               # writes docs/benchmarks/transforms.md
    python benchmarks/transforms.py --images 8 --rounds 3 --output -
"""

import argparse
import datetime
import io
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from _common import cpu_model, publish
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2

from pml_tacl import SiameseTransform, __version__

SIZE, GRID, HEIGHT, WIDTH = 224, 14, 375, 500

GEOMETRIC: dict[str, nn.Module | None] = {
    "crop and flip": None,
    "rotation": v2.RandomRotation(20),
    "affine": v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10),
    "perspective": v2.RandomPerspective(0.4, p=1.0),
    "affine, then perspective": v2.Compose(
        [v2.RandomAffine(15, (0.1, 0.1), (0.8, 1.2), 10), v2.RandomPerspective(0.4, p=1.0)]
    ),
    "elastic": v2.ElasticTransform(50.0, 5.0),
}


def jpeg_files(count: int) -> list[bytes]:
    """Return JPEG files like photographs (smooth colours with grain), with similar decode time."""
    generator = torch.Generator().manual_seed(0)
    files = []
    for _ in range(count):
        coarse = torch.rand(1, 3, 12, 16, generator=generator)
        image = F.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0]
        image += 0.05 * torch.randn(3, HEIGHT, WIDTH, generator=generator)
        pixels = image.clamp(0, 1).mul(255).byte().permute(1, 2, 0).numpy()
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=90)
        files.append(file.getvalue())
    return files


def without_points(ours: SiameseTransform) -> Callable[[Image.Image], tuple[Tensor, Tensor]]:
    """Return the same steps of torchvision with the same parameters."""
    crop = v2.RandomResizedCrop(ours.size, ours.crop_scale, ours.crop_ratio, ours.interpolation)
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(ours.mean, ours.std)]
    first = v2.Compose([crop, ours.photometric, *finish])
    geometric = [] if ours.geometric is None else [ours.geometric]
    second = v2.Compose([crop, v2.RandomHorizontalFlip(), *geometric, ours.photometric, *finish])
    to_tensor = v2.PILToTensor()

    def views(image: Image.Image) -> tuple[Tensor, Tensor]:
        pixels = to_tensor(image)
        return first(pixels), second(pixels)

    return views


def seconds(transform: Callable[[Image.Image], object], files: list[bytes], turn: int) -> float:
    """Return the CPU time of one thread, which other processes hardly change."""
    torch.manual_seed(turn)
    start = time.process_time()
    for file in files:
        transform(Image.open(io.BytesIO(file)).convert("RGB"))
    return time.process_time() - start


def measure(count: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return median images per second with and without points for each geometric transform."""
    files, found = jpeg_files(count), {}
    for name, geometric in GEOMETRIC.items():
        ours = SiameseTransform(SIZE, GRID, geometric=geometric)
        contenders = [ours, without_points(ours)]
        times: list[list[float]] = [[], []]
        for turn in range(rounds + 1):  # the first round is a warm-up
            for index in (0, 1) if turn % 2 else (1, 0):
                taken = seconds(contenders[index], files, turn)
                if turn:
                    times[index].append(taken)
        found[name] = (count / statistics.median(times[0]), count / statistics.median(times[1]))
        print(name, found[name], file=sys.stderr)
    return found


def report(found: dict[str, tuple[float, float]], count: int, rounds: int) -> str:
    lines = [
        "# Speed of the two views",
        "",
        f"Written by `benchmarks/transforms.py` on {datetime.date.today()}: {cpu_model()}, one "
        f"thread, Python {platform.python_version()}, torch "
        f"{torch.__version__.partition('+')[0]}, torchvision "
        f"{torchvision.__version__.partition('+')[0]}, pml_tacl {__version__}.",
        "",
        f"Images per second of CPU time, from a JPEG file of {WIDTH} x {HEIGHT} pixels to two "
        f"normalised views of {SIZE} x {SIZE}, including decoding. With points: a grid of "
        f"{GRID} x {GRID} points. Without points: torchvision's own steps with the same parameters "
        f"and photometric transforms. Medians of {rounds} turns of {count} images each.",
        "",
        "| geometric | with points | without | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {ours:.0f} | {plain:.0f} | {ours / plain:.2f} |"
        for name, (ours, plain) in found.items()
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--output", default="docs/benchmarks/transforms.md", help="page; - prints it"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(arguments.images, arguments.rounds)
    text = report(found, arguments.images, arguments.rounds)
    publish(text, arguments.output)


if __name__ == "__main__":
    main()
