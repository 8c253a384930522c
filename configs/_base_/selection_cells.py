# What docs/en/evidence.md recommends where cells have labels, as in segmentation: the score is that of 4x4 cells.
_base_ = ['selection_recommended.py']

custom_hooks = _base_.custom_hooks
custom_hooks[0]['criterion']['pool'] = 4
