import pytest
import torch

from pml_tacl.models import AttentionEmbedder
from pml_tacl.models.self_attention import self_attention_map


def images(n=2):
    return torch.randn(n, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def build(name="test_vit", **kwargs):
    torch.manual_seed(0)
    return AttentionEmbedder(name, embedding_dim=8, img_size=64, **kwargs).eval()


@pytest.mark.parametrize(
    "prefix", [{}, {"reg_tokens": 3}, {"class_token": False, "global_pool": "avg"}]
)
def test_against_the_formula(prefix):
    model = build(**prefix)
    attention = model.trunk.model.blocks[3].attn
    inputs = []
    hook = attention.register_forward_pre_hook(lambda _, x: inputs.append(x[0]))
    model(images())
    hook.remove()
    n, length, _ = inputs[0].shape
    q, k, _ = attention.qkv(inputs[0]).reshape(n, length, 3, attention.num_heads, -1).unbind(2)
    weights = torch.einsum("nqhd,nkhd->nhqk", q * attention.scale, k).softmax(-1).mean(1)
    row = weights.mean(1) if prefix.get("class_token") is False else weights[:, 0]
    expected = row[:, -16:] / row[:, -16:].sum(1, keepdim=True)
    actual = model.self_attention(images(), block=3)
    torch.testing.assert_close(actual, expected.view(2, 4, 4))
    torch.testing.assert_close(actual, model.self_attention(images(), block=-3))


def test_eva():
    model = build("vit_small_patch16_dinov3", depth=2, embed_dim=48, num_heads=2)
    attention = model.self_attention(images())
    assert attention.shape == (2, 4, 4)
    torch.testing.assert_close(attention.sum((1, 2)), torch.ones(2))


def test_fused_attention_is_restored():
    model = build()
    attentions = [block.attn for block in model.trunk.model.blocks]
    before = [attention.fused_attn for attention in attentions]
    assert all(before)
    expected = model(images())
    model.self_attention(images())
    with pytest.raises(AssertionError):
        self_attention_map(model.trunk.model, images()[..., :-3, :])
    assert [attention.fused_attn for attention in attentions] == before
    assert not any(a.attn_drop._forward_pre_hooks for a in attentions)
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=0)


def test_errors():
    for block in (6, 1.5):
        with pytest.raises(ValueError, match=f"block must be .* from -6 to 5, got {block}"):
            build().self_attention(images(), block=block)
    with pytest.raises(ValueError, match=r"model must be a timm ViT, .* got ResNet: see the atten"):
        AttentionEmbedder("test_resnet", embedding_dim=8).self_attention(images())
    model = build()
    model.trunk.model.blocks[2].attn.attn_drop = None
    with pytest.raises(ValueError, match=r"block=2 of VisionTransformer has no readable .*: give"):
        model.self_attention(images(), block=2)
    model.trunk.model.blocks[3].attn.attn_drop = torch.nn.Identity()  # of whatever goes through
    model.trunk.model.blocks[3].attn.forward = lambda x, *_, **__: x
    with pytest.raises(ValueError, match=r"block=3 of VisionTransformer has no attention .*: give"):
        model.self_attention(images(), block=3)
