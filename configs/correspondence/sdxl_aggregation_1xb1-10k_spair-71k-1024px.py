_base_ = [
    '../_base_/models/matcher_sdxl.py',
    '../_base_/datasets/spair_1024.py',
    '../_base_/schedules/correspondence_10k.py',
    '../_base_/selection_recommended.py',
    '../_base_/correspondence_runtime.py',
]

model = dict(head=dict(type='AggregationHead', in_channels=[1280, 1280, 640, 640]))
