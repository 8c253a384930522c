_base_ = ['vpd_dit.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SD3', pretrained='stabilityai/stable-diffusion-3.5-medium', dtype='bfloat16'),
        block=12,
    ),
    neck=dict(in_channels=1536),
)
