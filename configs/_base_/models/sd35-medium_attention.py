# DifFeed's attention head (arXiv 2311.17921) in the place of pooling: a class token, two blocks, 1024 wide.
_base_ = ['sd35-medium.py']

model = dict(
    neck=[dict(type='AttentionPooling', in_channels=1536)],
    head=dict(in_channels=1024),
)
