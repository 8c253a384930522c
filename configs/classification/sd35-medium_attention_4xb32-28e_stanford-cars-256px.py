_base_ = [
    '../_base_/models/sd35-medium_attention.py',
    '../_base_/datasets/stanford_cars_bs32_256.py',
    '../_base_/schedules/fgvc_attention_28e.py',
    '../_base_/selection_paper.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=196))
