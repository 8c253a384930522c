# Thirty street scenes, on the latent model that configs/pretrain/sit-latent-6b_cub-camvid-128px.py trains.
_base_ = [
    '../_base_/models/pixel-ensemble.py',
    '../_base_/datasets/camvid-30_192x256.py',
    '../_base_/schedules/pixels_10k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]

custom_hooks = [*_base_.custom_hooks, dict(type='FeatureCacheHook')]
model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/sit-latent-6b_cub-camvid-128px/export'),
        block=[3, 5],
        component='output',
    ),
    data_preprocessor=dict(seg_pad_val=11),
    decode_head=dict(in_channels=[192, 192], num_classes=11, ignore_index=11, stride=2),
)
train_cfg = dict(max_iters=1000, val_interval=1000)
default_hooks = dict(checkpoint=dict(interval=1000))
