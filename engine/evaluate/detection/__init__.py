"""Object detection by Faster R-CNN."""
