_base_ = [
    '../_base_/models/upernet_gdf-sd15.py',
    '../_base_/datasets/ade20k_512x512.py',
    '../_base_/schedules/gdf_80k.py',
    '../_base_/selection_cells.py',
    '../_base_/segmentation_runtime.py',
]

model = dict(backbone=dict(diffusion=dict(prompt='a realistic photo, taken indoors, outdoors or in nature')))
train_dataloader = dict(batch_size=2)
