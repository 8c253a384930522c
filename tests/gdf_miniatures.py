"""GDF's models in miniature: every level and activation is there, a fortieth as wide, on pixels."""

from __future__ import annotations

from mmaselect.diffusion.families.unet import SD15, SD21, XL

SMALL = dict(sample_size=32, in_channels=3, out_channels=3, norm_num_groups=4, cross_attention_dim=12)
ARCHS = {
    'sd15': dict(SD15, **{**SMALL, 'block_out_channels': (8, 16, 32, 32), 'attention_head_dim': 2}),
    'sd21': dict(SD21, **{**SMALL, 'block_out_channels': (8, 16, 32, 32), 'attention_head_dim': 2}),
    'sdxl': dict(
        XL,
        **{
            **SMALL, 'block_out_channels': (8, 16, 32), 'attention_head_dim': 2, 'addition_time_embed_dim': 8,
            'projection_class_embeddings_input_dim': 6 * 8 + 10,
        },
    ),
    'flux': dict(
        num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=12,
        pooled_projection_dim=10, axes_dims_rope=(4, 6, 6), in_channels=12, guidance_embeds=True,
    ),
    'sit': dict(num_layers=3, num_attention_heads=2, attention_head_dim=8, in_channels=3, sample_size=32, patch_size=4),
}  # fmt: skip
#: Channels of the true models, and of these.
WIDTHS = {1280: 32, 640: 16, 320: 8, 192: 16, 144: 16}


def shrink_backbone(backbone, name):
    """Puts a miniature into a backbone's config; what is read of it stays."""
    kind = next(key for key in ARCHS if name.startswith(key))
    backbone.diffusion = dict(type=backbone.diffusion.type, arch=ARCHS[kind], latent='pixels')
    if kind == 'flux':
        backbone.block = 2
    if kind == 'sit':
        backbone.block = [2] * len(backbone.block) if isinstance(backbone.block, list) else 2


def shrink_channels(values):
    return [WIDTHS[value] if value in WIDTHS else 2 * WIDTHS[value // 2] for value in values]
