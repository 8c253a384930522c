# The outputs of the upsamplers, which were read before GDF.
_base_ = ['sd15_zero-shot_spair-71k-512px.py']

model = dict(backbone=dict(taps='legacy-sd15'))
