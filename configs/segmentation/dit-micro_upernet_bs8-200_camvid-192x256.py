# UPerNet on a DiT small enough for a CPU: the one that configs/pretrain/dit-micro_cub-32px.py trains.
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
        diffusion=dict(type='SiT', pretrained='work_dirs/dit-micro_cub-32px/export', latent='pixels'),
        block=[2, 2, 2, 2],
    ),
    # The map has the stride of a pyramid's first level already: 4 pixels.
    neck=dict(embed_dim=144, rescales=[2, 1, 0.5, 0.25]),
    decode_head=dict(in_channels=[144, 144, 144, 144], channels=64, num_classes=11, ignore_index=11),
    auxiliary_head=dict(in_channels=144, channels=32, num_classes=11, ignore_index=11),
)
