"""Every parallel layout against one process: `microtron certify`."""
