# mmdet's 1x schedule at the rate of its RetinaNet.
_base_ = ['mmdet::_base_/schedules/schedule_1x.py']

optim_wrapper = dict(optimizer=dict(lr=0.01))
