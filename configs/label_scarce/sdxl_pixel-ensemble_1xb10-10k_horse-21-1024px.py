_base_ = [
    '../_base_/models/pixel-ensemble_sdxl.py',
    '../_base_/datasets/horse_21_1024.py',
    '../_base_/schedules/pixels_10k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]

custom_hooks = [*_base_.custom_hooks, dict(type='FeatureCacheHook')]
