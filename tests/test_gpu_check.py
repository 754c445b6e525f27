"""`make gpu-check` where there is no GPU: it says what it lacks; its table's arithmetic by hand."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line_and_fails():
    done = subprocess.run([sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: no GPU that torch can use: torch ")
    assert done.stdout.count("\n") == 1


def test_without_a_library_it_names_it_in_one_line_and_fails(tmp_path):
    """In a Python of its own, without the libraries that are installed here."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "env": {"PATH": os.environ["PATH"]}}
    done = subprocess.run([sys.executable, "-I", "-S", "benchmarks/gpu.py"], **options)
    assert done.returncode == 2
    assert done.stdout.startswith("gpu-check: cannot import ftfy, ")
    assert "torch, " in done.stdout
    assert done.stdout.count("\n") == 1
    assert not done.stderr


@pytest.mark.parametrize(
    ("card", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-32GB", 112),
        ("Tesla T4", 65),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA B200", None),
    ],
)
def test_a_cards_peak_is_its_own_or_unknown(gpu, card, peak):
    assert gpu.peak_of(card) == peak


def test_shares_of_the_peaks_by_hand(gpu):
    rate = gpu.Rate(name="forward", images=20_000, flops=10**10)  # 200 TFLOP/s
    assert rate.row([1000.0, 800.0]) == "| forward | 20,000 images per second | 200 | 20.0 % | 25.0 % |"
    assert rate.row([None, 800.0]) == "| forward | 20,000 images per second | 200 |  | 25.0 % |"


def test_the_tables_of_the_other_benchmarks_are_read_by_their_columns(gpu):
    lines = [
        "seconds",
        "",
        "| | images | ours, s |",
        "|---|---:|---:|",
        "| a | 1,024 | 3.5 |",
        "| b | 8 | |",
        "",
        "| x |",
    ]
    assert gpu.tables(lines) == [
        {"": "a", "images": "1,024", "ours, s": "3.5"},
        {"": "b", "images": "8", "ours, s": ""},
    ]
    assert gpu.number("1,024") == 1024


def test_operations_of_a_vit_b_32_by_hand(gpu):
    """Two per weight and token for its matrices, and attention; a backward pass makes twice as many, but for pixels."""
    vit = importlib.import_module("vit")
    tokens, width, layers = 50, 768, 12
    patches = 2 * 49 * (3 * 32 * 32) * width
    per_layer = 2 * tokens * 12 * width**2 + 2 * 2 * tokens**2 * width
    head = 2 * width * 512 + 2 * 512 * vit.CLASSES
    forward = patches + layers * per_layer + head
    assert vit.flops(training=False) == forward
    assert vit.flops(training=True) == 3 * forward - patches
