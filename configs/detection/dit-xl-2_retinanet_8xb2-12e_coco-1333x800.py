_base_ = [
    '../_base_/models/retinanet_dit-xl-2.py',
    '../_base_/datasets/coco_1333x800.py',
    '../_base_/schedules/retinanet_12e.py',
    '../_base_/selection_detection.py',
    '../_base_/detection_runtime.py',
]
