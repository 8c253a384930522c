_base_ = [
    '../_base_/models/flux-dev.py',
    '../_base_/datasets/cub_bs32_256.py',
    '../_base_/schedules/fgvc_linear_100e.py',
    '../_base_/selection_recommended.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=200))
