# Photographs and themselves under known homographies, at 128x128: where every point must be found is known exactly.
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(128, 128), keep_ratio=False, interpolation='area'),
    dict(type='PackImage'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='WarpedPairs', data_root='data/CUB_200_2011/images', pipeline=pipeline),
)
val_dataloader = dict(
    batch_size=8,
    num_workers=0,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type='WarpedPairs', data_root='data/CUB_200_2011/images', seed=1, indices=200, pipeline=pipeline, test_mode=True
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type='PCK', thresholds=(0.05, 0.1), by=('img',))
test_evaluator = val_evaluator
