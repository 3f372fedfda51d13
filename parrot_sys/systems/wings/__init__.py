"""Wings (arXiv 2406.03496): visual and textual learners beside each layer's attention."""
