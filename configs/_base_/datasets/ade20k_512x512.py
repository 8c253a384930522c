# mmseg's ADE20K, where one image that cannot be read does not end a training of 160,000 iterations.
_base_ = ['mmseg::_base_/datasets/ade20k.py']
train_pipeline = [dict(type='LoadReadableImage'), *_base_.train_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
