# python tools/pretrain.py configs/pretrain/sit-latent-12b_cub-camvid-128px.py
# The network of sit-latent-6b, twice as deep; nothing else differs.
_base_ = ['sit-latent-6b_cub-camvid-128px.py']

model = dict(transformer=dict(num_layers=12))
export_dir = 'work_dirs/sit-latent-12b_cub-camvid-128px/export'
