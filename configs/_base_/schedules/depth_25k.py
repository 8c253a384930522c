# mmseg's for VPD; the best checkpoint is the one of least error.
_base_ = ['mmseg::_base_/schedules/schedule_25k.py']

default_hooks = dict(checkpoint=dict(save_best='rmse', rule='less', max_keep_ckpts=1))
