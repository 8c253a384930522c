# What docs/en/select.md recommends, on squares from the middle of the images: those of one size share a pass, and those
# of detection data sets have many. Boxes are not read.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='InstanceInformation', views=dict(crop=0.4, mirror=True)),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        pipeline=[
            dict(type='LoadImageFromFile'),
            dict(type='Resize', scale=(1333, 800), keep_ratio=True),
            dict(type='CenterCrop', crop_size=(800, 800), auto_pad=True),
            dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape')),
        ],
    )
]
