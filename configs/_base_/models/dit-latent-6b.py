# The same by DDPM, predicting the noise: what configs/pretrain/dit-latent-6b_cub-camvid-128px.py trains.
_base_ = ['sit-latent-6b.py']

model = dict(
    backbone=dict(diffusion=dict(type='DiT', pretrained='work_dirs/dit-latent-6b_cub-camvid-128px/export')),
)
