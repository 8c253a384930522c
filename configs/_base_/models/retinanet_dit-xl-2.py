_base_ = ['retinanet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='DiT', pretrained='facebook/DiT-XL-2-256', dtype='bfloat16'),
        block=14,
    ),
    neck=dict(in_channels=1152),
)
