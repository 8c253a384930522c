_base_ = ['default_runtime.py']

custom_imports = dict(imports=['mmaselect', 'mmaselect.pretraining'])
custom_hooks = [dict(type='EMAHook', momentum=0.002)]
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(by_epoch=False, interval=1000),
)
log_processor = dict(by_epoch=False)
