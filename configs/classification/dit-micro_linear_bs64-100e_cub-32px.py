# Needs the model that configs/pretrain/dit-micro_cub-32px.py trains.
_base_ = [
    '../_base_/models/linear.py',
    '../_base_/datasets/cub_bs64_32.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_noise_consistent.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/dit-micro_cub-32px/export', latent='pixels'),
        block=2,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=144)],
    head=dict(in_channels=144, num_classes=200),
)
