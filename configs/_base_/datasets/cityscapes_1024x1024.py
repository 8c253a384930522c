# mmseg's Cityscapes, where one image that cannot be read does not end a training.
_base_ = ['mmseg::_base_/datasets/cityscapes_1024x1024.py']
train_pipeline = [dict(type='LoadReadableImage'), *_base_.train_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
