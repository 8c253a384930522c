# Views for dense tasks: every cell stays where it is, and is compared with the same cell of other images.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='InstanceInformation', views=dict(crop=1.0, colour=0.4, blur=1.0), pool=4),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        batch_size=64,
    )
]
