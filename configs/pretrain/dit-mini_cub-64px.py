# python tools/pretrain.py configs/pretrain/dit-mini_cub-64px.py
_base_ = [
    '../_base_/models/flow-matching.py',
    '../_base_/datasets/cub_bs64_64.py',
    '../_base_/schedules/flow_matching_3k.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    transformer=dict(
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        sample_size=64,
        patch_size=4,
    ),
    # A third faster on CPUs with bfloat16 arithmetic.
    autocast='bfloat16',
)
export_dir = 'work_dirs/dit-mini_cub-64px/export'
val_cfg = val_dataloader = val_evaluator = None
test_cfg = test_dataloader = test_evaluator = None
train_dataloader = dict(batch_size=32, sampler=dict(type='InfiniteSampler'))
