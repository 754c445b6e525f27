"""The backbone that an experiment starts from, whatever library it comes from."""

from modelstock.models.pretrained import load_clip
from modelstock.models.text_towers import load_encoder, text_side
from modelstock.models.timm_models import load_timm
from modelstock.params import OpenClipPretraining, OpenClipTextPretraining, TimmPretraining, TransformersPretraining
from modelstock.weights.weight_set import WeightSet

Published = OpenClipPretraining | OpenClipTextPretraining | TransformersPretraining | TimmPretraining


def load_backbone(section: Published) -> WeightSet:
    """The backbone of a section, as a weight set without a head.

    Raises:
        DataError, ParamsError, WeightsError: see load_clip, text_side, load_encoder and load_timm.
    """
    if isinstance(section, TransformersPretraining):
        return load_encoder(section)
    if isinstance(section, TimmPretraining):
        return load_timm(section)
    clip = load_clip(section.architecture, section.pretrained, seed=section.seed)
    return text_side(clip, length=section.length) if isinstance(section, OpenClipTextPretraining) else clip
