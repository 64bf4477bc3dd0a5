"""The mean-IoU metric; the folder also loads with `evaluate.load("<its path>", num_classes=K)`."""
