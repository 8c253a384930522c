_base_ = [
    '../_base_/models/dit-nano.py',
    '../_base_/datasets/digits_bs64_16.py',
    '../_base_/schedules/linear_adamw_20e.py',
    '../_base_/default_runtime.py',
]

model = dict(head=dict(num_classes=10))
# A digit that is mirrored is another sign, or none: its views are turned a little instead.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='InstanceInformation', views=dict(crop=0.7, rotate=15)),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        batch_size=64,
    )
]
