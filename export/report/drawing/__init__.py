"""What the page is drawn with: HTML, SVG, colours, and figures as people read them."""
