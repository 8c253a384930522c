# mmseg's NYU with two changes. Its colour transforms are Albumentations', whose newer versions draw random numbers that
# no seed reaches: mmseg's own take their place. And it pastes strips of the depth map into the image (RandomDepthMix),
# millimetres into 8 bits: a frozen model has never seen such a thing.
_base_ = ['mmseg::_base_/datasets/nyu_512x512.py']
train_pipeline = [
    dict(type='LoadReadableImage'),
    dict(type='LoadDepthAnnotation', depth_rescale_factor=1e-3),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomResize', scale=(768, 512), ratio_range=(0.8, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=(512, 512)),
    dict(type='PhotoMetricDistortion'),
    _base_.train_pipeline[-1],
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
