# Needs the model that configs/pretrain/dit-mini_cub-64px.py trains.
_base_ = [
    '../_base_/models/dit-mini.py',
    '../_base_/datasets/cub_bs64_64.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_recommended.py',
    '../_base_/default_runtime.py',
]
