"""The script that trains object detectors: its data, augmentation and predictions."""
