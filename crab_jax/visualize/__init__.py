"""Drawing of masks, boxes, timelines, charts and HTML, from arrays and tasks alone."""
