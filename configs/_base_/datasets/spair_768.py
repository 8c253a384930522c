# SPair-71k, stretched to 768x768.
_base_ = ['spair_512.py']

pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(768, 768), keep_ratio=False),
    dict(type='PackImage'),
]
train_dataloader = dict(dataset=dict(pipeline=pipeline))
val_dataloader = dict(dataset=dict(pipeline=pipeline))
test_dataloader = dict(dataset=dict(pipeline=pipeline))
