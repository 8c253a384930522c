_base_ = ['upernet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='PixArt', pretrained='PixArt-alpha/PixArt-Sigma-XL-2-512-MS', dtype='bfloat16'),
        block=[14, 14, 14, 14],
    ),
    neck=dict(embed_dim=1152),
    decode_head=dict(in_channels=[1152, 1152, 1152, 1152]),
    auxiliary_head=dict(in_channels=1152),
)
