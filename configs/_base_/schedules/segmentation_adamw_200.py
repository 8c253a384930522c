# mmseg's schedule, short enough for a CPU.
_base_ = ['mmseg::_base_/schedules/schedule_20k.py']

optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.01))
param_scheduler = [dict(type='PolyLR', eta_min=1e-5, power=0.9, begin=0, end=200, by_epoch=False)]
train_cfg = dict(max_iters=200, val_interval=100)
default_hooks = dict(logger=dict(interval=20), checkpoint=dict(interval=100))
