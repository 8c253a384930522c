_base_ = ['mmpretrain::_base_/default_runtime.py']

custom_imports = dict(imports=['mmaselect'])
default_hooks = dict(checkpoint=dict(max_keep_ckpts=2))
# A number that nobody can reproduce is worth nothing on a leaderboard.
randomness = dict(seed=0, deterministic=False, _delete_=True)
