_base_ = ['upernet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(
            type='SiT', pretrained='checkpoints/SiT-XL-2-256', vae='stabilityai/sd-vae-ft-ema', dtype='bfloat16'
        ),
        block=[14, 14, 14, 14],
    ),
    neck=dict(embed_dim=1152),
    decode_head=dict(in_channels=[1152, 1152, 1152, 1152]),
    auxiliary_head=dict(in_channels=1152),
)
