# UPerNet on GDF's four activations of Stable Diffusion 1.5 (arXiv 2410.03558): strides 8, 16 and 32.
# Two things in GDF's own code are taken for mistakes, and are not inherited: it pads label maps with 1, a class, where
# 255 means none; and its UPerNet pools the finest level, because it gets the levels the other way round.
norm_cfg = dict(type='SyncBN', requires_grad=True)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size=(512, 512),
    ),
    backbone=dict(
        type='ASelectDiT',
        diffusion=dict(type='UNet', pretrained='stable-diffusion-v1-5/stable-diffusion-v1-5', dtype='float16'),
        taps='gdf-sd15',
        timestep=50,
    ),
    neck=dict(
        type='ActivationAggregation',
        in_channels=[1280, 1280, 640, 320],
        strides=[32, 32, 16, 8],
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(
        type='UPerHead',
        in_channels=[320, 640, 2560],
        in_index=[0, 1, 2],
        pool_scales=(1, 2, 3),
        channels=512,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=[
            dict(type='CrossEntropyLoss', loss_name='loss_ce', use_sigmoid=False, loss_weight=1.0),
            dict(type='LovaszLoss', loss_name='loss_lovasz', reduction='none', loss_weight=1.0),
        ],
    ),
    auxiliary_head=dict(
        type='FCNHead',
        in_channels=640,
        in_index=1,
        channels=256,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=150,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type='CrossEntropyLoss', use_sigmoid=False, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode='slide', crop_size=(512, 512), stride=(512, 512)),
)
