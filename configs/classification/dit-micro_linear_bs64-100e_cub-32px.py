# Needs the model that configs/pretrain/dit-micro_cub-32px.py trains.
_base_ = [
    '../_base_/models/dit-micro.py',
    '../_base_/datasets/cub_bs64_32.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_recommended.py',
    '../_base_/default_runtime.py',
]
