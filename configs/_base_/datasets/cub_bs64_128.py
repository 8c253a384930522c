# mmpretrain's CUB at 128x128, whole pictures, as the latent models of configs/pretrain saw them.
_base_ = ['mmpretrain::_base_/datasets/cub_bs8_384.py']

train_pipeline = [
    dict(type='LoadReadableImage'),
    dict(type='Resize', scale=(128, 128), interpolation='area'),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), interpolation='area'),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, num_workers=0, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, num_workers=0, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
