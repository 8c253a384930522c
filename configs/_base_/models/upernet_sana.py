_base_ = ['upernet_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='Sana', pretrained='Efficient-Large-Model/Sana_1600M_512px_diffusers', dtype='bfloat16'),
        block=[10, 10, 10, 10],
    ),
    neck=dict(embed_dim=2240),
    decode_head=dict(in_channels=[2240, 2240, 2240, 2240]),
    auxiliary_head=dict(in_channels=2240),
)
