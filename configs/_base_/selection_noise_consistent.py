# On small models trained here plain HFR follows the injected noise, so its noise-consistent form decides; the report
# shows what plain HFR would have chosen.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='NoiseConsistentHFR', sigma=0.25, centred=True),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
        batch_size=64,
    )
]
