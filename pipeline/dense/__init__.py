"""Images with masks or boxes, for segmentation and detection."""
