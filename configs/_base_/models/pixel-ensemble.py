# Ten small networks that read pixels one by one and vote (DDPM-Segmentation, GDF). Features are computed once.
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5] * 3,
        std=[127.5] * 3,
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
        size_divisor=1,
    ),
    backbone=dict(type='ASelectDiT', timestep='auto', cache=dict(dir='work_dirs/features')),
    decode_head=dict(type='PixelEnsembleHead', in_channels=None, num_classes=None, members=10, pixels=1024),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
