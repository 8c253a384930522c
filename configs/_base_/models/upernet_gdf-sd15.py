# UPerNet on GDF's four activations of Stable Diffusion 1.5 (arXiv 2410.03558): strides 8, 16 and 32.
# Two things in GDF's own code are taken for mistakes, and are not inherited: it pads label maps with 1, a class, where
# 255 means none; and its UPerNet pools the finest level, because it gets the levels the other way round.
_base_ = ['upernet_dit.py']

data_preprocessor = dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5])
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(
        diffusion=dict(type='UNet', pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5', dtype='float16'),
        taps='gdf-sd15',
        timestep=50,
    ),
    neck=dict(
        _delete_=True,
        type='ActivationAggregation',
        in_channels=[1280, 1280, 640, 320],
        strides=[32, 32, 16, 8],
        norm_cfg=_base_.norm_cfg,
    ),
    decode_head=dict(
        in_channels=[320, 640, 2560],
        in_index=[0, 1, 2],
        pool_scales=(1, 2, 3),
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce', use_sigmoid=False, loss_weight=1.0),
            dict(type='LovaszLoss', loss_name='loss_lovasz', reduction='none', loss_weight=1.0),
        ],
    ),
    auxiliary_head=dict(in_channels=640, in_index=1),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(512, 512)),
)
