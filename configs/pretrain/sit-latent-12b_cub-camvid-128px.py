# python tools/pretrain.py configs/pretrain/sit-latent-12b_cub-camvid-128px.py
_base_ = ['sit-latent-6b_cub-camvid-128px.py']

model = dict(transformer=dict(num_layers=12))
# Twice as deep, twice as long.
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=6000, eta_min=1e-5),
]
train_cfg = dict(max_iters=6000)
export_dir = 'work_dirs/sit-latent-12b_cub-camvid-128px/export'
