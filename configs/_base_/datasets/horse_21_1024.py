# The same, stretched to 1024x1024.
_base_ = ['horse_21_512.py']

label = dict(type='LoadLabelMap', num_classes=21)
resize = dict(type='Resize', scale=(1024, 1024), keep_ratio=False)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    label,
    dict(type='IgnoreRareClasses', least=20),
    resize,
    dict(type='PackSegInputs'),
]
test_pipeline = [dict(type='LoadImageFromFile'), resize, label, dict(type='PackSegInputs')]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
