_base_ = [
    '../_base_/models/upernet_sd35-medium.py',
    '../_base_/datasets/ade20k_512x512.py',
    'mmseg::_base_/schedules/schedule_160k.py',
    '../_base_/selection_paper.py',
    '../_base_/segmentation_runtime.py',
]
