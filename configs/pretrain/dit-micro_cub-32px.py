# python tools/pretrain.py configs/pretrain/dit-micro_cub-32px.py
_base_ = [
    '../_base_/models/flow-matching.py',
    '../_base_/datasets/cub_bs64_32.py',
    '../_base_/schedules/flow_matching_3k.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    transformer=dict(
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=36,
        in_channels=3,
        out_channels=3,
        sample_size=32,
        patch_size=4,
    ),
)
export_dir = 'work_dirs/dit-micro_cub-32px/export'
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
train_dataloader = dict(sampler=dict(type='InfiniteSampler'))
