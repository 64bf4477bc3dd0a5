"""Dataset builders: VOC 2012, COCO 2014, image tags and generated shapes, commands and functions."""
