# What the six fine-grained data sets have in common. Size and crops are DifFeed's (arXiv 2311.17921, released code):
# 256x256 out of a short side of 256 to 320 pixels for training (here 288, its middle), of 256 for testing.
data_preprocessor = dict(num_classes=None, mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], to_rgb=True)

train_pipeline = [
    dict(type='LoadReadableImage'),
    dict(type='ResizeEdge', scale=288, edge='short', interpolation='bicubic', backend='pillow'),
    dict(type='RandomCrop', crop_size=256),
    dict(type='RandomFlip', prob=0.5, direction='horizontal'),
    dict(type='PackInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='ResizeEdge', scale=256, edge='short', interpolation='bicubic', backend='pillow'),
    dict(type='CenterCrop', crop_size=256),
    dict(type='PackInputs'),
]
# 4 GPUs of 32 images, as in DifFeed's released command line.
train_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(pipeline=train_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=True),
)
val_dataloader = dict(
    batch_size=32,
    num_workers=4,
    dataset=dict(pipeline=test_pipeline),
    sampler=dict(type='DefaultSampler', shuffle=False),
)
val_evaluator = dict(type='Accuracy', topk=(1,))

test_dataloader = val_dataloader
test_evaluator = val_evaluator
