# The trained head, on photographs that a short training on a CPU can learn from.
_base_ = ['sit-latent-6b_zero-shot_warped-cub-128px.py']

model = dict(head=dict(type='AggregationHead', in_channels=[192], size=16))
train_cfg = dict(max_iters=1000, val_interval=1000)
