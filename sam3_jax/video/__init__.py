"""Videos in and out: frames of files, folders, arrays and streams; overlays and results."""
