_base_ = ['mmseg::_base_/default_runtime.py']

custom_imports = dict(imports=['mmaselect'])
# A number that nobody can reproduce is worth nothing on a leaderboard.
randomness = dict(seed=0)
