# GDF's: AdamW, a poly schedule to 1e-4 without a warm-up.
_base_ = ['mmseg::_base_/schedules/schedule_80k.py']

optim_wrapper = dict(optimizer=dict(_delete_=True, type='AdamW', lr=1.6e-4, weight_decay=1e-3))
