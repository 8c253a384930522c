# The demo's model on turned and shifted digits: needs no download. Selects its timestep when it is tested.
_base_ = [
    '../_base_/models/matcher.py',
    '../_base_/datasets/warped_128.py',
    '../_base_/schedules/correspondence_10k.py',
    '../_base_/correspondence_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='mmaselect://dit-nano_digits', latent='pixels'),
        block=2,
        component='output',
    ),
    resolution=16,
)
# A digit that is mirrored is another sign, or none.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='InstanceInformation', views=dict(crop=0.7, rotate=15)),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        batch_size=64,
    )
]
pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=(16, 16), interpolation='bicubic'),
    dict(type='PackImage'),
]
train_dataloader = dict(dataset=dict(data_root='data/digits/train', pipeline=pipeline))
val_dataloader = dict(dataset=dict(data_root='data/digits/test', num_points=9, pipeline=pipeline))
test_dataloader = val_dataloader
