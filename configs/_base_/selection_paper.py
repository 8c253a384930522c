# The paper's criterion (arXiv 2603.25758); sigma is ours, the paper's is not public.
custom_hooks = [
    dict(
        type='TimestepSelectionHook',
        criterion=dict(type='HighFrequencyRatio', sigma=0.25),
        timesteps=dict(start=0, stop=1000, num=21),
        num_images=256,
    )
]
