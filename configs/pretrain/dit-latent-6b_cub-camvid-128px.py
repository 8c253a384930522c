# python tools/pretrain.py configs/pretrain/dit-latent-6b_cub-camvid-128px.py
# The network of sit-latent-6b and its data; the noise is DDPM's, and the noise is predicted.
_base_ = ['sit-latent-6b_cub-camvid-128px.py']

model = dict(type='EpsilonPrediction')
export_dir = 'work_dirs/dit-latent-6b_cub-camvid-128px/export'
