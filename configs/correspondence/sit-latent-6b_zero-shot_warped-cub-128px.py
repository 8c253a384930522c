# Needs the model that configs/pretrain/sit-latent-6b_cub-camvid-128px.py trains.
# Selects its timestep when it is tested.
_base_ = [
    '../_base_/models/matcher.py',
    '../_base_/datasets/warped_128.py',
    '../_base_/schedules/correspondence_10k.py',
    '../_base_/selection_recommended.py',
    '../_base_/correspondence_runtime.py',
]

model = dict(
    backbone=dict(
        diffusion=dict(type='SiT', pretrained='work_dirs/sit-latent-6b_cub-camvid-128px/export'),
        block=5,
        component='output',
    ),
    resolution=64,
)
