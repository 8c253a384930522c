# Needs the model that configs/pretrain/dit-mini_cub-64px.py trains.
_base_ = [
    '../_base_/models/linear.py',
    '../_base_/datasets/cub_bs64_64.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_noise_consistent.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/dit-mini_cub-64px/export', latent='pixels'),
        block=2,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=192)],
    head=dict(in_channels=192, num_classes=200),
)
