# Latents of birds and of crops of street scenes, 32 channels of 16x16 from 128x128 pixels, in the space of FLUX.2.
# The encoder: taef2 of https://github.com/madebyollin/taesd
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='LatentDataset',
        vae='checkpoints/taef2',
        cache='work_dirs/latents/cub-camvid-128px.safetensors',
        datasets=[
            dict(
                type='CUB',
                data_root='data/CUB_200_2011',
                split='train',
                pipeline=[
                    dict(type='LoadReadableImage'),
                    dict(type='Resize', scale=(128, 128), interpolation='area'),
                    dict(type='PackInputs'),
                ],
            ),
            # 96 pictures of 480x360, 14 crops of each, of a tenth to seven tenths of the area.
            dict(
                type='RepeatDataset',
                times=14,
                dataset=dict(
                    type='CustomDataset',
                    data_root='data/camvid',
                    data_prefix='img_dir/train',
                    with_label=False,
                    pipeline=[
                        dict(type='LoadReadableImage'),
                        dict(type='RandomResizedCrop', scale=128, crop_ratio_range=(0.1, 0.7), interpolation='area'),
                        dict(type='PackInputs'),
                    ],
                ),
            ),
        ],
    ),
)
