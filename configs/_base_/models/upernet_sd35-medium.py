_base_ = ['upernet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SD3', pretrained='stabilityai/stable-diffusion-3.5-medium', dtype='bfloat16'),
        block=[12, 12, 12, 12],
    ),
    neck=dict(embed_dim=1536),
    decode_head=dict(in_channels=[1536, 1536, 1536, 1536]),
    auxiliary_head=dict(in_channels=1536),
)
