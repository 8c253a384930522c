# Six blocks, 192 wide, on 64x64 pixels: the model that configs/pretrain/dit-mini_cub-64px.py trains.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/dit-mini_cub-64px/export', latent='pixels'),
        block=2,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=192)],
    head=dict(in_channels=192, num_classes=200),
)
