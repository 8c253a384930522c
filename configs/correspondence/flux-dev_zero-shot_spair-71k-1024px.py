# DiTF's: what block 28 of FLUX.1-dev's attention reads, after its AdaLN, without massive channels (arXiv 2505.18584).
_base_ = [
    '../_base_/models/matcher.py',
    '../_base_/datasets/spair_1024.py',
    '../_base_/schedules/correspondence_10k.py',
    '../_base_/selection_recommended.py',
    '../_base_/correspondence_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='Flux', pretrained='black-forest-labs/FLUX.1-dev', dtype='bfloat16'),
        block=28,
        component='modulated',
        timestep=260,
    ),
    discard=30.0,
    resolution=1024,
)
