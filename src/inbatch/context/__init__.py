"""Where samples meet before the loss: plug-ins that no method knows of."""
