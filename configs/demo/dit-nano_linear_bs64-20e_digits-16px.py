_base_ = [
    '../_base_/models/dit-nano.py',
    '../_base_/datasets/digits_bs64_16.py',
    '../_base_/schedules/linear_adamw_20e.py',
    '../_base_/selection_noise_consistent.py',
    '../_base_/default_runtime.py',
]

model = dict(
    backbone=dict(mean=[127.5, 127.5, 127.5], std=[127.5, 127.5, 127.5]),
    head=dict(num_classes=10),
)
