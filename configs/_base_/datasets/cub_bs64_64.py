# mmpretrain's CUB at 64x64, for models small enough to train on a CPU.
_base_ = ['mmpretrain::_base_/datasets/cub_bs8_384.py']

train_pipeline = [
    dict(type='LoadReadableImage'),
    dict(type='Resize', scale=(72, 72), interpolation='area'),
    dict(type='RandomCrop', crop_size=64),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(72, 72), interpolation='area'),
    dict(type='CenterCrop', crop_size=64),
    dict(type='PackInputs'),
]
train_dataloader = dict(batch_size=64, num_workers=0, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(batch_size=64, num_workers=0, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
