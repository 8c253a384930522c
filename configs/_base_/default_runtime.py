_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['mmaselect'])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
# A number that nobody can reproduce is worth nothing on a leaderboard.
randomness = dict(seed=0, deterministic=False, _delete_=True)
# Seconds after which a run ends whose ranks wait for one that is gone.
env_cfg = dict(dist_cfg=dict(timeout=1800))
