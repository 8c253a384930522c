# What docs/en/evidence.md recommends, on squares from the middle of the images: those of one size share a pass, and
# those of detection data sets have many. Boxes are not read.
_base_ = ['selection_recommended.py']

custom_hooks = _base_.custom_hooks
custom_hooks[0].update(
    batch_size='auto',
    pipeline=[
        dict(type='LoadImageFromFile'),
        dict(type='Resize', scale=(1333, 800), keep_ratio=True),
        dict(type='CenterCrop', crop_size=(800, 800), auto_pad=True),
        dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
    ],
)
