# What docs/en/evidence.md recommends. Crops and mirror images are views of a photograph; give what suits your images.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='InstanceInformation', views=dict(crop=0.4, mirror=True)),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        batch_size=64,
    )
]
