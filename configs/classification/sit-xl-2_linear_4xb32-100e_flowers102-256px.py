_base_ = [
    '../_base_/models/sit-xl-2.py',
    '../_base_/datasets/flowers102_bs32_256.py',
    '../_base_/schedules/fgvc_linear_100e.py',
    '../_base_/selection_paper.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=102))
