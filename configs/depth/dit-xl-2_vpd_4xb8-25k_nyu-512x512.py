_base_ = [
    '../_base_/models/vpd_dit-xl-2.py',
    '../_base_/datasets/nyu_512x512.py',
    '../_base_/schedules/depth_25k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]
