# The depth head of mmseg's VPD (arXiv 2303.02153), which reads strides 8, 16, 32 and 64, on a pyramid of one block.
model = dict(
    type='DepthEstimator',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[127.5, 127.5, 127.5],
        std=[127.5, 127.5, 127.5],
        bgr_to_rgb=True,
        pad_val=0,
        # A depth of 0 is none: the loss leaves it out.
        seg_pad_val=0,
        size=(512, 512),
    ),
    backbone=dict(type='ASelectDiT', component='query', timestep='auto'),
    neck=dict(type='SimplePyramid', in_channels=None, out_channels=256, scales=[2, 1, 0.5, 0.25]),
    decode_head=dict(type='VPDDepthHead', in_channels=[256, 256, 256, 256], max_depth=10),
    train_cfg=dict(),
    test_cfg=dict(mode='slide_flip', crop_size=(512, 512), stride=(128, 128)),
)
