# The 30 + 30 images of horse_21, stretched to 1024x1024; a class of under 20 pixels in a training image is none.
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
train_dataloader = dict(
    batch_size=10,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='DatasetDDPM', data_root='data/horse_21', split='train', pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='DatasetDDPM', data_root='data/horse_21', split='test', pipeline=test_pipeline, test_mode=True),
)
test_dataloader = val_dataloader

val_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'])
test_evaluator = val_evaluator
