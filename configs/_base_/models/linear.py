# Linear probe on the pooled query, the paper's component (arXiv 2603.25758); batch norm without parameters, as in MAE's
# linear probe (arXiv 2111.06377), because queries have no common scale.
model = dict(
    type='ImageClassifier',
    backbone=dict(type='ASelectDiT', component='query', timestep='auto'),
    neck=[dict(type='GlobalAveragePooling'), dict(type='ClsBatchNormNeck', input_features=None)],
    head=dict(
        type='LinearClsHead',
        in_channels=None,
        num_classes=None,
        loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
        topk=(1,),
    ),
)
