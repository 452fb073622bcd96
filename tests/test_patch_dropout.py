"""Patch dropout: the tower on kept patches equals the tower written out on those tokens, for CLIP and SigLIP."""

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from encoder.patch_dropout import kept_patches, only_patches

NUM_PATCHES = 16  # of the tiny tower


@pytest.fixture()
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_draws_are_of_image_and_step_alone():
    whole = kept_patches(range(8), 5, 0, 100, 0.75)
    assert whole.shape == (8, 25) and bool((whole.diff(dim=1) > 0).all()) and whole.min() >= 0 and whole.max() < 100
    halves = [kept_patches(range(first, first + 4), 5, 0, 100, 0.75) for first in (0, 4)]
    assert torch.equal(torch.cat(halves), whole)  # on any number of ranks
    assert len({tuple(row) for row in whole.tolist()}) == 8
    for other in (kept_patches(range(8), 6, 0, 100, 0.75), kept_patches(range(8), 5, 1, 100, 0.75)):
        assert not torch.equal(whole, other)
    seen = torch.bincount(torch.cat([kept_patches(range(64), step, 0, 20, 0.5) for step in range(8)]).flatten(), minlength=20)
    assert seen.sum() == 8 * 64 * 10 and 200 < int(seen.min()) and int(seen.max()) < 312  # 256 each, 4 standard deviations
    assert kept_patches(range(1), 0, 0, 16, 0.99).shape == (1, 1)


def test_clip_and_its_prompter_see_the_kept_tokens_with_their_positions(tiny_model, pixels):
    kept = kept_patches(range(3), 0, 0, NUM_PATCHES, 0.5)
    tower = tiny_model.vision_model
    with only_patches(tower.embeddings, kept):
        image = tiny_model.encode_image(pixels)
    rows = []
    for tokens, patches in zip(tower.embeddings(pixels), kept.tolist(), strict=True):
        rows.append(tower.encoder(inputs_embeds=tower.pre_layrnorm(tokens[[0, *(1 + p for p in patches)]])[None])[0][0])
    tokens = tower.post_layernorm(torch.stack(rows))
    torch.testing.assert_close(image.tokens, tokens)
    torch.testing.assert_close(image.feat, tiny_model.visual_projection(tokens[:, 0]))
    boxes, index = torch.tensor([[0.1, 0.2, 0.6, 0.9]]).expand(3, 4), torch.arange(3)
    assert tiny_model.embed_boxes(image.tokens, boxes, index).shape == (3, 16)


def test_all_patches_kept_is_the_tower_as_it_is_and_nothing_stays_behind(tiny_model, pixels):
    plain = tiny_model.encode_image(pixels)
    with only_patches(tiny_model.vision_model.embeddings, torch.arange(NUM_PATCHES).expand(3, -1)):
        torch.testing.assert_close(tiny_model.encode_image(pixels).tokens, plain.tokens, rtol=0, atol=0)
    with pytest.raises(ZeroDivisionError), only_patches(tiny_model.vision_model.embeddings, torch.zeros(3, 1).long()):
        _ = 1 / 0
    assert tiny_model.encode_image(pixels).tokens.shape == plain.tokens.shape == (3, 1 + NUM_PATCHES, 32)


def test_siglip_without_a_cls_token(pixels):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    tower = SiglipVisionModel(SiglipVisionConfig(image_size=32, patch_size=8, **sizes)).eval()
    kept = kept_patches(range(3), 0, 0, NUM_PATCHES, 0.5)
    inner = getattr(tower, "vision_model", tower)
    with only_patches(inner.embeddings, kept):
        output = tower(pixels)
    tokens = torch.stack([row[patches] for row, patches in zip(inner.embeddings(pixels), kept, strict=True)])
    tokens = inner.post_layernorm(inner.encoder(inputs_embeds=tokens)[0])
    torch.testing.assert_close(output.last_hidden_state, tokens)
    torch.testing.assert_close(output.pooler_output, inner.head(tokens))
