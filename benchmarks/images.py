"""What an image costs: decoding and framing on one thread, and a ViT-B/32's forward pass, in milliseconds.

    python benchmarks/images.py [--threads N]

Pictures are large shapes with fine texture, as a JPEG of 500x375 and as a PNG of 2048x1536. Medians; threads are those
of the forward pass, on a batch of 64.
"""

import argparse
import io
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import open_clip
import torch
from PIL import Image

from modelstock.data.images import Framing
from modelstock.models.towers import build_visual


def picture(width: int, height: int, kind: str) -> bytes:
    """One picture as a file."""
    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 255, (height // 10, width // 10, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    pixels = np.clip(smooth + random.integers(-12, 13, smooth.shape), 0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **({"quality": 90} if kind == "jpeg" else {}))
    return buffer.getvalue()


def median(call: Callable[[], object], times: int) -> float:
    """Milliseconds of a call, after one that is not counted."""
    call()
    found = []
    for _ in range(times):
        begun = time.perf_counter()
        call()
        found.append(1000 * (time.perf_counter() - begun))
    return statistics.median(found)


def main() -> None:
    """Run it and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    print(f"{platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}\n")
    print("| | ms an image |\n|---|---:|")
    framing = Framing(224, "bicubic", "shortest")
    for width, height, kind, times in ((500, 375, "jpeg", 100), (2048, 1536, "png", 9)):
        file = picture(width, height, kind)
        taken = median(lambda file=file: framing(Image.open(io.BytesIO(file))), times)
        print(f"| {kind} of {width}x{height}, decoded and framed | {taken:.1f} |")
    tower = build_visual(open_clip.get_model_config("ViT-B-32-quickgelu")).eval()
    with torch.inference_mode():
        for dtype in (torch.float32, torch.bfloat16):
            tower.to(dtype)
            images = torch.zeros(64, 3, 224, 224, dtype=dtype)
            taken = median(lambda images=images: tower(images), 5) / 64
            print(f"| ViT-B/32 forward, {str(dtype).removeprefix('torch.')} | {taken:.0f} |")


if __name__ == "__main__":
    main()
