# Needs the model that configs/pretrain/dit-latent-6b_cub-camvid-128px.py trains.
_base_ = [
    '../_base_/models/dit-latent-6b.py',
    '../_base_/datasets/cub_bs64_128.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_recommended.py',
    '../_base_/default_runtime.py',
]
