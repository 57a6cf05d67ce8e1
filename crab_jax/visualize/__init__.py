"""Drawing: masks, boxes, time lines, charts and HTML, from arrays and tasks alone."""
