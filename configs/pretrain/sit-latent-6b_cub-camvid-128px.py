# python tools/pretrain.py configs/pretrain/sit-latent-6b_cub-camvid-128px.py
_base_ = [
    '../_base_/models/flow-matching.py',
    '../_base_/datasets/latents_cub-camvid_bs32_128.py',
    '../_base_/schedules/flow_matching_3k.py',
    '../_base_/pretrain_runtime.py',
]

model = dict(
    # Latents come standardised.
    data_preprocessor=dict(_delete_=True, type='mmengine.BaseDataPreprocessor'),
    transformer=dict(
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=32,
        out_channels=32,
        sample_size=16,
        patch_size=2,
    ),
)
export_dir = 'work_dirs/sit-latent-6b_cub-camvid-128px/export'
default_hooks = dict(checkpoint=dict(interval=250))
