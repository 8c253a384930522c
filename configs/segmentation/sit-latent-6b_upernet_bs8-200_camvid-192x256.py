# UPerNet on the latent model that configs/pretrain/sit-latent-6b_cub-camvid-128px.py trains.
_base_ = [
    '../_base_/models/upernet_dit.py',
    '../_base_/datasets/camvid_192x256.py',
    '../_base_/schedules/segmentation_adamw_200.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(
    data_preprocessor=dict(size=(128, 128), seg_pad_val=11),
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/sit-latent-6b_cub-camvid-128px/export'),
        block=[5, 5, 5, 5],
        component='output',
    ),
    neck=dict(embed_dim=192),
    decode_head=dict(in_channels=[192, 192, 192, 192], channels=64, num_classes=11, ignore_index=11),
    auxiliary_head=dict(in_channels=192, channels=32, num_classes=11, ignore_index=11),
)
