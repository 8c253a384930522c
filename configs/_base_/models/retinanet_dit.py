# mmdet's RetinaNet on the pyramid that ViTDet makes of one block (arXiv 2203.16527). From cells of 16 pixels come the
# strides that its anchors are made for: 8, 16, 32, 64, 128.
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']

model = dict(
    # Images of another size get another fixed noise.
    backbone=dict(_delete_=True, type='ASelectDiT', component='query', timestep='auto', noise='fresh'),
    neck=dict(_delete_=True, type='SimplePyramid', in_channels=None, out_channels=256, scales=[2, 1, 0.5], num_outs=5),
)
