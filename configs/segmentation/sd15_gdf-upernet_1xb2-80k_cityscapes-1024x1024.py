_base_ = [
    '../_base_/models/upernet_gdf-sd15.py',
    '../_base_/datasets/cityscapes_1024x1024.py',
    '../_base_/schedules/gdf_80k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]

data_preprocessor = dict(size=(1024, 1024))
model = dict(
    data_preprocessor=data_preprocessor,
    backbone=dict(diffusion=dict(prompt='a street scene with lanes, buildings, lights, cars and people')),
    decode_head=dict(num_classes=19),
    auxiliary_head=dict(num_classes=19),
    test_cfg=dict(crop_size=(1024, 1024), stride=(1024, 1024)),
)
train_dataloader = dict(batch_size=2)
