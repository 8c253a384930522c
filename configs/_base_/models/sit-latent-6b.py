# Six blocks, 192 wide, on latents of 128x128 pixels: what configs/pretrain/sit-latent-6b_cub-camvid-128px.py trains.
_base_ = ['linear.py']

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/sit-latent-6b_cub-camvid-128px/export'),
        block=5,
        component='output',
    ),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=192)],
    head=dict(in_channels=192, num_classes=200),
)
