# The same with twelve blocks: what configs/pretrain/sit-latent-12b_cub-camvid-128px.py trains.
_base_ = ['sit-latent-6b.py']

model = dict(
    backbone=dict(
        diffusion=dict(pretrained='work_dirs/sit-latent-12b_cub-camvid-128px/export'),
        block=9,
    ),
)
