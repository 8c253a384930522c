# What VPD reads of Stable Diffusion 1.5, the last of each upward level, of a frozen U-Net under an empty prompt.
_base_ = ['vpd_dit.py']

model = dict(
    backbone=dict(
        _delete_=True,
        type='ASelectDiT',
        timestep='auto',
        diffusion=dict(type='UNet', pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5', dtype='float16'),
        taps=[
            'up-level0-repeat2-res-out',
            'up-level1-repeat2-vit-out',
            'up-level2-repeat2-vit-out',
            'up-level3-repeat2-vit-out',
        ],
    ),
    # It puts the finest first, as the head reads them.
    neck=dict(
        _delete_=True,
        type='ActivationAggregation',
        in_channels=[1280, 1280, 640, 320],
        strides=[64, 32, 16, 8],
        norm_cfg=dict(type='SyncBN'),
    ),
    decode_head=dict(in_channels=[320, 640, 1280, 1280]),
)
