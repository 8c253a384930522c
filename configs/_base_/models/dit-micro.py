# Six blocks, 144 wide, on 32x32 pixels: the model that configs/pretrain/dit-micro_cub-32px.py trains.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/dit-micro_cub-32px/export', latent='pixels'),
        block=2,
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=144)],
    head=dict(in_channels=144, num_classes=200),
)
