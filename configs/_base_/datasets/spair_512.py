# SPair-71k, stretched to 512x512. The whole test split, and the validation split for the end of a training.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(512, 512), keep_ratio=False),
    dict(type='PackImage'),
]
dataset = dict(type='SPair71k', data_root='data/SPair-71k', pipeline=pipeline)
train_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(**dataset, split='trn'),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='val', test_mode=True),
)
test_dataloader = dict(
    batch_size=1,
    num_workers=2,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(**dataset, split='test', test_mode=True),
)
val_evaluator = dict(type='PCK')
test_evaluator = val_evaluator
