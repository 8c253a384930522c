_base_ = [
    '../_base_/models/sd35-medium.py',
    'mmpretrain::_base_/datasets/cub_bs8_384.py',
    'mmpretrain::_base_/schedules/cub_bs64.py',
    '../_base_/selection_paper.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=200))
