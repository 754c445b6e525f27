"""CLIPs of every kind of architecture with random weights, and folders as open_clip publishes models."""

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from safetensors.torch import save_file

from modelstock.models import towers as models
from modelstock.weights.weight_set import WeightSet

TINY = models.TINY_CLIP
TEXT = TINY["text_cfg"]


def timm_config(name: str, size: int, pool: str) -> dict[str, Any]:
    """A CLIP whose image tower is one of timm's."""
    vision = {
        "timm_model_name": name,
        "timm_pool": pool,
        "timm_proj": "linear",
        "image_size": size,
        "timm_model_pretrained": True,
    }
    return {"embed_dim": 32, "vision_cfg": vision, "text_cfg": TEXT}


CONFIGS = {
    "CLIP": TINY,
    "QuickGELU": {**TINY, "quick_gelu": True},
    "ResNet": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16},
        "text_cfg": TEXT,
    },
    "CustomTextCLIP": {**TINY, "custom_text": True, "init_logit_bias": -10},
    "CoCa": {
        **TINY,
        "custom_text": True,
        "vision_cfg": {**TINY["vision_cfg"], "output_tokens": True, "attentional_pool": True, "attn_pooler_heads": 2},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 16, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 1},
    },
    "a ViT of timm": timm_config("vit_tiny_patch16_224", 224, ""),
    "rotary embeddings": {
        **open_clip.get_model_config("PE-Core-T-16-384"),
        "text_cfg": TEXT,
        "embed_dim": 512,
        "custom_text": False,
    },
    "relative positions and masks": timm_config("swin_tiny_patch4_window7_224", 224, "avg"),
}


def clip_of(config: dict[str, Any], seed: int = 0) -> tuple[torch.nn.Module, WeightSet]:
    """A CLIP with random weights, and its weight set."""
    torch.manual_seed(seed)
    model = models.build_clip(config).eval()
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    meta = {"architecture": config, "backbone": {"name": "tiny", "pretrained": "random"}, "preprocess": preprocess}
    return model, WeightSet(models.tensors_of(model), meta, "clip")


def folder_of(path: Path, state: dict[str, torch.Tensor], config: dict[str, Any], **preprocess: Any) -> Path:
    """Write a folder that open_clip loads."""
    path.mkdir()
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    save_file(state, path / "open_clip_model.safetensors")
    return path
