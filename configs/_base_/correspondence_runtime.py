default_scope = 'mmengine'
custom_imports = dict(imports=['mmaselect'])
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=50),
    checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=2000, max_keep_ckpts=2),
)
log_processor = dict(by_epoch=False)
visualizer = dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')])
# A number that nobody can reproduce is worth nothing on a leaderboard.
randomness = dict(seed=0)
# Seconds after which a run ends whose ranks wait for one that is gone.
env_cfg = dict(dist_cfg=dict(timeout=1800))
