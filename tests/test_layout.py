"""In which block of its network a tensor is, read off its name."""

from modelstock.weights.layout import blocks, depths


def test_depth_is_read_off_the_names_of_many_architectures():
    depth = depths(
        [
            "visual.conv1.weight",
            "visual.class_embedding",
            "visual.ln_pre.weight",
            "visual.proj",
            "head.weight",
            *(f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(5)),
            *(f"transformer.resblocks.{i}.ln_1.weight" for i in range(3)),
            "token_embedding.weight",
            "ln_final.weight",
            "resnet.layer1.0.conv1.weight",
            "resnet.layer4.2.bn3.weight",
            "model.embed_tokens.weight",
            "model.layers.0.q.weight",
            "model.layers.1.q.weight",
            "lm_head.weight",
        ]
    )
    zero = [
        "visual.conv1.weight",
        "visual.class_embedding",
        "visual.ln_pre.weight",
        "token_embedding.weight",
        "model.embed_tokens.weight",
        "resnet.layer1.0.conv1.weight",
        "model.layers.0.q.weight",
    ]
    one = [
        "visual.proj",
        "head.weight",
        "ln_final.weight",
        "resnet.layer4.2.bn3.weight",
        "lm_head.weight",
        "visual.transformer.resblocks.4.mlp.c_fc.weight",
        "transformer.resblocks.2.ln_1.weight",
    ]
    assert [depth[n] for n in zero] == [0] * len(zero)
    assert [depth[n] for n in one] == [1] * len(one)
    assert depth["visual.transformer.resblocks.1.mlp.c_fc.weight"] == 0.25
    assert depth["transformer.resblocks.1.ln_1.weight"] == 0.5


def test_blocks_by_hand():
    openai = [f"visual.transformer.resblocks.{i}.attn.out_proj.weight" for i in range(4)]
    outside = {
        "visual.class_embedding": -1,
        "visual.positional_embedding": -1,
        "visual.conv1.weight": -1,
        "visual.ln_pre.bias": -1,
        "visual.ln_post.weight": 4,
        "visual.proj": 4,
        "head.bias": 4,
    }
    assert blocks([*openai, *outside]) == {
        **{name: (i, 4) for i, name in enumerate(openai)},
        **{name: (i, 4) for name, i in outside.items()},
    }
    resnet = {
        "visual.conv3.weight": -1,
        "visual.bn2.bias": -1,
        "visual.layer1.0.conv1.weight": 0,
        "visual.layer4.2.bn3.weight": 3,
        "visual.attnpool.positional_embedding": 4,
    }
    assert blocks(list(resnet)) == {name: (i, 4) for name, i in resnet.items()}
    timm = {
        "visual.trunk.patch_embed.proj.bias": -1,
        "visual.trunk.blocks.0.norm1.weight": 0,
        "visual.trunk.blocks.2.norm1.weight": 2,
        "visual.trunk.attn_pool.latent": 3,
        "visual.trunk.norm.weight": 3,
    }
    assert blocks(list(timm)) == {name: (i, 3) for name, i in timm.items()}
    efficientnet = {
        "visual.conv_stem.weight": -1,
        "visual.bn1.weight": -1,
        "visual.blocks.0.0.bn2.weight": 0,
        "visual.blocks.6.0.conv_dw.weight": 6,
        "visual.conv_head.weight": 7,
        "visual.bn2.weight": 7,
    }
    assert blocks(list(efficientnet)) == {name: (i, 7) for name, i in efficientnet.items()}
    assert blocks(["fc.weight"]) == {"fc.weight": (0, 0)}


def test_names_without_numbers_have_no_depth():
    assert depths(["fc.weight", "fc.bias"]) == {}
