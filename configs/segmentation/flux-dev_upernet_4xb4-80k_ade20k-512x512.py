_base_ = [
    '../_base_/models/upernet_flux-dev.py',
    '../_base_/datasets/ade20k_512x512.py',
    'mmseg::_base_/schedules/schedule_80k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]
