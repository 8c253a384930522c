optim_wrapper = dict(optimizer=dict(type='AdamW', lr=1e-3, weight_decay=0.01), clip_grad=dict(max_norm=1.0))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=100),
    dict(type='CosineAnnealingLR', by_epoch=False, begin=100, end=3000, eta_min=1e-5),
]
train_cfg = dict(by_epoch=False, max_iters=3000)
auto_scale_lr = dict(base_batch_size=64)
