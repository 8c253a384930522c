_base_ = ['upernet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='Flux', pretrained='black-forest-labs/FLUX.1-dev', dtype='bfloat16'),
        block=[28, 28, 28, 28],
    ),
    neck=dict(embed_dim=3072),
    decode_head=dict(in_channels=[3072, 3072, 3072, 3072]),
    auxiliary_head=dict(in_channels=3072),
)
