_base_ = ['mmdet::_base_/default_runtime.py']

custom_imports = dict(imports=['mmaselect'])
# A number that nobody can reproduce is worth nothing on a leaderboard.
randomness = dict(seed=0)
# Seconds after which a run ends whose ranks wait for one that is gone.
env_cfg = dict(dist_cfg=dict(timeout=1800))
