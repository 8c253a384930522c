# mmdet's COCO, where one image that cannot be read does not end a training.
_base_ = ['mmdet::_base_/datasets/coco_detection.py']
train_pipeline = [dict(type='LoadReadableImage'), *_base_.train_pipeline[1:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
