"""Messages between lead and workers, and the sockets that carry them."""
